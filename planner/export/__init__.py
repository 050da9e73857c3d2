"""A plan as the configuration of the framework that somebody already runs, or of what starts this package's executor.

What a target can't express is never dropped in silence. Where following the target would change what is computed, or
need more memory than planned, the export raises InputError; where it only changes speed, or takes less memory, the
output says so in a comment that begins with `NOTE:`. `docs/exports.md` names the versions that the options were read
from.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.errors import InputError
from planner.export.accelerate import export_accelerate
from planner.export.deepspeed import export_deepspeed
from planner.export.launch import export_kubernetes, export_slurm, export_torchrun
from planner.export.megatron import export_megatron
from planner.export.nanotron import export_nanotron
from planner.export.torchtitan import export_torchtitan
from planner.plan import Plan

_EXPORTERS: dict[str, Callable[[Plan], dict[str, str]]] = {
    "megatron": export_megatron,
    "torchtitan": export_torchtitan,
    "deepspeed": export_deepspeed,
    "nanotron": export_nanotron,
    "accelerate": export_accelerate,
    "torchrun": export_torchrun,
    "slurm": export_slurm,
    "kubernetes": export_kubernetes,
}
TARGETS: tuple[str, ...] = tuple(_EXPORTERS)
"""What a plan can be exported to, in the order of the documentation."""


def export(plan: Plan, target: str) -> dict[str, str]:
    """The files that make `target` run `plan`: text by file name.

    Raises InputError when `target` is unknown, and when it can't express a decision of the plan.
    """
    if target not in _EXPORTERS:
        raise InputError("--to", target, f"one of {', '.join(TARGETS)} is expected")
    return _EXPORTERS[target](plan)


__all__ = ["TARGETS", "export"]
