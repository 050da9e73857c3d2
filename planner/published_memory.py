"""The peak memory that a published row would report, and whether it would have fitted at all."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from planner.framework_memory import MemoryProgram, Reader, Run, facts, framework_memory, memory_program, needed_bytes, reported_bytes
from planner.plan import replace
from planner.rows import Case


class RowMemory(NamedTuple):
    """Bytes."""

    reported: float
    """As the row's source measures: its tool, on its GPUs."""
    needed: float
    """What the fullest GPU must have."""
    capacity: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity


def row_memory(row: dict[str, Any], case: Case) -> RowMemory:
    """Memory of the configuration that `row` describes, which is `case` as a plan."""
    text = _text(row)
    run = _run(row, case, text)
    inputs, decisions = case.inputs, case.decisions
    capacity = inputs.cluster.gpu.memory_bytes
    totals = [memory.total_bytes for memory in framework_memory(inputs, decisions, run)]
    reader = memory_reader(text)
    seen = totals
    if reader.ranks == "first_node":
        per_stage = decisions.data_parallel * decisions.tensor_parallel
        seen = totals[: max(1, inputs.cluster.gpus_per_node // per_stage)]
    return RowMemory(reported_bytes(max(seen), reader.kind), needed_bytes(max(totals)), capacity)


def memory_reader(text: str) -> Reader:
    """How a row with that text (see `_text`) is read; the last reader of the data takes all."""
    return next(reader for reader in facts().readers if re.search(reader.pattern, text))


def ran_out_of_memory(row: Any) -> bool:
    measured = row.get("measured") if isinstance(row, dict) else None
    return isinstance(measured, dict) and measured.get("oom") is True


def _text(row: dict[str, Any]) -> str:
    measured = row.get("measured")
    kind = measured.get("memory_kind") if isinstance(measured, dict) else None
    source = row.get("source")
    parts = [f"kind: {kind}" if kind else "", row.get("group"), row.get("id"), *(source.values() if isinstance(source, dict) else ())]
    return " | ".join(str(part) for part in parts if part).lower()


def _run(row: dict[str, Any], case: Case, text: str) -> Run:
    degrees = row.get("parallel")
    context = degrees.get("cp") if isinstance(degrees, dict) else None
    p = case.decisions.pipeline_parallel
    flights = None
    if case.zero_bubble_memory is not None and case.decisions.num_stages == p:
        # Qi et al. 2023, section 2.2: the hand-made schedules hold p micro-batches on every rank, or 2p - 1.
        flights = (p if case.zero_bubble_memory < 2 else 2 * p - 1,) * p
    return Run(
        program=_program(row, case, text),
        fused_attention=case.software.attention == "fused",
        selective="op" if case.software.selective_recompute == "op" else "core",
        context_parallel=context if isinstance(context, int) else 1,
        flights=flights,
    )


def _program(row: dict[str, Any], case: Case, text: str) -> MemoryProgram:
    """The program's facts, changed where the row's own words say so."""
    name = case.software.name
    source, notes = row.get("source"), str(row.get("notes")).lower()
    year = source.get("year") if isinstance(source, dict) else None
    year = year if isinstance(year, int) else 2024
    if case.inputs.training.precision == "fp32":
        return replace(memory_program(name), weights=4, gradients=4, optimizer=8, accumulation=0)
    if name == "megatron-deepspeed":
        name = "deepspeed-2021" if year <= 2021 else "deepspeed-bf16" if "bf16" in str(row.get("precision")).lower() else name
    if name == "torchtitan" and "compile" in notes and "compile=false" not in notes:
        name = "torchtitan-compile"
    if name == "torchtitan-compile" and year >= 2025:
        name = "torchtitan-2025"
    return memory_program(name)
