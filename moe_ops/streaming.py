"""Quantizes the weights of a module as they are read: one matrix in float at a time, into storage that is made once.

E experts, S shards (gate and up), N rows and K columns of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from .formats import FORMATS, QuantizedTensor, write_matrix
from .storage import QuantizedModule


class Share(Protocol):
    """What a rank keeps of a weight that is read whole (sharding)."""

    def index(self, expert: int) -> int | None:
        """Where an expert is kept; None for one of another rank."""

    def codes(self, weight: str, matrix: Tensor) -> QuantizedTensor:
        """This rank's part of the codes of a whole matrix (N, K)."""


class Stream:
    """What a loader calls for one quantized module, the same four steps for every format, Linears and experts:

    `dtype` what float weights are to be read as; `allocate` storage for codes and scales, kept if it is there;
    `write` one float matrix: it is quantized and stored; `finish`, which refuses a module that is not complete.

    Between `open` and `allocate` the module holds a float placeholder of each weight on the meta device, with the name,
    shape and dtype that it has in the float model: loaders cast what they read to the parameter that they find.
    """

    def __init__(self, module: QuantizedModule, name: str = "") -> None:
        self.module, self.name = module, name
        layouts = module.layouts()
        self.pending = {
            weight: {(e, s) for e in range(x.experts or 1) for s in range(x.shards)} for weight, x in layouts.items()
        }
        self._layouts, self._float_shapes = layouts, {weight: module.float_shape(weight) for weight in layouts}
        self.share: Share | None = None
        self._storage: dict[str, QuantizedTensor] = {}
        self._biases: dict[str, nn.Parameter] = {}

    def open(self) -> None:
        """Put float placeholders in the place of codes and scales."""
        m = self.module
        for weight in self._layouts:
            self.module.empty_weight(weight, None)
            shape = self._float_shapes[weight]
            m._parameters[weight] = nn.Parameter(torch.empty(shape, dtype=m.float_dtype, device="meta"), False)

    def dtype(self, weight: str) -> torch.dtype:
        """What the float weight is rounded to before it is quantized, as in a model that was loaded in float."""
        return self.module.float_dtype

    def allocate(self, weight: str, device: torch.device | str) -> None:
        """Storage on the device, uninitialised; what the module has there already is kept, for graphs that read it."""
        m, layout, device = self.module, self._layouts[weight], torch.device(device)
        if weight in self._storage:
            return
        codes = m._parameters[weight]
        want = (m.code_shape(weight), FORMATS[m.format].weight.element.storage or m.float_dtype, device)
        # A placeholder is on meta: it is never kept, whatever its shape and dtype.
        if codes is None or codes.is_meta or (tuple(codes.shape), codes.dtype, codes.device) != want:
            m.empty_weight(weight, device)
        q = m._get(weight)
        self._storage[weight] = q if layout.experts is not None else _with_experts(q)

    def write(self, weight: str, expert: int, shard: int, matrix: Tensor) -> None:
        """Quantize and store one matrix (N, K), gate first. Raises ValueError, naming it, for anything else."""
        layout, label = self._layouts[weight], self.label(weight, expert, shard)
        if tuple(matrix.shape) != (layout.n, layout.k):
            raise ValueError(f"{label} must be {(layout.n, layout.k)}, got {tuple(matrix.shape)}")
        if not matrix.is_floating_point() or matrix.element_size() < 2:
            raise ValueError(f"{label} is {matrix.dtype}: codes of another tool? only float weights are quantized")
        self.pending[weight].discard((expert, shard))
        index = expert if self.share is None else self.share.index(expert)
        if index is None:
            return
        self.allocate(weight, matrix.device)
        matrix = matrix.detach().to(self.dtype(weight)).contiguous()
        if matrix.numel() and not matrix.is_meta and not all(bool(torch.isfinite(x)) for x in torch.aminmax(matrix)):
            raise ValueError(f"{label} has non-finite values")
        quantize = self.module.quantization.weight.quantize
        codes = quantize(matrix) if self.share is None else self.share.codes(weight, matrix)
        write_matrix(self._storage[weight], index, shard, codes, layout.shards)

    def take(self, weight: str, expert: int, found: Tensor) -> None:
        """Store all shards of one expert, in the layout of the float model: transposed, interleaved, ..."""
        layout = self._layouts[weight]
        shape = tuple(self._float_shapes[weight][1 if layout.experts is not None else 0 :])
        if tuple(found.shape) != shape:
            raise ValueError(f"{self.label(weight, expert)} must be {shape}, got {tuple(found.shape)}")
        w = self.module.canonical(weight, found)  # (S*N, K)
        for s, matrix in enumerate(w.unflatten(0, (layout.shards, layout.n))):
            self.write(weight, expert, s, matrix)

    def take_whole(self, weight: str, found: Tensor) -> None:
        """Store the weight of the float model, expert by expert."""
        if self._layouts[weight].experts is None:
            self.take(weight, 0, found)
            return
        if found.shape != self._float_shapes[weight]:
            want = tuple(self._float_shapes[weight])
            raise ValueError(f"{self.label(weight)} must be {want}, got {tuple(found.shape)}")
        for e, one in enumerate(found[: self._layouts[weight].experts]):  # more rows: experts without weights
            self.take(weight, e, one)

    def finish(self) -> None:
        """Raises ValueError for matrices that never came."""
        for weight, pending in self.pending.items():
            if pending:
                experts = sorted({e for e, _ in pending})
                of = "" if self._layouts[weight].experts is None else f" of experts {', '.join(map(str, experts[:8]))}"
                raise ValueError(f"{self.label(weight)}: the checkpoint lacks the weights{of}")
        self.module._mark()

    def experts(self, weight: str) -> int | None:
        """Experts whose matrices are wanted; None for a Linear."""
        return self._layouts[weight].experts

    def experts_stored(self, weight: str) -> int | None:
        """Experts in the float model's parameter: more, where some compute nothing."""
        return None if self.experts(weight) is None else self._float_shapes[weight][0]

    def float_shape(self, weight: str) -> torch.Size:
        """Of the float model's parameter."""
        return self._float_shapes[weight]

    def wants(self, expert: int) -> bool:
        """Whether the matrices of an expert have to be read."""
        return self.share is None or self.share.index(expert) is not None

    def of_others(self) -> None:
        """Nothing is missed of what other ranks keep."""
        for pending in self.pending.values():
            pending -= {(e, s) for e, s in pending if not self.wants(e)}

    def label(self, weight: str, expert: int | None = None, shard: int | None = None) -> str:
        layout, full = self._layouts[weight], f"{self.name}.{weight}" if self.name else weight
        if expert is None or layout.experts is None:
            return full
        part = "" if shard is None or layout.shards == 1 else f", {('gate', 'up')[shard]}"
        return f"{full} (expert {expert}{part})"


def _with_experts(q: QuantizedTensor) -> QuantizedTensor:
    """The tensors of one matrix as those of one expert with one shard: views."""
    scale, global_scale = q.scale, q.global_scale
    return QuantizedTensor(
        q.qdata[None], None if scale is None else scale.reshape(1, *(scale.shape or (1,))), None,
        None if global_scale is None else global_scale.reshape(1, 1), q.codec,
    )  # fmt: skip


def streams(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """Quantized modules of a model, each once, with their names."""
    for name, m in model.named_modules():
        if isinstance(m, QuantizedModule):
            yield name, m


@torch.no_grad()
def dummy_(model: nn.Module, device: torch.device | str, std: float = 0.02, seed: int = 0) -> nn.Module:
    """Give quantized modules that are on meta (`skeleton_`) random weights: shapes, speed and memory without a file.

    Normal numbers of standard deviation `std`, a matrix at a time. What is not quantized stays as it is, but biases of
    quantized modules become zero.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, m in streams(model):
        stream = Stream(m, name)
        for weight, x in m.layouts().items():
            if not m._get(weight).qdata.is_meta:
                stream.pending.pop(weight)
                continue
            for e, s in sorted(stream.pending[weight]):
                matrix = torch.randn(x.n, x.k, generator=generator, device=device) * std
                stream.write(weight, e, s, matrix)
        for key, p in m._parameters.items():
            if p is not None and p.is_meta:
                m._parameters[key] = nn.Parameter(torch.zeros_like(p, device=device), p.requires_grad)
        stream.finish()
    return model


