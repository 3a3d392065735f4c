"""Small sets of cases that show what all cases do: every two values of any two factors, or what a function says."""

from collections.abc import Callable, Hashable
from itertools import combinations
from random import Random


def pairs(case: dict) -> set:
    return {((a, case[a]), (b, case[b])) for a, b in combinations(case, 2)}


def cover(factors: dict[str, list]) -> list[dict]:
    """Cases in which every two values of any two factors meet. The same list every time, nearly the shortest."""
    missing = {((a, x), (b, y)) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]}
    left, random, chosen = sorted(missing, key=str), Random(0), []
    for pair in left:
        if pair in missing:
            around = [_around(pair, factors, missing, random) for _ in range(20)]
            chosen.append(max(around, key=lambda case: len(pairs(case) & missing)))
            missing -= pairs(chosen[-1])
    return chosen


def _around(pair: tuple, factors: dict[str, list], missing: set, random: Random) -> dict:
    """A case with a pair: other factors in random order, each with the value that is in most of the missing pairs."""
    case, place = dict(pair), {name: i for i, name in enumerate(factors)}

    def meets(new: tuple) -> int:
        return sum(((old, new) if place[old[0]] < place[new[0]] else (new, old)) in missing for old in case.items())

    others = [name for name in factors if name not in case]
    for name in random.sample(others, len(others)):
        values = random.sample(factors[name], len(factors[name]))
        case[name] = max(values, key=lambda value, name=name: meets((name, value)))
    return {name: case[name] for name in factors}


def fewest(cases: list[dict], shows: Callable[[dict], set[Hashable]]) -> list[dict]:
    """Greedily, cases that show everything that some case shows."""
    missing, chosen = set().union(*map(shows, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(shows(case) & missing)))
        missing -= shows(chosen[-1])
    return chosen
