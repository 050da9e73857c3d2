"""What a row of published measurements says, part by part, and what it measured.

A row is a JSON object with the fields model, cluster, parallel, batch, recompute, precision, source and notes, as in
planner/data/published.json. Any field may be missing or of another type.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from planner.errors import MeshwrightError


class NotExpressible(MeshwrightError):
    """A row whose configuration has no place in a plan, or that does not say enough."""


class Measured(NamedTuple):
    step_seconds: float | None
    peak_bytes: float | None


class RowFacts:
    """The parts of one row."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        self.model = object_of(row.get("model"))
        self.cluster = object_of(row.get("cluster"))
        self.parallel = object_of(row.get("parallel"))
        self.batch = object_of(row.get("batch"))
        source = object_of(row.get("source"))
        self.year = count_of(source.get("year")) or 2024
        notes = row.get("notes")
        self.notes = " ".join(str(note) for note in notes) if isinstance(notes, list) else str(notes or "")
        self.text = " ".join(str(part) for part in (*source.values(), self.notes, row.get("group"), row.get("id"))).lower()
        """All that could name the program, in lower case."""

    def degree(self, name: str) -> int:
        """A parallel degree; 1 where the row gives none."""
        return count_of(self.parallel.get(name)) or 1


def measured_of(row: Any) -> Measured:
    """Step time and peak memory that a row reports, from whichever of its figures gives them most directly.

    GB of memory as GPU tools print them count as 2^30 bytes.
    """
    measured = row.get("measured") if isinstance(row, dict) else None
    if not isinstance(measured, dict):
        return Measured(None, None)
    gib = number_of(measured.get("memory_gib")) or number_of(measured.get("memory_gb"))
    return Measured(_measured_seconds(row, measured), gib * 2**30 if gib else None)


def _measured_seconds(row: dict[str, Any], measured: dict[str, Any]) -> float | None:
    direct = number_of(measured.get("iter_time_s")) or number_of(measured.get("iter_time_s_derived"))
    if direct:
        return direct
    batch, cluster, model = (object_of(row.get(name)) for name in ("batch", "cluster", "model"))
    gpus, samples, sequence = number_of(cluster.get("gpu_count")), number_of(batch.get("global_batch")), number_of(model.get("seq"))
    tokens = samples * sequence if samples and sequence else None
    rate = number_of(measured.get("tokens_per_s_total"))
    if tokens and rate:
        return tokens / rate
    rate = number_of(measured.get("tokens_per_s_per_gpu"))
    if tokens and rate and gpus:
        return tokens / (rate * gpus)
    rate = number_of(measured.get("samples_per_s_per_gpu"))
    if samples and rate and gpus:
        return samples / (rate * gpus)
    rate = number_of(measured.get("samples_per_s"))
    if samples and rate:
        return samples / rate
    return number_of(row.get("derived_step_seconds"))


def number_of(value: Any) -> float | None:
    """`value` when it is a positive finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


def count_of(value: Any) -> int | None:
    """`value` when it is a positive whole number, else None."""
    number = number_of(value)
    return int(number) if number is not None and number == int(number) and number < 1e12 else None


def object_of(value: Any) -> dict[str, Any]:
    """`value` when it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}
