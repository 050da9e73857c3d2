"""A cluster's constants corrected by what one run measured, so that predict, run, correct, predict converges."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

from planner.cluster import RENDEZVOUS_SECONDS, ClusterSpec, ComputeEfficiency, Efficiency, Link, compute_efficiency, in_precision
from planner.layer_time import final_sums_seconds, transfer_seconds
from planner.network import axis_group
from planner.plan import Axis, Decisions, Inputs, replace
from planner.run import Run
from planner.timeline import Event, Timeline
from planner.timing import predict_time, predict_timeline

BOUNDS = (0.05, 20.0)
"""A constant that a run puts outside these factors is not what is wrong, so it is moved no further."""


class Correction(NamedTuple):
    """The corrected cluster, the step's prediction before and after in seconds, and each part's measured over predicted time."""

    cluster: ClusterSpec
    before: float
    after: float
    ratios: dict[str, float]


def correct(inputs: Inputs, decisions: Decisions, run: Run, timeline: Timeline | None) -> Correction:
    """Corrects compute, reduction, optimizer, messages and the fixed cost of a step by their own ratios, as far as the
    timeline shows them; without one, all compute by the ratio of the steps.

    The timeline is of one step: its times are scaled to the run's median step.
    """
    given = inputs.cluster
    inputs = replace(inputs, cluster=in_precision(given, inputs.training.precision))
    before = predict_time(inputs, decisions).time.step_seconds or 0.0
    measured = run.summary.step_seconds
    if timeline is None or not timeline.events:
        ratios = {"compute": measured / before} if before else {}
        cluster = _scaled(inputs, decisions, ratios)
    else:
        last = run.steps[-1].seconds
        ratios = _ratios(inputs, decisions, run, timeline, measured / last if last > 0 else 1.0)
        cluster = _scaled(inputs, decisions, ratios)
        cluster = _optimizer_scaled(replace(inputs, cluster=cluster), decisions, inputs, ratios.get("optimizer", 1.0))
        fixed = max(0.0, last - timeline.end)
        cluster = replace(cluster, efficiency=replace(cluster.efficiency, step_seconds=fixed))
    after = predict_time(replace(inputs, cluster=cluster), decisions).time.step_seconds or 0.0
    if cluster.efficiency.bf16 != given.efficiency.bf16:  # it holds what is of bf16 where fp32's is kept
        kept = {name: getattr(given.efficiency, name) for name in ComputeEfficiency.__struct_fields__}
        cluster = replace(cluster, efficiency=replace(cluster.efficiency, bf16=compute_efficiency(cluster), **kept))
    return Correction(cluster, before, after, ratios)


def _ratios(inputs: Inputs, decisions: Decisions, run: Run, timeline: Timeline, to_median: float) -> dict[str, float]:
    predicted = predict_timeline(inputs, decisions)
    copies = decisions.data_parallel * decisions.tensor_parallel
    found: dict[str, float] = {}
    for name, kinds in (("forward", "F"), ("backward", "BIW")):
        expected = sum(_durations(predicted.events, kinds)) * copies
        seen = sum(_durations(timeline.events, kinds)) * to_median
        if expected > 0 and seen > 0:
            found[name] = _bounded(seen / expected)
    if decisions.zero_stage == 3:
        expected = sum(_durations(predicted.events, ("F", "B", "I", "W", "REDUCE"))) * copies
        seen = sum(_durations(timeline.events, ("F", "B", "I", "W", "REDUCE"))) * to_median
        found = dict.fromkeys(("forward", "backward", "reduction"), _bounded(seen / expected)) if expected > 0 else {}
    for name, kind in (("reduction", "REDUCE"), ("optimizer", "OPTIMIZER")):
        if name in found:
            continue
        expected, seen = _together(predicted.events, kind), _together(timeline.events, kind) * to_median
        if kind == "REDUCE" and inputs.cluster.efficiency.wait_seconds > 0:  # waiting for the last rank is in the prediction
            expected = sum(_durations(predicted.events, (kind,)))
            seen = sum(_durations(timeline.events, (kind,))) / copies * to_median
        if expected > 0 and seen > 0:
            found[name] = _bounded(seen / expected)
    transits = _transits(timeline, run)
    expected_transits = [event.end - event.start for event in _messages(predicted)]
    if transits and expected_transits:
        found["messages"] = _bounded(statistics.median(transits) * to_median / statistics.median(expected_transits))
    late = _late(timeline, run)
    if late and inputs.cluster.efficiency.receive_seconds > 0:
        found["late receives"] = _bounded(statistics.fmean(late) * to_median / _late_seconds(inputs.cluster, inputs, decisions))
    return found


def _late_seconds(cluster: ClusterSpec, inputs: Inputs, decisions: Decisions) -> float:
    """Predicted for a receive whose message had been sent before: the mean over the pipeline's links."""
    links = range(decisions.pipeline_parallel - 1)
    transfers = [transfer_seconds(replace(inputs, cluster=cluster), decisions, rank) for rank in links]
    return cluster.efficiency.receive_seconds + statistics.fmean(transfers)


def _bounded(ratio: float) -> float:
    return min(max(ratio, BOUNDS[0]), BOUNDS[1])


def _durations(events: Iterable[Event], kinds: str | tuple[str, ...]) -> list[float]:
    return [event.end - event.start for event in events if event.kind in kinds]


def _together(events: Iterable[Event], kind: str) -> float:
    """Seconds of an action in which ranks wait for each other: from the last start to the last end, for each stage.

    What the ranks that came first spend waiting for the last one is no cost of the action.
    """
    stages: dict[int, list[Event]] = {}
    for event in events:
        if event.kind == kind:
            stages.setdefault(event.stage, []).append(event)
    return sum(max(event.end for event in same) - max(event.start for event in same) for same in stages.values())


def _late(timeline: Timeline, run: Run) -> list[float]:
    """Seconds of the receives whose message had been sent before."""
    places = {rank.rank: (rank.coordinates.dp, rank.coordinates.tp) for rank in run.ranks}
    sends = _sends(timeline, places)
    found = []
    for event in timeline.events:
        if event.kind.startswith("RECV"):
            sent = sends.get((event.kind[-1], event.stage, event.microbatch, places[event.rank]))
            if sent is not None and event.start > sent.start:
                found.append(event.end - event.start)
    return found


def _sends(timeline: Timeline, places: dict[int, tuple[int, int]] | None) -> dict[tuple[str, int, int, tuple[int, int] | None], Event]:
    """Each send by what its receive is called."""
    return {
        (event.kind[-1], event.stage + (1 if event.kind == "SEND_F" else -1), event.microbatch, places[event.rank] if places else None): event
        for event in timeline.events
        if event.kind.startswith("SEND")
    }


def _messages(timeline: Timeline, places: dict[int, tuple[int, int]] | None = None) -> list[Event]:
    """Each message from the start of its send to the end of its receive, where the receiver was waiting by then."""
    sends = _sends(timeline, places)
    found = []
    for event in timeline.events:
        if not event.kind.startswith("RECV"):
            continue
        sent = sends.get((event.kind[-1], event.stage, event.microbatch, places[event.rank] if places else None))
        if sent is not None and event.start <= sent.start < event.end:
            found.append(event._replace(start=sent.start))
    return found


def _transits(timeline: Timeline, run: Run) -> list[float]:
    places = {rank.rank: (rank.coordinates.dp, rank.coordinates.tp) for rank in run.ranks}
    return [event.end - event.start for event in _messages(timeline, places)]


def _scaled(inputs: Inputs, decisions: Decisions, ratios: dict[str, float]) -> ClusterSpec:
    cluster, efficiency = inputs.cluster, inputs.cluster.efficiency
    both = ratios.get("compute", 1.0)
    forward, backward = ratios.get("forward", both), ratios.get("backward", both)
    scales = {
        f"{kind}.{name}": efficiency.layer_scale.get(f"{kind}.{name}", 1.0) * ratio
        for kind in ("embedding", "block", "head")
        for name, ratio in (("forward", forward), ("backward", backward))
    }
    cluster = replace(cluster, efficiency=replace(efficiency, layer_scale=scales))
    if decisions.tensor_parallel > 1:
        cluster = _slower_collectives(cluster, decisions, "tp", (forward + backward) / 2)
    if "reduction" in ratios and decisions.data_parallel > 1:
        cluster = _slower_collectives(cluster, decisions, "dp", ratios["reduction"])
    if "messages" in ratios:
        cluster = _slower_messages(cluster, decisions, ratios["messages"])
    if "late receives" in ratios:  # what they take beyond the messages' new times
        receive = cluster.efficiency.receive_seconds
        wanted = _late_seconds(inputs.cluster, inputs, decisions) * ratios["late receives"]
        longer = wanted - (_late_seconds(cluster, inputs, decisions) - receive)
        cluster = replace(cluster, efficiency=replace(cluster.efficiency, receive_seconds=max(RENDEZVOUS_SECONDS, longer)))
    waits = ratios.get("reduction", 1.0) if decisions.tensor_parallel == 1 else (forward + backward) / 2
    return replace(cluster, efficiency=replace(cluster.efficiency, wait_seconds=cluster.efficiency.wait_seconds * waits))


def _optimizer_scaled(corrected: Inputs, decisions: Decisions, inputs: Inputs, ratio: float) -> ClusterSpec:
    """The optimizer takes `ratio` times what was predicted of it; the sums over ranks in that are the collectives' affair."""
    cluster = corrected.cluster
    parts = _optimizer_parts(inputs, decisions)
    own = [whole - sums for whole, sums in parts]
    if ratio == 1.0 or not sum(own):
        return cluster
    left = ratio * sum(whole for whole, _ in parts) - sum(sums for _, sums in _optimizer_parts(corrected, decisions))
    scale = cluster.efficiency.optimizer_scale * _bounded(left / sum(own))
    return replace(cluster, efficiency=replace(cluster.efficiency, optimizer_scale=scale))


def _optimizer_parts(inputs: Inputs, decisions: Decisions) -> list[tuple[float, float]]:
    """For each pipeline rank the optimizer's predicted seconds, and of those the sums over ranks."""
    sums = final_sums_seconds(inputs, decisions)
    return [(event.end - event.start, sums) for event in predict_timeline(inputs, decisions).events if event.kind == "OPTIMIZER"]


def _slower_collectives(cluster: ClusterSpec, decisions: Decisions, axis: Axis, ratio: float) -> ClusterSpec:
    """Collectives over the links of an axis take `ratio` times as long."""
    ranks = axis_group(cluster, decisions, axis)
    inside = ranks.nodes == 1
    curves = tuple(
        replace(
            curve, latency_seconds=curve.latency_seconds * ratio, bandwidth_bytes_per_second=curve.bandwidth_bytes_per_second / ratio
        ) if curve in ranks.curves else curve
        for curve in cluster.collectives
    )  # fmt: skip
    cluster = replace(cluster, collectives=curves)
    share, latency = ("collective", "collective_latency") if inside else ("inter_node_collective", "inter_node_collective_latency")
    cluster, wanted = _room(cluster, inside, getattr(cluster.efficiency, share) / ratio, share)
    changes = {share: wanted, latency: getattr(cluster.efficiency, latency) * ratio}
    return replace(cluster, efficiency=replace(cluster.efficiency, **changes))


def _slower_messages(cluster: ClusterSpec, decisions: Decisions, ratio: float) -> ClusterSpec:
    """Messages take `ratio` times as long; collectives stay as they are."""
    inside = axis_group(cluster, decisions, "pp").nodes == 1
    name, prefix = ("intra_node", "") if inside else ("inter_node", "inter_node_")
    link: Link = getattr(cluster, name)
    latency = f"{prefix}collective_latency"
    efficiency = replace(cluster.efficiency, **{latency: getattr(cluster.efficiency, latency) / ratio})
    cluster = replace(cluster, efficiency=efficiency, **{name: replace(link, latency_seconds=link.latency_seconds * ratio)})
    cluster, wanted = _room(cluster, inside, cluster.efficiency.point_to_point / ratio, "point_to_point")
    return replace(cluster, efficiency=replace(cluster.efficiency, point_to_point=wanted))


def _room(cluster: ClusterSpec, inside: bool, wanted: float, name: str) -> tuple[ClusterSpec, float]:
    """Where a share of the link's bandwidth would exceed 1, the link is faster instead, and the other shares are less."""
    if wanted <= 1.0:
        return cluster, wanted
    link_name = "intra_node" if inside else "inter_node"
    link: Link = getattr(cluster, link_name)
    shares = {"collective", "point_to_point"} if inside else {"inter_node_collective"}
    others = {share: getattr(cluster.efficiency, share) / wanted for share in shares - {name}}
    efficiency: Efficiency = replace(cluster.efficiency, **others)
    faster = replace(link, bandwidth_bytes_per_second=link.bandwidth_bytes_per_second * wanted)
    return replace(cluster, efficiency=efficiency, **{link_name: faster}), 1.0
