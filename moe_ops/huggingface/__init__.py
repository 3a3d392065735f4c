"""transformers' side of the package: `MoeOpsConfig` for from_pretrained, save and reload, the experts implementation.

`import moe_ops` calls `install`, which imports nothing: what is registered with transformers is registered when its own
module is imported, or at once if it is there already. Everything else here may import transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .attach import attach
from .watch import after_import, before

if TYPE_CHECKING:
    from .config import MoeOpsConfig
    from .reload import reload_

__all__ = ["MoeOpsConfig", "attach", "install", "reload_"]
OLDEST = (5, 17)


def install() -> None:
    """Register the quantizer and the experts implementation with transformers, now or when it is imported."""
    after_import("transformers.quantizers.auto", _register_quantizer)
    after_import("transformers.integrations.moe", _register_experts)
    after_import("transformers.modeling_utils", _watch_models)
    after_import("transformers.trainer", _watch_trainer)


def too_old() -> str | None:
    """Why the installed transformers cannot be used here, None if it can."""
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found >= OLDEST:
        return None
    return (
        f"MoeOpsConfig needs transformers {'.'.join(map(str, OLDEST))} or later, this is {transformers.__version__}:"
        " load the model in float, then quantize_ it"
    )


def _register_quantizer() -> None:
    if too_old():
        return
    module = importlib.import_module(".quantizer", __name__)
    if hasattr(module, "register"):  # else it is being imported, and registers at its end
        module.register()


def _register_experts() -> None:
    if too_old():
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from .experts import NAME, experts_forward

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _watch_models() -> None:
    if too_old():
        return
    from transformers.modeling_utils import PreTrainedModel

    from .experts import check_set

    # transformers takes any registered name, for models that will not use it too.
    before(PreTrainedModel, "set_experts_implementation", check_set)
    # Modules that were quantized by themselves, below the model: codes without a config would be read as weights.
    before(PreTrainedModel, "save_pretrained", lambda model, *args, **kwargs: attach(model))


def _watch_trainer() -> None:
    if too_old():
        return
    from transformers.trainer import Trainer

    from .training import check, check_batch, check_loss

    before(Trainer, "train", lambda trainer, *args, **kwargs: check(trainer.model))
    before(Trainer, "training_step", check_batch, check_loss)


def config_class() -> Any:
    """MoeOpsConfig; where transformers is absent or too old, a class that says so when it is called."""
    try:
        reason = too_old()
    except ImportError as e:
        reason = f"MoeOpsConfig needs transformers ({e})"
    if reason is None:
        from .config import MoeOpsConfig

        return MoeOpsConfig

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError(reason)

    return type("MoeOpsConfig", (), {"__init__": __init__, "__doc__": reason})


def __getattr__(name: str) -> Any:
    if name == "MoeOpsConfig":
        return config_class()
    if name == "reload_":
        from .reload import reload_

        return reload_
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
