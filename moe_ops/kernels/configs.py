"""Tile configurations as data: per kind of chip and kind of product, by rows per expert. No format names.

block_n counts output channels: a gated product computes gate's and up's, so its tile holds 2 x block_n rows of weight.
The first entry whose number of rows is at least the expected rows of an expert that has any serves. Tiles are higher
than that number: half of the experts have more rows than expected, and a second tile reads their weights again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

_LEAST_K = 384  # a part shorter than this costs more than it saves


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False  # weights first: they fill the 64 rows of a warp group's product
    group_m: int = 1  # row tiles that go through the columns together
    short: int = 0  # the last rows of an expert, if no more than this, are a tile of this height
    parts: int = 1  # of K, each a program of its own, added by the kernel that reads them: at most so many
    programs: int = 0  # parts are made up to so many of them: a few warps alone wait for memory most of the time

    def divided(self, tiles: int, k: int) -> Config:
        """With as many parts of K as so many tiles ask for."""
        parts = 1
        while parts < self.parts and 2 * parts * tiles <= self.programs and k >= 2 * parts * _LEAST_K:
            parts *= 2
        return replace(self, parts=parts, programs=0)


@dataclass(frozen=True)
class Kind:
    """What a configuration depends on.

    The MMA ("fp8", "int8", "scaled" by blocks, "bf16" for both halves, "fp32"); of how many bits weights are that
    become its type in registers; whether sums leave the tensor core every K block, for scales or for precision;
    whether gate and up are computed together; whether there is a bias (two more vectors of registers in the epilogue).
    """

    mma: str
    decoded: int = 0
    promoted: bool = False
    gated: bool = False
    bias: bool = False
    transposed: bool = False  # the gradient's product: weights dequantized in registers, whatever the format
    wgrad: bool = False  # the gradient of weights: block_m channels, block_n columns, block_k rows a step


MANY = 1 << 30
Table = dict[int, Config]

# About 100 KiB of shared memory and mma.sync: sm_80 to sm_89, sm_120.
_FEW = Config(16, 64, 64, 4, 3)
SMALL: dict[Kind, Table] = {
    Kind("bf16"): {16: _FEW, 64: Config(64, 64, 64, 4, 3), MANY: Config(128, 64, 32, 8, 4, group_m=8)},
    Kind("bf16", gated=True): {16: _FEW, MANY: Config(64, 32, 64, 4, 3, group_m=8)},
    Kind("fp8"): {
        16: Config(16, 64, 128, 4, 3), 64: Config(64, 64, 128, 4, 3), MANY: Config(128, 64, 64, 8, 2, group_m=8),
    },
    Kind("fp8", gated=True): {16: Config(16, 64, 128, 4, 3), MANY: Config(64, 32, 128, 4, 3, group_m=8)},
    Kind("bf16", decoded=4): {16: Config(16, 64, 128, 4, 2), MANY: Config(32, 64, 128, 4, 2, group_m=8)},
    Kind("bf16", decoded=4, gated=True): {16: Config(16, 64, 128, 4, 2), MANY: Config(32, 32, 128, 4, 2, group_m=8)},
    Kind("scaled"): {16: Config(16, 64, 128, 4, 3), MANY: Config(64, 64, 128, 4, 2, group_m=8)},
    Kind("scaled", gated=True): {16: Config(16, 32, 128, 4, 2), MANY: Config(64, 32, 128, 4, 2, group_m=8)},
    Kind("fp32"): {16: Config(16, 32, 16, 4, 2), MANY: Config(64, 32, 16, 4, 2, group_m=8)},
    Kind("fp32", transposed=True): {MANY: Config(32, 32, 16, 4, 2, group_m=8)},
    Kind("bf16", transposed=True): {16: Config(16, 64, 32, 4, 2), MANY: Config(64, 64, 32, 4, 2, group_m=8)},
    Kind("fp32", wgrad=True): {MANY: Config(32, 32, 16, 4, 2, group_m=8)},
    Kind("fp32", promoted=True, wgrad=True): {MANY: Config(32, 32, 128, 4, 2, group_m=8)},
    Kind("bf16", wgrad=True): {MANY: Config(64, 64, 32, 4, 2, group_m=8)},
    Kind("bf16", promoted=True, wgrad=True): {MANY: Config(64, 64, 128, 8, 1, group_m=8)},
    Kind("fp8", wgrad=True): {MANY: Config(64, 64, 128, 4, 3, group_m=8)},
    Kind("fp8", promoted=True, wgrad=True): {MANY: Config(64, 64, 128, 4, 2, group_m=8)},
}  # fmt: skip
SMALL[Kind("bf16", decoded=6, gated=True)] = {16: _FEW, MANY: Config(32, 32, 64, 4, 3, group_m=8)}
SMALL |= {Kind("int8", gated=gated): SMALL[Kind("fp8", gated=gated)] for gated in (False, True)}
_WGRADS = tuple(kind for kind in SMALL if kind.wgrad)
_SHARED = (Kind("fp32"), Kind("fp32", transposed=True), Kind("bf16", transposed=True), *_WGRADS)
# 227 KiB and products of warp groups: sm_90. Measured with examples/benchmark.py --tune on an H200 with Triton 3.6.
HOPPER: dict[Kind, Table] = {
    Kind("bf16"): {
        2: Config(16, 128, 64, 4, 3, swap=True, parts=4, programs=500), 12: Config(16, 128, 64, 4, 3, swap=True),
        24: Config(32, 128, 64, 4, 3, swap=True), 72: Config(64, 256, 64, 4, 4),
        200: Config(128, 256, 64, 8, 4, group_m=8, short=64), MANY: Config(128, 256, 64, 8, 3, group_m=16, short=64),
    },
    Kind("bf16", gated=True): {
        12: Config(16, 64, 128, 4, 4, swap=True, parts=4, programs=150), 24: Config(32, 64, 128, 4, 4, swap=True),
        72: Config(64, 128, 64, 8, 4, swap=True), 200: Config(128, 128, 64, 8, 4, group_m=8, short=64),
        MANY: Config(128, 128, 64, 8, 3, group_m=16, short=64),
    },
    Kind("bf16", decoded=8): {
        5: Config(8, 128, 128, 4, 3, swap=True, parts=8, programs=2000),
        12: Config(16, 128, 128, 4, 3, parts=4, programs=1200), 40: Config(32, 128, 128, 8, 3, swap=True),
        100: Config(64, 128, 64, 4, 3), MANY: Config(128, 128, 64, 4, 3, group_m=8, short=64),
    },
    Kind("bf16", decoded=8, gated=True): {
        5: Config(8, 64, 128, 4, 4, swap=True, parts=8, programs=300), 12: Config(16, 128, 128, 8, 3),
        40: Config(32, 64, 128, 4, 3),
        100: Config(64, 64, 64, 4, 3), MANY: Config(128, 64, 64, 4, 3, group_m=8, short=64),
    },
    # Up to eight rows go second into products of 16 channels. 4 bits: 128 columns a step, always. Where rows fill 64
    # channels' products, decoded weights go first: as the first operand they stay in registers. Scales of whole steps
    # multiply their product (promoted), smaller ones the weights.
    Kind("bf16", decoded=4): {
        5: Config(8, 128, 128, 4, 3, swap=True, parts=8, programs=1200),
        12: Config(16, 128, 128, 4, 3, parts=8, programs=1200), 20: Config(32, 64, 128, 4, 3),
        40: Config(32, 128, 128, 8, 3, swap=True), 100: Config(64, 128, 128, 8, 3, swap=True),
        300: Config(64, 128, 128, 8, 3, swap=True, group_m=8),
        MANY: Config(128, 128, 128, 4, 3, swap=True, group_m=8, short=64),
    },
    Kind("bf16", decoded=4, gated=True): {
        5: Config(8, 64, 128, 4, 3, swap=True, parts=8, programs=2000), 12: Config(16, 64, 128, 4, 3, swap=True),
        20: Config(32, 64, 128, 4, 3), 40: Config(32, 64, 128, 4, 3, swap=True),
        MANY: Config(128, 64, 128, 4, 3, swap=True, group_m=8, short=64),
    },
    Kind("bf16", decoded=4, promoted=True): {
        5: Config(8, 128, 128, 4, 3, swap=True, parts=8, programs=1600),
        12: Config(16, 64, 128, 4, 3, swap=True, parts=4, programs=2000), 40: Config(32, 128, 128, 8, 3, swap=True),
        100: Config(64, 128, 128, 8, 3, swap=True), MANY: Config(64, 128, 128, 8, 3, swap=True, group_m=8),
    },
    Kind("bf16", decoded=4, promoted=True, gated=True): {
        5: Config(8, 64, 128, 4, 3, swap=True, parts=8, programs=2000), 12: Config(16, 64, 128, 4, 4, swap=True),
        20: Config(32, 64, 128, 4, 3, swap=True), 100: Config(64, 128, 128, 8, 3, swap=True),
        MANY: Config(64, 128, 128, 8, 3, swap=True, group_m=8),
    },
    Kind("bf16", decoded=4, gated=True, bias=True): {
        5: Config(8, 64, 128, 4, 3, swap=True, parts=8, programs=2000), 12: Config(16, 64, 128, 4, 3, swap=True),
        20: Config(32, 64, 128, 4, 3),
        40: Config(32, 64, 128, 4, 3, swap=True), MANY: Config(64, 128, 128, 8, 3, swap=True, group_m=8),
    },
    Kind("int8"): {
        2: Config(16, 128, 256, 8, 3, swap=True, parts=4, programs=300), 12: Config(16, 64, 128, 4, 3, swap=True),
        24: Config(32, 128, 128, 8, 3, swap=True), 72: Config(64, 128, 128, 4, 3),
        MANY: Config(128, 128, 128, 4, 3, group_m=16, short=64),
    },
    Kind("int8", gated=True): {
        2: Config(16, 64, 256, 4, 4, swap=True, parts=4, programs=150), 12: Config(16, 64, 128, 4, 3, swap=True),
        24: Config(32, 64, 128, 4, 4, swap=True), 48: Config(64, 64, 128, 4, 3), 100: Config(64, 128, 128, 8, 4),
        MANY: Config(128, 64, 128, 8, 3, group_m=16, short=64),
    },
    Kind("fp8"): {
        2: Config(16, 128, 128, 8, 3, swap=True, parts=4, programs=300),
        12: Config(16, 128, 128, 8, 3, swap=True, parts=4, programs=600),
        24: Config(32, 128, 128, 8, 3, swap=True), 72: Config(64, 128, 128, 4, 3, swap=True),
        MANY: Config(128, 256, 128, 8, 4, group_m=16, short=64),
    },
    Kind("fp8", gated=True): {
        2: Config(16, 64, 256, 4, 4, swap=True, parts=4, programs=150), 12: Config(16, 64, 256, 4, 3, swap=True),
        24: Config(32, 64, 128, 4, 4, swap=True), 72: Config(64, 128, 128, 8, 4),
        MANY: Config(128, 128, 128, 8, 4, group_m=8, short=64),
    },
    Kind("fp8", gated=True, bias=True): {
        2: Config(16, 64, 256, 4, 4, swap=True), 12: Config(16, 64, 256, 4, 3, swap=True),
        24: Config(32, 64, 128, 4, 4, swap=True), MANY: Config(64, 128, 128, 8, 4, group_m=8),
    },
    Kind("fp8", promoted=True): {
        2: Config(16, 128, 128, 4, 4, parts=4, programs=300), 12: Config(16, 128, 128, 4, 3, swap=True),
        24: Config(32, 128, 128, 4, 3, swap=True), 72: Config(64, 128, 128, 4, 4),
        200: Config(64, 128, 128, 4, 4, group_m=8), MANY: Config(128, 128, 128, 8, 4, group_m=16, short=64),
    },
    Kind("fp8", promoted=True, gated=True): {
        12: Config(16, 64, 128, 4, 6, swap=True), 24: Config(32, 64, 128, 4, 3, swap=True),
        72: Config(64, 128, 128, 8, 4), 200: Config(128, 128, 128, 8, 3, group_m=8, short=64),
        MANY: Config(128, 128, 128, 8, 3, group_m=16, short=64),
    },
    Kind("fp8", promoted=True, gated=True, bias=True): {
        12: Config(16, 64, 128, 4, 6, swap=True), 24: Config(32, 64, 128, 4, 3, swap=True),
        MANY: Config(64, 128, 128, 8, 4, group_m=8),
    },
    **{kind: SMALL[kind] for kind in _SHARED},
    Kind("bf16", transposed=True): {
        16: Config(16, 64, 32, 4, 2), 64: Config(64, 64, 32, 4, 2, group_m=8),
        200: Config(128, 128, 64, 8, 3, group_m=8), MANY: Config(128, 256, 64, 8, 4, group_m=8),
    },
    Kind("bf16", decoded=8, transposed=True): {
        16: Config(16, 64, 32, 4, 2), 64: Config(64, 64, 32, 4, 2, group_m=8),
        MANY: Config(128, 64, 64, 4, 3, group_m=8),
    },
    Kind("bf16", decoded=4, transposed=True): {
        16: Config(16, 64, 32, 4, 2), 64: Config(64, 64, 32, 4, 2, group_m=8),
        MANY: Config(128, 64, 64, 4, 3, group_m=8),
    },
    Kind("bf16", wgrad=True): {MANY: Config(128, 128, 64, 4, 3, group_m=8)},
    Kind("bf16", promoted=True, wgrad=True): {MANY: Config(128, 128, 128, 8, 3, group_m=8)},
    Kind("fp8", wgrad=True): {MANY: Config(128, 128, 128, 4, 3, group_m=8)},
    Kind("fp8", promoted=True, wgrad=True): {MANY: Config(64, 128, 128, 4, 3, group_m=8)},
}  # fmt: skip
# Unpacking 6 bits takes registers.
HOPPER[Kind("bf16", decoded=6, transposed=True)] = SMALL[Kind("bf16", transposed=True)]
_SIX = {40: Config(32, 64, 128, 8, 3)}
HOPPER[Kind("bf16", decoded=6, gated=True)] = HOPPER[Kind("bf16", decoded=8, gated=True)] | _SIX
# sm_100: accumulators come from tensor memory into registers for the epilogue, so gated tiles are half as wide.
# Compiled, not measured.
_NARROW = Config(128, 64, 128, 8, 3, group_m=8)
BLACKWELL: dict[Kind, Table] = {
    Kind("bf16"): {32: Config(32, 64, 128, 4, 3), MANY: Config(128, 128, 64, 8, 3, group_m=8)},
    Kind("bf16", gated=True): {32: Config(32, 32, 128, 4, 3), MANY: Config(128, 64, 64, 8, 3, group_m=8)},
    Kind("bf16", decoded=8): {32: Config(32, 64, 128, 4, 3), MANY: Config(128, 64, 64, 8, 3, group_m=8)},
    Kind("bf16", decoded=8, gated=True): {32: Config(32, 32, 128, 4, 3), MANY: Config(128, 64, 64, 8, 3, group_m=8)},
    Kind("bf16", decoded=4): {32: Config(32, 64, 128, 8, 3), MANY: Config(64, 64, 128, 8, 3, group_m=8)},
    Kind("bf16", decoded=4, gated=True): {32: Config(32, 32, 128, 4, 3), MANY: Config(64, 64, 128, 8, 3, group_m=8)},
    Kind("scaled"): {MANY: Config(128, 64, 128, 8, 3, group_m=8)},  # the block-scaled product has 128 rows
    Kind("scaled", gated=True): {MANY: Config(128, 32, 128, 4, 3, group_m=8)},
    Kind("fp8"): {32: Config(32, 64, 128, 4, 3), MANY: _NARROW},
    Kind("fp8", gated=True): {32: Config(32, 32, 128, 4, 3), MANY: _NARROW},
    Kind("fp8", promoted=True): {32: Config(32, 64, 128, 4, 3), MANY: _NARROW},
    Kind("fp8", promoted=True, gated=True): {32: Config(32, 32, 128, 4, 3), MANY: _NARROW},
    **{kind: SMALL[kind] for kind in (*_SHARED, Kind("int8"), Kind("int8", gated=True))},
}
_TABLES = {90: HOPPER, 100: BLACKWELL, 103: BLACKWELL}


def tables(arch: int) -> dict[Kind, Table]:
    return _TABLES.get(arch, SMALL)


def table(kind: Kind, arch: int) -> Table:
    """The entry of the kind, or of the nearest one: without the bias, then the gate, the promotion, the decoding."""
    listed = tables(arch)
    if kind.transposed or kind.wgrad:
        return listed.get(kind) or listed[replace(kind, decoded=0)]
    flags = [(flag, False) if flag else (False,) for flag in (kind.promoted, kind.gated, kind.bias)]
    bits = dict.fromkeys((kind.decoded, min(kind.decoded, 8) and 8, 0))
    return next(listed[near] for near in (Kind(kind.mma, *f) for f in product(bits, *flags)) if near in listed)


@cache
def choose(kind: Kind, arch: int, rows_per_expert: float, experts: int, channels: int, k: int) -> Config:
    """For so many expected rows in each of so many experts."""
    config = next(config for rows, config in table(kind, arch).items() if rows_per_expert <= rows)
    return config.divided(experts * -(-channels // config.block_n), k)
