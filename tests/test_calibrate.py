"""Fitting a cluster to measurements, and correcting it by a run."""

import math
import random
from pathlib import Path

import pytest
from msgspec import UNSET

from planner.calibration import fit
from planner.calibration_rounds import spread_fraction, typical
from planner.cluster import Link, compute_efficiency, in_precision, load_cluster
from planner.correction import correct
from planner.estimate import predict
from planner.kernels import elementwise_seconds, matmul_seconds
from planner.layer_time import layer_seconds, optimizer_seconds, reduce_seconds
from planner.measurements import (
    CollectivePoint,
    LayerPoint,
    MatmulPoint,
    Measurements,
    MemoryPoint,
    MessagePoint,
    OptimizerPoint,
    StepPoint,
)
from planner.model import load_model
from planner.network import all_gather_seconds, all_reduce_seconds, group, message_seconds
from planner.paradigms import as_plan
from planner.plan import Decisions, Inputs, Memory, Training, even_stages, plan_hash, replace
from planner.run import Coordinates, Run, RunRank, Step, Summary
from planner.simplex import minimise
from planner.timeline import Event, Timeline
from planner.timing import predict_time, predict_timeline

TRUE = load_cluster("cpu:2")
TRUE = replace(TRUE, efficiency=replace(TRUE.efficiency, matmul=0.9, kernel_seconds=2e-5, attention=0.3, attention_backward=0.4, memory=0.5))


def one_rank(model, batch, length, precision="fp32", truth=TRUE):
    training = Training(global_batch_size=batch, sequence_length=length, precision=precision)
    decisions = Decisions(data_parallel=1, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=batch, num_microbatches=1, stages=())
    return Inputs(model=model, cluster=replace(truth, num_gpus=1), training=training), decisions


def measurements() -> Measurements:
    """What a machine that is exactly `TRUE` would measure."""
    noise = random.Random(0)
    matmuls = [MatmulPoint("fp32", n, n, n, matmul_seconds(TRUE, "fp32", n, n, n)) for n in (64, 256, 1024)]
    memory = [MemoryPoint(n, elementwise_seconds(TRUE, n)) for n in (1 << 16, 1 << 20, 1 << 24)]
    layers = []
    for name in ("tiny-gpt", "tiny-llama"):
        for batch, length in ((1, 64), (4, 128), (2, 256)):
            inputs, decisions = one_rank(load_model(name), batch, length)
            for kind in ("embedding", "block", "head"):
                time = layer_seconds(inputs, decisions, kind)
                layers.append(LayerPoint(inputs.model, kind, 1, batch, length, "fp32", time.forward * noise.uniform(0.98, 1.02), time.backward))
    inputs, decisions = one_rank(load_model("tiny-gpt"), 1, 64)
    optimizer = [OptimizerPoint("fp32", n, 3 * optimizer_seconds(inputs, decisions, n)) for n in (10**5, 10**6)]
    collectives = [CollectivePoint("all_reduce", 2, n, 4e-4 + n / 5e8) for n in (1 << 12, 1 << 18, 1 << 22)]
    messages = [MessagePoint(n, 1e-4 + n / 1e9) for n in (1 << 12, 1 << 18, 1 << 22)]
    return Measurements(
        "cpu", "a CPU", 2, 2, 2, 1 << 32, None, tuple(matmuls), tuple(memory), tuple(layers), tuple(optimizer), tuple(collectives), tuple(messages)
    )


def with_bf16(cluster):
    """A machine that computes in bf16 otherwise than in fp32."""
    own = replace(compute_efficiency(cluster), attention=0.2, attention_backward=0.9, kernel_seconds=4e-5, attention_block_seconds=6e-5,
                  optimizer_scale=4.0, pipeline_scale=1.02)  # fmt: skip
    return replace(cluster, efficiency=replace(cluster.efficiency, bf16=own))


def test_fit_tells_bf16_from_fp32() -> None:
    truth = with_bf16(replace(TRUE, efficiency=replace(TRUE.efficiency, pipeline_scale=1.1)))
    steps = {precision: tuple(trained(truth, precision, **{f"{axis}_parallel": 2}) for axis in ("data", "pipeline"))
             for precision in ("fp32", "mixed-bf16")}  # fmt: skip
    fp32 = measurements()._replace(steps=steps["fp32"])
    layers = []
    for name in ("tiny-gpt", "tiny-llama"):
        for batch, length in ((1, 64), (4, 128), (2, 256), (1, 512), (1, 1024)):
            inputs, decisions = one_rank(load_model(name), batch, length, "mixed-bf16", truth)
            for kind in ("embedding", "block", "head"):
                time = layer_seconds(inputs, decisions, kind)
                layers.append(LayerPoint(inputs.model, kind, 1, batch, length, "mixed-bf16", time.forward, time.backward))
    inputs, decisions = one_rank(load_model("tiny-gpt"), 1, 64, "mixed-bf16", truth)
    matmuls = tuple(MatmulPoint("bf16", n, n, n, matmul_seconds(in_precision(truth, "bf16"), "bf16", n, n, n)) for n in (64, 256, 1024))
    optimizer = tuple(OptimizerPoint("mixed-bf16", n, optimizer_seconds(inputs, decisions, n)) for n in (10**5, 10**6))
    both = fp32._replace(
        layers=(*fp32.layers, *layers), matmuls=(*fp32.matmuls, *matmuls), optimizer=(*fp32.optimizer, *optimizer),
        steps=(*steps["fp32"], *steps["mixed-bf16"]),
    )  # fmt: skip
    found = fit(both).cluster
    assert found.efficiency.pipeline_scale == pytest.approx(1.1, rel=0.01) and found.efficiency.bf16.pipeline_scale == pytest.approx(1.02, rel=0.01)
    assert found.efficiency.bf16.attention_block_seconds == pytest.approx(6e-5, rel=0.15)
    for precision in ("fp32", "mixed-bf16"):
        for batch, length in ((2, 128), (1, 300)):
            inputs, decisions = one_rank(load_model("tiny-gpt"), batch, length, precision, truth)
            expected = layer_seconds(inputs, decisions, "block")
            fitted = layer_seconds(replace(inputs, cluster=found), decisions, "block")
            assert fitted.forward == pytest.approx(expected.forward, rel=0.1)
            assert fitted.backward == pytest.approx(expected.backward, rel=0.1)
    alone = fit(fp32).cluster.efficiency
    assert compute_efficiency(found) == compute_efficiency(replace(found, efficiency=replace(alone, bf16=found.efficiency.bf16)))


def test_minimise_finds_the_bottom_of_a_valley() -> None:
    found = minimise(lambda x: (x[0] - 1) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2, [-1.0, 2.0])
    assert found == pytest.approx([1.0, 1.0], abs=1e-2)


def test_fit_gives_back_the_machine() -> None:
    fitted = fit(measurements())
    residuals = {residual.name: residual for residual in fitted.residuals}
    assert residuals["block layers"].mean_error_fraction < 0.03
    assert residuals["matrix products"].mean_error_fraction < 0.15
    assert residuals["optimizer"].worst_error_fraction < 0.05
    assert residuals["collectives"].worst_error_fraction < 0.01
    assert message_seconds(fitted.cluster, 1 << 20, True) == pytest.approx(1e-4 + (1 << 20) / 1e9, rel=0.01)
    assert "mean error of the fit" in fitted.cluster.source


def test_a_measured_group_takes_its_curve_and_others_the_links() -> None:
    cluster = fit(measurements()).cluster
    assert all_reduce_seconds(group(cluster, 2, 1), 1 << 20) == pytest.approx(4e-4 + (1 << 20) / 5e8, rel=0.01)
    assert all_gather_seconds(group(cluster, 2, 1), 1 << 20) < all_reduce_seconds(group(cluster, 2, 1), 1 << 20)
    assert all_reduce_seconds(group(replace(cluster, collectives=()), 2, 1), 1 << 20) == pytest.approx(4e-4 + (1 << 20) / 5e8, rel=0.2)


def test_a_pair_that_has_the_link_between_nodes_to_itself_is_told_from_all_pairs_at_once() -> None:
    sizes = (1 << 12, 1 << 18, 1 << 22)
    across = tuple(MessagePoint(n, 1e-4 + n / 1e7, inside=False) for n in sizes)
    alone = tuple(MessagePoint(n, 1e-4 + n / 1.8e7, inside=False, alone=True) for n in sizes)
    measured = measurements()
    link = fit(measured._replace(messages=(*measured.messages, *across, *alone))).cluster.inter_node
    assert link.alone_speedup == pytest.approx(1.8, rel=0.01)
    found = fit(measured._replace(messages=(*measured.messages, *across, *alone))).cluster
    assert message_seconds(found, 1 << 20, False) == pytest.approx(1e-4 + (1 << 20) / 1e7, rel=0.01)
    hosts = measured._replace(gpus_per_node=1, collectives=(), messages=across)
    assert message_seconds(fit(hosts).cluster, 1 << 20, False) == pytest.approx(1e-4 + (1 << 20) / 1e7, rel=0.01), "no link inside a node"
    assert fit(measured._replace(messages=(*measured.messages, *across))).cluster.inter_node.alone_speedup is UNSET


def test_one_rank_measures_no_links() -> None:
    fitted = fit(measurements()._replace(num_gpus=1, gpus_per_node=1, collectives=(), messages=()))
    assert fitted.cluster.collectives == ()
    assert "assumed" in fitted.cluster.intra_node.source


def trained(truth, precision="fp32", **degrees) -> StepPoint:
    """What short training on a machine like `truth` would find."""
    model = load_model("tiny-gpt")
    sizes = {"data_parallel": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "micro_batch_size": 2, "num_microbatches": 4, **degrees}
    decisions = Decisions(**sizes, stages=even_stages(model, "1F1B", sizes["pipeline_parallel"], 1, "none"))
    batch = sizes["data_parallel"] * 8
    inputs = Inputs(model=model, cluster=truth, training=Training(global_batch_size=batch, sequence_length=128, precision=precision))
    kinds = (("embedding", 1), ("block", model.num_layers), ("head", 1))

    def passes(cluster) -> tuple[float, float]:
        found = [(layer_seconds(replace(inputs, cluster=cluster), decisions, kind), count) for kind, count in kinds]
        return sum(count * layer.forward for layer, count in found), sum(count * layer.backward for layer, count in found)

    forward, backward = passes(_silent(truth))
    inside = sizes["num_microbatches"] * (sum(passes(truth)) - forward - backward)
    reduction = reduce_seconds(inputs, decisions, model.num_parameters / decisions.tensor_parallel)
    sharded = decisions.zero_stage == 3
    rest = optimizer_seconds(inputs, decisions, model.num_parameters / decisions.tensor_parallel) + 0.004
    return StepPoint(
        model, decisions, 128, precision, forward, backward, reduction if sharded else inside, 0.0 if sharded else reduction, rest
    )


def _silent(cluster):
    free = replace(cluster.intra_node, bandwidth_bytes_per_second=1e18, latency_seconds=0.0)
    return replace(cluster, intra_node=free, inter_node=free, collectives=(), efficiency=replace(cluster.efficiency, wait_seconds=0.0))


def test_short_training_gives_back_what_a_step_adds() -> None:
    """Passes 1.3 times as long as layers alone, a wait for every collective, new buffers at 2 GB/s, 4 ms of fixed cost, late receives."""
    alone = measurements()
    curves = fit(alone).cluster.collectives
    all_kinds = tuple(replace(curve, kind=kind) for curve in curves for kind in ("all_reduce", "all_gather", "reduce_scatter"))
    efficiency = replace(TRUE.efficiency, time_scale=1.3, optimizer_scale=2.3, wait_seconds=1.2e-3, fresh_bandwidth_bytes_per_second=2e9,
                         pipeline_scale=1.07)  # fmt: skip
    truth = replace(TRUE, efficiency=efficiency, collectives=all_kinds)
    steps = tuple(
        trained(truth, **degrees)
        for degrees in ({"data_parallel": 2}, {"data_parallel": 2, "micro_batch_size": 4, "num_microbatches": 2},
                        {"data_parallel": 2, "zero_stage": 3}, {"data_parallel": 2, "zero_stage": 3, "num_microbatches": 1, "micro_batch_size": 8},
                        {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2})
    )  # fmt: skip
    kinds = ("all_reduce", "all_gather", "reduce_scatter")
    points = tuple(CollectivePoint(kind, 2, n, 4e-4 + n / 5e8) for kind in kinds for n in (1 << 12, 1 << 18, 1 << 22))
    late = (MessagePoint(1 << 16, 1e-3), MessagePoint(1 << 17, 2e-3), MessagePoint(1 << 17, 9e-3, inside=False))
    fitted = fit(alone._replace(collectives=points, steps=steps, late_receives=late))
    found, residuals = fitted.cluster.efficiency, {residual.name: residual for residual in fitted.residuals}
    assert residuals["passes in training"].worst_error_fraction < 0.03
    assert residuals["passes of pipelines"].worst_error_fraction < 0.03
    assert found.pipeline_scale == pytest.approx(1.07, rel=0.02)
    assert fit(alone._replace(cores_per_node=1, collectives=points, steps=steps)).cluster.efficiency.pipeline_scale is UNSET, "they share cores"
    assert residuals["collectives in training"].worst_error_fraction < 0.1
    assert found.wait_seconds == pytest.approx(1.2e-3, rel=0.1)
    assert found.fresh_bandwidth_bytes_per_second == pytest.approx(2e9, rel=0.3)
    messages = [message_seconds(fitted.cluster, point.num_bytes, same_node=True) for point in late[:2]]
    assert found.receive_seconds == pytest.approx(1.5e-3 - sum(messages) / 2), "beyond the message, inside the node"
    assert found.step_seconds == pytest.approx(4e-3, rel=0.2)
    across = tuple(MessagePoint(n, 1e-4 + n / 1e7, inside=False) for n in (1 << 12, 1 << 18, 1 << 22))
    between = alone._replace(gpus_per_node=1, collectives=(), messages=across)
    for added, expected in ((2e-3, 2e-3), (-1e-3, 1e-6)):
        late = tuple(MessagePoint(n, 1e-4 + n / 1e7 + added, inside=False) for n in (1 << 16, 1 << 17))
        assert fit(between._replace(late_receives=late)).cluster.efficiency.receive_seconds == pytest.approx(expected, rel=0.1), "beyond the message"


def pipeline_plan(cluster, schedule="1F1B"):
    model = load_model("tiny-gpt")
    inputs = Inputs(model=model, cluster=cluster, training=Training(global_batch_size=16, sequence_length=128, precision="fp32"))
    decisions = Decisions(
        data_parallel=1, tensor_parallel=1, pipeline_parallel=2, micro_batch_size=2, num_microbatches=8, schedule=schedule,
        stages=even_stages(model, schedule, 2, 1, "none"),
    )  # fmt: skip
    return as_plan(inputs, decisions, predict(inputs, decisions))


def pretend_run(plan, truth) -> tuple[Run, Timeline]:
    """The run that a machine like `truth` would report."""
    inputs = replace(plan.inputs, cluster=truth)
    timeline = predict_timeline(inputs, plan.decisions)
    events = []
    for event in timeline.events:
        events.append(event if not event.kind.startswith("SEND") else event._replace(end=event.start + 1e-6))
    seconds = predict_time(inputs, plan.decisions).time.step_seconds
    memory = Memory.of(0, 0, 0)
    ranks = tuple(
        RunRank(rank=r, coordinates=Coordinates(pp=r, dp=0, tp=0), memory=memory, bubble_fraction=0.0, busy_seconds=0.0, actions_file=None)
        for r in range(2)
    )
    step = Step(step=0, loss=0.0, seconds=seconds, num_tokens=1)
    summary = Summary(step_seconds=seconds, bubble_fraction=0.0, peak_bytes=0, tokens_per_second=0.0)
    run = Run(plan_hash=plan_hash(plan), rehearsed=False, environment={}, steps=(step,), ranks=ranks, summary=summary)
    return run, Timeline(source="measured", events=tuple(Event(*event) for event in events))


@pytest.mark.parametrize("nodes", [1, 2])
def test_late_receives_are_corrected_by_what_they_take_beyond_their_message(nodes) -> None:
    between = Link(bandwidth_bytes_per_second=1e9, latency_seconds=2e-4)
    efficiency = replace(TRUE.efficiency, receive_seconds=1e-3)
    given = replace(TRUE, efficiency=efficiency, gpus_per_node=2 // nodes, inter_node=between)
    truth = replace(given, efficiency=replace(given.efficiency, receive_seconds=3e-3))
    plan = pipeline_plan(given)
    run, timeline = pretend_run(plan, truth)
    corrected = correct(plan.inputs, plan.decisions, run, timeline)
    assert corrected.ratios["late receives"] > 1.2 and corrected.ratios["messages"] == pytest.approx(1.0, rel=0.05)
    assert corrected.cluster.efficiency.receive_seconds == pytest.approx(3e-3, rel=0.05)
    assert corrected.after == pytest.approx(run.summary.step_seconds, rel=0.01)


def test_correction_converges_on_the_machine_that_ran() -> None:
    plan = pipeline_plan(TRUE)
    late = TRUE.efficiency.collective_latency * TRUE.intra_node.latency_seconds / 2e-3
    slower = replace(TRUE.efficiency, time_scale=1.7, optimizer_scale=3.0, step_seconds=0.004, collective_latency=late)
    truth = replace(TRUE, efficiency=slower, intra_node=replace(TRUE.intra_node, latency_seconds=2e-3))
    run, timeline = pretend_run(plan, truth)
    corrected = correct(plan.inputs, plan.decisions, run, timeline)
    measured = run.summary.step_seconds
    assert abs(corrected.before / measured - 1) > 0.3
    assert corrected.after == pytest.approx(measured, rel=0.03)
    assert corrected.ratios["forward"] == pytest.approx(1.7, rel=1e-6)
    count = plan.inputs.model.num_parameters / 2
    optimizer = [optimizer_seconds(replace(plan.inputs, cluster=cluster), plan.decisions, count) for cluster in (truth, TRUE)]
    assert corrected.ratios["optimizer"] == pytest.approx(optimizer[0] / optimizer[1], rel=0.1)
    again = correct(replace(plan.inputs, cluster=corrected.cluster), plan.decisions, run, timeline)
    assert all(ratio == pytest.approx(1.0, rel=0.05) for ratio in again.ratios.values())
    other = pipeline_plan(TRUE, "GPipe")
    expected = predict_time(replace(other.inputs, cluster=truth), other.decisions).time.step_seconds
    assert predict_time(replace(other.inputs, cluster=corrected.cluster), other.decisions).time.step_seconds == pytest.approx(expected, rel=0.05)


def test_correction_by_a_run_in_bf16_leaves_fp32_alone() -> None:
    cluster = with_bf16(TRUE)
    plan = pipeline_plan(cluster)
    plan = replace(plan, inputs=replace(plan.inputs, training=replace(plan.inputs.training, precision="mixed-bf16")))
    run, timeline = pretend_run(plan, replace(cluster, efficiency=replace(cluster.efficiency, time_scale=1.5)))
    corrected = correct(plan.inputs, plan.decisions, run, timeline)
    assert corrected.after == pytest.approx(run.summary.step_seconds, rel=0.05)
    assert compute_efficiency(corrected.cluster) == compute_efficiency(cluster)
    scale = corrected.cluster.efficiency.bf16.layer_scale["block.forward"] / cluster.efficiency.bf16.layer_scale.get("block.forward", 1.0)
    assert scale == pytest.approx(1.5, rel=1e-6)


def test_correction_without_a_timeline_scales_compute() -> None:
    plan = pipeline_plan(TRUE)
    run, _ = pretend_run(plan, replace(TRUE, efficiency=replace(TRUE.efficiency, time_scale=1.5)))
    corrected = correct(plan.inputs, plan.decisions, run, None)
    assert corrected.after == pytest.approx(run.summary.step_seconds, rel=0.05)


def test_rounds_of_measurements_count_by_their_medians() -> None:
    first = measurements()._replace(steps=(trained(TRUE, data_parallel=2), trained(TRUE, tensor_parallel=2)))
    slower = [
        first._replace(
            matmuls=tuple(point._replace(seconds=factor * point.seconds) for point in first.matmuls),
            steps=tuple(point._replace(**{name: factor * getattr(point, name) for name in point._fields if name.endswith("_seconds")})
                        for point in first.steps),
            late_receives=(MessagePoint(1024, factor * 1e-3),) if factor > 1 else (),
            memory_bytes=int(factor),
        )
        for factor in (1.0, 1.2, 3.0)
    ]  # fmt: skip
    found = typical(slower)
    assert [point.seconds for point in found.matmuls] == pytest.approx([1.2 * point.seconds for point in first.matmuls])
    assert found.layers == first.layers and found.memory_bytes == 1
    assert [point.forward_seconds for point in found.steps] == pytest.approx([1.2 * point.forward_seconds for point in first.steps])
    assert [point.decisions for point in found.steps] == [point.decisions for point in first.steps]
    assert found.late_receives == (MessagePoint(1024, pytest.approx(2.1e-3)),), "of the rounds that have it"
    assert spread_fraction(slower) == pytest.approx(1.0 / (5.2 / 3))
    twice = first._replace(messages=(MessagePoint(8, 1.0), MessagePoint(8, 2.0)))
    assert typical([twice, twice]).messages == twice.messages, "points that are alike stay apart"
    assert typical([first]) == first and spread_fraction([first]) == 0.0


def test_calibrate_measures_this_machine(tmp_path: Path) -> None:
    """The real thing on two ranks: a cluster file that --cluster takes, with finite constants and its residual."""
    torch = pytest.importorskip("torch")
    from executor import calibrate

    assert calibrate.main(["--output", str(tmp_path / "cluster.json"), "--num-gpus", "2"]) == 0
    cluster = load_cluster(f"{tmp_path / 'cluster.json'}:2")
    assert cluster.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "mean error of the fit" in cluster.source
    assert {(curve.kind, curve.num_ranks) for curve in cluster.collectives} == {("all_reduce", 2), ("all_gather", 2), ("reduce_scatter", 2)}
    assert all(math.isfinite(value) and value > 0 for value in cluster.gpu.peak_flops_per_second.values())
    assert {"fp32", "bf16"} <= set(cluster.gpu.peak_flops_per_second)
    assert (cluster.device == "cpu") == bool(cluster.efficiency.bf16)
    assert math.isfinite(predict_time(pipeline_plan(cluster).inputs, pipeline_plan(cluster).decisions).time.step_seconds or math.nan)


def test_calibrate_says_what_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from executor import calibrate

    output = ["--output", str(tmp_path / "c.json")]
    assert calibrate.main([*output, "--from", "run.json"]) == 2
    assert "--plan" in capfd.readouterr().err
    assert calibrate.main([*output, "--num-gpus", "0"]) == 2
    assert "--num-gpus" in capfd.readouterr().err
    assert calibrate.main([*output, "--rounds", "0"]) == 2
    assert "error: --rounds: 0 is not valid; 1 to 100 is expected" in capfd.readouterr().err
