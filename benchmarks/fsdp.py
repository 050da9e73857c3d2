"""ZeRO-3 as the executor does it, beside torch's `fully_shard` (FSDP2): losses, and bytes sent in a step.

    python benchmarks/fsdp.py       2 and 4 CPU processes; tables in benchmarks/results/fsdp.txt

The second table is why: both under pipeline schedules, against one process, where those that split the backward pass go wrong with FSDP2.

Both have the same initial weights, samples, micro-batches, AdamW and clipping (`reference_model.py`). FSDP2's bytes are counted at its collectives
as torch dispatches them, by the same ring formulas as the executor's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from common import make_plan, processor, table, write_results  # noqa: E402

from planner.cluster import load_cluster  # noqa: E402
from planner.documents import dumps  # noqa: E402
from planner.model import load_model, replace  # noqa: E402
from planner.plan import Plan, load_plan  # noqa: E402

SEED, STEPS = 3, 6


class CountBytes(TorchDispatchMode):
    """Bytes that a rank of `size` sends in all-gathers and reduce-scatters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.total = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "allgather_base" in name or "reduce_scatter_base" in name or "all_gather_single" in name or "reduce_scatter_single" in name:
            whole = max((item for item in args if isinstance(item, torch.Tensor)), key=lambda tensor: tensor.nbytes)
            self.total += (self.size - 1) * whole.nbytes // self.size
        return func(*args, **(kwargs or {}))


def plan_of(num_ranks: int, schedule: str | None = None) -> Plan:
    """ZeRO-3 over `num_ranks`, a batch of 8; with a schedule, over half of them in two pipeline ranks."""
    sizes = {"num_layers": 4, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "ffn_hidden_size": 128}
    model = replace(load_model("tiny-llama"), **sizes, vocab_size=256)
    cluster = load_cluster(f"cpu:{num_ranks}")
    if schedule is None:
        return make_plan(model, cluster, dp=num_ranks, zero=3 if num_ranks > 1 else 0, num_microbatches=8 // num_ranks, sequence_length=32)
    degrees = {"dp": num_ranks // 2, "pp": 2, "num_microbatches": 16 // num_ranks}
    return make_plan(model, cluster, **degrees, zero=3, schedule=schedule, virtual=1 if schedule == "1F1B" else 2, sequence_length=32)


def formula(plan: Plan) -> float:
    """Bytes sent in a step: each micro-batch gathers all weights for its forward and again for its backward pass, and scatters all
    gradients: 3 (n - 1) / n of the model (Rajbhandari et al. 2020, section 7)."""
    n = plan.decisions.data_parallel
    return 3 * (n - 1) / n * plan.decisions.num_microbatches * 4 * plan.inputs.model.num_parameters


def work(plan_file: str, output: str) -> None:
    """What each rank does; rank 0 writes both sides' losses and bytes."""
    import torch.distributed as dist
    from reference_dtensor import DTensorTrainer

    from executor.data import Data, open_tokens
    from executor.mesh import make_mesh
    from executor.train import RunOptions, Trainer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plan = load_plan(plan_file)
    training, spec = plan.inputs.training, plan.inputs.model
    data = Data(open_tokens(None, spec.vocab_size), spec.vocab_size, training.sequence_length, training.global_batch_size, SEED)
    ours = Trainer(plan, make_mesh(plan.decisions, dist.get_rank()), RunOptions(seed=SEED, learning_rate=1e-3), torch.device("cpu"))
    losses = []
    for _ in range(STEPS):
        ours.mesh.sent_bytes.clear()
        ours.load(data)
        losses.append(float(ours.step().loss))
    theirs = DTensorTrainer(plan, SEED)
    their_losses = []
    for _ in range(STEPS):
        with CountBytes(dist.get_world_size()) as counter:
            their_losses.append(theirs.step(data))
    if dist.get_rank() == 0:
        found = {"ours": losses, "theirs": their_losses, "our_bytes": ours.mesh.sent_bytes["dp"], "their_bytes": counter.total}
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def launch(plan: Plan) -> dict[str, Any]:
    """Both sides' losses and bytes under `plan`."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "plan.json", Path(folder) / "result.json"
        path.write_text(dumps(plan))
        ranks = str(plan.decisions.world_size)
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, __file__]
        command += ["--work", str(path), str(output)]
        for _ in range(2):
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return json.loads(output.read_text())  # type: ignore[no-any-return]
        raise RuntimeError(done.stderr[-4000:])


def largest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def compare(num_ranks: int) -> dict[str, Any]:
    """Largest loss difference between the two, and bytes beside the formula."""
    plan = plan_of(num_ranks)
    found = launch(plan)
    return {"ranks": num_ranks, "loss_difference": largest(found["ours"], found["theirs"]), "formula_bytes": formula(plan), **found}


def compare_schedules() -> list[dict[str, Any]]:
    """Largest loss difference of each from one process, on dp 2 x pp 2."""
    alone = launch(plan_of(1))["ours"]
    results = []
    for schedule in ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        found = launch(plan_of(4, schedule))
        results.append({"schedule": schedule, "ours": largest(found["ours"], alone), "theirs": largest(found["theirs"], alone)})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", nargs=2, metavar=("PLAN", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return 0
    results = [compare(count) for count in (2, 4)]
    header = ("ranks", "largest loss difference", "bytes by formula", "ours", "FSDP2")
    rows = [
        (row["ranks"], f"{row['loss_difference']:.1e}", f"{row['formula_bytes']:,.0f}", f"{row['our_bytes']:,}", f"{row['their_bytes']:,}")
        for row in results
    ]
    text = f"{processor()}. {STEPS} steps in fp32; bytes that a rank sends in a step.\n\n{table(header, rows)}"
    schedules = compare_schedules()
    rows = [(row["schedule"], f"{row['ours']:.1e}", f"{row['theirs']:.1e}") for row in schedules]
    text += f"\nLargest loss difference from one process, dp 2 x pp 2.\n\n{table(('schedule', 'ours', 'FSDP2'), rows)}"
    write_results("fsdp", text, {"data_parallel": results, "schedules": schedules})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
