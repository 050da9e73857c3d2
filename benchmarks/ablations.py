"""What each assumption of the time model is worth: the errors on published rows with it and without it.

An assumption is a constant or a rule that neither a source nor a fit to declared groups settles, so that the errors of
groups that nothing was fitted to could be seen when it was chosen. `python benchmarks/validate.py --ablate` prints the
table; docs/time.md lists them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from benchmarks.common import table
from planner.accuracy import accuracy
from planner.cluster import presets
from planner.published import case_seconds, published_rows
from planner.rows import Case, NotExpressible, case_of, measured_of

Change = Callable[[Case], Case]


class Ablation(NamedTuple):
    """An assumption, what stands in its place, and the cases with that."""

    assumption: str
    instead: str
    change: Change


class Errors(NamedTuple):
    """Means of the untouched groups' means, and each group's mean absolute error, all as fractions."""

    mean_abs: float
    mean: float
    groups: dict[str, float]


def software(only: tuple[str, ...] = (), **changes: Any) -> Change:
    """Other constants for the programs named, or for all."""

    def change(case: Case) -> Case:
        if only and case.software.name not in only:
            return case
        return case._replace(software=msgspec.structs.replace(case.software, **changes))

    return change


def efficiency(gpu: str, **factors: float) -> Change:
    """Constants of the clusters whose name begins with `gpu`, times the factors."""

    def change(case: Case) -> Case:
        cluster = case.inputs.cluster
        if not cluster.name.startswith(gpu):
            return case
        values = {name: getattr(cluster.efficiency, name) * factor for name, factor in factors.items()}
        found = msgspec.structs.replace(cluster, efficiency=msgspec.structs.replace(cluster.efficiency, **values))
        return case._replace(inputs=msgspec.structs.replace(case.inputs, cluster=found))

    return change


def of_preset(*names: str) -> Change:
    """Constants as in the cluster's preset, whatever the row's network is."""

    def change(case: Case) -> Case:
        cluster = case.inputs.cluster
        values = {name: getattr(presets()[cluster.name].efficiency, name) for name in names}
        found = msgspec.structs.replace(cluster, efficiency=msgspec.structs.replace(cluster.efficiency, **values))
        return case._replace(inputs=msgspec.structs.replace(case.inputs, cluster=found))

    return change


def aligned(case: Case) -> Case:
    """Products off the grid of 8 as fast as others."""
    cluster = case.inputs.cluster
    found = msgspec.structs.replace(cluster, efficiency=msgspec.structs.replace(cluster.efficiency, matmul_misaligned=1.0))
    return case._replace(inputs=msgspec.structs.replace(case.inputs, cluster=found))


def default_vocabulary(case: Case) -> Case:
    """GPT-2's vocabulary for the runs of Qi et al."""
    if case.software.name != "megatron-zero-bubble":
        return case
    model = msgspec.structs.replace(case.inputs.model, vocab_size=50304)
    return case._replace(inputs=msgspec.structs.replace(case.inputs, model=model))


ABLATIONS = (
    Ablation("half the jitter on InfiniBand", "the preset's jitter", of_preset("jitter")),
    Ablation("Omni-Path at 65 % of other networks", "100 %", of_preset("inter_node_collective", "point_to_point")),
    Ablation("V100: 95 TFLOP/s, as measured by mli/transformers-benchmarks", "100", efficiency("v100", matmul=100 / 95)),
    Ablation("A100: within the flat optimum of its fit", "matmul + 1 %, memory - 5 %", efficiency("a100", matmul=1.01, memory=0.95)),
    Ablation("A100: the same", "matmul - 1 %, memory + 5 %", efficiency("a100", matmul=0.99, memory=1.05)),
    Ablation("H100 of 500 W at the cube root of 500/700", "as that of 700 W", efficiency("h100-96gb", matmul=0.615 / 0.55)),
    Ablation("products of 2021 at 97 % of 2022's speed", "100 %", software(("megatron-2021",), matmul_speed=1.0)),
    Ablation("eager kernels move 2 or 3 times the bytes of fused ones", "once",
             software(("torchtitan", "fsdp-paper", "gpt-neox"), elementwise_passes=1.0)),
    Ablation("softmax reads or writes unfused scores 4.5 times", "4 times", software(softmax_passes=4.0)),
    Ablation("backward all-reduces of 2022 hide by 70 %", "not at all",
             software(("megatron-2022", "megatron-zero-bubble"), overlap_tensor_backward=0.0)),
    Ablation("asynchronous tensor parallelism hides half", "nothing",
             software(("torchtitan", "torchtitan-compile"), overlap_tensor_forward=0.0, overlap_tensor_backward=0.0)),
    Ablation("Megatron's sends block until 2023", "they do not", software(blocking_transfers=False)),
    Ablation("ZeRO-1 of DeepSpeed all-reduces", "reduce-scatters", software(("megatron-deepspeed", "gpt-neox"), zero1_all_reduce=False)),
    Ablation("BLOOM's scalar holds for MT-NLG, NeoX and V100 too", "none of it", software(collective_seconds=0.0)),
    Ablation("products off the grid of 8 run at the fp32 peak", "as others", aligned),
    Ablation("zero-bubble's runs had 32,000 tokens", "50,304", default_vocabulary),
)  # fmt: skip


def errors(change: Change | None = None) -> Errors:
    """Errors of step time on the published rows that say all it needs, with every case changed."""
    found: dict[str, list[float]] = {}
    for row in published_rows():
        measured = measured_of(row).step_seconds
        if measured is None or row.get("complete_for_step_time") is False:
            continue
        try:
            case = case_of(row)
        except NotExpressible:
            continue
        found.setdefault(row["group"], []).append(case_seconds(change(case) if change else case) / measured - 1.0)
    untouched = [values for group, values in found.items() if group not in accuracy().groups]
    absolute = {group: statistics.fmean(map(abs, values)) for group, values in found.items()}
    return Errors(
        statistics.fmean(statistics.fmean(map(abs, values)) for values in untouched), statistics.fmean(map(statistics.fmean, untouched)), absolute
    )


def ablate() -> list[dict[str, Any]]:
    """Errors with all assumptions, then without each, as fractions; of the groups, the three whose mean absolute error it moves most."""
    known = errors()
    found: list[dict[str, Any]] = [{"assumption": "all as it is", "instead": "", "mean_abs": known.mean_abs, "mean": known.mean, "moved": {}}]
    for ablation in ABLATIONS:
        now = errors(ablation.change)
        most = sorted(known.groups, key=lambda group: -abs(now.groups[group] - known.groups[group]))[:3]
        moved = {group: (known.groups[group], now.groups[group]) for group in most if abs(now.groups[group] - known.groups[group]) >= 0.0005}
        found.append({"assumption": ablation.assumption, "instead": ablation.instead, "mean_abs": now.mean_abs, "mean": now.mean, "moved": moved})
    return found


def ablation_table(found: list[dict[str, Any]]) -> str:
    """What `ablate` found, in per cent."""
    rows = [
        (item["assumption"], item["instead"], f"{100 * item['mean_abs']:.1f}", f"{100 * item['mean']:+.1f}",
         ", ".join(f"{group} {100 * before:.1f} -> {100 * after:.1f}" for group, (before, after) in item["moved"].items()))
        for item in found
    ]  # fmt: skip
    return table(("assumption", "instead", "untouched: mean abs %", "mean %", "groups that move most: mean abs % with it -> without"), rows)
