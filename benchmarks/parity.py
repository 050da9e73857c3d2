"""Losses and gradient norms of every way of splitting a model, against one process.

    python benchmarks/parity.py                 all combinations, a table in docs/parity.md
    python benchmarks/parity.py --fast          the part that runs in CI

Each number of ranks is one torchrun launch, in which the combinations run one after the other.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from planner.cluster import load_cluster  # noqa: E402
from planner.documents import dumps  # noqa: E402
from planner.model import ModelSpec, load_model  # noqa: E402
from planner.model import replace as with_changes  # noqa: E402
from planner.plan import (  # noqa: E402
    Decisions,
    Inputs,
    Memory,
    Plan,
    Predictions,
    RecomputeCounts,
    SolverReport,
    Time,
    Training,
    check,
    digest,
    even_stages,
    make_stages,
    stage_ranks,
)

STEPS = 10
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
SEQUENCE, BATCH = 16, 8
SIZES = {"num_layers": 8, "hidden_size": 32, "head_dim": 8, "ffn_hidden_size": 64, "vocab_size": 257}


def combination(family: str = "gpt", *, fast: bool = False, **decisions: Any) -> dict[str, Any]:
    """One row of the table: what differs from one process."""
    return {"family": family, "fast": fast, "decisions": decisions}


COMBINATIONS: list[dict[str, Any]] = [
    # paradigms by themselves
    combination(schedule="Naive", pp=2, fast=True),
    combination("llama", schedule="Naive", pp=4),
    combination(dp=2, fast=True),
    combination("llama", dp=4),
    combination(schedule="GPipe", pp=2, fast=True),
    combination("llama", schedule="1F1B", pp=4),
    combination(tp=2, fast=True),
    combination("llama", tp=2, fast=True),
    combination(tp=2, sp=True, fast=True),
    combination("llama", tp=2, sp=True),
    combination(tp=4),
    combination("llama", tp=4, sp=True),  # key-value heads held by two ranks each
    combination("llama", tp=4),
    # ZeRO
    combination(dp=2, zero=1, fast=True),
    combination("llama", dp=2, zero=2, fast=True),
    combination(dp=2, zero=3, fast=True),
    combination(dp=4, zero=1),
    combination(dp=4, zero=2),
    combination("llama", dp=4, zero=3),
    combination(dp=4, zero=1, rep=2),
    combination("llama", dp=4, zero=2, rep=2),
    combination(dp=4, zero=3, rep=2, fast=True),
    # schedules, several stages a rank, uneven stages
    combination(schedule="Interleaved1F1B", pp=2, v=2, fast=True),
    combination(schedule="InterleavedZeroBubble", pp=2, v=2, fast=True),
    combination(schedule="ZBVZeroBubble", pp=2, v=2, fast=True),
    combination("llama", schedule="Interleaved1F1B", pp=4, v=2),
    combination("llama", schedule="InterleavedZeroBubble", pp=4, v=2),
    combination("llama", schedule="ZBVZeroBubble", pp=4, v=2),
    combination(schedule="1F1B", pp=4, sizes=[4, 1, 4, 1]),
    combination(schedule="GPipe", pp=2, sizes=[1, 9], fast=True),
    combination(schedule="ZBVZeroBubble", pp=2, v=2, sizes=[1, 5, 3, 1]),
    combination(schedule="1F1B", pp=3),
    # recompute
    combination(recompute="full", fast=True, pp=2, schedule="1F1B"),
    combination("llama", recompute="selective", tp=2, fast=True),
    combination(recompute="selective", tp=2, sp=True),
    combination("llama", recompute="full", tp=2, sp=True),
    combination(recompute="mixed", schedule="ZBVZeroBubble", pp=2, v=2),
    combination("llama", recompute="selective", schedule="InterleavedZeroBubble", pp=2, v=2),
    combination(recompute="full", dp=2, zero=3),
    # attention whose scores are stored, against one that is fused
    combination(attention="unfused", tp=2, recompute="selective", fast=True),
    combination("llama", attention="unfused", pp=2, schedule="1F1B", fast=True),
    combination("llama", attention="unfused", tp=4, sp=True),
    combination(attention="unfused", recompute="full", dp=2, zero=3),
    combination("llama", attention="unfused", schedule="ZBVZeroBubble", pp=2, v=2, recompute="selective"),
    # other families of blocks
    combination("bloom", tp=2, sp=True, fast=True),
    combination("bloom", tp=4),
    combination("bloom", attention="unfused", tp=2, pp=2, schedule="1F1B", recompute="selective"),
    combination("bloom", dp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=3, recompute="full"),
    combination("neox", tp=2, fast=True),
    combination("neox", tp=2, pp=2, schedule="InterleavedZeroBubble", v=2, sp=True, recompute="selective"),
    combination("neox", dp=2, tp=2, zero=3, sp=True, recompute="full"),
    combination("gptj", tp=2, sp=True, fast=True),
    combination("gptj", dp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=3),
    combination("falcon", tp=2, sp=True, fast=True),  # one key-value head, held by every rank
    combination("falcon", dp=2, tp=2, zero=2, recompute="selective"),
    combination("qwen3", tp=2, fast=True),
    combination("qwen3", tp=2, sp=True, recompute="selective", fast=True),
    combination("qwen3", tp=4, recompute="full"),
    combination("qwen3", dp=2, tp=2, zero=1),
    combination("qwen3", dp=2, tp=2, zero=2, sp=True),
    combination("qwen3", dp=2, tp=2, zero=3, recompute="full"),
    combination("qwen3", tp=2, pp=2, schedule="ZBVZeroBubble", v=2),
    combination("qwen3", dp=2, pp=2, schedule="InterleavedZeroBubble", v=2, zero=3, attention="unfused", recompute="selective"),
    combination("gemma", tp=2, sp=True, fast=True),
    combination("gemma", tp=4, recompute="selective"),
    combination("gemma", dp=2, tp=2, zero=3, recompute="full"),
    combination("gemma", dp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=2),
    combination("gemma", tp=2, pp=2, schedule="InterleavedZeroBubble", v=2, sp=True, recompute="selective"),
    combination("gemma2", attention="unfused", tp=2, fast=True),
    combination("gemma2", attention="unfused", dp=2, tp=2, zero=3, sp=True, recompute="selective"),
    combination("gemma2", attention="unfused", dp=2, pp=2, schedule="1F1B", zero=1, recompute="full"),
    combination("reglu", tp=2, sp=True, recompute="selective"),
    combination("reglu", pp=2, schedule="ZBVZeroBubble", v=2),
    # two axes
    combination(dp=2, tp=2, zero=1, sp=True, fast=True),
    combination("llama", dp=2, tp=2, zero=2),
    combination(dp=2, tp=2, zero=3, sp=True),
    combination("llama", dp=2, pp=2, schedule="1F1B", zero=1),
    combination(dp=2, pp=2, schedule="GPipe", zero=2),
    combination("llama", dp=2, pp=2, schedule="1F1B", zero=3),
    combination(dp=2, pp=2, schedule="Interleaved1F1B", v=2, zero=3),
    combination(dp=2, pp=2, schedule="InterleavedZeroBubble", v=2, zero=2),
    combination("llama", dp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=1),
    combination(dp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=2, fast=True),
    combination(dp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=3),
    combination("llama", dp=2, pp=2, schedule="InterleavedZeroBubble", v=2, zero=3),
    combination(tp=2, pp=2, schedule="1F1B", sp=True, order=["pp", "tp", "dp"]),
    combination("llama", tp=2, pp=2, schedule="ZBVZeroBubble", v=2, sp=True),
    # three axes
    combination(dp=2, tp=2, pp=2, schedule="1F1B"),
    combination("llama", dp=2, tp=2, pp=2, schedule="1F1B", zero=1, sp=True),
    combination(dp=2, tp=2, pp=2, schedule="GPipe", zero=2, sp=True, recompute="full"),
    combination("llama", dp=2, tp=2, pp=2, schedule="Interleaved1F1B", v=2, zero=3),
    combination(dp=2, tp=2, pp=2, schedule="InterleavedZeroBubble", v=2, zero=2, sp=True),
    combination("llama", dp=2, tp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=1, sp=True),
    combination(dp=2, tp=2, pp=2, schedule="ZBVZeroBubble", v=2, zero=3, sp=True, recompute="selective"),
    combination("llama", dp=4, pp=2, schedule="1F1B", zero=2, rep=2, order=["dp", "pp", "tp"]),
    combination(dp=4, tp=2, zero=3, rep=2, sp=True),
    combination("llama", tp=4, pp=2, schedule="1F1B", sp=True, recompute="selective"),
]


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("tiny-gpt", {}),
    "llama": ("tiny-llama", {}),
    "qwen3": ("tiny-llama", {"qk_norm": True, "family": "qwen3"}),
    "reglu": ("tiny-llama", {"activation": "relu", "mlp_bias": True}),
    "gemma": (
        "tiny-llama",
        {"activation": "gelu", "tied_embeddings": True, "num_norms_per_layer": 4, "embedding_scaled": True, "head_softcap": 1.0,
         "sliding_window": 6, "full_attention_every": 2, "family": "gemma2"},
    ),
    "gemma2": (
        "tiny-llama",
        {"activation": "gelu", "tied_embeddings": True, "num_norms_per_layer": 4, "embedding_scaled": True, "head_softcap": 1.0,
         "attention_softcap": 0.5, "attention_scale": 0.3, "sliding_window": 6, "full_attention_every": 2, "family": "gemma2"},
    ),
    "bloom": ("tiny-gpt", {"position_embedding": "alibi", "num_position_embeddings": 0, "embedding_norm": True, "family": "bloom"}),
    "neox": (
        "tiny-gpt",
        {"position_embedding": "rope", "num_position_embeddings": 0, "parallel_block": True, "tied_embeddings": False, "rotary_dim": 2,
         "activation": "gelu_erf", "family": "neox"},
    ),
    "gptj": (
        "tiny-gpt",
        {"position_embedding": "rope", "num_position_embeddings": 0, "parallel_block": True, "num_norms_per_layer": 1, "qkv_bias": False,
         "attention_output_bias": False, "head_bias": True, "tied_embeddings": False, "rotary_dim": 4, "rotary_neighbours": True, "family": "gptj"},
    ),
    "falcon": (
        "tiny-gpt",
        {"position_embedding": "rope", "num_position_embeddings": 0, "parallel_block": True, "num_norms_per_layer": 1, "qkv_bias": False,
         "attention_output_bias": False, "mlp_bias": False, "num_key_value_heads": 1, "activation": "gelu_erf", "family": "falcon"},
    ),
}
"""A preset, and what the family changes in it."""


ALONE: dict[str, dict[str, Any]] = {"gemma2": {"attention": "unfused"}}
"""What one process of a family needs: soft-capped scores have no fused attention."""


def model_of(family: str) -> ModelSpec:
    """Eight small blocks; a vocabulary that no degree divides."""
    preset, changes = FAMILIES[family]
    return with_changes(load_model(preset), **SIZES, **changes)


def plan_of(row: dict[str, Any], precision: str = "fp32") -> Plan:
    """The plan of a combination."""
    made = dict(row["decisions"])
    dp, tp, pp, v = (made.get(name, 1) for name in ("dp", "tp", "pp", "v"))
    schedule = made.get("schedule", "1F1B")
    model = model_of(row["family"])
    level = made.get("recompute", "none")
    count = pp * v
    stages = even_stages(model, schedule, pp, v, "none" if level == "mixed" else level)
    if level == "mixed":
        blocks = [stage.num_layers - (index in (0, count - 1)) for index, stage in enumerate(stages)]
        mixed = [RecomputeCounts(full=1, selective=size - 1) if size else "none" for size in blocks]
        stages = make_stages([stage.num_layers for stage in stages], mixed, stage_ranks(schedule, pp, v))
    if "sizes" in made:
        stages = make_stages(made["sizes"], [level] * count, stage_ranks(schedule, pp, v))
    inputs = Inputs(
        model=model,
        cluster=load_cluster(f"cpu:{dp * tp * pp}"),
        training=Training(
            global_batch_size=BATCH,
            sequence_length=SEQUENCE,
            precision=precision,  # type: ignore[arg-type]
            attention=made.get("attention", "fused"),
        ),
    )
    decisions = Decisions(
        data_parallel=dp,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        zero_stage=made.get("zero", 0),
        sequence_parallel=made.get("sp", False),
        micro_batch_size=1 if pp > 1 else 2 if dp < 8 else 1,
        num_microbatches=BATCH // dp // (1 if pp > 1 else 2),
        schedule=schedule,
        num_virtual_stages=v,
        rank_order=tuple(made.get("order", ("tp", "dp", "pp"))),
        data_parallel_replicate=made.get("rep", 1),
        stages=stages,
    )
    check(inputs, decisions)
    solver = SolverReport(
        name="none", status="given", objective_seconds=None, bound_seconds=None, gap_fraction=None, num_candidates=1, num_pruned=0, wall_seconds=0.0
    )
    return Plan(
        inputs=inputs,
        inputs_hash=digest(inputs),
        decisions=decisions,
        predictions=Predictions(memory=Memory.of(0, 0, 0), pipeline_ranks=(), time=Time()),
        solver=solver,
    )


def describe(row: dict[str, Any]) -> str:
    """A combination in words."""
    made = row["decisions"]
    parts = [row["family"]] + [f"{name}{made[name]}" for name in ("dp", "tp", "pp", "v") if made.get(name, 1) > 1]
    parts += [f"ZeRO-{made['zero']}"] if made.get("zero") else []
    parts += [f"{made['rep']} replicas"] if made.get("rep") else []
    parts += ["sequence parallel"] if made.get("sp") else []
    parts += [made["schedule"]] if made.get("schedule") else []
    parts += [f"recompute {made['recompute']}"] if made.get("recompute") else []
    parts += [f"{made['attention']} attention"] if made.get("attention") else []
    parts += [f"stages {made['sizes']}"] if made.get("sizes") else []
    parts += ["ranks " + "-".join(made["order"])] if made.get("order") else []
    return " ".join(parts)


def work(path: str, output: str, steps: int) -> None:
    """What each rank of a launch does: all plans of the file one after the other; rank 0 writes losses, norms and memory."""
    import torch
    import torch.distributed as dist

    from executor.data import Data, open_tokens
    from executor.mesh import make_mesh
    from executor.train import RunOptions, Trainer
    from planner.plan import load_plan

    torch.set_num_threads(1)
    rows = json.loads(Path(path).read_text())
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), []
    for row in rows:
        plan = load_plan(row["path"])
        model, training, decisions = plan.inputs.model, plan.inputs.training, plan.decisions
        mesh = make_mesh(decisions, rank, key_value_copies=max(1, decisions.tensor_parallel // model.num_key_value_heads), timeout_seconds=30)
        if rank == 0:
            print(f"{decisions.world_size} ranks: {row['name']}", file=sys.stderr, flush=True)
        trainer = Trainer(plan, mesh, RunOptions(seed=3, learning_rate=1e-3), torch.device("cpu"))
        data = Data(open_tokens(None, model.vocab_size), model.vocab_size, training.sequence_length, training.global_batch_size, 3)
        losses, norms = [], []
        for step in range(steps):
            trainer.load(data)
            if step == 0:
                tracker = trainer.track_memory()
                with tracker:
                    result = trainer.step()
                trainer.stop_tracking()
            else:
                result = trainer.step()
            losses.append(float(result.loss))
            norms.append(float(result.gradient_norm))
        memory = tracker.memory()
        own = {"rank": rank, **mesh.coordinates, **{name: getattr(memory, name) for name in memory.__struct_fields__}}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        results.append({"losses": losses, "norms": norms, "memory": gathered})
        del trainer
    if rank == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def launch(combinations: list[dict[str, Any]], num_ranks: int, steps: int) -> list[dict[str, Any]]:
    """Runs combinations of `num_ranks` ranks in one launch; started again once if the launch fails."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for index, combination in enumerate(combinations):
            path = Path(folder) / f"{index}.json"
            path.write_text(dumps(plan_of(combination)))
            rows.append({"path": str(path), "name": describe(combination)})
        listing, output = Path(folder) / "plans.json", Path(folder) / "results.json"
        listing.write_text(json.dumps(rows))
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command += [__file__, "--work", str(listing), str(output), "--steps", str(steps)]
        for _ in range(2):
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
            if output.exists():
                return json.loads(output.read_text())  # type: ignore[no-any-return]
        raise RuntimeError("\n".join(line for line in done.stderr.splitlines() if "ranks:" in line or "rank0" in line)[-6000:] or done.stderr[-4000:])


def ranks_of(row: dict[str, Any]) -> int:
    made = row["decisions"]
    return made.get("dp", 1) * made.get("tp", 1) * made.get("pp", 1)  # type: ignore[no-any-return]


def compare(rows: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each combination with its largest differences from one process of the same family."""
    families = sorted({row["family"] for row in rows})
    alone = dict(zip(families, launch([combination(family, **ALONE.get(family, {})) for family in families], 1, steps), strict=True))
    results: list[dict[str, Any]] = []
    for count in sorted({ranks_of(row) for row in rows}):
        part = [row for row in rows if ranks_of(row) == count]
        for row, found in zip(part, launch(part, count, steps), strict=True):
            one = alone[row["family"]]
            loss = max(abs(a - b) for a, b in zip(one["losses"], found["losses"], strict=True))
            norm = max(abs(a - b) / a for a, b in zip(one["norms"], found["norms"], strict=True))
            right = loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE  # false for NaN
            results.append({"name": describe(row), "ranks": count, "loss": loss, "norm": norm, "right": right, "memory": found["memory"]})
    return results


def table(results: list[dict[str, Any]], steps: int) -> str:
    """The results as Markdown."""
    wrong = sum(not row["right"] for row in results)
    lines = [
        "# Parity",
        "",
        f"Written by `benchmarks/parity.py`. {len(results)} ways of splitting small models (8 blocks, vocabulary 257) against one",
        f"process: {steps} steps in fp32 on CPU processes with gloo, the same data and initial weights. Losses agree within {LOSS_TOLERANCE:g} and",
        f"the gradients' global norm within {NORM_TOLERANCE:g} (relative) in {len(results) - wrong} of {len(results)}.",
        "",
        "| combination | ranks | largest loss difference | largest relative difference of the gradient norm |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {row['name']} | {row['ranks']} | {row['loss']:.1e} | {row['norm']:.1e} |{'' if row['right'] else ' **wrong**'}" for row in results]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="only the combinations that run in CI")
    parser.add_argument("--only", metavar="TEXT", help="only combinations whose description contains this")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the table there (default docs/parity.md for a whole run)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--work", nargs=2, metavar=("PLANS", "RESULTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.steps)
        return 0
    rows = [row for row in COMBINATIONS if (row["fast"] or not options.fast) and (not options.only or options.only in describe(row))]
    results = compare(rows, options.steps)
    whole = not (options.fast or options.only)
    output = options.output or (str(ROOT / "docs" / "parity.md") if whole else None)
    if output:
        Path(output).write_text(table(results, options.steps))
    print(json.dumps(results) if options.json else table(results, options.steps))
    return 0 if all(row["right"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
