"""Was the planner right? `python benchmarks/regret.py [--bench NAME ...] [--model NAME ...] [-o NAME] [--plot FILE.html]`.

| bench | hosts | ranks | link between the hosts |
| --- | --- | --- | --- |
| one | 1 | 2 | |
| fast, slow | 2, in network namespaces (`scripts/two-hosts`, needs root) | 2 | as fast as the machine makes it; 200 Mbit/s |
| fast-4, slow-4 | 2 | 4, two on the one core of each host | the same |

For each bench the machine is calibrated once, in several rounds, and then for each of three models *every* feasible plan of a small space is run, 16
sequences a step. The space of 2 ranks: all degrees; micro-batches of 1, 2 and 4; ZeRO 0, 1 and 3; with and without sequence parallelism;
1F1B and interleaved 1F1B. Of 4 ranks: all degrees; every placement on the hosts; micro-batches of 2 and 4; ZeRO 0, 1 and 3 (3 without a
pipeline); 1F1B. Reported are

    regret     measured time of the plan with the least predicted time, over the least measured time, minus 1;
               beside it the same of what `plan solve` chooses in this space, which may cut the layers unevenly
    Spearman   the rank correlation of predicted and measured times
    spread     the median over plans of half the range of a plan's rounds over their mean: what the machine itself does

and with 4 ranks on two hosts where the planner put the tensor-parallel groups, and what the best plan with the other placement costs.

All plans are run in turn, `--rounds` times, and those within a quarter of the least time, the chosen one and the solved one are then run
again, `--last-rounds` times in turn. Where a whole round was faster or slower than others that is the machine, not the plans, and is taken out
(`benchmarks.common.comparable_seconds`). The best is looked for among those that were run again, since the least of many noisy times is too low.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, comparable_seconds, make_plan, processor, round_medians, run_plans, spread, table, write_results
from planner.candidates import Constraints
from planner.cluster import ClusterSpec, load_cluster
from planner.defaults import Fixed
from planner.errors import InputError, MeshwrightError
from planner.estimate import predict
from planner.model import ModelSpec, load_model
from planner.network import axis_group
from planner.paradigms import as_plan
from planner.plan import Decisions, Inputs, Plan, Training, check, digest, replace
from planner.search import search
from planner.timing import predict_time

BATCH = 16


class Bench(NamedTuple):
    title: str
    num_hosts: int
    num_ranks: int
    rate: str | None = None
    """Of the link between the hosts, as `tc` wants it; None as fast as it is."""


BENCHES = {
    "one": Bench("one host", 1, 2),
    "fast": Bench("two hosts, fast link", 2, 2),
    "slow": Bench("two hosts, 200 Mbit/s", 2, 2, "200mbit"),
    "fast-4": Bench("two hosts of 2 ranks, fast link", 2, 4),
    "slow-4": Bench("two hosts of 2 ranks, 200 Mbit/s", 2, 4, "200mbit"),
}


class Case(NamedTuple):
    name: str
    bench: Bench
    model: ModelSpec
    sequence_length: int


def models() -> list[tuple[ModelSpec, int]]:
    """Three models with their sequence lengths: small and deep, wide, and with a large vocabulary."""
    gpt, llama = load_model("tiny-gpt"), load_model("tiny-llama")
    return [
        (replace(gpt, name="gpt-6x128", num_layers=6, hidden_size=128, ffn_hidden_size=512, head_dim=32), 128),
        (replace(llama, name="llama-4x256", hidden_size=256, ffn_hidden_size=768, num_attention_heads=8, num_key_value_heads=4, head_dim=32), 64),
        (replace(gpt, name="gpt-4x128-vocabulary-8192", hidden_size=128, ffn_hidden_size=512, head_dim=32, vocab_size=8192), 64),
    ]


def space(num_ranks: int) -> Iterator[dict[str, Any]]:
    """Every combination of decisions, feasible or not, as keywords of `make_plan`, and the order of the axes."""
    degrees = [(tp, pp, num_ranks // tp // pp) for tp in (1, 2, 4) for pp in (1, 2, 4) if num_ranks % (tp * pp) == 0 and tp * pp <= num_ranks]
    small = num_ranks == 2
    orders = [("tp", "dp", "pp")] if small else [("tp", "dp", "pp"), ("dp", "tp", "pp"), ("pp", "tp", "dp"), ("pp", "dp", "tp")]
    for (tp, pp, dp), micro, zero, order in itertools.product(degrees, (1, 2, 4) if small else (2, 4), (0, 1, 3), orders):
        if BATCH % (dp * micro) or (zero and dp == 1) or (zero == 3 and pp > 1):
            continue
        for virtual, sequence in itertools.product((1, 2) if small and pp > 1 else (1,), (False, True) if small and tp > 1 else (False,)):
            yield {
                "tp": tp, "pp": pp, "dp": dp, "micro_batch_size": micro, "num_microbatches": BATCH // dp // micro, "zero": zero, "virtual": virtual,
                "schedule": "1F1B" if virtual == 1 else "Interleaved1F1B", "sequence_parallel": sequence, "order": order,
            }  # fmt: skip


def feasible(model: ModelSpec, sequence_length: int, cluster: ClusterSpec) -> list[Plan]:
    """Every plan of the space that keeps the rules."""
    found: dict[str, Plan] = {}
    for choice in space(cluster.num_gpus):
        order = choice.pop("order")
        try:
            plan = make_plan(model, cluster, sequence_length=sequence_length, **choice)
            decisions = replace(plan.decisions, rank_order=order)
            check(plan.inputs, decisions)
        except InputError:
            continue
        plan = as_plan(plan.inputs, decisions, predict(plan.inputs, decisions))
        found.setdefault(_layout(decisions), plan)
    return list(found.values())


def _layout(decisions: Decisions) -> str:
    """What tells two plans apart: an axis of size 1 has no place."""
    sizes = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    order = [axis for axis in decisions.rank_order if sizes[axis] > 1]
    kind = [decisions.zero_stage, decisions.micro_batch_size, decisions.num_virtual_stages, decisions.sequence_parallel]
    return digest([sizes, order, kind])


def label(decisions: Decisions) -> str:
    sizes = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    order = " ".join(f"{axis}{sizes[axis]}" for axis in decisions.rank_order if sizes[axis] > 1)
    more = f" ZeRO-{decisions.zero_stage}" if decisions.zero_stage else ""
    more += " sequence parallel" if decisions.sequence_parallel else ""
    more += f" {decisions.num_virtual_stages} stages a rank" if decisions.num_virtual_stages > 1 else ""
    return f"{order} b{decisions.micro_batch_size}{more}"


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of the ranks."""
    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(range(len(values)), key=values.__getitem__)
        found = [0.0] * len(values)
        for rank, index in enumerate(order):
            found[index] = float(rank)
        return found

    return statistics.correlation(ranks(left), ranks(right))


def calibrate(bench: Bench, rounds: int) -> ClusterSpec:
    """The bench's cluster, as `plan calibrate` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "cluster.json")
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": _path(), "PYTHON": sys.executable}
        command = [sys.executable, "-m", "executor.calibrate", "--num-gpus", str(bench.num_ranks)]
        if bench.num_hosts > 1:
            command = [*hosts("exec"), "--nproc-per-node", str(bench.num_ranks // bench.num_hosts), "-m", "executor.calibrate"]
        command += ["--rounds", str(rounds), "--output", path]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=600 * rounds)
        return load_cluster(path)


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def hosts(*arguments: str) -> list[str]:
    return [str(ROOT / "scripts" / "two-hosts"), *arguments]


class Effort(NamedTuple):
    """How often the machine is measured, and how often plans are run: steps a round, rounds of all plans, and of those that may be the fastest."""

    calibration_rounds: int
    steps: int
    rounds: int
    last_rounds: int


CONTENDER = 1.25
"""A plan may be the fastest when its time is within this factor of the least."""


class Measured(NamedTuple):
    """Each plan's seconds, and whether it was run again; the spread over the last rounds; and what was measured in each round."""

    seconds: list[float]
    again: list[bool]
    spread: float
    rounds: list[list[float | None]]


def measure(plans: Sequence[Plan], always: Sequence[int], launcher: Sequence[str], effort: Effort) -> Measured:
    """Runs every plan, and again the fastest, the fastest of those whose placement is compared, and those at `always`."""
    rounds: list[list[float | None]] = _rounds(run_plans(plans, steps=effort.steps, rounds=effort.rounds, launcher=launcher), effort.rounds)
    first = comparable_seconds(rounds)
    groups = [range(len(plans)), [index for index, plan in enumerate(plans) if _inside(plan) is not None]]
    fastest = {index for group in groups for index in group if first[index] <= CONTENDER * min(first[other] for other in group)}
    again = sorted(fastest | set(always))
    last = run_plans([plans[index] for index in again], steps=effort.steps, rounds=effort.last_rounds, launcher=launcher)
    for each in _rounds(last, effort.last_rounds):
        seconds = dict(zip(again, each, strict=True))
        rounds.append([seconds.get(index) for index in range(len(plans))])
    noise = statistics.median(spread(result["seconds"], effort.last_rounds) for result in last)
    return Measured(comparable_seconds(rounds), [index in again for index in range(len(plans))], noise, rounds)


def _rounds(results: Sequence[dict[str, list[float]]], count: int) -> list[list[float | None]]:
    """For each round every plan's median step, in seconds."""
    return [list(each) for each in zip(*(round_medians(result["seconds"], count) for result in results), strict=True)]


def run_bench(name: str, wanted: Sequence[tuple[ModelSpec, int]], effort: Effort) -> Iterator[dict[str, Any]]:
    """All cases of a bench."""
    bench = BENCHES[name]
    environment = {**os.environ, "PYTHON": sys.executable}
    if bench.num_hosts > 1:
        subprocess.run(hosts("up", *(("--rate", bench.rate) if bench.rate else ())), env=environment, check=True)
    try:
        cluster = calibrate(bench, effort.calibration_rounds)
        for model, length in wanted:
            yield run_case(Case(name, bench, model, length), cluster, effort)
    finally:
        if bench.num_hosts > 1:
            subprocess.run(hosts("down"), env=environment, check=False)


def solved(model: ModelSpec, sequence_length: int, cluster: ClusterSpec) -> Plan:
    """What `plan solve` chooses in the same space."""
    training = Training(global_batch_size=BATCH, sequence_length=sequence_length, precision="fp32")
    inputs = Inputs(model=model, cluster=cluster, training=training)
    small = cluster.num_gpus == 2
    sizes = (8, 16) if small else (1, 8, 16)
    schedules = ("Naive", "GPipe", "InterleavedZeroBubble", "ZBVZeroBubble")
    forbidden: list[tuple[str, object]] = [("zero_stage", 2), *(("micro_batch_size", size) for size in sizes)]
    forbidden += [("schedule", name) for name in schedules] + [("num_virtual_stages", count) for count in range(3, 9)]
    fixed = Fixed(recompute="none") if small else Fixed(schedule="1F1B", recompute="none", sequence_parallel=False)
    return search(inputs, Constraints(fixed=fixed, forbidden=tuple(forbidden), time_limit_seconds=60))


def run_case(case: Case, cluster: ClusterSpec, effort: Effort) -> dict[str, Any]:
    """Runs every feasible plan of a model."""
    plans = feasible(case.model, case.sequence_length, cluster)
    predicted = [predict_time(plan.inputs, plan.decisions).time.step_seconds or 0.0 for plan in plans]
    choice = solved(case.model, case.sequence_length, cluster)
    same = next((index for index, plan in enumerate(plans) if _layout(plan.decisions) == _layout(choice.decisions)
                 and plan.decisions.stages == choice.decisions.stages), None)  # fmt: skip
    launcher = () if case.bench.num_hosts == 1 else hosts("exec")
    chosen = min(range(len(plans)), key=predicted.__getitem__)
    at_choice = len(plans) if same is None else same
    seen = measure(plans if same is not None else [*plans, choice], (chosen, at_choice), launcher, effort)
    measured, again = seen.seconds, seen.again
    of_choice = measured[at_choice]
    rows = [
        {"plan": label(plan.decisions), "predicted_seconds": p, "measured_seconds": m, "run_again": a, "tensor_parallel_inside": _inside(plan),
         "rounds": own}
        for plan, p, m, a, own in zip(plans, predicted, measured, again, zip(*seen.rounds, strict=True), strict=False)
    ]
    best = min((index for index, row in enumerate(rows) if row["run_again"]), key=measured.__getitem__)
    row: dict[str, Any] = {
        "bench": case.name,
        "model": case.model.name,
        "num_plans": len(plans),
        "chosen": rows[chosen]["plan"],
        "best": rows[best]["plan"],
        "regret": measured[chosen] / measured[best] - 1.0,
        "solved": label(choice.decisions),
        "solved_stages": [stage.num_layers for stage in choice.decisions.stages],
        "solved_seconds": of_choice,
        "solved_regret": of_choice / measured[best] - 1.0,
        "spearman": spearman(predicted, measured[: len(plans)]),
        "mean_error": statistics.fmean(abs(p / m - 1.0) for p, m in zip(predicted, measured, strict=False)),
        "spread": seen.spread,
        "placement": _placement(rows),
        "rows": sorted(rows, key=lambda item: item["measured_seconds"]),
    }
    sys.stderr.write(f"{case.bench.title}, {case.model.name}: regret {100 * row['regret']:.1f} %, Spearman {row['spearman']:.3f}\n")
    return row


def _inside(plan: Plan) -> bool | None:
    """Whether the tensor-parallel groups stay inside a host; None without tensor parallelism or with a single host."""
    cluster, decisions = plan.inputs.cluster, plan.decisions
    if decisions.tensor_parallel == 1 or cluster.gpus_per_node in (1, cluster.num_gpus):
        return None
    return axis_group(cluster, decisions, "tp").nodes == 1


def _placement(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best times with tensor-parallel groups inside a host and across hosts, predicted and measured; and of all plans with tensor
    parallelism the one with the least predicted time, and its regret among them."""
    inside = [row for row in rows if row["tensor_parallel_inside"] is True]
    across = [row for row in rows if row["tensor_parallel_inside"] is False]
    if not inside or not across:
        return None
    chosen = min([*inside, *across], key=lambda row: row["predicted_seconds"])
    best = min([*inside, *across], key=lambda row: row["measured_seconds"])
    return {
        "chosen": chosen["plan"], "best": best["plan"], "regret": chosen["measured_seconds"] / best["measured_seconds"] - 1.0,
        **{
            f"{kind}_{name}": min(row[f"{kind}_seconds"] for row in group)
            for kind in ("predicted", "measured")
            for name, group in (("inside", inside), ("across", across))
        },
    }  # fmt: skip


def text_of(cases: Sequence[dict[str, Any]]) -> str:
    header = ("bench", "model", "plans", "chosen", "best", "regret %", "plan solve", "regret %", "Spearman", "mean error %", "spread %")
    cells = [
        (BENCHES[case["bench"]].title, case["model"], case["num_plans"], case["chosen"], case["best"], f"{100 * case['regret']:.1f}",
         case["solved"], f"{100 * case['solved_regret']:.1f}", f"{case['spearman']:.3f}", f"{100 * case['mean_error']:.1f}",
         f"{100 * case['spread']:.1f}")
        for case in cases
    ]  # fmt: skip
    text = f"Regret of the planner's choice, every plan run, {datetime.date.today()}, {processor()}\n\n" + table(header, cells)
    good = sum(case["regret"] <= 0.05 and case["spearman"] >= 0.9 for case in cases)
    text += f"\nregret at most 5 % and Spearman at least 0.9: {good} of {len(cases)}\n\n"
    text += "Plans with * were run again among the fastest. What whole rounds were faster or slower is taken out of all times.\n"
    for case in cases:
        place = case["placement"]
        if place:
            text += (
                f"{BENCHES[case['bench']].title}, {case['model']}: tensor parallelism inside a host {1e3 * place['measured_inside']:.0f} ms "
                f"(predicted {1e3 * place['predicted_inside']:.0f}), across {1e3 * place['measured_across']:.0f} ms "
                f"(predicted {1e3 * place['predicted_across']:.0f}); of all plans with it the planner takes {place['chosen']}, the best is "
                f"{place['best']}, regret {100 * place['regret']:.1f} %\n"
            )
    for case in cases:
        text += f"\n{BENCHES[case['bench']].title}, {case['model']}\n"
        text += table(
            ("plan", "predicted ms", "measured ms"),
            [(row["plan"] + " *" * row["run_again"], f"{1e3 * row['predicted_seconds']:.1f}", f"{1e3 * row['measured_seconds']:.1f}")
             for row in case["rows"]],
        )
    return text


def plot(cases: Sequence[dict[str, Any]]) -> str:
    """Predicted against measured times, a colour for each case, as one page that needs no network."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for case in cases:
        figure.add_scatter(
            x=[1e3 * row["predicted_seconds"] for row in case["rows"]], y=[1e3 * row["measured_seconds"] for row in case["rows"]],
            text=[row["plan"] for row in case["rows"]], mode="markers", name=f"{BENCHES[case['bench']].title}, {case['model']}",
        )  # fmt: skip
    times = [1e3 * row[key] for case in cases for row in case["rows"] for key in ("predicted_seconds", "measured_seconds")]
    ends = [min(times), max(times)]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="as predicted", line={"dash": "dot", "color": "grey"})
    figure.update_layout(title="Every plan: predicted and measured step time", xaxis_title="predicted, ms", yaxis_title="measured, ms")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    page: str = figure.to_html(include_plotlyjs=True)
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", choices=tuple(BENCHES), action="append", help="default: all of them")
    parser.add_argument("--model", choices=[model.name for model, _ in models()], action="append", help="default: all three")
    parser.add_argument("--calibration-rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of all plans")
    parser.add_argument("--last-rounds", type=int, default=4, help="of the plans that may be the fastest")
    parser.add_argument("-o", "--output", help="name of the result files under benchmarks/results (default: DATE-regret)")
    parser.add_argument("--plot", metavar="FILE", help="where the scatter goes")
    options = parser.parse_args()
    benches = options.bench or list(BENCHES)
    wanted = [(model, length) for model, length in models() if not options.model or model.name in options.model]
    if any(BENCHES[bench].num_hosts > 1 for bench in benches):
        checked = subprocess.run(hosts("check"), capture_output=True, text=True, check=False)
        if checked.returncode:
            raise MeshwrightError(checked.stderr.strip())
    cases: list[dict[str, Any]] = []
    for bench in benches:
        for case in run_bench(bench, wanted, Effort(options.calibration_rounds, options.steps, options.rounds, options.last_rounds)):
            cases.append(case)
            write_results(options.output or f"{datetime.date.today()}-regret", text_of(cases), cases)
    sys.stdout.write(text_of(cases))
    if options.plot:
        Path(options.plot).write_text(plot(cases), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)
