"""How far predicted step times are from published ones, beside other estimators.

    python benchmarks/validate.py [--calculon FOLDER] [--ablate] [-o NAME]

Three tables: errors by group of published rows, groups that a constant was fitted to apart; the comparison with what other
estimators reach on the same tables, as measured in November 2026 (calculon of February 2024, SimuMax of 2026, llm-analysis
as on the package index and as in its repository); and the order of plans. With --calculon, the root of a checkout of
calculon-ai/calculon, that program is run on the same rows. With --ablate, the errors without each assumption that no source settles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ablations import ablate, ablation_table
from benchmarks.calculon import run_calculon
from benchmarks.common import table, write_results
from planner.cluster import load_cluster
from planner.documents import builtins
from planner.model import load_model
from planner.plan import Decisions, Inputs, Training, even_stages
from planner.published import ErrorMeans, Validation, ValidationRow, kendall, published_rows, spearman, validate
from planner.timing import predict_time

RIVALS = {
    "korthikanti_table5": ("3.65 / 8.9", "5.2 / 9.8", "11.4 / 15.3", "25.9 / 70.9"),
    "sc21_table1": ("10.3 / 17.8", "10.2 / 22.9", "7.9 / 13.1", "46 / 138"),
    "mtnlg": ("28 to 31 low", "22 to 25 low", "19 to 27 low", "70 to 81 high"),
    "bloom_tuning": ("31 / 47; 8.7 / 23 fitted", "19.5 / 40; 7.6 / 27 fitted", "13.9 / 33; 8.2 / 25 fitted", "9.8 / 67; 8.1 / 74 fitted"),
}
"""Mean / worst absolute error of step time in per cent, of 8, 10, 3 and 36 rows; "fitted": after one scalar fitted to the group."""
RIVAL_RANKS = ("0.28; 8.3 %", "0.10; 1.2 %", "0; 3.3 %", "0.54; 1.9 %")
RIVAL_MILLISECONDS = ("2.0 to 20", "33 to 1,327", "0.2 to 0.35, no pipeline", "0.2 to 0.35, no pipeline")
NAMES = ("calculon", "SimuMax", "llm-analysis, index", "llm-analysis, repository")

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calculon", type=Path, help="root of a checkout of calculon-ai/calculon")
    parser.add_argument("--ablate", action="store_true", help="also the errors without each assumption of the time model")
    parser.add_argument("-o", "--output", metavar="NAME", help="also write benchmarks/results/NAME.txt and .json")
    options = parser.parse_args()
    facts = {row["id"]: row for row in published_rows()}
    started = time.process_time()
    document = validate()
    seconds = time.process_time() - started
    evaluations = [evaluation_milliseconds(*plan) for plan in EVALUATED]
    without = ablate() if options.ablate else []
    ran = run_calculon(options.calculon, [row for name in RIVALS for row in counted(document, name)], facts) if options.calculon else {}
    parts = [
        f"{len(document.rows)} published rows in {seconds:.1f} s of CPU\n",
        group_table(document),
        means(document),
        rival_table(document, ran),
        order(document, facts),
        evaluation_table(evaluations),
        *([ablation_table(without)] if without else []),
    ]
    text = "\n".join(parts)
    print(text)
    if options.output:
        data = {
            "groups": builtins(document.groups),
            "summary": builtins(document.summary),
            "evaluation_milliseconds": evaluations,
            "calculon": ran,
            "without_assumptions": without,
        }
        write_results(options.output, text, data)


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def counted(document: Validation, group: str) -> list[ValidationRow]:
    """Rows of a group that have both times and say all that a step time needs."""
    return [row for row in document.rows if row.group == group and row.complete and row.step_time_error_fraction is not None]


def group_table(document: Validation) -> str:
    """Errors of step time by group, in per cent."""
    rows = []
    for group in sorted(document.groups, key=lambda group: (group.calibrated, group.group)):
        if group.step_time_mean_abs_error is None:
            continue
        rows.append(
            (
                group.group, "fitted to" if group.calibrated else "untouched", len(counted(document, group.group)),
                percent(group.step_time_mean_abs_error), percent(group.step_time_mean_error), percent(group.step_time_worst_error),
                percent(group.interval_coverage, 0), "" if group.rank_correlation is None else f"{group.rank_correlation:.2f}",
            )
        )  # fmt: skip
    return table(("group", "", "rows", "mean abs %", "mean %", "worst %", "in interval %", "Spearman"), rows)


def means(document: Validation) -> str:
    lines = []
    for name in ("untouched", "calibrated"):
        found: ErrorMeans = getattr(document.summary, name)
        timed = sum(group.step_time_mean_abs_error is not None and group.calibrated == (name == "calibrated") for group in document.groups)
        lines.append(
            f"{name}: mean over {timed} groups {percent(found.step_time_mean_abs_error)} % absolute, "
            f"{percent(found.step_time_mean_error)} % signed"
        )
    rows = [row for group in document.groups if not group.calibrated for row in counted(document, group.group)]
    inside = [row for row in rows if _inside(row)]
    lines.append(f"{len(inside)} of {len(rows)} untouched rows ({percent(len(inside) / len(rows), 0)} %) lie in their 80 % interval")
    return "\n".join(lines) + "\n"


def _inside(row: ValidationRow) -> bool:
    low, high = row.predicted.step_seconds_interval or (0.0, 0.0)
    return low <= (row.measured.step_seconds or 0.0) <= high


def rival_table(document: Validation, ran: dict[str, dict[str, float]]) -> str:
    """Mean / worst absolute error, and calculon's where it was run just now."""
    rows = []
    for name, others in RIVALS.items():
        errors = [abs(row.step_time_error_fraction or 0.0) for row in counted(document, name)]
        ours = f"{percent(statistics.fmean(errors))} / {percent(max(errors))} ({len(errors)} rows)"
        here = [abs(value) for value in ran.get(name, {}).values()]
        fitted = f"; {_after_one_scalar(ran[name].values())} fitted" if here and name == "bloom_tuning" else ""
        today = f"{percent(statistics.fmean(here))} / {percent(max(here))} ({len(here)} rows{fitted})" if here else ""
        rows.append((name, ours, *others, today))
    ours_rank, regret = _bloom_order(document, {row["id"]: row for row in published_rows()})
    rows.append(("BLOOM plans: Kendall; regret", f"{ours_rank:.2f}; {percent(regret)} %", *RIVAL_RANKS, ""))
    rows.append(("ms an evaluation", f"{evaluation_milliseconds():.2f}", *RIVAL_MILLISECONDS, ""))
    return table(("mean / worst abs %", "meshwright", *NAMES, "calculon, run now"), rows)


def _after_one_scalar(errors: Iterable[float]) -> str:
    """Mean / worst absolute error after all predictions are divided by their mean ratio to the measured times (geometric)."""
    ratios = [1.0 + error for error in errors]
    scale = statistics.geometric_mean(ratios)
    left = [abs(ratio / scale - 1.0) for ratio in ratios]
    return f"{percent(statistics.fmean(left))} / {percent(max(left))}"


def order(document: Validation, facts: dict[str, Any]) -> str:
    """Where a source measured several plans: by model, the rank correlation of predicted and measured samples per GPU and second."""
    found = []
    for group in ("sc21_table2", "zero_bubble_table4", "zero_bubble_table8", "mosaic_llm_foundry"):
        sets: dict[str, list[ValidationRow]] = {}
        for row in counted(document, group):
            sets.setdefault(facts[row.id]["model"]["name"] + " on " + facts[row.id]["cluster"]["gpu"], []).append(row)
        for name, rows in sets.items():
            if len(rows) < 3:
                continue
            rates = [[_rate(facts[row.id], seconds) for seconds in (row.predicted.step_seconds, row.measured.step_seconds)] for row in rows]
            rank = spearman([a for a, _ in rates], [b for _, b in rates])
            if rank is not None:
                found.append((group, name, len(rows), f"{rank:.2f}"))
    middle = statistics.median(float(row[-1]) for row in found)
    return table(("several plans of one model", "", "plans", "Spearman"), found) + f"median {middle:.2f}\n"


def _rate(facts: dict[str, Any], seconds: float | None) -> float:
    return float(facts["batch"]["global_batch"] / facts["cluster"]["gpu_count"] / (seconds or 1.0))


def _bloom_order(document: Validation, facts: dict[str, Any]) -> tuple[float, float]:
    """Kendall's tau and the regret of the pick on the plans of 72 x 14336 with 64 heads, repeated runs averaged."""
    plans: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for row in counted(document, "bloom_tuning"):
        shape, parallel, batch = (facts[row.id][name] for name in ("model", "parallel", "batch"))
        if (shape["layers"], shape["hidden"], shape["heads"]) == (72, 14336, 64):
            key = (parallel["tp"], parallel["pp"], parallel["dp"], batch["micro_batch"], batch["global_batch"])
            plans.setdefault(key, []).append((row.predicted.step_seconds or 0.0, row.measured.step_seconds or 0.0))
    pairs = [[statistics.fmean(run[i] for run in runs) / int(str(key[4])) for i in (0, 1)] for key, runs in plans.items()]
    predicted, measured = [a for a, _ in pairs], [b for _, b in pairs]
    pick = predicted.index(min(predicted))
    return kendall(predicted, measured) or 0.0, measured[pick] / min(measured) - 1.0


EVALUATED = (("1F1B", 8, 8, 16, 1), ("1F1B", 8, 16, 8, 1), ("Interleaved1F1B", 8, 8, 16, 3), ("Interleaved1F1B", 8, 16, 8, 2),
             ("ZBVZeroBubble", 8, 16, 8, 2), ("1F1B", 4, 32, 8, 1))  # fmt: skip
"""Plans of GPT-3 on 1,024 GPUs whose evaluation is timed: schedule, tensor, pipeline and data parallel, stages on a rank."""


def evaluation_table(milliseconds: list[float]) -> str:
    rows = [(*plan, f"{value:.2f}") for plan, value in zip(EVALUATED, milliseconds, strict=True)]
    return table(("one evaluation of GPT-3 on 1,024 GPUs", "t", "p", "d", "v", "CPU ms"), rows)


def evaluation_milliseconds(schedule: Any = "1F1B", t: int = 8, p: int = 8, d: int = 16, v: int = 1, count: int = 200) -> float:
    """CPU time of one `predict_time` of GPT-3 on 1,024 A100, per stage; the median of five rounds."""
    model, training = load_model("gpt3"), Training(global_batch_size=1536, sequence_length=2048)
    inputs = Inputs(model=model, cluster=load_cluster("a100-80gb:1024"), training=training)
    decisions = Decisions(
        data_parallel=d, tensor_parallel=t, pipeline_parallel=p, zero_stage=1, micro_batch_size=1, num_microbatches=1536 // d,
        schedule=schedule, num_virtual_stages=v, stages=even_stages(model, schedule, p, v, "full"),
    )  # fmt: skip
    predict_time(inputs, decisions)
    rounds = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(count // 5):
            predict_time(inputs, decisions)
        rounds.append((time.process_time() - started) / (count // 5))
    return statistics.median(rounds) * 1e3


if __name__ == "__main__":
    main()
