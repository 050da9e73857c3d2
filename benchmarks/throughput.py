"""Tokens per second on 4 and 8 CPU processes, beside two other ways of training the same model with the same degrees.

    python benchmarks/throughput.py [--rounds N]        writes benchmarks/results/throughput.txt and .json

`reference_dtensor.py` is torchtitan's way (DTensor tensor and sequence parallelism, FSDP2, torch's pipeline schedule), `reference_plain.py` is
picotron's (plain tensor-parallel linears, bucketed all-reduce, paired messages): small programs written for this comparison, on the same torch,
with the same initial weights, samples, micro-batches, optimizer and clipping, so that their losses must equal ours (they are checked).
In one launch the two take steps in turn, a few at a time, and which of them begins changes from round to round.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from common import make_plan, processor, table, write_results  # noqa: E402

from planner.cluster import load_cluster  # noqa: E402
from planner.documents import dumps  # noqa: E402
from planner.model import ModelSpec, load_model, replace  # noqa: E402
from planner.plan import Plan, load_plan  # noqa: E402

SEED, LENGTH = 3, 128
CHECKED_STEPS, LOSS_TOLERANCE = 8, 1e-4
DTENSOR, PLAIN = "DTensor, FSDP2", "plain, buckets"


def model() -> ModelSpec:
    """Eight Llama blocks, 7.0 million parameters."""
    sizes = {"num_layers": 8, "hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "ffn_hidden_size": 704}
    return replace(load_model("tiny-llama"), **sizes, vocab_size=2048)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    # what it is, the other, our decisions
    ("dp4 ZeRO-3", DTENSOR, {"dp": 4, "zero": 3, "num_microbatches": 2}),
    ("dp4", PLAIN, {"dp": 4, "num_microbatches": 2}),
    ("dp2 tp2 ZeRO-3", DTENSOR, {"dp": 2, "tp": 2, "zero": 3, "sequence_parallel": True}),
    ("dp2 tp2", PLAIN, {"dp": 2, "tp": 2}),
    ("tp2 pp2", DTENSOR, {"tp": 2, "pp": 2, "sequence_parallel": True, "num_microbatches": 8}),
    ("tp2 pp2", PLAIN, {"tp": 2, "pp": 2, "num_microbatches": 8}),
    ("dp2 tp2 pp2 ZeRO-1", DTENSOR, {"dp": 2, "tp": 2, "pp": 2, "zero": 1, "sequence_parallel": True}),
    ("dp2 tp2 pp2", PLAIN, {"dp": 2, "tp": 2, "pp": 2}),
]


def plan_of(decisions: dict[str, Any]) -> Plan:
    return make_plan(model(), load_cluster("cpu:8"), micro_batch_size=2, sequence_length=LENGTH, **decisions)


def work(listing: str, output: str, rounds: int, steps: int) -> None:
    """What each rank of a launch does: every case after the other; rank 0 writes the seconds of each round."""
    import torch
    import torch.distributed as dist
    from reference_dtensor import DTensorTrainer
    from reference_plain import PlainTrainer

    from executor.data import Data
    from executor.mesh import make_mesh
    from executor.optimizer import OptimizerOptions
    from executor.train import RunOptions, Trainer
    from executor.transport import hasten_transport

    torch.set_num_threads(1)
    _post_alike()
    dist.init_process_group("gloo")
    results = []
    for case in json.loads(Path(listing).read_text()):
        plan = load_plan(case["plan"])
        training, spec = plan.inputs.training, plan.inputs.model
        data = Data(None, spec.vocab_size, training.sequence_length, training.global_batch_size, SEED)
        options = RunOptions(seed=SEED, learning_rate=1e-3, optimizer=OptimizerOptions())
        ours = Trainer(plan, make_mesh(plan.decisions, dist.get_rank()), options, torch.device("cpu"))
        theirs = {DTENSOR: DTensorTrainer, PLAIN: PlainTrainer}[case["other"]](plan, SEED)
        hasten_transport()

        def step_ours(trainer: Trainer = ours, data: Data = data) -> float:
            trainer.load(data)
            return float(trainer.step().loss)

        def step_theirs(trainer: Any = theirs, data: Data = data) -> float:
            return float(trainer.step(data))

        results.append(race({"ours": step_ours, "theirs": step_theirs}, rounds, steps, dist.barrier))
        if dist.get_rank() == 0:
            print(case["name"], case["other"], {name: min(found["seconds"]) for name, found in results[-1].items()}, file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _post_alike() -> None:
    """Makes torch's own message functions post as the executor does (`executor.transport.posting`), so that both sides' messages are served alike."""
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d

    from executor.transport import posting

    def posted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with posting():
                return function(*args, **kwargs)

        return call

    for name in ("isend", "irecv"):
        replaced = posted(getattr(c10d, name))
        setattr(c10d, name, replaced)
        setattr(dist, name, replaced)


def race(steps_of: dict[str, Callable[[], float]], rounds: int, steps: int, barrier: Callable[[], Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds per step of each in each round, and all losses; the first two steps of each are not timed."""
    found: dict[str, dict[str, list[float]]]
    found = {name: {"seconds": [], "cpu_seconds": [], "losses": [step(), step()]} for name, step in steps_of.items()}
    names = list(steps_of)
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            barrier()
            started, used = time.perf_counter(), time.process_time()
            found[name]["losses"] += [steps_of[name]() for _ in range(steps)]
            used = time.process_time() - used
            barrier()
            found[name]["seconds"].append((time.perf_counter() - started) / steps)
            found[name]["cpu_seconds"].append(used / steps)
    return found


def launch(cases: list[tuple[str, str, dict[str, Any]]], num_ranks: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The cases of `num_ranks` ranks in one torchrun launch."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for index, (name, other, decisions) in enumerate(cases):
            path = Path(folder) / f"{index}.json"
            path.write_text(dumps(plan_of(decisions)))
            rows.append({"name": name, "other": other, "plan": str(path)})
        listing, output = Path(folder) / "cases.json", Path(folder) / "results.json"
        listing.write_text(json.dumps(rows))
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), __file__]
        command += ["--work", str(listing), str(output), "--rounds", str(rounds), "--steps", str(steps)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}, cwd=ROOT, check=True)
        return json.loads(output.read_text())  # type: ignore[no-any-return]


def measure(rounds: int, steps: int, only: str | None) -> list[dict[str, Any]]:
    """Each case with both sides' figures. Raises RuntimeError where the losses differ: then they do not do the same work."""
    cases = [case for case in CASES if not only or only in f"{case[0]}, {case[1]}"]
    results = []
    for count in (4, 8):
        part = [case for case in cases if plan_of(case[2]).decisions.world_size == count]
        for (name, other, decisions), found in zip(part, launch(part, count, rounds, steps) if part else [], strict=True):
            training = plan_of(decisions).inputs.training
            pairs = list(zip(found["ours"]["losses"], found["theirs"]["losses"], strict=True))
            difference = max(abs(a - b) for a, b in pairs[:CHECKED_STEPS])  # later ones drift apart with rounding
            if not difference <= LOSS_TOLERANCE:
                raise RuntimeError(f"{name} against {other}: losses differ by {difference}")
            tokens = training.global_batch_size * training.sequence_length
            ratios = [theirs / ours for ours, theirs in zip(found["ours"]["seconds"], found["theirs"]["seconds"], strict=True)]
            results.append(
                {
                    "case": name,
                    "ranks": count,
                    "other": other,
                    "our_tokens_per_second": tokens / statistics.median(found["ours"]["seconds"]),
                    "their_tokens_per_second": tokens / statistics.median(found["theirs"]["seconds"]),
                    "ratio": statistics.median(ratios),
                    "lowest_ratio": min(ratios),
                    "highest_ratio": max(ratios),
                    "cpu_ratio": statistics.median(found["theirs"]["cpu_seconds"]) / statistics.median(found["ours"]["cpu_seconds"]),
                    "loss_difference": difference,
                    "seconds": {side: found[side]["seconds"] for side in found},
                }
            )
    return results


def report(results: list[dict[str, Any]], rounds: int, steps: int) -> str:
    header = ("plan", "ranks", "beside", "ours, tokens/s", "theirs", "ratio", "of rounds", "CPU ratio", "loss difference")
    rows = [
        (
            row["case"], row["ranks"], row["other"], f"{row['our_tokens_per_second']:,.0f}", f"{row['their_tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}", f"{row['lowest_ratio']:.2f}-{row['highest_ratio']:.2f}", f"{row['cpu_ratio']:.2f}",
            f"{row['loss_difference']:.1e}",
        )
        for row in results
    ]  # fmt: skip
    where = f"{processor()}. {rounds} rounds of {steps} steps each; ratio: median over the rounds of their seconds by ours.\n"
    return f"{where}DTensor, FSDP2: torchtitan's way. plain, buckets: picotron's way.\n\n{table(header, rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose name contains this; writes nothing")
    parser.add_argument("--work", nargs=2, metavar=("CASES", "RESULTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.rounds, options.steps)
        return 0
    results = measure(options.rounds, options.steps, options.only)
    text = report(results, options.rounds, options.steps)
    if not options.only:
        write_results("throughput", text, results)
    print(text)
    return 0 if all(row["ratio"] >= 1 for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
