"""Quantized Mixture-of-Experts for plain PyTorch: `moe_ops.quantize_(model, "fp8")`, then `torch.compile(model)`."""

_LAZY = {"load_quantized": ".checkpoints.load"}  # name -> the module that has it, imported when it is asked for


def __getattr__(name: str) -> Any:
    if name == "MoeOpsConfig":  # transformers is imported when it is asked for
        return _huggingface.config_class()
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
