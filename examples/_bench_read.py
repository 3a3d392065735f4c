"""A streaming read in Triton: the bandwidth that a kernel reaches when it does nothing but read."""

import torch
import triton
import triton.language as tl

# (elements per step, steps per program, warps): one wins at 2 MB, another at 4 GiB
CONFIGS = (
    (2048, 1, 4),
    (4096, 1, 4),
    (4096, 1, 8),
    (8192, 1, 8),
    (16384, 1, 16),
    (4096, 4, 4),
    (8192, 4, 8),
    (8192, 16, 8),
)


@triton.jit
def _read_kernel(x_ptr, sink_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """sink[program] = sum of the program's BLOCK * STEPS elements; the sum only keeps the loads alive."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * (BLOCK * STEPS)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in tl.static_range(STEPS):
        index = start + step * BLOCK + lanes
        total += tl.load(x_ptr + index, mask=index < size, other=0, eviction_policy="evict_first")
    tl.store(sink_ptr + program, tl.sum(total, axis=0))


def read_once(x: torch.Tensor, sink: torch.Tensor, config: tuple[int, int, int]) -> torch.Tensor:
    """Reads the flat int32 tensor `x` once; `sink` takes one int32 per program, and is returned."""
    block, steps, warps = config
    programs = triton.cdiv(x.numel(), block * steps)
    assert programs <= sink.numel()
    _read_kernel[(programs,)](x, sink, x.numel(), BLOCK=block, STEPS=steps, num_warps=warps)
    return sink
