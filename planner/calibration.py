"""From measurements of a machine to a cluster file: the constants of the time model, fitted.

Nothing here measures; `executor.calibrate` does. The constants minimise the sum of squared logarithms of predicted over
measured seconds, so that a short and a long measurement weigh alike and a factor of 2 too much is as bad as one too
little. The search is the simplex method of Nelder and Mead 1965 (The Computer Journal 7(4)) on the logarithms of the
constants, which keeps them positive.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from planner.calibration_links import fit_curves, fit_link, fitted_messages
from planner.cluster import RENDEZVOUS_SECONDS, ClusterSpec, Gpu, Link, compute_efficiency, in_precision
from planner.graph import LayerKind
from planner.kernels import elementwise_seconds, matmul_seconds
from planner.layer_time import layer_seconds, optimizer_seconds, reduce_seconds
from planner.measurements import CollectivePoint, LayerPoint, MatmulPoint, Measurements, MemoryPoint, OptimizerPoint, StepPoint
from planner.model import presets
from planner.network import message_seconds
from planner.plan import Decisions, Inputs, Training, replace
from planner.simplex import minimise, squared_logarithms


class Residual(NamedTuple):
    """How far the fitted model is from a group of measurements."""

    name: str
    num_points: int
    mean_error_fraction: float
    worst_error_fraction: float


class Fit(NamedTuple):
    cluster: ClusterSpec
    residuals: tuple[Residual, ...]


_Point = TypeVar("_Point", MatmulPoint, LayerPoint, OptimizerPoint, StepPoint)


def fit(measured: Measurements) -> Fit:
    """The cluster whose predictions are nearest to the measurements."""
    cluster = _fit_precisions(_start(measured), measured)
    for inside in (True, False):
        cluster = fit_link(cluster, measured, inside)
    cluster = _fit_waits(fit_curves(cluster, measured.collectives), measured.steps)
    cluster = _fit_rest(cluster, measured)
    residuals = tuple(residual for residual in _residuals(cluster, measured) if residual.num_points)
    return Fit(replace(cluster, source=_source(residuals)), residuals)


def _fit_precisions(cluster: ClusterSpec, measured: Measurements) -> ClusterSpec:
    """What computing takes: of fp32 and of bf16 apart where layers of both were measured, else of both together."""
    bf16 = _of_precisions(measured, lambda precision: precision != "fp32")
    fp32 = _of_precisions(measured, lambda precision: precision == "fp32")
    if not (bf16.layers and fp32.layers):
        return _fit_computing(cluster, measured)
    own = compute_efficiency(_fit_computing(cluster, bf16))
    found = _fit_computing(cluster, fp32)
    return replace(found, efficiency=replace(found.efficiency, bf16=own))


def _of_precisions(measured: Measurements, wanted: Callable[[str], bool]) -> Measurements:
    """What was measured of computing in some precisions."""

    def some(points: Iterable[_Point]) -> tuple[_Point, ...]:
        return tuple(point for point in points if wanted(point.precision))

    return measured._replace(
        matmuls=some(measured.matmuls), layers=some(measured.layers), optimizer=some(measured.optimizer), steps=some(measured.steps)
    )


def _fit_computing(cluster: ClusterSpec, measured: Measurements) -> ClusterSpec:
    cluster = _fit_layer_scales(_fit_compute(cluster, measured), measured.layers)
    return _fit_pipeline(_fit_passes(_fit_optimizer(cluster, measured.optimizer), measured.steps), measured.steps)


def _start(measured: Measurements) -> ClusterSpec:
    """Peaks are the best that was measured, so that the efficiencies stay fractions."""
    peaks: dict[str, float] = {}
    for point in measured.matmuls:
        rate = 2.0 * point.rows * point.columns * point.depth / point.seconds
        peaks[point.precision] = max(peaks.get(point.precision, 0.0), rate)
    bandwidth = max((point.num_bytes / point.seconds for point in measured.memory), default=1e10)
    unknown = Link(bandwidth_bytes_per_second=1e9, latency_seconds=1e-4, source="assumed: there was one rank")
    return ClusterSpec(
        name=f"calibrated-{measured.device}",
        device="cuda" if measured.device == "cuda" else "cpu",
        num_gpus=measured.num_gpus,
        gpus_per_node=measured.gpus_per_node,
        gpu=Gpu(
            name=measured.device_name,
            memory_bytes=measured.memory_bytes,
            peak_flops_per_second=peaks or {"fp32": 1e11},
            memory_bandwidth_bytes_per_second=bandwidth,
            reserved_bytes=measured.reserved_bytes,
            num_multiprocessors=measured.num_multiprocessors,
            source="the best measured rates",
        ),
        intra_node=unknown,
        inter_node=unknown,
        cores_per_node=measured.cores_per_node,
    )


# compute

_FRACTIONS = ("matmul", "memory", "attention", "attention_backward")


def _with_constants(cluster: ClusterSpec, logs: Sequence[float]) -> ClusterSpec:
    """The cluster with constants from their logarithms; the fractions are at most 1."""
    values = [math.exp(min(max(x, -40.0), 20.0)) for x in logs]
    fractions = {name: min(1.0, value) for name, value in zip(_FRACTIONS, values, strict=False)}
    efficiency = replace(cluster.efficiency, matmul_depth_overhead=values[4], kernel_seconds=values[5], **fractions)
    if cluster.device == "cpu":
        efficiency = replace(efficiency, attention_block_seconds=values[6])
    return replace(cluster, efficiency=efficiency)


def _fit_compute(cluster: ClusterSpec, measured: Measurements) -> ClusterSpec:
    """The constants of kernels, from whole layers of the executor and from plain products and copies."""
    if not (measured.layers or measured.matmuls):
        return cluster

    def cost(logs: Sequence[float]) -> float:
        candidate = _with_constants(cluster, logs)
        ratios = [*_matmul_ratios(candidate, measured.matmuls), *_memory_ratios(candidate, measured.memory)]
        total = 0.1 * squared_logarithms(ratios) + squared_logarithms(_layer_ratios(candidate, measured.layers))
        return total + 0.01 * sum(max(0.0, x) ** 2 for x in logs[:4])

    start = [math.log(x) for x in (0.8, 0.5, 0.4, 0.3, 8.0, 5e-6) + ((1e-6,) if cluster.device == "cpu" else ())]
    best = minimise(cost, start)
    return _with_constants(cluster, minimise(cost, best, step=0.2))


def _matmul_ratios(cluster: ClusterSpec, points: Iterable[MatmulPoint]) -> list[float]:
    return [matmul_seconds(in_precision(cluster, p.precision), p.precision, p.rows, p.columns, p.depth) / p.seconds for p in points]


def _memory_ratios(cluster: ClusterSpec, points: Iterable[MemoryPoint]) -> list[float]:
    return [elementwise_seconds(cluster, p.num_bytes) / p.seconds for p in points]


def _one_rank(cluster: ClusterSpec, point: LayerPoint) -> tuple[Inputs, Decisions]:
    training = Training(global_batch_size=point.micro_batch_size, sequence_length=point.sequence_length, precision=point.precision)
    decisions = Decisions(
        data_parallel=1, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=point.micro_batch_size, num_microbatches=1, stages=()
    )
    return Inputs(model=point.model, cluster=replace(cluster, num_gpus=1), training=training), decisions


def _layer_ratio(cluster: ClusterSpec, point: LayerPoint) -> tuple[float, float]:
    """Predicted over measured seconds of the forward and the backward pass."""
    inputs, decisions = _one_rank(cluster, point)
    found = layer_seconds(inputs, decisions, point.kind)
    return point.num_layers * found.forward / point.forward_seconds, point.num_layers * found.backward / point.backward_seconds


def _layer_ratios(cluster: ClusterSpec, points: Iterable[LayerPoint]) -> list[float]:
    """Blocks only: they are nearly all of a step, and the ends are corrected by `layer_scale`."""
    return [ratio for point in points if point.kind == "block" for ratio in _layer_ratio(cluster, point)]


def _fit_layer_scales(cluster: ClusterSpec, points: Sequence[LayerPoint]) -> ClusterSpec:
    """What is left, as one factor for each kind of layer and pass: the median of measured over predicted."""
    scales: dict[str, float] = {}
    for kind in ("embedding", "block", "head"):
        ratios = [_layer_ratio(cluster, point) for point in points if point.kind == kind]
        if ratios:
            scales[f"{kind}.forward"] = 1.0 / statistics.median(ratio[0] for ratio in ratios)
            scales[f"{kind}.backward"] = 1.0 / statistics.median(ratio[1] for ratio in ratios)
    return replace(cluster, efficiency=replace(cluster.efficiency, layer_scale=scales))


def _fit_optimizer(cluster: ClusterSpec, points: Sequence[OptimizerPoint]) -> ClusterSpec:
    if not points:
        return cluster
    scale = statistics.median(point.seconds / _optimizer_prediction(cluster, point) for point in points)
    return replace(cluster, efficiency=replace(cluster.efficiency, optimizer_scale=cluster.efficiency.optimizer_scale * scale))


# training


def _of_step(cluster: ClusterSpec, point: StepPoint) -> Inputs:
    decisions = point.decisions
    batch = decisions.data_parallel * decisions.micro_batch_size * decisions.num_microbatches
    training = Training(global_batch_size=batch, sequence_length=point.sequence_length, precision=point.precision)
    return Inputs(model=point.model, cluster=replace(cluster, num_gpus=decisions.world_size), training=training)


def _passes(cluster: ClusterSpec, point: StepPoint, *, silent: bool = True) -> tuple[float, float]:
    """Predicted seconds of one micro-batch's forward and backward pass through the whole model; `silent` leaves the collectives out."""
    if silent:
        free = Link(bandwidth_bytes_per_second=1e18, latency_seconds=0.0)
        efficiency = replace(cluster.efficiency, wait_seconds=0.0)
        cluster = replace(cluster, intra_node=free, inter_node=free, collectives=(), efficiency=efficiency)
    inputs = _of_step(cluster, point)
    kinds: dict[LayerKind, int] = {"embedding": 1, "block": point.model.num_layers, "head": 1}
    layers = [(layer_seconds(inputs, point.decisions, kind), count) for kind, count in kinds.items()]
    return sum(count * layer.forward for layer, count in layers), sum(count * layer.backward for layer, count in layers)


def _undisturbed(points: Iterable[StepPoint]) -> list[StepPoint]:
    """Those whose passes have no collectives in them, and whose ranks all compute all the time."""
    return [point for point in points if point.decisions.data_parallel == point.decisions.world_size and point.decisions.zero_stage < 3]


def _fit_passes(cluster: ClusterSpec, points: Sequence[StepPoint]) -> ClusterSpec:
    """What layers take in a step, where caches are cold: one factor for all forward passes, one for all backward passes, and one for
    the seconds of a kernel, which small layers consist of."""
    points = _undisturbed(points)
    if not points:
        return cluster

    def scaled(logs: Sequence[float]) -> ClusterSpec:
        efficiency, (forward, backward, kernel) = cluster.efficiency, (math.exp(x) for x in logs)
        scales = {
            f"{kind}.{name}": efficiency.layer_scale.get(f"{kind}.{name}", 1.0) * factor
            for kind in ("embedding", "block", "head")
            for name, factor in (("forward", forward), ("backward", backward))
        }
        return replace(cluster, efficiency=replace(efficiency, layer_scale=scales, kernel_seconds=efficiency.kernel_seconds * kernel))

    def cost(logs: Sequence[float]) -> float:
        candidate = scaled(logs)
        return squared_logarithms(ratio for point in points for ratio in _pass_ratios(candidate, point)) + 0.01 * logs[2] ** 2

    return scaled(minimise(cost, [0.1, 0.1, 0.1], step=0.2, rounds=200))


def _pass_ratios(cluster: ClusterSpec, point: StepPoint) -> tuple[float, float]:
    forward, backward = _passes(cluster, point)
    return forward / point.forward_seconds, backward / point.backward_seconds


def _fit_pipeline(cluster: ClusterSpec, points: Iterable[StepPoint]) -> ClusterSpec:
    """What passes take longer on ranks that wait for messages: the geometric mean of measured over predicted."""
    ratios = [1.0 / ratio for point in _pipelines(cluster, points) for ratio in _pass_ratios(cluster, point)]
    if not ratios:
        return cluster
    return replace(cluster, efficiency=replace(cluster.efficiency, pipeline_scale=max(1.0, statistics.geometric_mean(ratios))))


def _pipelines(cluster: ClusterSpec, points: Iterable[StepPoint]) -> list[StepPoint]:
    """Those whose passes have nothing beside them but messages."""
    cores = cluster.cores_per_node
    if cores is not None and cores < cluster.gpus_per_node:
        return []
    return [point for point in points if point.decisions.pipeline_parallel == point.decisions.world_size > 1]


def _waiting(cluster: ClusterSpec, point: StepPoint) -> list[tuple[float, float]]:
    """Predicted and measured seconds of a step's collectives in its passes; the reductions behind them go with the fixed cost of a step.

    Where passes with collectives in them compute longer than without, that too is what the collectives cost.
    """
    inputs, decisions = _of_step(cluster, point), point.decisions
    if decisions.pipeline_parallel > 1:
        return []
    computing = sum(_passes(cluster, point))
    longer = decisions.num_microbatches * max(0.0, point.forward_seconds + point.backward_seconds - computing)
    reduction = reduce_seconds(inputs, decisions, point.model.num_parameters / decisions.tensor_parallel)
    inside = decisions.num_microbatches * (sum(_passes(cluster, point, silent=False)) - computing)
    if decisions.zero_stage == 3:
        return [(inside + reduction, point.communication_seconds + point.reduction_seconds + longer)]
    return [(inside, point.communication_seconds + longer)] if decisions.tensor_parallel > 1 else []


def _fit_waits(cluster: ClusterSpec, points: Sequence[StepPoint]) -> ClusterSpec:
    """What collectives cost in a step beyond what they take one right after another: seconds for each, and where they fill new buffers, by
    the bytes of those."""
    if not any(_waiting(cluster, point) for point in points):
        return cluster

    sharded = any(point.decisions.zero_stage >= 2 for point in points)

    def waits(logs: Sequence[float]) -> ClusterSpec:
        fresh = math.exp(logs[1]) if sharded else None
        efficiency = replace(cluster.efficiency, wait_seconds=math.exp(logs[0]), fresh_bandwidth_bytes_per_second=fresh)
        return replace(cluster, efficiency=efficiency)

    def cost(logs: Sequence[float]) -> float:
        candidate = waits(logs)
        return squared_logarithms(expected / seen for point in points for expected, seen in _waiting(candidate, point))

    return waits(minimise(cost, [math.log(1e-3), math.log(2e9)], rounds=200))


def _fit_rest(cluster: ClusterSpec, measured: Measurements) -> ClusterSpec:
    """The fixed cost of a step: what is left of it outside the passes once reduction and optimizer are taken off. Most of it is waiting for
    the rank that came last to the step's end."""
    points = [point for point in measured.steps if point.decisions.pipeline_parallel == 1 and point.decisions.zero_stage == 0]
    efficiency = cluster.efficiency
    if points:
        left = []
        for point in points:
            inputs, count = _of_step(cluster, point), point.model.num_parameters / point.decisions.tensor_parallel
            expected = optimizer_seconds(inputs, point.decisions, count) + reduce_seconds(inputs, point.decisions, count)
            left.append(point.rest_seconds + point.reduction_seconds - expected)
        efficiency = replace(efficiency, step_seconds=max(0.0, statistics.median(left)))
    if measured.late_receives:
        inside = any(point.inside for point in measured.late_receives)
        late = [point for point in measured.late_receives if point.inside == inside]
        beyond = statistics.fmean(point.seconds - message_seconds(cluster, point.num_bytes, inside) for point in late)
        efficiency = replace(efficiency, receive_seconds=max(RENDEZVOUS_SECONDS, beyond))
    return replace(cluster, efficiency=efficiency)


def _optimizer_prediction(cluster: ClusterSpec, point: OptimizerPoint) -> float:
    any_layer = LayerPoint(presets()["tiny-gpt"], "block", 1, 1, 1, point.precision, 1.0, 1.0)
    return optimizer_seconds(*_one_rank(cluster, any_layer), point.num_parameters)


# how well it fits


def _residuals(cluster: ClusterSpec, measured: Measurements) -> list[Residual]:
    def collective(point: CollectivePoint) -> float:
        curves = {(curve.kind, curve.num_ranks, curve.num_nodes): curve for curve in cluster.collectives}
        curve = curves[point.kind, point.num_ranks, point.num_nodes]
        return (curve.latency_seconds + point.num_bytes / curve.bandwidth_bytes_per_second) / point.seconds

    messages = [point for inside in (True, False) for point in fitted_messages(measured.messages, inside)]
    steps = [ratio for point in _undisturbed(measured.steps) for ratio in _pass_ratios(cluster, point)]
    layers = {kind: [r for p in measured.layers if p.kind == kind for r in _layer_ratio(cluster, p)] for kind in ("embedding", "block", "head")}
    return [
        _residual("passes in training", steps),
        _residual("passes of pipelines", [ratio for point in _pipelines(cluster, measured.steps) for ratio in _pass_ratios(cluster, point)]),
        _residual("collectives in training", [expected / seen for point in measured.steps for expected, seen in _waiting(cluster, point)]),
        _residual("matrix products", _matmul_ratios(cluster, measured.matmuls)),
        _residual("memory traffic", _memory_ratios(cluster, measured.memory)),
        *(_residual(f"{kind} layers", ratios) for kind, ratios in layers.items()),
        _residual("optimizer", [_optimizer_prediction(cluster, p) / p.seconds for p in measured.optimizer]),
        _residual("collectives", [collective(p) for p in measured.collectives]),
        _residual("messages", [message_seconds(cluster, p.num_bytes, p.inside) / p.seconds for p in messages]),
    ]


def _residual(name: str, ratios: Sequence[float]) -> Residual:
    errors = [abs(ratio - 1.0) for ratio in ratios]
    return Residual(name, len(errors), statistics.fmean(errors) if errors else 0.0, max(errors, default=0.0))


def _source(residuals: Iterable[Residual]) -> str:
    parts = ", ".join(
        f"{r.name} {100 * r.mean_error_fraction:.0f} % (worst {100 * r.worst_error_fraction:.0f} %, {r.num_points} points)" for r in residuals
    )
    return f"measured by plan calibrate; mean error of the fit: {parts}"

