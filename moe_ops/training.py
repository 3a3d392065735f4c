"""Training through quantized products: float master weights, quantized anew at every forward.

    moe_ops.training.prepare_training_(model, "fp8")     before the optimizer is made
    ...                                                  any training loop
    moe_ops.training.convert_(model)                     masters become codes; or dequantize_: they stay as they are
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from . import experts, linear
from .backends.base import check_backend
from .formats import FORMATS, Format, quantize_weight
from .ops.training import multiplies_gradients
from .quantize import check_plan, store, tell
from .rules import parse
from .storage import QuantizedModule, Training
from .streaming import Stream, streams
from .summary import remember_left
from .targets import Target, check_not_compiled, plan

_FLOAT = "bf16"  # weights as they are


@torch.no_grad()
def prepare_training_(
    model: nn.Module, format: str | Format | Mapping[str, str | Format | None] = "fp8", *,
    gradients: str | None = "auto", ignore: str | Iterable[str] = (), backend: str | None = None,
) -> nn.Module:  # fmt: skip
    """Replace experts and Linears, in place, by modules that train their float weights through quantized products.

        y = q(x) q(W)^T,    dx = q(g) q(W),    dW = q(g)^T q(x)

    in fp32 sums, every operand quantized along the sum: W for y and once more for dx, scales computed on the device.
    `format`, `ignore`: which modules, in which format, as `quantize_` takes them. `gradients`: the format of the second
    and third product; "auto" is the module's own where that is of 8-bit floats on both sides, else None. None: they are
    products of floats with what the codes of y stand for, straight-through, which is quantization-aware training.
    For dW groups lie along the rows of an expert; a scale of whole rows is one for 128.

    Weights keep their names, dtype and requires_grad; those that the model stores transposed or interleaved are brought
    to (E, N, K), gate rows first, as new parameters: make the optimizer afterwards. Raises ValueError as `quantize_`
    does, and for formats in which gradients are not multiplied, before anything is changed.
    """
    if backend is not None:
        check_backend(backend)
    if gradients not in (None, "auto") and not multiplies_gradients(FORMATS[gradients]):
        allowed = ", ".join(name for name in FORMATS if multiplies_gradients(FORMATS[name]))
        raise ValueError(f"gradients are not multiplied in {gradients!r}; allowed: {allowed}, None (floats), 'auto'")
    found = plan(model, parse(format, ignore), strict=True)
    check_plan(found)
    remember_left(model, found.left)
    try:
        for target in found.targets:
            assert target.format is not None
            if target.format.quantized:
                store(target, _prepared(target, gradients, backend))
    finally:
        tell(model)
    return model


def _prepared(target: Target, gradients: str | None, backend: str | None) -> QuantizedModule:
    m, fmt = target.module, target.format
    assert fmt is not None
    new: QuantizedModule
    if target.spec is None:
        assert isinstance(m, nn.Linear)
        new = linear.QuantizedLinear.from_float(m, _FLOAT, backend=backend)
        trains = m.weight.requires_grad
    else:
        new, trains = experts.swap(m, target.spec, FORMATS[_FLOAT], backend), target.spec.trainable
    for name in new.weight_names():
        old, made = m._parameters.get(name), new._parameters[name]
        assert made is not None
        if old is not None and old.shape == made.shape and new.as_stored(name):
            new._parameters[name] = old  # itself, for optimizers that hold it
        else:
            made.requires_grad_(trains)
    own = fmt.name if multiplies_gradients(fmt) else None
    new.trained = Training(fmt.name, own if gradients == "auto" else gradients)
    return new


@torch.no_grad()
def convert_(model: nn.Module) -> nn.Module:
    """Replace the masters of `prepare_training_`, in place by the codes that its forward multiplied. Returns the model.

    From then on modules are those of `quantize_`. Raises ValueError for a compiled model, and one without masters.
    """
    check_not_compiled(model)
    mine = [m for m in model.modules() if isinstance(m, QuantizedModule) and m.trained is not None]
    if not mine:
        raise ValueError("no module of the model is trained: prepare_training_ comes first")
    try:
        for m in mine:
            assert m.trained is not None
            codec = m.computes.weight
            for name, layout in m.layouts().items():
                w = getattr(m, name).detach()
                m._put(name, codec.quantize(w) if layout.experts is None else quantize_weight(codec, w, layout.shards))
            m.format, m.trained = m.trained.format, None
    finally:
        tell(model)
    return model


@torch.no_grad()
def requantize_(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Quantize new float weights into the storage that the model has: graphs stay valid. Returns the model.

    weights: by the names and in the layouts of the float model, such as its state_dict(): those of quantized modules
    are taken, one expert at a time; others, and modules that it does not name, stay. Raises ValueError for shapes that
    do not fit, non-finite values, and weights none of which is quantized here, before anything is changed.
    """
    found = [
        (module, name, key, weights[full])
        for name, module in streams(model) for key in module.weight_names()
        if (full := f"{name}.{key}" if name else key) in weights
    ]  # fmt: skip
    if not found:
        raise ValueError("none of these is the weight of a quantized module: " + ", ".join([*weights][:5]))
    problems = []
    for module, name, key, w in found:
        want = tuple(module.float_shape(key))
        if tuple(w.shape) != want or not w.is_floating_point() or w.element_size() < 2:
            problems.append(f"{name}.{key} must be floats {want}, got {w.dtype} {tuple(w.shape)}")
        elif not all(bool(torch.isfinite(part).all()) for part in (w if w.ndim == 3 else [w])):
            problems.append(f"{name}.{key} has non-finite values")
    if problems:
        raise ValueError("\n".join(["cannot do this, the model is unchanged:", *problems]))
    for module, name, key, w in found:
        stream, device = Stream(module, name), getattr(module, key).device
        if module.layouts()[key].experts is None:
            stream.take(key, 0, w.to(device))
        else:
            for e, one in enumerate(w[: module.layouts()[key].experts]):
                stream.take(key, e, one.to(device))
    return model
