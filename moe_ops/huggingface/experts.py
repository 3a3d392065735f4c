"""The experts implementation "moe_ops": experts in float, as they are stored, on our kernels.

    model.set_experts_implementation("moe_ops")    and back: model.set_experts_implementation("grouped_mm")

No weight is copied. Weights (E, N, K) run as one op; transposed ones (E, K, N), gates that are not recognised and norms
after each expert run in parts. Weights get no gradient here: where one is asked for, transformers' own grouped_mm runs.
Under autocast rows are multiplied in its type and come back in their own, as in the models' loops over experts, in
transformers' batched_mm and in quantized experts; its grouped_mm multiplies in the type of the weights, always.

T tokens, A experts per token, R = T * A slots, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import routing
from ..adapters import ExpertsSpec, read
from ..backends.base import FLOATS, resolve
from ..storage import autocast

NAME = "moe_ops"
FORMAT = "bf16"  # the weights as they are, whatever float type they have
_SPEC = "_moe_ops_spec"
_TRAINS = "grouped_mm"


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states (T, H), top_k_index and top_k_weights (T, A) -> (T, H). Ids outside 0..num_experts-1 add nothing.

    Raises ValueError for a layout that cannot be read from the module, and for weights that are not float.
    """
    spec = self.__dict__.get(_SPEC) or _read_once(self)
    if torch.is_grad_enabled() and _needs_gradient(self, spec, hidden_states, top_k_weights):
        _say_once(type(self).__name__)
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return ALL_EXPERTS_FUNCTIONS[_TRAINS](self, hidden_states, top_k_index, top_k_weights)
    num_experts: Any = getattr(self, "num_experts", spec.num_experts)
    if num_experts != getattr(self, spec.up).shape[0]:
        top_k_index = torch.where((top_k_index >= 0) & (top_k_index < num_experts), top_k_index, -1)
    fused = spec.gate is not None and spec.post_norm is None and not spec.transposed
    y = (_fused if fused else _in_parts)(self, spec, autocast(hidden_states), top_k_index, top_k_weights)
    return y.to(hidden_states.dtype)


def spec_of(module: nn.Module) -> ExpertsSpec:
    """How the experts are stored; read once for a module, for it evaluates the gate."""
    spec = read(module)
    if spec is None:
        raise ValueError(f"{type(module).__name__} carries no layout flags: the implementation {NAME!r} cannot read it")
    if getattr(module, spec.up).dtype not in FLOATS:
        raise ValueError(
            f"{type(module).__name__}.{spec.up} is {getattr(module, spec.up).dtype}: the implementation {NAME!r} runs"
            f" {', '.join(map(str, FLOATS))}"
        )
    from .. import lowering

    lowering.register()
    module.__dict__[_SPEC] = spec
    return spec


@torch.compiler.assume_constant_result
def _read_once(module: nn.Module) -> ExpertsSpec:
    """For the compiler: it takes what this returns, instead of tracing the evaluation of a gate.

    torch 2.11 cannot; there a model whose config chose the implementation runs once before it is compiled.
    """
    return spec_of(module)


def _needs_gradient(m: nn.Module, spec: ExpertsSpec, x: Tensor, topk_weights: Tensor) -> bool:
    if getattr(m, spec.up).requires_grad or getattr(m, spec.down).requires_grad:
        return True
    in_parts = spec.transposed and (x.requires_grad or topk_weights.requires_grad)
    return in_parts or (spec.transposed and any(p.requires_grad for p in m._parameters.values() if p is not None))


def _say_once(kind: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(kind)


@functools.cache
def _warn(kind: str) -> None:
    warnings.warn(
        f"experts implementation {NAME!r}: {kind} needs gradients that its kernels do not have (of the weights, or"
        f" through transposed ones), so {_TRAINS!r} runs while gradients are recorded. For our kernels use"
        " torch.no_grad(), or requires_grad_(False) on the experts",
        stacklevel=3,
    )


def _fused(m: nn.Module, spec: ExpertsSpec, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    gate = spec.gate
    assert gate is not None
    backend, invariant = resolve(None)
    up, down = getattr(m, spec.up), getattr(m, spec.down)
    biases = [m._parameters.get(f"{name}_bias") for name in (spec.up, spec.down)]
    return torch.ops.moe_ops.experts(
        x, ids, weights, up, down, None, None, None, None, None, None, *biases, format=FORMAT,
        activation=gate.activation, gated=gate.gated, interleaved=spec.interleaved, alpha=gate.alpha, beta=gate.beta,
        limit=gate.limit, backend=backend, batch_invariant=invariant,
    )  # fmt: skip


def _in_parts(m: nn.Module, spec: ExpertsSpec, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The module's own gate and norm between our products; columns are in the order that the gate expects."""
    backend, _ = resolve(None)
    top_k = ids.shape[-1]
    if not ids.numel():
        return torch.zeros_like(x)
    order, offsets = torch.ops.moe_ops.sort_by_expert(ids, getattr(m, spec.up).shape[0], backend=backend)
    owner = routing.experts_of_rows(offsets, order.shape[0])  # (R,), E for rows that no expert owns
    h = _product(m, spec, spec.up, x, offsets, owner, rows_in=order, top_k=top_k)  # (R, 2I) sorted
    own: Any = m._apply_gate if spec.gated else m.act_fn
    y = _product(m, spec, spec.down, own(h).to(x.dtype), offsets, owner)  # (R, H) sorted
    if spec.post_norm is not None:
        y = getattr(m, spec.post_norm)(y.to(x.dtype))
    kept = (owner < offsets.shape[0] - 1)[:, None]  # a bias or a norm may have moved the others off zero
    y = torch.where(kept, y.float() * weights.reshape(-1)[order].float()[:, None], 0.0).to(x.dtype)
    return torch.ops.moe_ops.combine(torch.ops.moe_ops.unpermute(y, order), top_k, backend=backend)


def _product(
    m: nn.Module, spec: ExpertsSpec, name: str, x: Tensor, offsets: Tensor, owner: Tensor, **rows: Any
) -> Tensor:
    """Rows times their expert's matrix, plus bias, in x's dtype after the first projection and fp32 after the last."""
    backend, invariant = resolve(None)
    weight, bias = getattr(m, name), m._parameters.get(f"{name}_bias")
    y = torch.ops.moe_ops.grouped_mm(
        x, weight, offsets, format=FORMAT, transpose=spec.transposed, out_dtype=torch.float32, backend=backend,
        bias=None if spec.transposed else bias, batch_invariant=invariant, **rows,
    )  # fmt: skip
    if bias is not None and spec.transposed:  # a transposed product takes none
        y = y + bias[owner.clamp(max=bias.shape[0] - 1)].float()
    return y.to(x.dtype) if name == spec.up else y


def check_set(model: nn.Module, experts_implementation: Any) -> None:
    """Read every experts module before the implementation is chosen. Raises ValueError where none would use it."""
    chosen = experts_implementation
    given = chosen.values() if isinstance(chosen, dict) else (chosen,)
    if NAME not in given:
        return
    flagged = [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "has_bias")]
    if not flagged:
        raise ValueError(
            f"{type(model).__name__} has no experts that take an implementation (their class is not decorated):"
            f" {NAME!r} would change nothing; quantize_(model, {FORMAT!r}) runs what it can read on our kernels"
        )
    for m in flagged:
        if not hasattr(m, "layouts"):  # quantized ones have a forward of their own
            spec_of(m)

