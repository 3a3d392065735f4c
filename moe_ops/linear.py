"""QuantizedLinear: an nn.Linear whose weight is stored in a format.

N output features, K input features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends.base import check_backend, resolve
from .formats import FORMATS, Format
from .ops.library import call
from .storage import PARTS, Layout, QuantizedModule, autocast, carry_over, wrong_dtype

_STATE = ("format", "backend", "float_dtype", "trainable", "trained")


class QuantizedLinear(QuantizedModule, nn.Linear):
    """y = x W^T + bias. A subclass of nn.Linear, because adapters (PEFT) are put on nothing else."""

    trainable: bool

    @classmethod
    def from_float(
        cls, linear: nn.Linear, format: str | Format = "fp8", *, backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> QuantizedLinear:  # fmt: skip
        """Quantized stand-in for `linear`; shares its bias and hooks. ValueError where the format cannot take it."""
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantizedModule):
            raise ValueError(f"from_float takes a float nn.Linear, got {type(linear).__name__}")
        check_backend(backend or "auto")
        fmt = FORMATS.resolve(format)
        if reason := cannot_take(linear, fmt) or wrong_dtype(linear.weight):
            raise ValueError(reason)
        new = carry_over(linear, cls.__new__(cls))
        weight = linear.weight
        new.format, new.backend, new.float_dtype, new.trainable = fmt.name, backend, weight.dtype, weight.requires_grad
        new._put("weight", fmt.weight.quantize(weight.detach().to(device)))
        if linear.bias is not None and device is not None:
            new._parameters["bias"] = nn.Parameter(linear.bias.detach().to(device), linear.bias.requires_grad)
        return new

    def weight_names(self) -> tuple[str, ...]:
        return ("weight",)

    def layouts(self) -> dict[str, Layout]:
        return {"weight": Layout(None, 1, self.out_features, self.in_features)}

    def float_shape(self, name: str) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def canonical(self, name: str, weight: Tensor) -> Tensor:
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in x's dtype, under autocast in its."""
        self.check_frozen()
        backend, invariant = resolve(self.backend)
        w = self.operands("weight", backend)
        return call(
            torch.ops.moe_ops.linear.default, autocast(x), w.codes, w.scale, w.global_scale, w.zero_point, self.bias,
            self.static_scale(x), w.master, format=self.computes.name, grad_format=self.grad_format, backend=backend,
            batch_invariant=invariant,
        )  # fmt: skip

    def static_scale(self, x: Tensor) -> Tensor | None:
        """(): the scale of activations that is known before they are quantized; None: x tells."""
        return self.part("weight", "input_scale")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K): the values of the stored codes."""
        return self.quantization.weight.dequantize(self._get("weight"), dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format!r}, backend={self.backend or 'auto'!r}"


def cannot_take(linear: nn.Linear, fmt: Format) -> str | None:
    """Why the weight cannot be stored in the format, None if it can."""
    n, k = linear.out_features, linear.in_features
    if reason := fmt.check(n, k):
        return f"weight {(n, k)} does not fit format {fmt.name!r}: {reason}"
    return None


def restore(module: QuantizedLinear) -> nn.Linear:
    """The nn.Linear that `from_float` was given, with the values of the stored codes."""
    new = carry_over(module, nn.Linear.__new__(nn.Linear))
    new._parameters["weight"] = nn.Parameter(module.dequantize(module.float_dtype), requires_grad=module.trainable)
    for part in PARTS:
        new._parameters.pop(f"weight_{part}", None)
    for name in _STATE:
        new.__dict__.pop(name, None)
    return new
