"""Step times and bubbles of real runs on two ranks: `python benchmarks/step_time.py [-o NAME]`.

The machine is calibrated once, in several rounds, since its speed may change from minute to minute. Then ten different plans, three in
mixed-bf16 and a few pipelines with known bubbles are predicted from that cluster file and trained by the executor. Reported: each plan's
predicted and measured step time; each pipeline's bubble beside the prediction and the textbook formula, (p - 1)/(m + p - 1) for GPipe and 1F1B;
naive model parallelism's utilisation, 1/p. At last the cluster is corrected by one run (`plan calibrate --from`), with the errors of all ten
plans before and after. A plan's time is that of the median round, with what whole rounds were faster or slower taken out; the spread is half of
the range of the rounds' medians over their mean: what the machine itself does.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, comparable_seconds, make_plan, processor, round_medians, run_plan, run_plans, spread, table, write_results
from planner.cluster import ClusterSpec, load_cluster
from planner.correction import correct
from planner.model import ModelSpec, load_model
from planner.plan import Plan, replace
from planner.timing import predict_time


def models() -> tuple[ModelSpec, ModelSpec]:
    gpt, llama = load_model("tiny-gpt"), load_model("tiny-llama")
    return (
        replace(gpt, name="gpt-6x128", num_layers=6, hidden_size=128, ffn_hidden_size=512, head_dim=32),
        replace(llama, name="llama-4x256", hidden_size=256, ffn_hidden_size=768, num_attention_heads=8, num_key_value_heads=4, head_dim=32),
    )


def ten_plans(cluster: ClusterSpec) -> list[tuple[str, Plan]]:
    """Ten plans that differ in what they split, in schedule, micro-batches, ZeRO, recomputation and model."""
    gpt, llama = models()

    def plan(model: ModelSpec, **decisions: Any) -> Plan:
        return make_plan(model, cluster, sequence_length=128 if model is gpt else 64, **decisions)

    return [
        ("gpt dp2", plan(gpt, dp=2, micro_batch_size=4, num_microbatches=2)),
        ("gpt dp2 ZeRO-1, micro-batches of 1", plan(gpt, dp=2, zero=1, num_microbatches=8)),
        ("llama dp2 ZeRO-3", plan(llama, dp=2, zero=3, micro_batch_size=4, num_microbatches=2)),
        ("gpt tp2", plan(gpt, tp=2, micro_batch_size=4, num_microbatches=4)),
        ("llama tp2 sequence parallel", plan(llama, tp=2, sequence_parallel=True, micro_batch_size=4, num_microbatches=4)),
        ("gpt pp2 Naive", plan(gpt, pp=2, micro_batch_size=4, num_microbatches=4, schedule="Naive")),
        ("gpt pp2 GPipe", plan(gpt, pp=2, micro_batch_size=2, num_microbatches=8, schedule="GPipe")),
        ("llama pp2 1F1B, full recomputation", plan(llama, pp=2, micro_batch_size=4, num_microbatches=4, recompute="full")),
        ("gpt pp2 Interleaved1F1B", plan(gpt, pp=2, micro_batch_size=2, num_microbatches=8, schedule="Interleaved1F1B", virtual=2)),
        ("llama pp2 ZBVZeroBubble", plan(llama, pp=2, micro_batch_size=2, num_microbatches=8, schedule="ZBVZeroBubble", virtual=2)),
    ]


def bf16_plans(cluster: ClusterSpec) -> list[tuple[str, Plan]]:
    """Three in mixed-bf16, which CPUs compute otherwise than fp32; beside the ten."""
    gpt, llama = models()

    def plan(model: ModelSpec, length: int, **decisions: Any) -> Plan:
        return make_plan(model, cluster, sequence_length=length, precision="mixed-bf16", **decisions)

    return [
        ("gpt dp2", plan(gpt, 128, dp=2, micro_batch_size=4, num_microbatches=2)),
        ("llama dp2 ZeRO-1, sequences of 256", plan(llama, 256, dp=2, zero=1, micro_batch_size=2, num_microbatches=2)),
        ("gpt pp2 1F1B", plan(gpt, 128, pp=2, micro_batch_size=4, num_microbatches=8)),
    ]


def pipelines(cluster: ClusterSpec) -> list[tuple[str, Plan, float]]:
    """Pipelines of equal stages with their textbook bubble."""
    gpt = replace(models()[0], num_layers=8)
    found = [("Naive", 4, 0.5)] + [(name, m, 1 / (m + 1)) for name in ("GPipe", "1F1B") for m in (4, 8)]
    return [
        (f"{name} m {m}", make_plan(gpt, cluster, pp=2, micro_batch_size=4, num_microbatches=m, schedule=name), bubble) for name, m, bubble in found
    ]


def predicted(plan: Plan, cluster: ClusterSpec | None = None) -> float:
    inputs = plan.inputs if cluster is None else replace(plan.inputs, cluster=replace(cluster, num_gpus=plan.inputs.cluster.num_gpus))
    return predict_time(inputs, plan.decisions).time.step_seconds or 0.0


def calibrated(rounds: int = 1) -> ClusterSpec:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "cluster.json")
        path_of = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path_of}
        command = [sys.executable, "-m", "executor.calibrate", "--num-gpus", "2", "--rounds", str(rounds), "--output", path]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300 * rounds)
        return load_cluster(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibration-rounds", type=int, default=3)
    parser.add_argument("-o", "--output", help="name of the result files under benchmarks/results (default: DATE-step-time)")
    options = parser.parse_args()
    cluster = calibrated(options.calibration_rounds)
    plans, chains, others = ten_plans(cluster), pipelines(cluster), bf16_plans(cluster)
    everything = [plan for _, plan in plans] + [plan for _, plan, _ in chains] + [plan for _, plan in others]
    results = run_plans(everything, steps=options.steps, rounds=options.rounds)
    rounds = zip(*(round_medians(result["seconds"], options.rounds) for result in results), strict=True)
    times = comparable_seconds([list(each) for each in rounds])
    measured = times[: len(plans)]

    by, (name, plan) = 6, plans[6]
    run, timeline = run_plan(plan, 12)
    correction = correct(plan.inputs, plan.decisions, run, timeline)
    rows, cells = [], []
    for (title, item), seconds, result in zip(plans, measured, results, strict=False):
        noise = spread(result["seconds"], options.rounds)
        before, after = predicted(item), predicted(item, correction.cluster)
        rows.append({"plan": title, "measured_seconds": seconds, "predicted_seconds": before, "predicted_after_correction_seconds": after,
                     "spread": noise})  # fmt: skip
        errors = [f"{100 * (value / seconds - 1):+.1f}" for value in (before, after)]
        cells.append((title, f"{1e3 * seconds:.1f}", f"{1e3 * before:.1f}", errors[0], f"{1e3 * after:.1f}", errors[1], f"{100 * noise:.1f}"))
    errors_before = [abs(row["predicted_seconds"] / row["measured_seconds"] - 1) for row in rows]
    errors_after = [abs(row["predicted_after_correction_seconds"] / row["measured_seconds"] - 1) for index, row in enumerate(rows) if index != by]
    text = f"Step times of real runs on 2 ranks, {datetime.date.today()}, {processor()}\n\n"
    text += table(("plan", "measured ms", "predicted ms", "error %", "corrected ms", "error %", "spread %"), cells)
    text += f"\nmean error of the ten after plan calibrate: {100 * statistics.fmean(errors_before):.1f} %\n"
    text += (
        f"after plan calibrate --from a run of '{name}' ({1e3 * correction.before:.1f} -> {1e3 * correction.after:.1f} ms, "
        f"measured {1e3 * run.summary.step_seconds:.1f}): {100 * statistics.fmean(errors_after):.1f} % of the other nine\n\n"
    )
    bubbles, lines = [], []
    for (title, item, formula), result in zip(chains, results[len(plans) :], strict=False):
        seen, used = statistics.median(result["bubbles"]), statistics.median(result["utilisations"])
        expected = predict_time(item.inputs, item.decisions).time.bubble_fraction or 0.0
        bubbles.append({"pipeline": title, "measured": seen, "predicted": expected, "formula": formula, "utilisation": used})
        lines.append((title, *(f"{100 * value:.1f}" for value in (seen, expected, abs(seen - expected), formula, used))))
    text += table(("pp 2", "bubble %", "predicted %", "error, points", "formula %", "utilisation %"), lines)
    in_bf16, lines = [], []
    for (title, item), result, seconds in zip(others, results[-len(others) :], times[-len(others) :], strict=True):
        noise = spread(result["seconds"], options.rounds)
        expected = predicted(item)
        in_bf16.append({"plan": title, "measured_seconds": seconds, "predicted_seconds": expected, "spread": noise})
        lines.append((title, f"{1e3 * seconds:.1f}", f"{1e3 * expected:.1f}", f"{100 * (expected / seconds - 1):+.1f}", f"{100 * noise:.1f}"))
    text += "\n" + table(("mixed-bf16", "measured ms", "predicted ms", "error %", "spread %"), lines)
    sys.stdout.write(text)
    found = {"plans": rows, "mixed-bf16": in_bf16, "bubbles": bubbles, "correction": correction.ratios}
    write_results(options.output or f"{datetime.date.today()}-step-time", text, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
