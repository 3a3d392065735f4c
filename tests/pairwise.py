"""A small set of cases in which every two values of any two factors meet."""

from itertools import combinations, product


def pairs(case: dict) -> set:
    return {((a, case[a]), (b, case[b])) for a, b in combinations(case, 2)}


def cover(factors: dict[str, list], allowed=lambda case: True) -> list[dict]:
    """Greedy: the case that brings the most new pairs, until none does. The same list every time."""
    cases = [c for c in (dict(zip(factors, values)) for values in product(*factors.values())) if allowed(c)]
    missing = set().union(*(pairs(c) for c in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda c: len(pairs(c) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
