"""Traced modules and their plans as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from planner.chain_estimate import ChainEstimate
from planner.chain_plan import ChainPlan, recomputed
from planner.estimate import warnings
from planner.plan import Stage
from planner.tables.plans import degrees, memory_line, solver_line
from planner.tables.text import GIB, count, gib, notes, percent, seconds, size, table
from planner.traced import TracedModel, at


def plan_view(plan: ChainPlan, *, short: bool) -> list[Any]:
    """The answer first, then a row per pipeline rank, the reasons and the runners-up."""
    predictions, solver, cluster = plan.predictions, plan.solver, plan.inputs.cluster
    time, memory, ranks = predictions.time, predictions.memory, predictions.pipeline_ranks
    fits = all((rank.headroom_bytes or 0) >= 0 for rank in ranks)
    batch = plan.inputs.training.global_batch_size
    lines = [
        f"{'FITS' if fits else 'DOES NOT FIT'}: {plan.inputs.model.name} on {cluster.num_gpus:,} x {cluster.gpu.name} ({degrees(plan.decisions)})",
        memory_line(plan.inputs, memory, ranks),
        f"  step: {seconds(time.step_seconds)} (no interval: errors were measured for transformers only), bubble {percent(time.bubble_fraction)}, "
        f"MFU {percent(time.model_flops_utilization)}, {count(batch / (time.step_seconds or 1.0))} samples/s",
        solver_line(solver),
    ]
    parts: list[Any] = ["\n".join(lines), "", _stage_table(plan)]
    if solver.reasons:
        parts.append(notes("Why this plan", solver.reasons))
    parts += [notes("Warnings", found) for found in [warnings(plan.inputs, predictions)] if found]
    if solver.runners_up and not short:
        rows = [(degrees(other.decisions), seconds(other.step_seconds), gib(other.peak_bytes), other.why_not) for other in solver.runners_up]
        parts += ["", table("Runners-up", ("plan", "step", "peak GiB", "why it lost"), rows)]
    elif solver.runners_up:
        parts.append(f"{len(solver.runners_up)} runners-up, and why they lost: plan show")
    return parts


def _layers(model: TracedModel, stage: Stage) -> str:
    first, last = stage.first_layer, stage.first_layer + stage.num_layers - 1
    if first == last:
        return f"{first}: {model.layers[first].name}"
    return f"{first}–{last}: {model.layers[first].name} to {model.layers[last].name}"


def _stage_table(plan: ChainPlan) -> Table:
    rows = []
    for rank in plan.predictions.pipeline_ranks:
        stage = plan.decisions.stages[rank.pipeline_rank]
        again = len(recomputed(stage))
        memory = rank.memory
        rows.append(
            (
                rank.pipeline_rank,
                _layers(plan.inputs.model, stage),
                "none" if not again else "full" if again == stage.num_layers else f"{again} of {stage.num_layers}",
                gib(memory.weights_bytes),
                gib(memory.gradients_bytes),
                gib(memory.optimizer_bytes),
                gib(memory.activations_bytes),
                rank.num_in_flight,
                gib(memory.total_bytes),
                gib(rank.headroom_bytes),
                seconds(rank.forward_seconds),
                seconds(rank.backward_seconds),
            )
        )
    columns = (
        "rank", "layers", "recomputed", "weights", "gradients", "optimizer", "activations", "in flight", "peak", "headroom", "forward", "backward",
    )  # fmt: skip
    return table("Per pipeline rank (GiB; Mi = MiB; times per micro-batch)", columns, rows, left=3)


def wall_view(estimate: ChainEstimate) -> list[Any]:
    """The memory wall of a traced module, and its chain."""
    memory, per = estimate.memory, estimate.bytes_per_parameter
    rows = [
        (label, f"{held / 1e9:,.3g}", gib(held), f"{held / estimate.gpu_memory_bytes:,.3g}")
        for label, held in (
            (f"weights ({per[0]} B)", memory.weights_bytes),
            (f"gradients ({per[1]} B)", memory.gradients_bytes),
            (f"optimizer ({per[2]} B)", memory.optimizer_bytes),
            ("buffers, frozen weights", memory.buffers_bytes),
            ("together", memory.total_bytes),
        )
    ]
    title = f"{estimate.model['name']}: {estimate.model['num_parameters']:,} parameters in a chain of {estimate.model['num_layers']} layers"
    return [
        table(title, ("what training keeps", "GB (10^9)", "GiB", f"x {estimate.gpu}"), rows),
        f"The states alone fill {estimate.num_gpus_for_states:,} x {estimate.gpu} ({estimate.gpu_memory_bytes / GIB:,.1f} GiB each).",
        f"Activations of one sample: {size(estimate.activations_bytes_per_sample)} (none recomputed).",
        f"FLOPs of one sample: {estimate.forward_flops_per_sample:.4g} forward, {estimate.training_flops_per_sample:.4g} with backward.",
        "",
        layers_table(estimate.traced),
    ]


def layers_table(model: TracedModel, samples: int = 1) -> Table:
    """The chain: what each layer holds, does and hands on, for micro-batches of `samples`."""
    rows: list[Sequence[object]] = []
    for index, layer in enumerate(model.layers):
        cost = model.costs[layer.cost]
        flops = sum(item.num_calls * at(item.flops, samples) for item in cost.forward)
        rows.append(
            (
                index,
                layer.name,
                f"{cost.num_parameters:,}" + (f" (+ {cost.num_shared_parameters:,} tied)" if cost.num_shared_parameters else ""),
                count(flops),
                gib(at(cost.saved_bytes, samples)),
                gib(at(cost.sent_bytes, samples)),
            )
        )
    columns = ("layer", "module", "parameters", "forward FLOPs", "saved", "handed on")
    return table("The chain that a pipeline can cut (GiB; Mi = MiB; of one sample)", columns, rows, left=2)
