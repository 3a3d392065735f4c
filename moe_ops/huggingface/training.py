"""What Trainer is about to train, of a quantized model: said before it begins, for codes never change."""

from __future__ import annotations

import warnings

from torch import nn

from ..streaming import streams


def check(model: nn.Module) -> None:
    """Raises ValueError where nothing would be trained, or codes were asked for a gradient; warns of what stays as it is.

    A model without quantized modules is none of our business, and with adapters nobody expects their base to change.
    """
    mine = list(streams(model))
    if not mine:
        return
    codes = [f"{name}.{key}" for name, m in mine if m.quantization.quantized for key in m.codes()]
    parameters = dict(model.named_parameters())
    asked = [name for name in codes if name in parameters and parameters[name].requires_grad]
    if asked:
        raise ValueError(
            f"{asked[0]}{f' and {len(asked) - 1} more' * (len(asked) > 1)} cannot be trained: they hold codes and scales,"
            " which have no gradient. Train an adapter (PEFT), what is float, or the float model"
        )
    trained = [p for p in parameters.values() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"nothing to train: the weights of {len(mine)} modules are quantized, and no other parameter requires a"
            " gradient. Add an adapter (PEFT's get_peft_model), or requires_grad_(True) to what is float"
        )
    if not any("base_layer" in m._modules for m in model.modules()):
        total = sum(p.numel() for p in trained)
        warnings.warn(
            f"the weights of {len(mine)} quantized modules stay as they are: {len(trained)} float parameters"
            f" ({total:,} numbers) are trained. An adapter (PEFT) trains the rest too",
            stacklevel=3,
        )
