"""What a quantized module stores, and what may be done to it: `.to`, deepcopy, pickle, state_dict, initialisation.

Each quantized weight `name` is a frozen parameter that holds codes, with its scales as parameters beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .backends.base import FLOATS
from .formats import FORMATS, Format, QuantizedTensor, empty_weight

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=nn.Module)
PARTS = ("scale", "global_scale", "zero_point", "input_scale")


class Layout(NamedTuple):
    """What a quantized weight is made of: `experts` (None for a Linear) times `shards` matrices (n, k)."""

    experts: int | None
    shards: int
    n: int
    k: int


class Training(NamedTuple):
    """In which format a float weight is multiplied while it is trained, and in which gradients are (None: floats)."""

    format: str
    gradients: str | None


class Operands(NamedTuple):
    """A weight as the ops take it."""

    codes: Tensor
    scale: Tensor | None
    global_scale: Tensor | None
    zero_point: Tensor | None
    input_scale: Tensor | None
    master: Tensor | None


class _Codes(NamedTuple):
    """A parameter of a one-byte float type, as bytes: `pickle` cannot take such types (torch.save can)."""

    data: Tensor
    dtype: torch.dtype

    def restore(self) -> nn.Parameter:
        return nn.Parameter(self.data.view(self.dtype), requires_grad=False)


class QuantizedModule(nn.Module):
    """Mixin for modules whose weights are stored in a format.

    `format` is the format's name, `backend` a backend's name or None (the active one), `float_dtype` what the weights
    had and what `dequantize_` gives back; `.to(dtype)` changes only that and the parameters that are not quantized.
    """

    format: str
    backend: str | None
    float_dtype: torch.dtype
    trained: Training | None = None  # weights are floats then, `format` is "bf16"
    ranks: Any = None  # what says that the weights are one rank's part of the whole's (sharding)
    _is_hf_initialized = True  # transformers' weight initialisation passes such modules over

    def weight_names(self) -> tuple[str, ...]:
        """Parameters that hold codes."""
        raise NotImplementedError

    def layouts(self) -> dict[str, Layout]:
        """By the name of each quantized weight."""
        raise NotImplementedError

    def float_shape(self, name: str) -> torch.Size:
        """Shape of a weight in the float model."""
        raise NotImplementedError

    def canonical(self, name: str, weight: Tensor) -> Tensor:
        """One expert's weight, or a Linear's, as the float model holds it -> (S*N, K), gate rows first."""
        raise NotImplementedError

    @property
    def quantization(self) -> Format:
        return FORMATS[self.format]

    def part(self, name: str, part: str) -> Tensor | None:
        """`scale`, `global_scale`, `zero_point` or `input_scale` of a weight."""
        return self._parameters.get(f"{name}_{part}")

    def bytes_stored(self) -> int:
        """Bytes of codes and scales."""
        stored = [self._parameters.get(n) for n in self._protected()]
        return sum(t.numel() * t.element_size() for t in stored if t is not None)

    def operands(self, name: str, backend: str = "auto") -> Operands:
        """What is stored; of a weight that is trained, codes made now."""
        w = getattr(self, name)
        if self.trained is None:
            get = self._parameters.get  # spelled out: a forward of few tokens waits for it
            return Operands(w, get(f"{name}_scale"), get(f"{name}_global_scale"), get(f"{name}_zero_point"),
                            get(f"{name}_input_scale"), None)  # fmt: skip
        codec, layout = self.computes.weight, self.layouts()[name]
        master = w.detach() if layout.experts is not None else w.detach()[None]  # (E, S*N, K)
        made = torch.ops.moe_ops.quantize_weight(master, codec.name, layout.shards, backend)
        q, scale, whole = made if layout.experts is not None else (t[0] if t.ndim > 1 else t for t in made)
        return Operands(q, scale, whole if codec.global_scale else None, None, None, w)

    @property
    def computes(self) -> Format:
        """The format of products: what is stored in, or trained in."""
        return FORMATS[self.format if self.trained is None else self.trained.format]

    @property
    def grad_format(self) -> str | None:
        return None if self.trained is None else self.trained.gradients

    @property
    def compute_dtype(self) -> torch.dtype:
        """What PEFT gives its adapters, which would have the type of the codes without it."""
        return self.float_dtype

    def codes(self) -> list[str]:
        """Names of the parameters that hold codes and scales."""
        return [name for name, p in self._parameters.items() if p is not None and name in self._protected()]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As nn.Module's for False, and where weights are floats. Codes have no gradient: ValueError, nothing changed.

        Train biases by name, adapters on this module, or float weights (moe_ops.training.prepare_training_).
        """
        if requires_grad and self.quantization.quantized:
            raise ValueError(_refusal(self.weight_names()[0], self.format))
        return super().requires_grad_(requires_grad)

    def check_frozen(self) -> None:
        """ValueError if codes or scales want a gradient that they would not get: torch lets float8 ask for one."""
        if not torch.is_grad_enabled() or not self.quantization.quantized:
            return
        for name in self.codes():
            if self._parameters[name].requires_grad:  # type: ignore[union-attr]
                raise ValueError(_refusal(name, self.format))

    def _protected(self) -> set[str]:
        return {n for name in self.weight_names() for n in (name, *(f"{name}_{p}" for p in PARTS))}

    def _put(self, name: str, q: QuantizedTensor) -> None:
        """Store a quantized weight; parts that the format does not have are None."""
        parts = {name: q.qdata, f"{name}_scale": q.scale, f"{name}_global_scale": q.global_scale}
        parts |= {f"{name}_zero_point": q.zero_point, f"{name}_input_scale": None}
        for key, t in parts.items():
            self._parameters[key] = None if t is None else nn.Parameter(t, requires_grad=False)
        self._mark()

    def as_stored(self, name: str) -> bool:
        """The float model holds a weight as it is stored here, gate rows above up rows."""
        probe = torch.empty(self.float_shape(name)[-2:], device="meta")
        return self.canonical(name, probe) is probe

    def code_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the stored codes."""
        x = self.layouts()[name]
        lead = () if x.experts is None else (x.experts,)
        return *lead, x.shards * x.n, self.quantization.weight.stored(x.k)

    def empty_weight(self, name: str, device: torch.device | str | None) -> None:
        """Uninitialised storage for a weight on the device; None takes the storage away."""
        if device is None:
            for part in ("", *(f"_{p}" for p in PARTS)):
                self._parameters[f"{name}{part}"] = None
            return
        (experts, shards, n, k), codec = self.layouts()[name], self.quantization.weight
        if experts is not None:
            self._put(name, empty_weight(codec, experts, n, k, shards, dtype=self.float_dtype, device=device))
            return
        one = codec.quantize(torch.empty(n, k, dtype=self.float_dtype, device="meta"))
        parts = (one.qdata, one.scale, one.zero_point, one.global_scale)
        made = [None if t is None else torch.empty_like(t, device=device) for t in parts]
        assert made[0] is not None
        self._put(name, QuantizedTensor(made[0], made[1], made[2], made[3], codec))

    def _get(self, name: str) -> QuantizedTensor:
        """The weight as the codec takes it."""
        data = [None if t is None else t.detach() for t in (getattr(self, name), *(self.part(name, p) for p in PARTS))]
        assert data[0] is not None
        return QuantizedTensor(data[0], data[1], data[3], data[2], self.quantization.weight)

    def _mark(self) -> None:
        """transformers' initialisers pass marked tensors over, also when they are called on this module by hand."""
        for p in self._parameters.values():
            if p is not None:
                p._is_hf_initialized = True  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_parameters": {n: _plain(p) for n, p in self._parameters.items()}}
        state.pop("_compiled_call_impl", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = {n: p.restore() if isinstance(p, _Codes) else p for n, p in state["_parameters"].items()}
        super().__setstate__({**state, "_parameters": parameters})
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves everything; casts only what is not quantized."""
        names = self._protected() if self.quantization.quantized else set()
        kept = {id(p): p for n, p in self._parameters.items() if p is not None and n in names}
        device = getattr(self, self.weight_names()[0]).device
        with torch.no_grad():
            self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype, device=device)).dtype

        def move(t: Tensor) -> Tensor:
            if id(t) not in kept:
                return fn(t)
            sample = fn(t.new_empty(0))  # tells the device and the dtype that fn would give, without the work
            return fn(t) if sample.dtype == t.dtype else t.to(sample.device)

        return super()._apply(move, recurse)

    def _misread(self, name: str, mine: torch.dtype, given: torch.dtype) -> str | None:
        """Why a tensor of type `given` cannot be copied into a parameter, which would cast it; None if it can."""
        if not self.quantization.quantized:
            return "codes load into a model that was quantized to their format" if given.itemsize == 1 else None
        if given == mine or (mine == torch.float32 and given in FLOATS):  # the latter keeps every value
            return None
        if given == torch.uint8 and mine.itemsize == 1:
            return f"view the bytes as {str(mine).removeprefix('torch.')}"
        if name in self.weight_names() and given in FLOATS:
            return "load float weights before quantize_, or dequantize_ first"
        return f"{'codes' if name in self.weight_names() else 'scales'} of another type belong to another format"

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # bytes do not say what they are codes of
            destination._metadata.setdefault(prefix[:-1], {})["codec"] = self.quantization.weight.name

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        state_dict = {**state_dict, **self._from_disk(state_dict, prefix)}
        mine = {n: p for n, p in self._parameters.items() if p is not None and n in self._protected()}
        wrong = [
            f"{prefix}{name} is {state_dict[prefix + name].dtype}, this module stores {p.dtype} ({self.format}): {hint}"
            for name, p in mine.items()
            if prefix + name in state_dict and (hint := self._misread(name, p.dtype, state_dict[prefix + name].dtype))
        ]
        codec, given = self.quantization.weight.name, metadata.get("codec")
        if not wrong and given not in (None, codec):
            wrong.append(f"{prefix or 'the module '}holds codes of {given}, this module stores {codec} ({self.format})")
        errors.extend(wrong)
        if not wrong:  # a copy would cast the values to codes without their scale
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _from_disk(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Codes of a file that save_pretrained wrote, which Trainer loads by itself: their last extent is one."""
        found = {prefix + name: (state_dict.get(prefix + name), self._parameters[name]) for name in self.weight_names()}
        return {
            key: t.squeeze(-1) for key, (t, p) in found.items()
            if t is not None and p is not None and t.shape == (*p.shape, 1)
        }  # fmt: skip


def _refusal(name: str, format: str) -> str:
    return (
        f"{name} is stored in format {format!r}: codes and scales are frozen, they have no gradient. Leave their"
        " requires_grad off, and train adapters on the module, or float weights (moe_ops.training.prepare_training_)"
    )


_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu")  # torch 2.11 does not trace the function that says so


def autocast(x: Tensor) -> Tensor:
    """x in the type in which autocast, where it is on, has an nn.Linear multiply."""
    kind = x.device.type
    if x.dtype not in FLOATS or kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def wrong_dtype(*weights: Tensor | None) -> str | None:
    """Why weights of such a type are not quantized, None for those of a type that ops compute in."""
    for w in weights:
        if w is not None and w.dtype not in FLOATS:
            return f"its weights are {w.dtype}: ops compute in {', '.join(map(str, FLOATS))}, cast the model first"
    return None


def _plain(p: nn.Parameter | None) -> nn.Parameter | _Codes | None:
    if p is None or not p.is_floating_point() or p.element_size() > 1:
        return p
    return _Codes(p.detach().view(torch.uint8), p.dtype)


def carry_over(old: nn.Module, new: M) -> M:
    """Fill an empty instance with the attributes, hooks, parameters and children of `old`, which stays as it is.

    Hook tables are shared, so that their handles still work; tables of tensors and children are copies.
    """
    new.__dict__.update(old.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        new.__dict__[table] = dict(old.__dict__[table])
    new.__dict__.pop("_compiled_call_impl", None)
    hook = new.__dict__.pop("_hf_hook", None)
    if hook is not None:  # accelerate wraps forward on the instance: take the wrapper off and put it on again
        new.__dict__.pop("forward", None)
        new.__dict__.pop("_old_forward", None)
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
    return new
