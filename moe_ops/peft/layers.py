"""PEFT's LoRA layers around quantized modules: its own, but for what touches the weight.

E experts, S shards, N rows and K columns of a stored matrix, R sorted rows, r rank, s scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..activation import deinterleave
from ..experts import QuantizedExperts
from ..linear import QuantizedLinear
from ..storage import QuantizedModule
from . import merge

FORMAT = "bf16"  # the factors as they are, in the type of the rows
_INITS = (True, False, "gaussian", "eva")  # those that do not read the weight
_SAVED = "_moe_ops_saved"


def _merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """W = quantize(dequantize(W) + s B A), in the same storage; a warning says what that cost.

    Values that are not finite are refused with and without `safe_merge`, and leave the codes as they were.
    """
    names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
    if not names:
        return
    base, weight = self.get_base_layer(), self.parameter_name
    deltas = [self._delta(name) for name in names]
    now = merge.save(base, weight)
    label = (self.kwargs.get("target_name") or "").removesuffix(f".{weight}")
    cost = merge.add_(base, weight, lambda e: sum(d(e) for d in deltas), now, label)
    self.__dict__.setdefault(_SAVED, now)  # of before the first, where several are merged one after another
    self.merged_adapters.extend(names)
    merge.tell(cost)


def _unmerge(self: Any) -> None:
    """The codes of before the merge, bit for bit. Raises ValueError where they are not known."""
    if not self.merged_adapters:
        return
    if _SAVED not in self.__dict__:
        raise ValueError(
            f"{', '.join(self.merged_adapters)}: merged before the weight was quantized, so that there are no codes"
            " of before: quantize the model without the adapter, then load the adapter"
        )
    merge.restore(self.get_base_layer(), self.__dict__[_SAVED])
    del self.__dict__[_SAVED]
    self.merged_adapters.clear()


class Linear(lora.Linear):
    """y = x W^T + s (x A^T) B^T with W of codes. PEFT's layer: forward and files are its own."""

    parameter_name = "weight"
    merge, unmerge = _merge, _unmerge

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        _check(config, "a quantized Linear")
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def _delta(self, adapter: str) -> Any:
        """A function that gives what an adapter adds, (N, K)."""
        if self.lora_bias[adapter]:
            raise ValueError("lora_bias=True cannot be merged into a quantized Linear: unload the adapter instead")
        return lambda e: self.get_delta_weight(adapter)


class ParamWrapper(lora.ParamWrapper):
    """LoRA on one projection of quantized experts, per expert: y = x W^T + s (x A^T) B^T, W of codes.

    Shapes, names and order of A (r * E, in) and B (out, r * E) are those that PEFT gives the float model's parameter.
    Nothing of the size of W is made: rows go through A and B, in the place where they go through W. (The class has
    PEFT's name, by which PEFT finds it again.)
    """

    merge, unmerge = _merge, _unmerge

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: Any, **kwargs: Any
    ) -> None:
        experts = _experts_of(base_layer)
        if parameter_name not in experts.weight_names():
            raise ValueError(
                f"{parameter_name} of quantized experts takes no adapter: {' and '.join(experts.weight_names())} do"
            )
        _check(config, "quantized experts")
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)
        self._join()

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        _check(config, "quantized experts")
        super().update_layer(adapter_name, *args, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name: str, config: Any) -> None:
        """Of the rows: PEFT refuses it where it adds to the weight, for then there are no rows."""
        if config.lora_dropout > 0:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def _join(self) -> None:
        experts = _experts_of(self)
        experts.adapters = {**(experts.adapters or {}), self.parameter_name: self}

    def get_param(self) -> Tensor:
        """What PEFT asks of the parameter (shape, type, device), without its values: (E, out, in), no storage."""
        experts = _experts_of(self)
        codes, shape = getattr(experts, self.parameter_name), experts.float_shape(self.parameter_name)
        if experts.spec.moved:  # the float model has no such parameter
            _, shards, n, k = experts.layouts()[self.parameter_name]
            shape = torch.Size((codes.shape[0], shards * n, k))
        elif _said_transposed(experts):
            shape = torch.Size((shape[0], shape[2], shape[1]))
        return torch.full((), torch.nan, dtype=experts.float_dtype, device=codes.device).expand(shape)

    def factors(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (E, r, K) and B (E, S*N, r) of the stored matrices, gate rows first."""
        experts = _experts_of(self)
        spec, name = experts.spec, self.parameter_name
        a, b = self.lora_A[adapter].weight.to(dtype), self.lora_B[adapter].weight.to(dtype)
        a = a.unflatten(0, (self.num_experts, -1))  # (E, r, in)
        b = b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)  # (E, out, r)
        if not spec.moved and spec.transposes(name) != _said_transposed(experts):  # PEFT took inputs for outputs
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        if not spec.moved and name == spec.up and spec.interleaved:
            b = deinterleave(b.transpose(1, 2)).transpose(1, 2)
        stored = getattr(experts, name).shape[0]  # the float model may have rows for experts that compute nothing
        return a[:stored].contiguous(), b[:stored].contiguous()

    def applies(self) -> bool:
        if self.disable_adapters or self.merged_adapters:
            return False
        return any(name in self.lora_A for name in self.active_adapters)

    def only_here(self) -> str | None:
        if _experts_of(self).spec.moved:
            return f"the float experts have no {self.parameter_name}"
        dropped = [name for name, layer in self.lora_dropout.items() if isinstance(layer, nn.Dropout)]
        return f"PEFT knows no lora_dropout on float experts ({', '.join(dropped)})" if dropped else None

    def added(self, x: Tensor, offsets: Tensor, options: Mapping[str, Any], *, rows_in: Tensor | None = None,
              top_k: int = 1, **rows: Any) -> Tensor:  # fmt: skip
        """The sum of s (x A^T) B^T over the active adapters, arguments as of moe_ops::grouped_mm."""
        total = None
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            a, b = self.factors(name, x.dtype)
            h = _product(self.lora_dropout[name](x), a, offsets, options, rows_in=rows_in, top_k=top_k)  # (R, r)
            y = _product(h * self.scaling[name], b, offsets, options, **rows)  # (R, S*N)
            total = y if total is None else total + y
        assert total is not None
        return total

    def _delta(self, adapter: str) -> Any:
        """A function e -> what an adapter adds to expert e, canonical (S*N, K) in fp32."""
        a, b = self.factors(adapter, torch.float32)
        return lambda e: (b[e] @ a[e]) * self.scaling[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the experts return: they ask `applies` and `added` themselves."""
        self._check_forward_args(x, *args, **kwargs)
        self._unmerge_if_disabled()
        return self.base_layer(x, *args, **kwargs)

    def routed(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of QuantizedExperts, for blocks that were routed anew."""
        self._unmerge_if_disabled()
        return self.base_layer.routed(*args, **kwargs)

    def _unmerge_if_disabled(self) -> None:
        if self.disable_adapters and self.merged_adapters:
            self.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        experts = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        experts.adapters = None
        return experts


def dispatch(target: nn.Module, adapter_name: str, *, config: Any, parameter_name: str | None = None,
             **kwargs: Any) -> nn.Module | None:  # fmt: skip
    """Our layer for a quantized module, None for PEFT to choose. ValueError for what such a module cannot have."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, QuantizedExperts):
        if parameter_name is None:
            names = [f"{kwargs.get('target_name') or 'experts'}.{name}" for name in base.weight_names()]
            raise ValueError(f"experts are no Linear: name their projections, LoraConfig(target_parameters={names})")
        return ParamWrapper(target, adapter_name, parameter_name, config=config, **kwargs)
    if not isinstance(base, QuantizedLinear):
        return None
    if parameter_name is not None:
        raise ValueError(f"{kwargs.get('target_name')}: a quantized Linear is adapted by target_modules")
    return Linear(target, adapter_name, config=config, **kwargs)


# PEFT's class -> ours, and what has to be below it
_TWINS: dict[Any, tuple[Any, Any]] = {
    lora.Linear: (Linear, QuantizedLinear),
    lora.ParamWrapper: (ParamWrapper, QuantizedExperts),
}


def adopt_layer(layer: Any) -> None:
    """Bring the class of a LoRA layer in line with the module that it is around now."""
    for theirs, (ours, kind) in _TWINS.items():
        if type(layer) is theirs and isinstance(layer.get_base_layer(), kind):
            layer.__class__ = ours
        elif type(layer) is ours and not isinstance(layer.get_base_layer(), QuantizedModule):
            layer.__dict__.pop(_SAVED, None)
            layer.__class__ = theirs
        else:
            continue
        if theirs is lora.ParamWrapper:  # how it reads `get_param`
            layer._did_swap_in_out_features = not getattr(layer.get_base_layer(), "is_transposed", False)
        if type(layer) is ParamWrapper:
            layer._join()


def _experts_of(layer: Any) -> QuantizedExperts:
    while not isinstance(layer, QuantizedExperts):
        layer = layer.base_layer
    return layer


def _said_transposed(experts: QuantizedExperts) -> bool:
    """What PEFT reads off the float module: flags, where it has some."""
    return dict(experts.spec.flags).get("is_transposed", False)


def _product(x: Tensor, w: Tensor, offsets: Tensor, options: Mapping[str, Any], **rows: Any) -> Tensor:
    return torch.ops.moe_ops.grouped_mm(x, w, offsets, format=FORMAT, **options, **rows)


def _without_dropout(config: Any) -> Any:
    import copy

    plain = copy.copy(config)
    plain.lora_dropout = 0.0
    return plain


def _check(config: Any, what: str) -> None:
    """ValueError for what would take codes for weights."""
    variants = [key for key in ("use_dora", "kasa_config", "velora_config") if getattr(config, key, None)]
    if config.init_lora_weights not in _INITS:
        variants.append(f"init_lora_weights={config.init_lora_weights!r}")
    if variants:
        raise ValueError(
            f"{', '.join(variants)}: reads or changes the weight, and the weight of {what} is codes: use plain LoRA"
            f" (init_lora_weights in {_INITS})"
        )
