"""Lower bounds on candidates whose cuts are regular, cut by cut, each dearer than the one before, and the ILP of one of the cuts.

The sizes of the stages are known there (`chain.regular_sizes`), so that only what is recomputed is open.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from planner import bounds, greedy
from planner.candidates import shape_of
from planner.chain import Costs
from planner.choices import rank_choices
from planner.critical_path import Path, graph, path_seconds, rank_paths
from planner.forced import Forced, forced, forced_in_the_mean, path_bound
from planner.moments import mean_in_flight
from planner.pipeline import Pipeline, stage_seconds
from planner.plan import Decisions, Recompute

MAX_PATHS = 48
"""Critical paths of a schedule's graph that walks add, and that are handed on from one program to the next."""

Sizes = tuple[int, ...]
"""Layers per stage of one cut."""


class RegularCuts:
    """What is known of each candidate's cuts, and the critical paths seen of each schedule's graph. Seconds are those of whole steps."""

    def __init__(self, costs: Costs, levels: tuple[Recompute, ...], shared: bool) -> None:
        self.costs, self.levels, self.shared = costs, levels, shared
        self.paths: dict[tuple[str, int, int, int], dict[Path, None]] = {}
        self.known: dict[Decisions, dict[Sizes, tuple[float, bool]]] = {}
        """Lower bounds, and whether each is that of a walk or path."""
        self.needs: dict[tuple[Decisions, Sizes], Forced] = {}

    def pool(self, candidate: Decisions) -> dict[Path, None]:
        """The paths seen of the candidate's graph; to be added to."""
        return self.paths.setdefault(shape_of(candidate), {})

    def rough(self, candidate: Decisions, pipeline: Pipeline, goal: float) -> dict[Sizes, tuple[float, bool]]:
        """The bounds of a candidate's cuts as known so far, at first those of the fullest rank."""
        found = self.known.get(candidate)
        if found is None:
            fixed, recomputed = self.costs.step_seconds, self._recomputed(candidate, pipeline)
            rough = bounds.regular_bounds(self.costs, candidate, self.levels, recomputed=recomputed, enough=goal - fixed)
            found = self.known[candidate] = {sizes: (bound + fixed, False) for bound, group in rough for sizes in group}
        return found

    def _recomputed(self, candidate: Decisions, pipeline: Pipeline) -> Callable[[Sizes], tuple[float, ...]]:
        """What each rank of a regular cut must recompute, from the mean of its fullest moments."""
        means = mean_in_flight(*shape_of(candidate))
        needs = self.costs.bytes(candidate).values()
        slack = max(0.0, *(-min(need.forward_transient, need.backward_transient, need.weight_transient) for need in needs))
        return lambda sizes: forced_in_the_mean(pipeline, greedy.place(pipeline, list(sizes)), means, slack)

    def walks(self, candidate: Decisions, pipeline: Pipeline, goal: float, *, every: bool = False) -> list[tuple[float, Sizes]]:
        """The regular cuts with a lower bound on their step time, least first: that of the walk without recomputation.

        More recomputation makes no action shorter and so no step. A cut that a bound or a known path already shows to be
        slower than the goal is not walked, nor, unless `every` one is asked for, than the fastest walk.
        """
        pool = self.pool(candidate)
        fixed = self.costs.step_seconds
        found = self.rough(candidate, pipeline, goal)
        best = min((bound for bound, walked in found.values() if walked), default=math.inf)
        for sizes, (bound, walked) in sorted(found.items(), key=lambda item: (item[1], item[0])):
            if walked or (not self.shared and bound >= goal) or (bound >= best and not every):
                continue
            whole = graph(*shape_of(candidate))
            seconds = stage_seconds(pipeline, greedy.frozen(greedy.place(pipeline, list(sizes))))
            shown = max((path_seconds(path, seconds) for path in pool), default=0.0) + fixed
            if shown >= goal and not self.shared:
                found[sizes] = (shown, True)
                continue
            length, paths = whole.critical_paths(seconds) if len(pool) < MAX_PATHS else (whole.longest(seconds), ())
            pool.update(dict.fromkeys(paths))
            found[sizes] = (length + fixed, True)
            best = min(best, length + fixed)
        return sorted((bound, sizes) for sizes, (bound, _) in found.items())

    def forced(self, candidate: Decisions, pipeline: Pipeline, goal: float, *, every: bool = False) -> list[tuple[float, Sizes]]:
        """The regular cuts with their walk's bound, raised by the recomputation that each rank's memory forces, least first.

        Bounds of cuts above the least are only raised where `every` one is asked for.
        """
        shape, fixed = shape_of(candidate), self.costs.step_seconds
        found, least = [], goal
        for bound, sizes in self.walks(candidate, pipeline, goal):
            if bound < least:
                rows = greedy.place(pipeline, list(sizes))
                need = self.needs.get((candidate, sizes))
                if need is None:
                    need = self.needs[candidate, sizes] = forced(pipeline, rows)
                if any(need.seconds):
                    paths = [*rank_paths(*shape), *self.paths.get(shape, ())]
                    bound = max(bound, path_bound(paths, stage_seconds(pipeline, rows), need, pipeline.ranks) + fixed)
                if not every:
                    least = min(least, bound)
            found.append((bound, sizes))
        return sorted(found)

    def one(self, candidate: Decisions, pipeline: Pipeline, sizes: Sizes) -> Pipeline:
        """The pipeline with one of its cuts, whose bound `forced` has raised."""
        return dataclasses.replace(pipeline, patterns=(sizes,), forced=self.needs[candidate, sizes].seconds)

    def chosen(self, candidate: Decisions, one: Pipeline, above: float, goal: float) -> tuple[Pipeline, float]:
        """A pipeline of known sizes with the choices of each rank that may beat the goal, and its bound, infinite where none may."""
        shape, fixed = shape_of(candidate), self.costs.step_seconds
        paths = list(dict.fromkeys([*rank_paths(*shape), *self.paths.get(shape, ())]))
        found = rank_choices(one, greedy.place(one, list(one.patterns[0])), paths, goal - fixed)
        return dataclasses.replace(one, choices=found.choices), max(above, found.bound + fixed)
