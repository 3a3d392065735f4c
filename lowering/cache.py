"""Compiled artifacts depend on our sources, formats and tuned tiles: torch's cache key knows none, so it gets a salt.

Without it a graph compiled by another version of these files is loaded from the disk cache and gives wrong numbers.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from moe_ops.formats import FORMATS, Codec
from moe_ops.kernels import tuning

from . import _compat, where


@cache
def sources_hash() -> str:
    """Of every Python file of the package, lowering included."""
    root = Path(__file__).resolve().parent
    package = Path(next(iter(__import__("moe_ops").__path__))).resolve()
    digest = hashlib.sha256()
    for path in sorted({*package.rglob("*.py"), *root.rglob("*.py")}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _describe(codec: Codec) -> str:
    """Everything that a codec's numbers depend on, in words that mean the same in every process."""
    e, rule = codec.element, codec.scale_rule
    bits = (e.name, e.bits, e.exponent_bits, e.mantissa_bits, e.bias, e.max, e.storage)
    named = f"{rule.__module__}.{rule.__qualname__}" if rule is not None else None
    return repr((codec.name, bits, codec.block, codec.scale_dtype, named, codec.global_scale))


def salt() -> str:
    formats = [f"{f.name}={f.weight.name}/{f.activation and f.activation.name}" for f in FORMATS.values()]
    formats += [_describe(codec) for codec in FORMATS.codecs()]  # of activations in pairs too
    made = f"moe_ops-{sources_hash()}-{hashlib.sha256(';'.join(formats).encode()).hexdigest()[:8]}"
    tuning.from_environment()
    tiles = tuning.digest()
    return made + f"-{tiles}" * bool(tiles) + "-whole" * where.kept_whole()


def register() -> None:
    """Append the salt to the compiler's cache key, once; what a user has put there stays."""
    tag = _compat.get_cache_key_tag()
    kept = [part for part in tag.split("|") if part and not part.startswith("moe_ops-")]
    _compat.set_cache_key_tag("|".join([*kept, salt()]))
