"""Bounds and first plans for chains of layers that all differ: by walks over the cuts, before any integer program.

For 1F1B and GPipe with one stage per rank. With c = f + b of a stage, P the seconds of all layers before it, m
micro-batches, and tails (reduction and optimizer) left out where they only add:

    T >= P_j + m c_j               rank j waits for its first micro-batch, and the last one's gradients go back
    T >= P_all + (m - 1) c_j                                GPipe, a flow shop of equal jobs
    T >= P_all + (m - 1) b_j + max(0, m - p + j) f_j        1F1B: stage j has run p - 1 - j forwards ahead

and each boundary on the way adds the shortest message there and back.

A layer on stage j needs its states and j's micro-batches in flight; the least recomputation that makes a stage fit is a
knapsack, whose linear relaxation bounds it from below (Dantzig 1957) and which is rounded up for a plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from planner.pipeline import Counts, Edge, Pipeline, excess_bytes


class _Layer(NamedTuple):
    forward: float
    backward: float
    states: float
    saved: float
    transient: float


class _Relief(NamedTuple):
    """Bytes that a stage frees when a layer is recomputed, and the seconds that this takes."""

    freed: float
    seconds: float
    layer: int


class ChainBound:
    """The cuts of one pipeline, as prefix sums over its layers, all with one stage per rank and one layer per run."""

    def __init__(self, pipeline: Pipeline, schedule: str, num_microbatches: int) -> None:
        self.pipeline, self.schedule, self.m = pipeline, schedule, num_microbatches
        self.p, self.n = pipeline.num_stages, len(pipeline.runs)
        self.layers = []
        for run in pipeline.runs:
            best = min(run.options, key=lambda option: option.forward + option.backward)
            transient = min(max(option.forward_transient, option.backward_transient) for option in run.options)
            self.layers.append(_Layer(best.forward, best.backward, run.states, best.saved, transient))
        self.seconds = [0.0, *itertools.accumulate(layer.forward + layer.backward for layer in self.layers)]
        self.forward = [0.0, *itertools.accumulate(layer.forward for layer in self.layers)]
        self.states = [0.0, *itertools.accumulate(layer.states for layer in self.layers)]
        self.saved = [0.0, *itertools.accumulate(layer.saved for layer in self.layers)]
        self.in_flight, self.deferred = [0] * self.p, [0] * self.p
        for moment in pipeline.moments:
            for stage, saved, deferred in moment.in_flight:
                self.in_flight[stage] = max(self.in_flight[stage], saved)
                self.deferred[stage] = max(self.deferred[stage], deferred)
        self.relief: list[list[_Relief]] = []
        """By stage, the cheapest per byte first."""
        for flight, deferred in zip(self.in_flight, self.deferred, strict=True):
            found = []
            for index, run in enumerate(pipeline.runs):
                best = min(run.options, key=lambda option: option.forward + option.backward)
                least = min(run.options, key=lambda option: option.saved)
                slower = least.forward + least.backward - best.forward - best.backward
                freed = flight * (best.saved - least.saved) + deferred * (best.deferred - least.deferred)
                if freed > 0:
                    found.append(_Relief(freed, slower, index))
            self.relief.append(sorted(found, key=lambda item: item.seconds / item.freed))
        self._borders()
        shortest = min((edge.message for edge in pipeline.edges if edge.target == edge.source + 1), default=0.0)
        fixed = pipeline.fixed_seconds
        hops = [
            fixed.get(("SEND_F", s), 0.0) + fixed.get(("SEND_B", s + 1), 0.0) + 2 * shortest * pipeline.slow(s) for s in range(self.p - 1)
        ]
        self.hops = [0.0, *itertools.accumulate(hops)]
        """Seconds of messages to each stage and back, at the least."""

    def _borders(self) -> None:
        """Seconds that edges add to stages: exactly for a segment (`border`), and at the least whatever the other cuts are."""
        charged = [edge for edge in self.pipeline.edges if edge.entering or edge.leaving]
        near = [edge for edge in charged if edge.target == edge.source + 1]
        complete = len({edge.source for edge in near}) == self.n - 1
        self.least_entering = min((edge.entering for edge in near), default=0.0) if complete else 0.0
        self.least_leaving = min((edge.leaving for edge in near), default=0.0) if complete else 0.0
        far = [edge for edge in charged if edge.target > edge.source + 1]
        # of a layer on a stage so late that the sender can't be on it
        self.late = [
            [0.0, *itertools.accumulate(sum(e.entering for e in far if e.target == layer and e.source < stage) for layer in range(self.n))]
            for stage in range(self.p)
        ] if far else []  # fmt: skip
        self.border: list[list[float]] = []
        coming: list[list[Edge]] = [[] for _ in range(self.n)]
        leaving = [0.0] * self.n
        for edge in charged:
            coming[edge.target].append(edge)
            leaving[edge.source] += edge.leaving
        for first in range(self.n) if charged else ():
            row, inside, outward = [0.0] * (self.n + 1), 0.0, 0.0
            for end in range(first + 1, self.n + 1):
                outward += leaving[end - 1]
                for edge in coming[end - 1]:
                    if edge.source < first:
                        inside += edge.entering
                    else:
                        outward -= edge.leaving
                row[end] = inside + outward
            self.border.append(row)

    def stage(self, first: int, end: int, stage: int) -> float:
        """At least so many seconds for one micro-batch, recomputation included; infinite where it can't fit.

        No more for a segment inside this one: what an edge costs is only counted where it is certain.
        """
        return self.seconds[end] - self.seconds[first] + self.charged(first, end, stage) + self.relieved(first, end, stage)

    def charged(self, first: int, end: int, stage: int) -> float:
        """Seconds that edges add to a stage's forward pass for certain."""
        seconds = (self.least_entering if stage else 0.0) + (self.least_leaving if stage < self.p - 1 else 0.0)
        return seconds + (self.late[stage][end] - self.late[stage][first] if self.late else 0.0)

    def segment(self, first: int, end: int, stage: int) -> float:
        """As `stage`, with all that edges cost."""
        seconds = self.seconds[end] - self.seconds[first] + (self.border[first][end] if self.border else 0.0)
        return seconds + self.relieved(first, end, stage)

    def relieved(self, first: int, end: int, stage: int) -> float:
        """Seconds of the least recomputation that makes a stage fit; infinite where none does."""
        seconds, over = 0.0, self.short(first, end, stage)
        if over <= 0:
            return seconds
        for freed, slower, layer in self.relief[stage]:
            if first <= layer < end:
                if freed >= over:
                    return seconds + slower * over / freed
                seconds, over = seconds + slower, over - freed
        return seconds if over <= 1e-9 * abs(self.pipeline.limits[0]) else math.inf

    def short(self, first: int, end: int, stage: int) -> float:
        """Bytes that a stage needs beyond its limit, nothing recomputed and without transients."""
        held = self.in_flight[stage] * (self.saved[end] - self.saved[first])
        return self.states[end] - self.states[first] + held - self.pipeline.limits[self.pipeline.ranks[stage]]

    def _furthest(self, first: int, stage: int, fits: Callable[[int], bool]) -> int:
        """The last end for which `fits` holds, which does for all ends before it."""
        low, high = first, self.n - (self.p - stage - 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def bound(self, goal: float) -> float:
        """Seconds that no cut beats; infinite where no cut fits or reaches `goal`."""
        least = max(self.seconds[-1] + self.hops[-1], self.m * self.seconds[-1] / self.p)
        self.total = self.seconds[-1] + (self.p - 1) * (self.least_entering + self.least_leaving)
        if self._reaches(least):
            return least
        high = goal
        if high == math.inf:
            high = 2 * self.m * self.seconds[-1] + 1e-12
            most = 2 * sum(max(o.forward + o.backward for o in run.options) for run in self.pipeline.runs) * self.m + 1e-12
            high = max(high, most) + 2 * self.hops[-1]
        if not self._reaches(high):
            return math.inf
        low = least
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self._reaches(middle) else (middle, high)
        return low

    def _reaches(self, step: float) -> bool:
        """Whether cuts exist of which no rank's path is longer than `step`: each stage as long as it can be."""
        at = 0
        for stage in range(self.p):
            end = self._furthest(at, stage, functools.partial(self._in_time, at, stage, step))
            if end == at:
                return False
            at = end
        return at == self.n

    def _in_time(self, first: int, stage: int, step: float, end: int) -> bool:
        """Whether the paths along a stage's rank are no longer than `step`."""
        taken, m, rest = self.stage(first, end, stage), self.m, step - self.total - self.hops[-1]
        if taken == math.inf:
            return False
        if self.schedule == "Naive":
            return m * (self.seconds[-1] + self.hops[-1]) <= step
        if self.seconds[first] + self.hops[stage] + m * taken > step:
            return False
        if self.schedule == "GPipe":
            return (m - 1) * taken <= rest
        forward = self.forward[end] - self.forward[first] + self.charged(first, end, stage)
        return (m - 1) * (taken - forward) + max(0, m - self.p + stage) * forward <= rest

    def balanced(self, goal: float = math.inf) -> Counts | None:
        """Cuts of the least Σ c + (m - 1) max c, by shortest paths under falling ceilings of c; None where none fits.

        Stages that are too long for any cut to take less than `goal` are left out.
        """
        most = (goal - self.seconds[-1]) / (self.m - 1) if self.m > 1 else goal
        tables = [[self._row(i, stage, most) for i in range(self.n)] for stage in range(self.p)]
        ceiling, best, chosen = math.inf, math.inf, None
        while (found := _cut(tables, self.n, ceiling)) is not None:
            total, largest, edges = found
            if total + (self.m - 1) * largest < best:
                counts = self.counts(edges)
                if counts is not None:
                    best, chosen = total + (self.m - 1) * largest, counts
            ceiling = largest
        return chosen

    def _row(self, first: int, stage: int, most: float) -> list[float]:
        """Seconds of a stage from `first` to each end, infinite once it is too long or can't fit."""
        row = [math.inf] * (self.n + 1)
        if stage <= first <= self.n - self.p + stage:
            for end in range(first + 1, self.n - (self.p - stage - 1) + 1):
                if self.stage(first, end, stage) > most:
                    break
                row[end] = self.segment(first, end, stage)
        return row

    def counts(self, edges: tuple[int, ...]) -> Counts | None:
        """These cuts with the least recomputation, rounded up, that makes every stage fit."""
        chosen = [min(range(len(run.options)), key=lambda o, run=run: run.options[o].forward + run.options[o].backward)  # type: ignore[misc]
                  for run in self.pipeline.runs]  # fmt: skip
        for stage, (a, b) in enumerate(itertools.pairwise(edges)):
            over = self.short(a, b, stage)
            inside = [item for item in self.relief[stage] if a <= item.layer < b]
            while over > 0 and inside:
                pick = min((item for item in inside if item.freed >= over), key=lambda item: item.seconds, default=inside[0])
                inside.remove(pick)
                chosen[pick.layer], over = self._least(pick.layer), over - pick.freed
        for _ in range(self.n + 1):
            counts = tuple(
                tuple(
                    tuple(int(a <= layer < b and o == chosen[layer]) for o in range(len(run.options)))
                    for layer, run in enumerate(self.pipeline.runs)
                )
                for a, b in itertools.pairwise(edges)
            )
            over, moment = excess_bytes(self.pipeline, counts)
            if over <= 0:
                return counts
            a, b = edges[moment.stage], edges[moment.stage + 1]
            fitting = [item for item in self.relief[moment.stage] if a <= item.layer < b and chosen[item.layer] != self._least(item.layer)]
            if not fitting:
                return None
            enough = [item for item in fitting if item.freed >= over]
            pick = min(enough, key=lambda item: item.seconds) if enough else fitting[0]
            chosen[pick.layer] = self._least(pick.layer)
        return None

    def _least(self, layer: int) -> int:
        options = self.pipeline.runs[layer].options
        return min(range(len(options)), key=lambda o: options[o].saved)


def _cut(tables: list[list[list[float]]], count: int, ceiling: float) -> tuple[float, float, tuple[int, ...]] | None:
    """The least sum over cuts into stages that stay below the ceiling: sum, largest, cuts."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
    for number, table in enumerate(tables):
        left = len(tables) - number - 1
        row: dict[int, tuple[float, int]] = {}
        for i, (total, _) in best[-1].items():
            for j in range(i + 1, count - left + 1):
                value = table[i][j]
                if value < ceiling and (j not in row or total + value < row[j][0]):
                    row[j] = (total + value, i)
        best.append(row)
    if count not in best[-1]:
        return None
    cuts = [count]
    for row in reversed(best[1:]):
        cuts.append(row[cuts[-1]][1])
    edges = tuple(reversed(cuts))
    largest = max(table[i][j] for table, (i, j) in zip(tables, itertools.pairwise(edges), strict=True))
    return best[-1][count][0], largest, edges
