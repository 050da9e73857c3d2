"""calculon on published rows: the rows as its applications and executions, run in a checkout that the user has.

calculon (calculon-ai/calculon, Isaev et al. 2023) is not part of this project; `python benchmarks/validate.py --calculon
FOLDER` starts it in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.published import ValidationRow
from planner.rows import NotExpressible, case_of

# Run in calculon's checkout: reads [[application, execution, GB/s between nodes], ...], writes the batch times or null.
CALCULON = """
import json, logging, sys, types
sys.path.insert(0, ".")
for name in ("pandas", "psutil"):  # its package imports them; its model does not use them
    sys.modules.setdefault(name, types.ModuleType(name))
from calculon.llm.llm import Llm
from calculon.system import System
found = []
log = logging.getLogger("quiet"); log.disabled = True
for application, execution, network in json.load(sys.stdin):
    try:
        facts = json.load(open("systems/a100_80g.json"))
        facts["mem1"]["GiB"] = 80_000  # times only: what does not fit is timed all the same
        facts["networks"][1]["bandwidth"] = network
        system = System(facts)
        model = Llm(Llm.Application(application), log)
        model.compile(system, Llm.Execution.from_json(execution))
        model.run(system)
        found.append(model.get_total_time())
    except (Llm.Error, AssertionError):
        found.append(None)
json.dump(found, sys.stdout)
"""


def run_calculon(folder: Path, rows: Sequence[ValidationRow], facts: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """calculon's signed error by group and row, as fractions; rows that it refuses are left out.

    `facts` holds the published rows by their id. Raises CalledProcessError when `folder` is no checkout that runs.
    """
    jobs = [(row, job) for row in rows if (job := _job(facts[row.id])) is not None]
    done = subprocess.run(
        [sys.executable, "-c", CALCULON], input=json.dumps([job for _, job in jobs]), cwd=folder, capture_output=True, text=True, check=True
    )
    found: dict[str, dict[str, float]] = {}
    for (row, _), seconds in zip(jobs, json.loads(done.stdout), strict=True):
        if seconds is not None and row.measured.step_seconds:
            found.setdefault(row.group, {})[row.id] = seconds / row.measured.step_seconds - 1.0
    return found


def _job(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], float] | None:
    """The row as calculon's application and execution, and the GB/s between nodes; on its A100 system with 80 GB."""
    try:
        case = case_of(row)
    except NotExpressible:
        return None
    model, plan = case.inputs.model, case.decisions
    level = plan.stages[0].recompute
    application = {
        "hidden": model.hidden_size, "feedforward": model.ffn_hidden_size, "seq_size": case.inputs.training.sequence_length,
        "attn_heads": model.num_attention_heads, "attn_size": model.head_dim, "num_blocks": model.num_layers, "name": model.name,
    }  # fmt: skip
    execution = {
        "num_procs": plan.world_size, "tensor_par": plan.tensor_parallel, "pipeline_par": plan.pipeline_parallel, "data_par": plan.data_parallel,
        "tensor_par_net": 0, "pipeline_par_net": 1 if plan.pipeline_parallel > 1 else 0, "data_par_net": 1 if plan.data_parallel > 1 else 0,
        "batch_size": case.inputs.training.global_batch_size, "microbatch_size": plan.micro_batch_size, "datatype": "float16",
        "fused_activation": False, "attention_type": "multihead", "activation_recompute": {"selective": "attn_only"}.get(str(level), level),
        "pipeline_interleaving": plan.num_virtual_stages, "optimizer_sharding": plan.zero_stage > 0,
        "tensor_par_comm_type": "rs_ag" if plan.sequence_parallel else "ar", "tensor_par_overlap": "none",
        "seq_par_ag_redo": plan.sequence_parallel and level != "full",
        "data_par_overlap": False, "weight_offload": False, "activations_offload": False, "optimizer_offload": False, "training": True,
    }  # fmt: skip
    return application, execution, case.inputs.cluster.inter_node.bandwidth_bytes_per_second / 1e9
