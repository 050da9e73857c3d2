from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from plans import make_dry_run, make_plan, make_run

from planner.cli.reporting import compare as compare_command
from planner.compare import Comparison, Row, blame, causes, compare, error_fraction, outside
from planner.documents import convert, dumps
from planner.errors import InputError, ToleranceError
from planner.plan import Plan, replace
from planner.run import Run, actions_path, load_actions
from planner.timeline import bubble_fractions
from planner.timing import predict_timeline


def plan_3d(**changes) -> Plan:
    return make_plan("tiny-gpt", tp=2, pp=2, dp=2, m=4, **changes)


def only(comparison: Comparison, quantity: str, rank: int | None) -> Row:
    (row,) = [row for row in comparison.rows if row.quantity == quantity and row.rank == rank]
    return row


def test_each_rank_is_compared_with_the_prediction_of_its_pipeline_rank():
    plan = plan_3d(rank_order=("dp", "pp", "tp"), sizes=(4, 2))
    run, _ = make_run(plan)
    comparison = compare(plan, run, make_dry_run(plan))
    for rank in run.ranks:
        need = plan.predictions.pipeline_ranks[rank.coordinates.pp].memory
        row = only(comparison, "total_bytes", rank.rank)
        assert (row.predicted, row.measured, row.dry_run) == (need.total_bytes, need.total_bytes, need.total_bytes)
        bubble = only(comparison, "bubble_fraction", rank.rank)
        assert bubble.predicted == bubble_fractions(predict_timeline(plan.inputs, plan.decisions))[rank.coordinates.pp]
        assert bubble.measured == rank.bubble_fraction
    assert {rank.coordinates.pp for rank in run.ranks[:4]} == {0, 1}
    quantities = {row.quantity for row in comparison.rows if row.rank is None}
    assert quantities == {"step_seconds", "tokens_per_second", "bubble_fraction", "peak_bytes"}
    assert only(comparison, "peak_bytes", None).dry_run == plan.predictions.memory.total_bytes
    assert comparison.within_tolerance is None and not comparison.rehearsed


def test_error_is_relative_to_the_measurement_and_positive_when_predicted_too_high():
    assert error_fraction(110, 100) == pytest.approx(0.1)
    assert error_fraction(50, 100) == pytest.approx(-0.5)
    assert error_fraction(None, 1) is error_fraction(1, None) is error_fraction(1, 0) is None
    assert error_fraction(0, 0) == 0
    plan = plan_3d()
    run, _ = make_run(plan, memory=0.5)
    assert only(compare(plan, run), "total_bytes", 3).error_fraction == pytest.approx(1.0, abs=1e-6)


def test_a_timeline_of_another_run_is_refused(tmp_path):
    run, actions = make_run(plan_3d())
    run = replace(run, ranks=tuple(replace(rank, actions_file="run.actions.json") for rank in run.ranks))
    (tmp_path / "run.actions.json").write_text(dumps(actions))
    assert load_actions(tmp_path / "run.json", run) == actions
    (tmp_path / "run.actions.json").write_text(dumps(make_run(plan_3d(), forward=1.5)[1]))
    with pytest.raises(InputError, match="this run's own timeline is expected"):
        load_actions(tmp_path / "run.json", run)
    names = {actions_path(f"folder/{name}").name for name in ("run.json", "run.1", "run.2", "run.1.json")}
    assert names == {"run.actions.json", "run.1.actions.json", "run.2.actions.json"}


def test_document_round_trips():
    plan = plan_3d()
    run, actions = make_run(plan, forward=1.5)
    comparison = compare(plan, run, make_dry_run(plan), tolerance=0.1, actions=actions)
    assert convert(json.loads(dumps(comparison)), Comparison, "comparison", "meshwright.comparison/1") == comparison


def test_run_of_another_plan_is_refused():
    plan, other = plan_3d(), plan_3d(schedule="GPipe")
    run, _ = make_run(other)
    with pytest.raises(InputError, match="run: plan_hash"):
        compare(plan, run)
    with pytest.raises(InputError, match="dry run: plan_hash"):
        compare(plan, make_run(plan)[0], make_dry_run(other))


def test_impossible_coordinates_are_refused():
    plan = plan_3d()
    run, _ = make_run(plan)
    wrong = replace(run.ranks[0], coordinates=replace(run.ranks[0].coordinates, pp=7))
    with pytest.raises(InputError, match=r"coordinates\.pp"):
        compare(plan, replace(run, ranks=(wrong, *run.ranks[1:])))


def exact(run: Run, plan: Plan) -> Run:
    """The run with its summary as predicted, the program's fixed time per step included."""
    time = plan.predictions.time
    summary = replace(run.summary, step_seconds=time.step_seconds, tokens_per_second=time.tokens_per_second, bubble_fraction=time.bubble_fraction)
    return replace(run, summary=summary)


def test_tolerance():
    plan = plan_3d()
    run = exact(make_run(plan, message=0.0)[0], plan)
    assert compare(plan, run, tolerance=0.2).within_tolerance is True
    slow = replace(run, summary=replace(run.summary, step_seconds=run.summary.step_seconds * 1.5))
    assert compare(plan, slow, tolerance=0.2).within_tolerance is False
    assert [row.quantity for row in outside(compare(plan, slow).rows, 0.2)] == ["step_seconds"]
    assert compare(plan, slow, tolerance=0.5).within_tolerance is True
    heavy = exact(make_run(plan, memory=1.4)[0], plan)
    assert compare(plan, heavy, tolerance=0.2).within_tolerance is False
    with pytest.raises(InputError, match="--tolerance"):
        compare(plan, run, tolerance=-0.1)


def test_a_small_tolerance_is_said_in_full(tmp_path):
    plan = plan_3d()
    run, _ = make_run(plan, forward=1.5)
    run = replace(run, ranks=tuple(replace(rank, actions_file=None) for rank in run.ranks))
    for name, document in (("plan.json", plan), ("run.json", run)):
        (tmp_path / name).write_text(dumps(document))
    arguments = [str(tmp_path / "plan.json"), str(tmp_path / "run.json"), "--tolerance", "0.0001"]
    with pytest.raises(ToleranceError, match=r"outside the tolerance of 0\.01 %"):
        CliRunner().invoke(compare_command, arguments, standalone_mode=False, catch_exceptions=False)


def test_a_few_stray_bytes_of_a_small_category_are_within_tolerance():
    plan = plan_3d()
    run = exact(make_run(plan)[0], plan)
    memory = run.ranks[0].memory
    stray = replace(memory, buffers_bytes=memory.buffers_bytes * 2 + 64, total_bytes=memory.total_bytes + memory.buffers_bytes + 64)
    changed = replace(run, ranks=(replace(run.ranks[0], memory=stray), *run.ranks[1:]))
    comparison = compare(plan, changed, tolerance=0.2)
    assert abs(only(comparison, "buffers_bytes", 0).error_fraction or 0) > 0.2
    assert comparison.within_tolerance is True


def test_memory_of_a_rehearsal_is_not_compared():
    plan = plan_3d()
    comparison = compare(plan, make_run(plan, rehearsed=True, memory=0.001)[0], tolerance=0.5)
    assert comparison.rehearsed
    assert only(comparison, "total_bytes", 0).measured is None and only(comparison, "peak_bytes", None).measured is None
    assert only(comparison, "bubble_fraction", 0).measured is not None


def test_of_a_stretched_rehearsal_bubbles_and_messages_are_compared():
    plan = plan_3d()
    run, actions = make_run(plan, rehearsed=True, forward=100.0, message=0.5)
    times = [(quantity, None) for quantity in ("step_seconds", "tokens_per_second")] + [("busy_seconds", 0)]
    for scale in (1.0, 1904.56):
        comparison = compare(plan, replace(run, environment={"rehearsal_scale": scale}), actions=actions)
        assert {only(comparison, *place).measured is None for place in times} == {scale != 1.0}
        assert only(comparison, "bubble_fraction", None).measured is not None
        assert [cause.constant for cause in comparison.causes] == ["message"]


def test_blame_finds_the_slow_forward_pass():
    plan = plan_3d()
    run, actions = make_run(plan, forward=1.5)
    first = causes(plan, run, actions)[0]
    assert first.constant == "forward" and first.ratio == pytest.approx(1.5)
    assert first.effect_seconds > 0 and "1.50 times the predicted" in first.words
    assert blame(plan, run, actions)[0] == first.words and blame(plan, run, None) == ()
    others = {cause.constant: cause.ratio for cause in causes(plan, run, actions)}
    assert others["backward"] == pytest.approx(1.0) and others["optimizer"] == pytest.approx(1.0)


def test_blame_finds_slow_messages_and_its_effect_is_that_of_the_walk():
    plan = plan_3d()
    run, actions = make_run(plan, message=0.5)
    found = causes(plan, run, actions)
    assert found[0].constant == "message" and found[0].measured_seconds == pytest.approx(0.5)
    as_measured = make_run(plan, message=0.5)[1].end - predict_timeline(plan.inputs, plan.decisions).end
    assert found[0].effect_seconds == pytest.approx(as_measured, rel=0.02)


@pytest.mark.parametrize(
    "changes", [{"schedule": "InterleavedZeroBubble", "virtual": 2}, {"schedule": "ZBVZeroBubble", "virtual": 2}, {"schedule": "Naive"}]
)
def test_blame_knows_split_backwards(changes):
    plan = make_plan("tiny-gpt", pp=2, m=4, **changes)
    run, actions = make_run(plan, forward=2.0)
    found = {cause.constant: cause for cause in causes(plan, run, actions)}
    assert found["forward"].ratio == pytest.approx(2.0) and found["backward"].ratio == pytest.approx(1.0)
