"""Which format the user asked for, by module name: exact, glob, "re:...", or the classes "experts" and "linear"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .formats import FORMATS, Format

CLASSES = ("experts", "linear")
Choice = str | Format | None


@dataclass(frozen=True)
class Picked:
    """`format` is None where the module stays float; `note` says why, `exact` that the user named this very module."""

    format: Format | None
    note: str = ""
    exact: bool = False


@dataclass(frozen=True)
class Rules:
    """A pattern that matches a module covers everything under it.

    ignore beats exact names (the longest first), which beat globs and "re:..." (the first given), which beat classes.
    """

    exact: dict[str, Format | None]
    patterns: dict[str, Format | None]
    classes: dict[str, Format | None]
    ignore: tuple[str, ...]

    def pick(self, names: Iterable[str], kind: str) -> Picked:
        """What becomes of a module that the model holds under `names`."""
        lines = [line for name in names for line in _ancestors(name)]
        for pattern in self.ignore:
            if any(matches(pattern, name) for name in lines):
                return Picked(None, f"ignored ({pattern})")
        named = [name for name in sorted(lines, key=len, reverse=True) if name in self.exact]
        if named:
            return Picked(self.exact[named[0]], f"kept by {named[0]!r}", named[0] in set(names))
        for pattern, fmt in self.patterns.items():
            if any(matches(pattern, name) for name in lines):
                return Picked(fmt, f"kept by {pattern!r}")
        return Picked(self.classes.get(kind), f"{kind!r} is not in the format")

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns, of the format and of ignore, that match no module at all: misspelt, probably."""
        names = list(names)
        given = [*self.exact, *self.patterns, *self.ignore]
        return [p for p in given if not any(matches(p, name) for name in names)]


def parse(format: Choice | Mapping[str, Choice], ignore: str | Iterable[str]) -> Rules:
    """Raises ValueError for an unknown format (it lists the known ones), a bad regular expression, a wrong type."""
    if not isinstance(ignore, Iterable):
        raise ValueError(f"ignore is a pattern or several, got {ignore!r}")
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    given = dict(format) if isinstance(format, Mapping) else dict.fromkeys(CLASSES, format)
    if not isinstance(format, Mapping) and format is None:
        raise ValueError(f"format is None; name one of {', '.join(FORMATS)}")
    if not given:
        raise ValueError(f"format is an empty dict: nothing would be quantized; name one of {', '.join(FORMATS)}")
    chosen = {pattern: _format(value) for pattern, value in given.items()}
    for pattern in (*chosen, *ignore):
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"patterns are module names, globs or 're:...', got {pattern!r}")
        if pattern.startswith("re:"):
            _compile(pattern)
    return Rules(
        exact={p: f for p, f in chosen.items() if p not in CLASSES and not _is_pattern(p)},
        patterns={p: f for p, f in chosen.items() if _is_pattern(p)},
        classes={p: f for p, f in chosen.items() if p in CLASSES},
        ignore=ignore,
    )


def matches(pattern: str, name: str) -> bool:
    """One pattern against one full module name."""
    if pattern.startswith("re:"):
        return _compile(pattern).match(name) is not None
    return fnmatchcase(name, pattern) if _is_pattern(pattern) else name == pattern


def _is_pattern(text: str) -> bool:
    return text.startswith("re:") or any(c in text for c in "*?[")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:])
    except re.error as e:
        raise ValueError(f"{pattern!r} is not a regular expression: {e}") from None


def _format(value: Choice) -> Format | None:
    return None if value is None else FORMATS.resolve(value)


def _ancestors(name: str) -> list[str]:
    """a.b.c -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
