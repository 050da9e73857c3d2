"""The simplex method of Nelder and Mead 1965 (The Computer Journal 7(4)), and what calibration minimises with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence


def minimise(function: Callable[[Sequence[float]], float], start: Sequence[float], step: float = 0.5, rounds: int = 600) -> list[float]:
    """The simplex method: reflection 1, expansion 2, contraction and shrinkage 1/2."""
    simplex = [list(start)] + [[x + (step if i == j else 0.0) for j, x in enumerate(start)] for i in range(len(start))]
    scored = sorted(((function(point), point) for point in simplex), key=lambda item: item[0])
    count = len(start)
    for _ in range(rounds):
        if scored[-1][0] - scored[0][0] < 1e-9:
            break
        centre = [sum(point[j] for _, point in scored[:-1]) / count for j in range(count)]
        worst = scored[-1]

        def along(factor: float, centre: list[float] = centre, point: list[float] = worst[1]) -> tuple[float, list[float]]:
            moved = [c + factor * (c - x) for c, x in zip(centre, point, strict=True)]
            return function(moved), moved

        reflected = along(1.0)
        if reflected[0] < scored[0][0]:
            expanded = along(2.0)
            scored[-1] = min(expanded, reflected, key=lambda item: item[0])
        elif reflected[0] < scored[-2][0]:
            scored[-1] = reflected
        else:
            contracted = along(0.5 if reflected[0] < worst[0] else -0.5)
            if contracted[0] < min(worst[0], reflected[0]):
                scored[-1] = contracted
            else:
                best = scored[0][1]
                shrunk = [[(b + x) / 2 for b, x in zip(best, point, strict=True)] for _, point in scored[1:]]
                scored = [scored[0], *((function(point), point) for point in shrunk)]
        scored.sort(key=lambda item: item[0])
    return scored[0][1]


def squared_logarithms(ratios: Iterable[float]) -> float:
    """Of ratios of predicted over measured: a factor of 2 too much is as bad as one too little."""
    return sum(math.log(ratio) ** 2 for ratio in ratios)
