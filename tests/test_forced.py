"""What memory forces a rank to recompute against all choices, and the ILP of one regular cut against enumeration."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from planner.choices import rank_choices
from planner.critical_path import graph, rank_paths
from planner.forced import _cheapest, forced, forced_in_the_mean, path_bound
from planner.greedy import fit, frozen, improve, place
from planner.moments import mean_in_flight, memory_moments
from planner.pipeline import Moment, Option, Piece, Pipeline, Run, excess_bytes, stage_seconds
from planner.plan import SPLIT_BACKWARD_SCHEDULES, stage_ranks
from planner.solver import solve_pipeline
from tests.test_solver import giving_back

SHAPES = [("1F1B", 3, 1, 5), ("Interleaved1F1B", 2, 2, 4), ("InterleavedZeroBubble", 2, 2, 6), ("ZBVZeroBubble", 2, 2, 5)]


def random_cut(rng, shape):
    """A chain like a transformer's, its ends with one option and its blocks with up to three, and the sizes of its stages."""
    schedule, p, v, _ = shape
    options, saved, slow = [], rng.uniform(3, 6), 0.0
    for name in ("none", "selective", "full")[: rng.choice([2, 3, 3])]:
        again = 0.0 if name == "none" else slow
        transients = (rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0, saved), rng.uniform(0, 1))
        options.append(Option(name, 1.0, 2.0 + again, 1.0 + again, 1.0, saved, *transients))
        saved, slow = saved / rng.uniform(1.5, 3), slow + rng.uniform(0.2, 0.7)
    end = Option("none", 0.4, 0.8, 0.4, 0.4, rng.uniform(0, 2))
    sizes = [rng.choice([1, 1, 2]) for _ in range(p * v)]
    sizes[0], sizes[-1] = sizes[0] + 1, sizes[-1] + 1
    runs = (Run("embedding", 1, (end,), 1.0, 1.0), Run("block", sum(sizes) - 2, tuple(options), rng.uniform(0, 2), 1.0), Run("head", 1, (end,), 1.0))
    kinds = "FIW" if schedule in SPLIT_BACKWARD_SCHEDULES else "FB"
    pipeline = Pipeline(
        runs, stage_ranks(schedule, p, v), (math.inf,) * p, memory_moments(*shape), kinds, {("SEND_F", 0): 0.1}, (Piece(0.1, 0.2),),
        patterns=(tuple(sizes),),
    )  # fmt: skip
    if rng.random() < 0.5:
        pipeline = giving_back(rng, pipeline)
    full = excess_bytes(replace(pipeline, limits=(0.0,) * p), frozen(place(pipeline, sizes)))[0]
    return replace(pipeline, limits=tuple(rng.uniform(0.5, 1.0) * full for _ in range(p))), sizes


def choices(pipeline, sizes):
    """All ways to recompute the blocks of these stages."""
    rows = place(pipeline, sizes)
    options = range(len(pipeline.runs[1].options))
    ways = []
    for stage in rows:
        blocks = sum(stage[1])
        ways.append([row for row in itertools.product(range(blocks + 1), repeat=len(options)) if sum(row) == blocks])
    for choice in itertools.product(*ways):
        yield tuple((tuple(stage[0]), row, tuple(stage[2])) for stage, row in zip(rows, choice, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forced_seconds_are_never_above_and_the_ilp_with_them_finds_the_optimum(shape):
    rng, whole, tight, fitting = random.Random(str(shape)), graph(*shape), 0, 0
    for _ in range(12):
        pipeline, sizes = random_cut(rng, shape)
        first = pipeline.runs[1].options[0]
        extra = [sum(option.seconds(kind) - first.seconds(kind) for kind in pipeline.kinds) for option in pipeline.runs[1].options]
        best, least = math.inf, [math.inf] * len(pipeline.limits)
        for counts in choices(pipeline, sizes):
            if excess_bytes(pipeline, counts)[0] <= 0:
                best = min(best, whole.longest(stage_seconds(pipeline, counts)))
                for rank in range(len(least)):
                    mine = [stage[1] for stage, owner in zip(counts, pipeline.ranks, strict=True) if owner == rank]
                    least[rank] = min(least[rank], sum(n * each for row in mine for n, each in zip(row, extra, strict=True)))
        rows = place(pipeline, sizes)
        need = forced(pipeline, rows)
        mean = forced_in_the_mean(pipeline, rows, mean_in_flight(*shape), 0.0)
        for known, rough, true in zip(need.seconds, mean, least, strict=True):
            assert known <= true * (1 + 1e-9)
            assert rough <= true * (1 + 1e-9)
            tight += 0 < known < math.inf
        assert path_bound(rank_paths(*shape), stage_seconds(pipeline, rows), need, pipeline.ranks) <= best * (1 + 1e-9)
        solution = solve_pipeline(replace(pipeline, forced=need.seconds if math.inf not in need.seconds else ()), whole)
        assert solution.proven
        assert solution.seconds == pytest.approx(best, rel=2e-6)
        start = fit(pipeline, sizes)
        if start is not None:
            fitting += 1
            better, paths = improve(pipeline, whole, start)
            assert excess_bytes(pipeline, better)[0] <= 0
            assert best * (1 - 1e-9) <= whole.longest(stage_seconds(pipeline, better)) <= whole.longest(stage_seconds(pipeline, start))
            assert paths
    assert tight > 3 and fitting > 3, "too few of the instances bind to say anything"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_choices_of_ranks_hold_the_optimum_and_their_bound_stays_below_it(shape):
    rng, whole, fitting, dropped = random.Random(f"{shape} choices"), graph(*shape), 0, 0
    for _ in range(12):
        pipeline, sizes = random_cut(rng, shape)
        rows = place(pipeline, sizes)
        fitting_counts = [counts for counts in choices(pipeline, sizes) if excess_bytes(pipeline, counts)[0] <= 0]
        fits = {counts: whole.longest(stage_seconds(pipeline, counts)) for counts in fitting_counts}
        best = min(fits.values(), default=math.inf)
        paths = {path: None for path in rank_paths(*shape)}
        for counts in list(fits)[:3]:
            paths.update(dict.fromkeys(whole.critical_paths(stage_seconds(pipeline, counts))[1]))
        for cutoff in (min(best, 100.0) * 2, best * 1.03, best * 0.999):
            if cutoff == math.inf:
                continue
            found = rank_choices(pipeline, rows, list(paths), cutoff)
            if best < cutoff:
                assert found.bound <= best * (1 + 1e-9)
                assert all(found.choices)
                fitting += 1
            else:
                assert found.bound == math.inf or best == math.inf or found.bound <= best
            if found.bound < cutoff and all(found.choices):
                for rank, several in enumerate(found.choices):
                    own = [stage for stage, owner in enumerate(pipeline.ranks) if owner == rank]
                    ways = math.prod(math.comb(sum(rows[stage][1]) + len(pipeline.runs[1].options) - 1, sum(rows[stage][1])) for stage in own)
                    dropped += len(several) < ways
            listed = replace(pipeline, choices=found.choices)
            solution = solve_pipeline(listed, whole, cutoff=cutoff) if found.bound < cutoff else None
            if best < cutoff:
                assert solution is not None and solution.proven
                assert solution.seconds == pytest.approx(best, rel=2e-6)
                assert excess_bytes(pipeline, solution.counts)[0] <= 1e-6
            else:
                assert solution is None or solution.counts is None
    assert fitting > 6 and dropped > 6, "too few of the instances fit to say anything"


def test_the_fewest_layers_are_found_where_some_options_save_nothing_or_less():
    rng = random.Random(5)
    for _ in range(200):
        options = tuple(Option(str(index), 1.0, 2.0, 1.0, 1.0, rng.uniform(0, 4)) for index in range(rng.choice([2, 3])))
        run, extra = Run("block", 9, options), sorted(rng.uniform(0.1, 1) for _ in options[1:])
        moment, counts = Moment(0, ((0, rng.randint(1, 3), 0), (1, rng.randint(1, 3), 0)), 0, "F"), ((rng.randint(0, 4),), (rng.randint(1, 4),))
        layers = [saved for stage, saved, _ in moment.in_flight for _ in range(*counts[stage])]
        savings = [[saved * (options[0].saved - other.saved) for other in options[1:]] for saved in layers]
        lack = rng.uniform(0, 1.2) * sum(max(0.0, *row) for row in savings) + 1e-3
        ones = [0.0, *itertools.accumulate(sorted((row[0] for row in savings), reverse=True))]
        more = [0.0, *itertools.accumulate(sorted((row[-1] - row[0] for row in savings), reverse=True))]
        ways = [(a, b) for a in range(len(savings) + 1) for b in range(a + 1 if len(extra) > 1 else 1) if ones[a] + more[b] >= lack * (1 - 1e-9)]
        least = min(((a - b) * extra[0] + (b * extra[1] if b else 0.0) for a, b in ways), default=math.inf)
        assert _cheapest(run, counts, 0, moment, extra, lack) == pytest.approx(least)
