"""Tile configurations as data: per kind of chip and kind of product, by rows per expert. No format names.

block_n counts output channels: a gated product computes gate's and up's, so its tile holds 2 x block_n rows of weight.
The first entry whose number of rows is at least the expected rows of an expert that has any serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False
    group_m: int = 1
    promote: int | None = None  # fp8: products summed by the tensor core before the sum joins fp32


@dataclass(frozen=True)
class Kind:
    """What a configuration depends on: the MMA ("fp8", "bf16" for both halves, "fp32"), whether weights are decoded to
    it in registers, whether scales change along K, whether gate and up are computed together."""

    mma: str
    decoded: bool = False
    scaled: bool = False
    gated: bool = False


MANY = 1 << 30
Table = dict[int, Config]

# About 100 KiB of shared memory and mma.sync: sm_80 to sm_89, sm_120.
SMALL: dict[Kind, Table] = {
    Kind("bf16"): {16: Config(16, 64, 64, 4, 3), 64: Config(64, 64, 64, 4, 3), MANY: Config(128, 64, 64, 8, 3, group_m=8)},
    Kind("fp8"): {16: Config(16, 64, 128, 4, 3), 64: Config(64, 64, 128, 4, 3), MANY: Config(128, 64, 64, 8, 3, group_m=8)},
    Kind("fp32"): {16: Config(16, 32, 32, 4, 2), MANY: Config(64, 32, 32, 4, 2, group_m=8)},
}
# 227 KiB and warp-group or tensor-memory products: sm_90, sm_100.
LARGE: dict[Kind, Table] = {
    Kind("bf16"): {
        16: Config(16, 64, 128, 4, 3, swap=True), 32: Config(32, 64, 128, 4, 3, swap=True),
        64: Config(64, 64, 64, 4, 4, swap=True), MANY: Config(128, 128, 64, 8, 3, group_m=8),
    },
    Kind("fp8"): {
        16: Config(16, 64, 128, 4, 4, swap=True), 32: Config(32, 64, 128, 4, 4, swap=True),
        64: Config(64, 64, 128, 4, 4, swap=True), MANY: Config(128, 128, 128, 8, 3, group_m=8),
    },
    Kind("fp8", scaled=True): {
        16: Config(16, 64, 128, 4, 4, swap=True), 32: Config(32, 64, 128, 4, 4, swap=True),
        64: Config(64, 64, 128, 4, 3), MANY: Config(128, 64, 128, 8, 3, group_m=8),
    },
    Kind("fp32"): SMALL[Kind("fp32")],
}  # fmt: skip


def tables(arch: int) -> dict[Kind, Table]:
    return LARGE if arch in (90, 100, 103) else SMALL


def table(kind: Kind, arch: int) -> Table:
    """The entry that fits the kind best: what is not listed apart is served by its simpler neighbour."""
    listed = tables(arch)
    for decoded, scaled, gated in _simpler(kind):
        found = listed.get(Kind(kind.mma, decoded, scaled, gated))
        if found is not None:
            return found
    raise AssertionError(f"no configuration for {kind}")


def _simpler(kind: Kind) -> list[tuple[bool, bool, bool]]:
    """Itself, then without the gate, then without the scales, then without the decoding."""
    d, s, g = kind.decoded, kind.scaled, kind.gated
    return [(d, s, g), (d, s, False), (d, False, g), (d, False, False), (False, s, g), (False, s, False),
            (False, False, g), (False, False, False)]  # fmt: skip


@cache
def choose(kind: Kind, arch: int, rows_per_expert: int) -> Config:
    return next(config for rows, config in table(kind, arch).items() if rows_per_expert <= rows)
