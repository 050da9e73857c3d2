"""The walk where ranks share cores."""

import pytest

from planner.cluster import load_cluster
from planner.contention import Demand, placement, shared_walk, shares_cores
from planner.model import load_model
from planner.plan import Decisions, Inputs, Training, even_stages, replace
from planner.schedule import Action, actions
from planner.timeline import simulate
from planner.timing import predict_time, predict_timeline

SCHEDULES = [("Naive", 1), ("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]
TIMES = {"F": 1.0, "B": 2.0, "I": 1.25, "W": 0.75, "REDUCE": 0.5, "OPTIMIZER": 0.25}


def seconds(action: Action) -> float:
    return TIMES[action.kind] * (1 + 0.1 * max(action.stage, 0))


def walk(lists, cores, copies=None):
    return shared_walk(lists, lambda rank, action: Demand(seconds(action)), lambda action: 0.3, cores, copies or [{0: 1}] * len(lists))


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_with_a_core_for_each_rank_it_is_the_plain_walk(schedule: str, virtual: int) -> None:
    lists = actions(schedule, 4, virtual, 8)
    plain = simulate(lists, seconds, lambda action: 0.3)
    shared = walk(lists, 4)
    expected = {(e.rank, e.kind, e.stage, e.microbatch): e.end for e in plain.events}
    assert {(e.rank, e.kind, e.stage, e.microbatch): e.end for e in shared.events} == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_one_core_does_all_the_work_one_after_the_other(schedule: str, virtual: int) -> None:
    lists = actions(schedule, 4, virtual, 8)
    work = sum(seconds(action) for own in lists for action in own if action.kind in TIMES)
    found = walk(lists, 1).end
    messages = 2 * 8 * (4 * virtual - 1) * 0.3
    assert work <= found + 1e-9 and found <= work + messages


def test_naive_needs_one_core() -> None:
    lists = actions("Naive", 4, 1, 4)
    assert walk(lists, 1).end == pytest.approx(walk(lists, 4).end, rel=0.05)


def test_copies_on_two_nodes_do_not_slow_each_other() -> None:
    lists = actions("1F1B", 2, 1, 4)
    together = walk(lists, 1, [{0: 1}, {0: 1}]).end
    apart = walk(lists, 1, [{0: 1}, {1: 1}]).end
    assert apart == pytest.approx(walk(lists, 2).end)
    assert apart < together


def test_placement_follows_the_rank_order() -> None:
    cluster = replace(load_cluster("cpu:4"), gpus_per_node=2)
    decisions = Decisions(data_parallel=2, tensor_parallel=1, pipeline_parallel=2, micro_batch_size=1, num_microbatches=1, stages=())
    assert placement(cluster, decisions) == [{0: 2}, {1: 2}]
    assert placement(cluster, replace(decisions, rank_order=("pp", "tp", "dp"))) == [{0: 1, 1: 1}, {0: 1, 1: 1}]


def test_prediction_uses_it_where_ranks_outnumber_cores() -> None:
    model, cluster = load_model("tiny-gpt"), replace(load_cluster("cpu:4"), cores_per_node=2)
    inputs = Inputs(model=model, cluster=cluster, training=Training(global_batch_size=8, sequence_length=64, precision="fp32"))
    decisions = Decisions(
        data_parallel=1, tensor_parallel=1, pipeline_parallel=4, micro_batch_size=1, num_microbatches=8,
        stages=even_stages(model, "1F1B", 4, 1, "none"),
    )  # fmt: skip
    assert shares_cores(cluster, 4) and not shares_cores(cluster, 2)
    shared, alone = predict_time(inputs, decisions), predict_time(replace(inputs, cluster=replace(cluster, cores_per_node=4)), decisions)
    assert shared.time.step_seconds is not None and alone.time.step_seconds is not None
    assert alone.time.step_seconds < shared.time.step_seconds < 2 * alone.time.step_seconds
    assert predict_timeline(inputs, decisions).end == pytest.approx(shared.time.step_seconds)
    assert sum(shared.breakdown.values()) == pytest.approx(shared.time.step_seconds)
