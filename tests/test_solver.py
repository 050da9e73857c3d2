"""The integer program against full enumeration, and its refusals."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from planner.critical_path import graph
from planner.errors import SolverError
from planner.plan import SPLIT_BACKWARD_SCHEDULES, stage_ranks
from planner.schedule import compute_actions
from planner.solver import Moment, Option, Piece, Pipeline, Run, excess_bytes, solve_pipeline, stage_seconds

SHAPES = [
    ("1F1B", 1, 1, 3),
    ("1F1B", 2, 1, 4),
    ("1F1B", 3, 1, 3),
    ("1F1B", 3, 1, 7),
    ("GPipe", 2, 1, 4),
    ("GPipe", 3, 1, 5),
    ("Naive", 2, 1, 2),
    ("Interleaved1F1B", 2, 2, 4),
    ("InterleavedZeroBubble", 2, 2, 4),
    ("ZBVZeroBubble", 2, 2, 5),
]


def moments(schedule, p, v, m):
    """Every moment of every rank, straight from the action lists."""
    found = set()
    for rank, actions in enumerate(compute_actions(schedule, p, v, m)):
        saved = {stage: 0 for _, stage, _ in actions}
        deferred = dict(saved)
        for kind, stage, _ in actions:
            saved[stage] += kind == "F"
            live = tuple((each, saved[each], deferred[each]) for each in sorted(saved))
            found.add(Moment(rank, live, stage, "B" if kind == "I" else kind))
            saved[stage] -= kind in "BI"
            deferred[stage] += (kind == "I") - (kind == "W")
    return tuple(sorted(found))


def random_pipeline(rng, shape):
    schedule, p, v, _ = shape
    runs = []
    for index in range(rng.choice([1, 2, 3, 3])):
        options = []
        saved, slow = rng.uniform(1, 5), 1.0
        for name in ("none", "full")[: rng.choice([1, 2, 2])]:
            forward, back_input, weight = rng.uniform(0.5, 2), slow * rng.uniform(0.5, 2), rng.uniform(0.5, 2)
            seconds = (forward, back_input + weight, back_input, weight)
            options.append(Option(name, *seconds, saved, rng.uniform(0, 2), rng.uniform(0, 4), rng.uniform(0, 4), rng.uniform(0, 2)))
            saved, slow = saved / rng.uniform(1.5, 5), slow * 1.7
        runs.append(Run(f"run{index}", rng.choice([1, 1, 3, 4]), tuple(options), rng.uniform(0, 6), rng.uniform(0, 3)))
    count = p * v
    while sum(run.length for run in runs) < count:
        runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
    messages = {(kind, stage): rng.choice([0.0, rng.uniform(0, 0.6)]) for kind in ("SEND_F", "SEND_B") for stage in range(count)}
    total = sum(run.length * (run.states + 2 * run.options[0].saved) for run in runs)
    limits = tuple(rng.uniform(0.7, 2.2) * total / p for _ in range(p))
    pieces = (Piece(0.1, 0.2), Piece(0.3, -0.5)) if rng.random() < 0.5 else ()
    kinds = "FIW" if schedule in SPLIT_BACKWARD_SCHEDULES else "FB"
    return Pipeline(tuple(runs), stage_ranks(schedule, p, v), limits, moments(*shape), kinds, messages, pieces, Piece(0.05, 0.1))


def giving_back(rng, pipeline):
    """The same, where layers above the one at work have less of the micro-batch at work than they save or defer, or more."""

    def changed(option):
        share = [rng.uniform(0, 1.2) for _ in "FBW"]
        return option._replace(above=(share[0] * option.saved, share[1] * max(option.saved, option.deferred), share[2] * option.deferred))

    return replace(pipeline, runs=tuple(run._replace(options=tuple(map(changed, run.options))) for run in pipeline.runs))


def splits(run):
    """All ways to give `n` layers of a run its options."""

    def of(n):
        options = len(run.options)
        if options == 1:
            return [(n,)]
        return [(a, n - a) for a in range(n + 1)]

    return of


def enumerate_all(pipeline, whole):
    """The best step time of all cuts and recompute counts, by trying each."""
    kinds = [index for index, run in enumerate(pipeline.runs) for _ in range(run.length)]
    best = math.inf
    for cuts in itertools.combinations(range(1, len(kinds)), pipeline.num_stages - 1):
        edges = (0, *cuts, len(kinds))
        numbers = [[kinds[a:b].count(r) for r in range(len(pipeline.runs))] for a, b in itertools.pairwise(edges)]
        choices = [itertools.product(*(splits(run)(n) for run, n in zip(pipeline.runs, row, strict=True))) for row in numbers]
        for counts in itertools.product(*choices):
            if excess_bytes(pipeline, counts)[0] <= 0:
                best = min(best, whole.longest(stage_seconds(pipeline, counts)))
    return best


def compare(shape, seed, solver=None):
    rng, whole = random.Random(f"{shape} {seed}"), graph(*shape)
    pipeline = random_pipeline(rng, shape)
    if rng.random() < 0.5:
        pipeline = giving_back(rng, pipeline)
    if pipeline.num_layers > 8:
        pytest.fail("too large to enumerate")
    best = enumerate_all(pipeline, whole)
    solution = solve_pipeline(pipeline, whole, solver=solver)
    assert solution.proven
    if best == math.inf:
        assert solution.counts is None and solution.bound == math.inf
        return False
    assert solution.seconds == pytest.approx(best, rel=1e-6)
    assert solution.bound <= best * (1 + 1e-6)
    assert solution.bound >= best * (1 - 1e-5)
    assert excess_bytes(pipeline, solution.counts)[0] <= 1e-6
    assert solution.seconds == whole.longest(stage_seconds(pipeline, solution.counts))
    return True


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimum_equals_enumeration(shape):
    fitting = 0
    for seed in range(14):
        if random_pipeline(random.Random(f"{shape} {seed}"), shape).num_layers <= 8:
            fitting += compare(shape, seed)
    assert fitting >= 2, "too few of the instances fit to say anything"


@pytest.mark.slow
def test_optimum_equals_enumeration_on_thousands():
    compared = 0
    for seed in range(300):
        for shape in SHAPES:
            if random_pipeline(random.Random(f"{shape} {seed}"), shape).num_layers <= 8:
                compare(shape, seed)
                compared += 1
    assert compared > 2000


@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_cbc_finds_the_same(shape):
    for seed in range(2):
        if random_pipeline(random.Random(f"{shape} {seed}"), shape).num_layers <= 8:
            compare(shape, seed, "CBC")


def easy():
    option = Option("none", 1.0, 2.0, 1.0, 1.0, 1.0)
    return Pipeline((Run("block", 8, (option,), 1.0),), (0, 1), (100.0, 100.0), moments("1F1B", 2, 1, 4), "FB"), graph("1F1B", 2, 1, 4)


def test_equal_stages_take_the_textbook_time():
    pipeline, whole = easy()
    solution = solve_pipeline(pipeline, whole)
    assert solution.counts == (((4,),), ((4,),))
    assert solution.seconds == pytest.approx((4 + 2 - 1) * 12)


def test_cutoff_below_the_optimum_is_proven_unreachable():
    pipeline, whole = easy()
    solution = solve_pipeline(pipeline, whole, cutoff=59.0)
    assert solution.counts is None and solution.proven and solution.bound >= 59.0
    assert solve_pipeline(pipeline, whole, cutoff=61.0).seconds == pytest.approx(60.0)


def test_memory_that_fits_no_cut_is_proven_so():
    pipeline, whole = easy()
    tight = Pipeline(pipeline.runs, pipeline.ranks, (5.0, 5.0), pipeline.moments, "FB")
    solution = solve_pipeline(tight, whole)
    assert solution.counts is None and solution.proven and solution.bound == math.inf


def test_time_limit_keeps_the_bound():
    pipeline, whole = easy()
    solution = solve_pipeline(pipeline, whole, deadline=0.0, lower_bound=7.0)
    assert solution.counts is None and not solution.proven and solution.bound == 7.0


def test_missing_solver_is_one_clear_line(monkeypatch):
    import pulp

    pipeline, whole = easy()
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    assert solve_pipeline(pipeline, whole).solver == "CBC"
    monkeypatch.setattr(pulp.COIN_CMD, "available", lambda self: False)
    with pytest.raises(SolverError, match="neither HiGHS nor CBC is installed"):
        solve_pipeline(pipeline, whole)
    with pytest.raises(SolverError, match="unknown solver Excel"):
        solve_pipeline(pipeline, whole, solver="Excel")


def test_failing_solver_is_one_clear_line(monkeypatch, capfd):
    import pulp

    def fail(self, problem, **options):
        raise pulp.PulpSolverError("no licence\nTraceback")

    monkeypatch.setattr(pulp.HiGHS, "actualSolve", fail)
    with pytest.raises(SolverError, match=r"^HiGHS failed: no licence$"):
        solve_pipeline(*easy())
    assert capfd.readouterr().out == ""
