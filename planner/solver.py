"""The optimum of the integer program (`planner.program`), by adding the rows that bind until its bound meets the walk.

There are more paths than can be written down, so they are added as they bind: solve, walk the schedule with the stages
found, add its critical paths, and solve again, first the linear relaxation, then the integer program. Every path is a
lower bound on the walked step time for any stages (the step is the longest path), so the optimum of each such program
is a lower bound on the best walked step time. It ends when the bound meets the walked time of the best stages found:
then these are optimal for the walk itself, fill and drain, unequal stages and messages included, under every schedule.
For p equal stages and no messages the paths give the textbook (m + p - 1)(f + b) of GPipe and 1F1B (Narayanan et al.
2021, arXiv 2104.04473, section 2.2). The same is done for moments of memory: only those that are violated are added.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from planner.critical_path import Graph, Path
from planner.greedy import improve
from planner.pipeline import Counts, Edge, Moment, Option, Piece, Pipeline, Run, excess_bytes, moment_bytes, stage_loads, stage_seconds
from planner.program import TOLERANCE, Program

__all__ = [
    "TOLERANCE", "Counts", "Edge", "Moment", "Option", "Patience", "Piece", "Pipeline", "Run", "Solution", "excess_bytes", "moment_bytes",
    "solve_pipeline", "stage_loads", "stage_seconds",
]  # fmt: skip

RELAXED_PROGRESS, STALLED_ROUNDS = 1e-3, 3
"""Rounds of the linear relaxation end when so many in a row (one where cuts are free) raise the bound by no more than this share."""
NEARLY = 0.05
"""Stages of an integer program are improved by hand where they are no more than this share slower than the best known."""


@dataclass(frozen=True, slots=True)
class Solution:
    """The best stages found, and what is proven about all others."""

    counts: Counts | None
    """None when nothing better than the cutoff exists (or was found in time)."""
    seconds: float
    """Walked step time of `counts`; infinite without."""
    bound: float
    """No stages take less. Infinite when none fit, the cutoff when none are better."""
    proven: bool
    """Whether the bound meets the seconds, the cutoff or infinity."""
    solver: str
    paths: tuple[Path, ...]
    num_programs: int


class Patience(NamedTuple):
    """CPU-seconds of this process after which a small gap is accepted."""

    until: float
    """A `time.process_time()`."""
    gap: float

    def left(self) -> float:
        return self.until - time.process_time()


def solve_pipeline(
    pipeline: Pipeline,
    graph: Graph,
    *,
    cutoff: float = math.inf,
    start: Counts | None = None,
    paths: Iterable[Path] = (),
    lower_bound: float = 0.0,
    deadline: float | None = None,
    solver: str | None = None,
    relaxed_rounds: int | None = None,
    patience: Patience | None = None,
) -> Solution:
    """The stages with the least walked step time, if they take less than `cutoff` seconds.

    `start` are stages that fit, near which paths are looked for first, and `paths` known paths of the same graph; both
    only save time. `deadline` is a `time.monotonic()`, `solver` "HiGHS" or "CBC" (default: the first that is installed).
    Once `patience` has run out, a bound within its gap of the best known is enough.
    With `relaxed_rounds` at most so many linear relaxations are solved and no integer program, for the bound alone.
    Raises SolverError when no solver is installed or the one chosen fails.
    """
    program = Program(pipeline, cutoff, solver)
    program.add_paths(graph.rank_paths())
    program.add_paths(paths)
    middle = stage_seconds(pipeline, start) if start else None
    if middle:
        program.add_paths(graph.critical_paths(middle)[1])
    best, best_seconds, bound, integer, relaxed, stalled = None, math.inf, lower_bound, False, 0.0, 0
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return _solution(program, best, best_seconds, bound, False)
        if patience is not None and bound >= min(best_seconds, cutoff) * (1 - patience.gap):
            if patience.left() <= 0:
                return _solution(program, best, best_seconds, bound, False)
            left = min(left or math.inf, patience.left())
        if patience is not None and patience.left() <= 0:
            program.gap = patience.gap / 5
        outcome = program.run(integer, left)
        if outcome.infeasible:
            return _solution(program, best, best_seconds, max(bound, min(best_seconds, cutoff)), True)
        bound = max(bound, min(outcome.bound, best_seconds))
        if bound >= cutoff * (1 - TOLERANCE):
            return _solution(program, best, best_seconds, bound, True)
        if outcome.values is None:
            return _solution(program, best, best_seconds, bound, False)
        if not integer:
            done = program.separate(graph, stage_seconds(pipeline, outcome.values), middle, outcome.bound)
            fits = not pipeline.patterns or not program.add_violated_moments(outcome.values)
            stalled = stalled + 1 if outcome.bound < relaxed * (1 + RELAXED_PROGRESS) else 0
            done = (done and fits) or stalled == (STALLED_ROUNDS if pipeline.patterns else 1)
            relaxed = outcome.bound
            if relaxed_rounds is not None and (done or program.num_programs >= relaxed_rounds):
                return _solution(program, None, math.inf, bound, False)
            integer = done
            continue
        counts: Counts = tuple(tuple(tuple(round(x) for x in row) for row in rows) for rows in outcome.values)
        violated = program.add_violated_moments(counts)
        seconds = stage_seconds(pipeline, counts)
        length, critical = graph.critical_paths(seconds)
        if pipeline.patterns and not violated and best_seconds > length * (1 - NEARLY):
            counts, critical = improve(pipeline, graph, counts)
            seconds = stage_seconds(pipeline, counts)
            length = graph.longest(seconds)
        if not violated and length < min(best_seconds, cutoff):
            best, best_seconds, middle = counts, length, seconds
            program.lower_cutoff(length)
        if best is not None and bound >= best_seconds * (1 - TOLERANCE):
            return _solution(program, best, best_seconds, bound, True)
        if not program.add_paths(critical) + violated:
            # the walk agrees with a known path, so that what is left is the solver's own tolerance
            return _solution(program, best, best_seconds, bound, best is not None and bound >= best_seconds * (1 - 10 * TOLERANCE))


def _solution(program: Program, counts: Counts | None, seconds: float, bound: float, proven: bool) -> Solution:
    return Solution(counts, seconds, bound, proven, program.solver, tuple(program.known_paths), program.num_programs)
