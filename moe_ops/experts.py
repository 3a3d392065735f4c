"""QuantizedExperts: the experts of one MoE block, stored in a format, called as the module that they replace.

T tokens, A experts per token, R = T * A slots, E experts, H hidden size, I intermediate size, S shards (gate and up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import routing
from .activation import Gate, apply_gate, interleave, resolve_activation
from .adapters import FLAGS, ExpertsSpec
from .backends.base import Operand, check_backend, resolve
from .backends.reference import values
from .formats import FORMATS, Format, QuantizedTensor, dequantize_weight, empty_weight, write_matrix
from .ops.library import call
from .storage import PARTS, Layout, QuantizedModule, autocast, carry_over, wrong_dtype

_STATE = ("format", "backend", "float_dtype", "spec", "adapters", "trained")


class Adapter(Protocol):
    """Adds to one projection, beside its weight: low-rank products of the same rows (peft/layers.py)."""

    def applies(self) -> bool:
        """It adds something now."""

    def only_here(self) -> str | None:
        """Why it cannot be on the float module, None if it can."""

    def added(self, x: Tensor, offsets: Tensor, options: Mapping[str, Any], **rows: Any) -> Tensor:
        """Arguments as of moe_ops::grouped_mm, `options` its backend -> what is added to the product, same shape."""


class QuantizedExperts(QuantizedModule):
    """out[t] = sum of topk_weights[t, a] * down(act(gate_up(hidden[t]))), with the weights of expert topk_ids[t, a].

    Ids outside 0..num_experts-1 contribute zero; `num_experts` is read at each call. `spec` is the layout of the float
    module; what is stored is canonical: gate_up_proj (E, 2I, H), gate rows first, or up_proj (E, I, H) without a gate,
    and down_proj (E, H, I). `adapters` add to the projections that they are named by.
    """

    spec: ExpertsSpec
    adapters: Mapping[str, Adapter] | None = None
    original_class: type[nn.Module] | None = None
    __repr__ = nn.Module.__repr__  # lists and dicts have their own, of children that are gone

    @classmethod
    def from_float(
        cls, gate_up_proj: Tensor, down_proj: Tensor, format: str | Format = "fp8", *,
        gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
        gated: bool = True, interleaved: bool = False, transposed: bool = False, alpha: float | None = None,
        beta: float | None = None, limit: float | None = None, backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> QuantizedExperts:  # fmt: skip
        """gate_up_proj (E, 2I, H), or (E, I, H) when not gated; down_proj (E, H, I); biases (E, 2I) and (E, H).

        transposed: (E, H, 2I) and (E, I, H). interleaved: rows (and bias) of gate and up alternate. Raises ValueError
        for shapes that do not fit, an unknown format or activation, and dimensions that the format cannot take.
        """
        check_backend(backend or "auto")
        name, alpha, beta, limit = resolve_activation(activation, alpha, beta, limit)
        gate = Gate(activation=name, gated=gated, interleaved=interleaved, alpha=alpha, beta=beta, limit=limit)
        e, rows, h = _rows_first(gate_up_proj, transposed)
        e2, h2, i = _rows_first(down_proj, transposed)
        if (e, h) != (e2, h2) or rows != i * (2 if gated else 1):
            raise ValueError(
                f"gate_up_proj {tuple(gate_up_proj.shape)} and down_proj {tuple(down_proj.shape)} do not fit together"
                f" (gated={gated}, transposed={transposed})"
            )
        if (gate_up_bias is None) != (down_bias is None):
            raise ValueError("give both biases or neither")
        for key, bias, n in (("gate_up_bias", gate_up_bias, rows), ("down_bias", down_bias, h)):
            if bias is not None and tuple(bias.shape) != (e, n):
                raise ValueError(f"{key} must be {(e, n)}, got {tuple(bias.shape)}")
        spec = ExpertsSpec(
            num_experts=e, hidden_size=h, intermediate_size=i, up="gate_up_proj" if gated else "up_proj", gated=gated,
            transposed=transposed, interleaved=interleaved and gated, has_bias=gate_up_bias is not None, gate=gate,
        )  # fmt: skip
        new = cls()
        new._parameters |= {spec.up: nn.Parameter(gate_up_proj.detach()), spec.down: nn.Parameter(down_proj.detach())}
        for key, bias in ((f"{spec.up}_bias", gate_up_bias), (f"{spec.down}_bias", down_bias)):
            if bias is not None:
                new._parameters[key] = nn.Parameter(bias.detach())
        new.__dict__["num_experts"] = e
        return _fill(new, spec, FORMATS.resolve(format), backend, device)

    def weight_names(self) -> tuple[str, ...]:
        spec = self.spec
        return (spec.up, spec.down) if spec.down else (spec.up,)

    def layouts(self) -> dict[str, Layout]:
        return {name: Layout(self.spec.num_experts, shards, n, k) for name, shards, n, k in self.spec.matrices}

    def float_shape(self, name: str) -> torch.Size:
        experts, shards, n, k = self.layouts()[name]
        assert experts is not None
        if name == self.spec.up:
            experts += self.spec.identities  # rows that nothing reads
        return self.spec.original(name, torch.empty(experts, shards * n, k, device="meta")).shape

    def canonical(self, name: str, weight: Tensor) -> Tensor:
        return self.spec.canonical(name, weight)

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden (T, H), topk_ids and topk_weights (T, A) -> (T, H) in its dtype. Any leading dims for T."""
        spec, top_k = self.spec, topk_ids.shape[-1]
        if hidden.shape[-1] != spec.hidden_size:
            raise ValueError(f"these experts take rows of {spec.hidden_size}, got {tuple(hidden.shape)}")
        lead = hidden.shape[:-1]
        if topk_ids.shape != topk_weights.shape or topk_ids.shape[:-1] not in (lead, (lead.numel(),)):
            raise ValueError(
                f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be"
                f" {tuple(lead)} + (experts per token,)"
            )
        x = hidden if hidden.ndim == 2 else hidden.reshape(-1, spec.hidden_size)  # (T, H)
        ids, weights = (t if t.ndim == 2 else t.reshape(x.shape[0], top_k) for t in (topk_ids, topk_weights))  # (T, A)
        out = self.routed(x, ids, weights)
        return out if hidden.ndim == 2 else out.view(hidden.shape)

    def routed(self, x: Tensor, ids: Tensor, weights: Tensor, on_input: bool = False) -> Tensor:
        """x (T, H), ids and weights (T, A) -> (T, H). `on_input`: the weights multiply x, not the result.

        Under autocast experts compute in its type, and give x's all the same, as those of the models do.
        """
        self.check_frozen()
        spec, rows = self.spec, autocast(x)
        num_experts: Any = getattr(self, "num_experts", spec.num_experts)
        stored = getattr(self, spec.up).shape[0]
        local = torch.where((ids >= 0) & (ids < num_experts), ids, -1) if num_experts != stored else ids
        drops = self.training and (spec.dropout > 0 or spec.row_dropout > 0)
        adapted = bool(self.adapters) and any(self._adapter(name) is not None for name in self.weight_names())
        if spec.row_dropout and not self.training:
            weights = weights * (1.0 - spec.row_dropout)
        if spec.gate is not None and spec.post_norm is None and not drops and not adapted and self.as_one_op():
            out = self._fused(rows, local, weights, on_input)
        elif on_input:
            out = self._weighed(rows, local, weights)
        else:
            out = self._unfused(rows, local, weights)
        if not spec.identities:
            return out if out.dtype == x.dtype else out.to(x.dtype)
        same = (ids >= spec.num_experts) & (ids < spec.num_experts + spec.identities)  # (T, A)
        share = torch.where(same, weights.float(), 0.0).sum(-1, keepdim=True)  # (T, 1)
        return (out.float() + x.float() * share).to(x.dtype)

    def as_one_op(self) -> bool:
        """Nothing has to be done between the two projections."""
        return True

    def static_scale(self, name: str, x: Tensor, offsets: Tensor, rows: Mapping[str, Any]) -> Tensor | None:
        """(E,): the scale of the activations of a projection that is known before it runs; None: x tells."""
        return self.part(name, "input_scale")

    def _fused(self, x: Tensor, ids: Tensor, weights: Tensor, on_input: bool) -> Tensor:
        gate = self.spec.gate
        assert gate is not None
        backend, invariant = resolve(self.backend)
        up, down = (self.operands(name, backend) for name in self.weight_names())
        biases = [self._parameters.get(f"{name}_bias") for name in self.weight_names()]
        return call(
            torch.ops.moe_ops.experts.default, x, ids, weights, up.codes, down.codes, up.scale, down.scale,
            up.global_scale, down.global_scale, up.zero_point, down.zero_point, *biases, up.input_scale,
            down.input_scale, up.master, down.master,
            format=self.computes.name, grad_format=self.grad_format, activation=gate.activation, gated=gate.gated,
            alpha=gate.alpha, beta=gate.beta, limit=gate.limit, router_weight_on_input=on_input, backend=backend,
            batch_invariant=invariant,
        )  # fmt: skip

    def _weighed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`_unfused` of rows that were multiplied by their weights before: every slot is a token of its own."""
        rows = (x[:, None].float() * weights[..., None].float()).to(x.dtype)  # (T, A, H)
        out = self._unfused(rows.flatten(0, 1), ids.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
        return out.view(rows.shape).float().sum(1).to(x.dtype)

    def _unfused(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The same in parts: the module's own gate, on columns in its own order, and its post norm run between."""
        spec, num_experts, top_k = self.spec, getattr(self, self.spec.up).shape[0], ids.shape[1]
        backend, _ = resolve(self.backend)
        up, down = self.weight_names()
        if not top_k:  # nothing to combine
            return torch.zeros_like(x)
        order, offsets = torch.ops.moe_ops.sort_by_expert(ids, num_experts, backend=backend)
        known = spec.gate if self._adapter(up) is None else None  # else what is added to comes before it
        h = self._project(x, up, offsets, gate=known, rows_in=order, top_k=top_k)  # (R, I or 2I) sorted
        if spec.gate is not None and known is None:
            h = apply_gate(replace(spec.gate, interleaved=False), h)
        elif spec.gate is None:
            h = interleave(h) if spec.interleaved else h
            own: Any = spec.own_gate or (self._apply_gate if spec.gated else self.act_fn)
            h = own(h).to(x.dtype)  # (R, I)
        h = nn.functional.dropout(h, spec.dropout, self.training)
        w = weights.reshape(-1).float()  # (R,) in slot order
        if spec.post_norm is None:
            rows = self._project(h, down, offsets, rows_out=order, row_weights=w)  # (R, H) in slot order
        else:
            norm: Any = getattr(self, spec.post_norm)
            rows = norm(self._project(h, down, offsets, rows_out=order))
            kept = ((ids >= 0) & (ids < num_experts)).reshape(-1, 1)  # the norm may move dropped rows off zero
            rows = torch.where(kept, rows.float() * w[:, None], 0.0).to(x.dtype)
        rows = nn.functional.dropout(rows, spec.row_dropout, self.training)
        return torch.ops.moe_ops.combine(rows, top_k, backend=backend)

    def _project(self, x: Tensor, name: str, offsets: Tensor, *, gate: Gate | None = None, **rows: Any) -> Tensor:
        """One grouped product of rows sorted by expert, with bias, and the activation where it is known."""
        backend, invariant = resolve(self.backend)
        out_dtype, input_scale, adapter = x.dtype, self.static_scale(name, x, offsets, rows), self._adapter(name)
        added = None
        if adapter is not None:
            assert gate is None  # it comes after the sum
            added = adapter.added(x, offsets, {"backend": backend, "batch_invariant": invariant}, **rows)
        fmt = self.computes.name
        if input_scale is not None and (codec := self.quantization.activation) is not None:
            if "rows_in" in rows:
                x = torch.ops.moe_ops.permute(x, rows.pop("rows_in"), rows.pop("top_k"))
            owner = routing.experts_of_rows(offsets, x.shape[0]).clamp(max=input_scale.shape[0] - 1)  # (R,)
            static = input_scale[owner][:, None]  # (R, 1)
            codes, scale, whole = torch.ops.moe_ops.quantize(x.detach(), static, codec.name, backend)
            if torch.is_grad_enabled() and x.requires_grad:  # straight through: codes have no gradient, their values do
                seen = values(Operand(codes, scale, whole if codec.global_scale else None), codec)
                x = seen.to(x.dtype) + (x - x.detach())
                fmt = f"{fmt.partition('/')[0]}/bf16"
            else:
                x, rows["x_scale"], rows["x_global_scale"] = codes, scale, whole if codec.global_scale else None
        if gate is not None:
            rows |= {"activation": gate.activation, "gated": gate.gated}
            rows |= {"alpha": gate.alpha, "beta": gate.beta, "limit": gate.limit}
        w = self.operands(name, backend)
        out = torch.ops.moe_ops.grouped_mm(
            x, w.codes, offsets, weight_scale=w.scale, weight_global_scale=w.global_scale,
            weight_zero_point=w.zero_point, bias=self._parameters.get(f"{name}_bias"), weight_master=w.master,
            format=fmt, grad_format=self.grad_format,
            shards=self.spec.shards if name == self.spec.up else 1, out_dtype=out_dtype, backend=backend,
            batch_invariant=invariant, **rows,
        )  # fmt: skip
        return out if added is None else out + added

    def _adapter(self, name: str) -> Adapter | None:
        """What adds to a projection now."""
        found = self.adapters.get(name) if self.adapters else None
        return found if found is not None and found.applies() else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """gate_up_proj (E, 2I, H), or up_proj (E, I, H), and down_proj (E, H, I): the values of the stored codes."""
        return tuple(self._dequantize(name, dtype) for name in self.weight_names())

    def _dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        q, shards = self._get(name), self.spec.shards if name == self.spec.up else 1
        return torch.cat([dequantize_weight(q.expert(e), shards, dtype) for e in range(q.qdata.shape[0])])

    def extra_repr(self) -> str:
        s = self.spec
        gate = "no gate" if not s.down else s.gate.activation if s.gate else "own gate"
        size = f"num_experts={s.num_experts}, hidden_size={s.hidden_size}, intermediate_size={s.intermediate_size}"
        return f"{size}, format={self.format!r}, {gate}, backend={self.backend or 'auto'!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _new, (self.original_class, self.spec.call), *reduced[2:]


def swap(
    module: nn.Module, spec: ExpertsSpec, fmt: Format, backend: str | None = None, device: Any = None
) -> QuantizedExperts:
    """A quantized stand-in for an experts module, of a class that derives from the module's own.

    It shares the module's children, hooks and attributes; the module itself is left as it was.
    """
    new = carry_over(module, _new(type(module), spec.call))
    if hasattr(new, "is_transposed"):
        new.__dict__ |= {"is_transposed": False, "is_concatenated": True}
    spec.take_out(new)
    return _fill(new, spec, fmt, backend, device, module)


def restore(module: QuantizedExperts) -> nn.Module:
    """The float module that `swap` was given: class, layout and dtype, with the values of the stored codes."""
    spec, original = module.spec, module.original_class
    if original is None:
        raise ValueError("experts made by QuantizedExperts.from_float have no float class: use .dequantize()")
    new = carry_over(module, original.__new__(original))
    floats: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in module.weight_names():
        bias = new._parameters.get(f"{name}_bias")
        floats[name] = module._dequantize(name, module.float_dtype), bias
        for part in PARTS:
            new._parameters.pop(f"{name}_{part}", None)
        if spec.moved:
            del new._parameters[name]
            new._parameters.pop(f"{name}_bias", None)
        else:
            _replace_bias(new, f"{name}_bias", lambda b, name=name: spec.original_bias(name, b))
    spec.put_back(new, floats)
    for name in (*_STATE, *FLAGS):
        new.__dict__.pop(name, None)
    new.__dict__.update(spec.flags)
    return new


def cannot_take(spec: ExpertsSpec, fmt: Format) -> str | None:
    """Why the experts cannot be stored in the format, None if they can."""
    for name, shards, n, k in spec.matrices:
        if reason := fmt.check(n, k):
            return f"{name} {(spec.num_experts, shards * n, k)} does not fit format {fmt.name!r}: {reason}"
    return None


def _new(original: Any, call: str) -> QuantizedExperts:
    """An empty instance: what unpickling starts from."""
    from .calls import CALLS, swapped_class  # subclasses of what this file defines

    base: Any = CALLS[call]
    cls = base if original is None else swapped_class(original, base)
    return cls.__new__(cls)


def _fill(
    new: QuantizedExperts, spec: ExpertsSpec, fmt: Format, backend: str | None, device: Any,
    found: nn.Module | None = None,
) -> QuantizedExperts:  # fmt: skip
    """Quantize the float weights of `found`, which `new` holds too unless they are under other names there."""
    found = new if found is None else found
    floats = [p for _, p in spec.floats(found)]
    if reason := cannot_take(spec, fmt) or wrong_dtype(*floats):
        raise ValueError(reason)
    new.spec, new.format, new.backend, new.float_dtype = spec, fmt.name, backend, floats[0].dtype
    for name, shards, n, k in spec.matrices:
        new._put(name, _quantize(spec, found, name, (shards, n, k), fmt, device))
        if spec.moved and (bias := spec.bias(found, name)) is not None:
            new._parameters[f"{name}_bias"] = nn.Parameter(bias.to(device), requires_grad=spec.trainable)
    if not spec.moved:
        canonical_biases_(new, device)
    return new


def canonical_biases_(module: QuantizedExperts, device: Any = None) -> None:
    """Bring biases that are as in the float module into the order of what is stored."""
    for name in module.weight_names():
        _replace_bias(module, f"{name}_bias", lambda b, name=name: module.spec.canonical_bias(name, b).to(device))


def _quantize(
    spec: ExpertsSpec, found: nn.Module, name: str, shape: tuple[int, int, int], fmt: Format, device: Any
) -> QuantizedTensor:
    """Expert by expert, so that one expert in fp32 is all that is held beside the result."""
    (shards, n, k), first = shape, spec.expert(found, name, 0)
    device = first.device if device is None else device
    q = empty_weight(fmt.weight, spec.num_experts, n, k, shards, dtype=first.dtype, device=device)
    if q.qdata.is_meta:  # a placeholder for what is still to be loaded
        return q
    for e in range(spec.num_experts):
        w = spec.expert(found, name, e).to(device)  # (S*N, K)
        for s, matrix in enumerate(w.unflatten(0, (shards, n))):
            write_matrix(q, e, s, fmt.weight.quantize(matrix.contiguous()), shards)
    return q


def _replace_bias(module: nn.Module, key: str, change: Any) -> None:
    bias = module._parameters.get(key)
    if bias is None:
        return
    found = bias.detach()
    changed = change(found)
    if changed is not found:  # else the parameter stays itself, for optimizers that hold it
        module._parameters[key] = nn.Parameter(changed.contiguous(), requires_grad=bias.requires_grad)


def _rows_first(w: Tensor, transposed: bool) -> tuple[int, int, int]:
    if w.ndim != 3 or not w.is_floating_point():
        raise ValueError(f"weights of experts are (E, N, K) float tensors, got {w.dtype} {tuple(w.shape)}")
    e, n, k = w.shape
    return (e, k, n) if transposed else (e, n, k)
