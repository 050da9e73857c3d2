r"""One command for a machine with one GPU: `python3 benchmarks/gpu.py [-o NAME] [--packages FOLDER] [--cluster FILE] [--device cpu]`.

Needs torch 2.11 or newer with CUDA and the planner's own dependencies; where there is no network, bring what is missing along and name it
with --packages, with that machine's Python:

    pip install --no-deps --target FOLDER msgspec networkx psutil \
        torchtitan==0.2.2 torchdata datasets dill multiprocess tyro docstring_parser typeguard

(all but the first three are torchtitan's, whose row says "not installed" without them). It

1. calibrates the GPU, as `plan calibrate` does (--cluster FILE takes an earlier calibration's file instead);
2. trains ten plans on it, and compares predicted with measured peak memory (the allocator's) and step time;
3. runs single ranks of big plans by `plan dry-run --device cuda`, and compares their peak with the prediction;
4. measures tokens/s and MFU beside a plain PyTorch loop and torchtitan's Llama, both at the same shape.

Results go to benchmarks/results/DATE-gpu.txt and .json after every row, so that a lease which ends early leaves what was measured; the
cluster file goes to DATE-gpu-cluster.json. Exit status 1 when a row failed, 2 without a GPU. With `--device cpu` it goes through the same
motions on this machine's CPU with tiny models, in a minute, prints what it found and writes no results: to see that the command itself is
whole before a GPU is lent.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SEQUENCE = 2048


def python(*arguments: str, timeout: float = 400.0) -> subprocess.CompletedProcess[str]:
    """This Python with arguments, in the repository's root."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", *arguments]
    try:
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end after {timeout:.0f} s\n")


def models(device: str) -> dict[str, Any]:
    """From 0.4 to 3 thousand million parameters, the shapes of GPT and Llama; tiny ones for a CPU."""
    from planner.model import load_model
    from planner.plan import replace

    gpt, llama = load_model("tiny-gpt"), load_model("tiny-llama")
    if device == "cpu":
        return {name: replace(shape, name=name) for name, shape in (("gpt-0.4b", gpt), ("llama-1b", llama), ("llama-3b", llama))}
    common = {"vocab_size": 32000, "max_sequence_length": SEQUENCE}
    return {
        "gpt-0.4b": replace(gpt, name="gpt-0.4b", num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16,
                            num_key_value_heads=16, head_dim=64, num_position_embeddings=SEQUENCE, **common),
        "llama-1b": replace(llama, name="llama-1b", num_layers=16, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16,
                            num_key_value_heads=8, head_dim=128, **common),
        "llama-3b": replace(llama, name="llama-3b", num_layers=26, hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24,
                            num_key_value_heads=8, head_dim=128, **common),
    }  # fmt: skip


def ten_plans(cluster: Any, device: str) -> list[tuple[str, Any]]:
    from benchmarks.common import make_plan

    shapes = models(device)
    rows = [
        ("gpt-0.4b", 4, 2, "none", "mixed-bf16"), ("gpt-0.4b", 8, 1, "none", "mixed-bf16"), ("gpt-0.4b", 8, 2, "full", "mixed-bf16"),
        ("gpt-0.4b", 8, 2, "selective", "mixed-bf16"), ("gpt-0.4b", 2, 2, "none", "fp32"), ("llama-1b", 4, 2, "none", "mixed-bf16"),
        ("llama-1b", 8, 1, "selective", "mixed-bf16"), ("llama-1b", 8, 1, "full", "bf16"), ("llama-3b", 2, 4, "none", "mixed-bf16"),
        ("llama-3b", 4, 2, "full", "mixed-bf16"),
    ]  # fmt: skip
    return [
        (f"{name} b{batch} m{m} {recompute} {precision}",
         make_plan(shapes[name], cluster, micro_batch_size=batch, num_microbatches=m, sequence_length=length(device), recompute=recompute,
                   precision=precision))
        for name, batch, m, recompute, precision in rows
    ]  # fmt: skip


def length(device: str) -> int:
    """Of a sequence."""
    return SEQUENCE if device == "cuda" else 128


def big_plans() -> list[tuple[str, Any, int]]:
    """Plans for many GPUs, of which one rank at a time fits here."""
    from benchmarks.common import make_plan
    from planner.cluster import load_cluster
    from planner.model import load_model

    h200 = load_cluster("h200-141gb")
    common: dict[str, Any] = {"sequence_parallel": True, "precision": "mixed-bf16"}
    gpt3 = make_plan(load_model("gpt3"), h200, tp=8, pp=8, num_microbatches=8, sequence_length=2048, **common)
    llama = make_plan(load_model("llama-3-8b"), h200, tp=2, pp=2, dp=4, zero=1, num_microbatches=4, sequence_length=4096, **common)
    return [("gpt3 tp8 pp8, first stage", gpt3, 0), ("gpt3 tp8 pp8, last stage", gpt3, gpt3.decisions.world_size - 1),
            ("llama-3-8b tp2 pp2 dp4 ZeRO-1, first stage", llama, 0)]  # fmt: skip


def train(folder: str, plan: Any, steps: int, device: str) -> dict[str, Any] | None:
    """The run document of a plan, None when it failed."""
    from planner.documents import dumps

    plan_file, run_file = Path(folder) / "plan.json", Path(folder) / "run.json"
    plan_file.write_text(dumps(plan), encoding="utf-8")
    run_file.unlink(missing_ok=True)
    done = python("-m", "executor", str(plan_file), "--steps", str(steps), "-o", str(run_file), "--device", device)
    if done.returncode:
        sys.stderr.write(done.stderr[-800:] + "\n")
        return None
    found: dict[str, Any] = json.loads(run_file.read_text(encoding="utf-8"))
    return found


def dry_run(folder: str, plan: Any, rank: int, device: str) -> tuple[int, int] | None:
    """Peak bytes of one rank with real tensors on this GPU (fake ones with a CPU), and the prediction for its pipeline rank."""
    from planner.documents import dumps

    plan_file, output = Path(folder) / "big.json", Path(folder) / "dry.json"
    plan_file.write_text(dumps(plan), encoding="utf-8")
    done = python("-m", "executor.dry_run", str(plan_file), "--rank", str(rank), "--device", device, "--output", str(output))
    if done.returncode:
        sys.stderr.write(done.stderr[-800:] + "\n")
        return None
    found = json.loads(output.read_text(encoding="utf-8"))["pipeline_ranks"][0]
    return found["memory"]["total_bytes"], plan.predictions.pipeline_ranks[found["pipeline_rank"]].memory.total_bytes


def compare_throughput(data: dict[str, Any], plan: Any, title: str, cluster: Any, steps: int, device: str) -> Iterator[None]:
    """Adds a row for each program, Meshwright's own first, whose step the row of `title` has measured."""
    from benchmarks.gpu_baselines import PROGRAMS, throughput
    from planner.graph import training_flops_per_token
    from planner.kernels import peak_flops_per_second

    model, decisions = plan.inputs.model, plan.decisions
    tokens = plan.inputs.training.global_batch_size * length(device)
    work = tokens * training_flops_per_token(model, length(device)) / peak_flops_per_second(load_peak(cluster), "mixed-bf16")

    def row(program: str, seconds: float | None, failure: str = "") -> None:
        figures = {"tokens_per_second": seconds and tokens / seconds, "mfu": seconds and work / seconds}
        data["throughput"].append({"program": program, "plan": title, **figures, "failure": failure})

    row("meshwright", next((found["measured_seconds"] for found in data["plans"] if found["plan"] == title), None), "failed")
    yield
    for program in PROGRAMS:
        try:
            row(program, throughput(program, model, length(device), decisions.micro_batch_size, decisions.num_microbatches, steps, device))
        except ImportError as error:
            row(program, None, f"not installed: {error}")
        except Exception as error:  # what was measured before it is worth more than a traceback
            row(program, None, f"{type(error).__name__}: {error}".splitlines()[0])
        yield


def measure(data: dict[str, Any], cluster: Any, steps: int, device: str) -> Iterator[None]:
    """Fills in `data`, row by row."""
    plans = ten_plans(cluster, device)
    with tempfile.TemporaryDirectory() as folder:
        for title, plan in plans:
            run = train(folder, plan, steps, device)
            peak = run and (run["ranks"][0]["allocated_bytes"] if device == "cuda" else run["summary"]["peak_bytes"])
            data["plans"].append({
                "plan": title, "predicted_bytes": plan.predictions.memory.total_bytes, "predicted_seconds": plan.predictions.time.step_seconds,
                "measured_bytes": peak, "measured_seconds": run and run["summary"]["step_seconds"],
            })  # fmt: skip
            yield
        title, plan = plans[5]
        yield from compare_throughput(data, plan, title, cluster, steps, device)
        for title, plan, rank in big_plans():
            found = dry_run(folder, plan, rank, device)
            data["big"].append({"rank": title, "measured_bytes": found and found[0], "predicted_bytes": found and found[1]})
            yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", help="name of the result files under benchmarks/results (default: DATE-gpu)")
    parser.add_argument("--packages", metavar="FOLDER", help="where packages that this Python lacks lie")
    parser.add_argument("--cluster", metavar="FILE", help="this GPU's calibration, from an earlier call")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same motions with tiny models, no results written")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if options.packages:
        folder = str(Path(options.packages).resolve())
        sys.path.insert(1, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    try:
        import torch
    except ImportError:
        sys.stderr.write("error: this benchmark needs torch 2.11 or newer\n")
        return 2
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: no CUDA GPU is visible: this benchmark measures one; --device cpu goes through its motions\n")
        return 2
    from benchmarks.common import write_results
    from planner.cluster import load_cluster

    name = options.output or f"{datetime.date.today()}-gpu"
    with tempfile.TemporaryDirectory() as scratch:
        results = ROOT / "benchmarks" / "results" if device == "cuda" else Path(scratch)
        cluster_file = Path(options.cluster) if options.cluster else results / f"{name}-cluster.json"
        if not options.cluster:
            done = python("-m", "executor.calibrate", "--num-gpus", "1", "--output", str(cluster_file))
            if done.returncode:
                sys.stderr.write(done.stderr[-2000:])
                return 1
        cluster = load_cluster(f"{cluster_file}:1")
    data: dict[str, Any] = {
        "device": cluster.gpu.name, "torch": torch.__version__, "calibration": cluster.source, "plans": [], "throughput": [], "big": [],
    }  # fmt: skip
    for _ in measure(data, cluster, options.steps, device):
        sys.stderr.write(".")
        sys.stderr.flush()
        if device == "cuda":
            write_results(name, report(data), data)
    sys.stderr.write("\n")
    sys.stdout.write(report(data))
    return 0 if all(row["measured_bytes"] for row in (*data["plans"], *data["big"])) else 1


def load_peak(cluster: Any) -> Any:
    """The preset of this GPU where there is one, for the peak that MFU is a share of; else what was measured."""
    from planner.cluster import presets

    words = cluster.gpu.name.lower().replace("nvidia", "").split()
    for preset in presets().values():
        if preset.device == "cuda" and words and preset.name.split("-")[0] == words[0]:
            return preset
    return cluster


def report(data: dict[str, Any]) -> str:
    """The tables of what has been measured so far."""
    from benchmarks.common import table

    def gib(value: int | None) -> str:
        return "failed" if value is None else f"{value / 2**30:.2f}"

    def off(row: dict[str, Any], unit: str) -> str:
        measured, predicted = row[f"measured_{unit}"], row[f"predicted_{unit}"]
        return "" if not measured or not predicted else f"{100 * (predicted / measured - 1):+.1f}"

    def ms(value: float | None) -> str:
        return "failed" if value is None else f"{1e3 * value:.1f}"

    def rate(row: dict[str, Any]) -> tuple[str, str]:
        return f"{row['tokens_per_second']:,.0f}", f"{100 * row['mfu']:.1f}"

    text = f"{data['device']}, torch {data['torch']}, {datetime.date.today()}\n{data['calibration']}\n\n"
    text += table(
        ("plan", "predicted GiB", "measured GiB", "error %", "predicted ms", "measured ms", "error %"),
        [(row["plan"], gib(row["predicted_bytes"]), gib(row["measured_bytes"]), off(row, "bytes"), ms(row["predicted_seconds"]),
          ms(row["measured_seconds"]), off(row, "seconds")) for row in data["plans"]],
    )  # fmt: skip
    text += "\n" + table(
        ("rank of a big plan", "predicted GiB", "measured GiB", "error %"),
        [(row["rank"], gib(row["predicted_bytes"]), gib(row["measured_bytes"]), off(row, "bytes")) for row in data["big"]],
    )
    text += "\n" + table(
        ("program", "plan", "tokens/s", "MFU %"),
        [(row["program"], row["plan"], *(rate(row) if row["mfu"] else (row["failure"], ""))) for row in data["throughput"]],
    )
    return text


if __name__ == "__main__":
    sys.exit(main())
