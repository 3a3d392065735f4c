"""What Trainer is about to train, of a quantized model: said before it begins, for codes never change.

And what it would train on without a word: an empty batch, a loss that is not a number.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..streaming import streams


def check(model: nn.Module) -> None:
    """Raises ValueError where nothing would be trained, or codes were asked for a gradient; warns of what stays.

    A model without quantized modules is none of our business, and with adapters nobody expects their base to change.
    """
    mine = [(name, m) for name, m in streams(model) if m.trained is None]
    if not mine:
        return
    codes = [f"{name}.{key}" for name, m in mine if m.quantization.quantized for key in m.codes()]
    parameters = dict(model.named_parameters())
    asked = [name for name in codes if name in parameters and parameters[name].requires_grad]
    if asked:
        others = f" and {len(asked) - 1} more" if len(asked) > 1 else ""
        raise ValueError(
            f"{asked[0]}{others} cannot be trained: codes and scales have no gradient. Train an adapter (PEFT), what is"
            " float, or the float model"
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


def check_batch(trainer: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> None:
    """Raises ValueError for an empty batch, of which models say no more than that a reshape failed."""
    if not _ours(trainer, inputs):
        return
    empty = [key for key, t in inputs.items() if isinstance(t, Tensor) and not t.numel()]
    if empty:
        raise ValueError(f"empty batch: {empty[0]} is {tuple(inputs[empty[0]].shape)}")


def check_loss(trainer: Any, loss: Any) -> None:
    """Raises ValueError for a loss that is not finite: the step would make everything that is trained NaN.

    Only where Trainer looks at the loss of every step too, to leave such losses out of what it logs: a GPU waits once.
    fp16 scales such steps away by itself.
    """
    args = trainer.args
    if not args.logging_nan_inf_filter or args.fp16 or not isinstance(loss, Tensor) or not _ours(trainer, {}):
        return
    if not bool(torch.isfinite(loss).all()):
        raise ValueError(
            f"the loss of step {trainer.state.global_step + 1} is {loss.mean().item()}: the step would make all that is"
            " trained NaN. Labels that are all ignored (-100), too high a learning rate, or an overflow do this"
        )


def _ours(trainer: Any, inputs: Any) -> bool:
    """Trains a model with quantized modules, with batches of names and tensors."""
    return isinstance(inputs, Mapping) and any(True for _ in streams(trainer.model))
