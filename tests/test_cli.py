import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

import planner.search
from planner import cli
from planner.candidates import Constraints
from planner.errors import SolverError
from planner.plan import Inputs

ROOT = Path(__file__).parent.parent


def plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from planner.cli import entry; entry()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_memory_wall_in_json() -> None:
    done = plan("estimate", "--model", "gpt3", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert document["schema"] == "meshwright.estimate/1" and document["parallel"] is None and document["fits"] is None
    assert document["memory"]["total_bytes"] == sum(value for key, value in document["memory"].items() if key != "total_bytes")
    assert document["time"]["gpu_years"] == pytest.approx(355, abs=1)


def test_the_memory_wall_for_people() -> None:
    done = plan("estimate", "--model", "gpt3")
    assert done.returncode == 0
    for figure in ("349.2", "2,095.3", "2,793.7", "33 x", "3.14e+23", "28 TFLOP/s"):
        assert figure in done.stdout


def test_bloom_fits_and_shows_its_bubble() -> None:
    done = plan("estimate", "--model", "bloom-176b", "--cluster", "a100-80gb:384", "--tp", "4", "--pp", "12", "--dp", "8", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["fits"] is True and len(document["pipeline_ranks"]) == 12
    assert 0 < document["time"]["bubble_fraction"] < 0.2


def test_what_does_not_fit_has_status_3_and_a_document_all_the_same() -> None:
    done = plan("estimate", "--model", "gpt3", "--cluster", "a100-80gb:1", "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["fits"] is False
    assert "would fit" in done.stderr and "Traceback" not in done.stderr


def test_where_no_change_would_fit_that_is_said() -> None:
    done = plan("estimate", "--model", "llama-2-7b", "--cluster", "l4-24gb:1", "--tp", "1", "--sequence-length", "20000001")
    assert done.returncode == 3 and "would fit:" not in done.stderr and "was found that would fit" in done.stderr


LONG = "a" * 300
SOLVE = ["solve", "--model", "gpt2", "--cluster", "a100:8", "--global-batch-size", "8"]
WRONG = [
    (["estimate", "--model", LONG], "--model"),
    (["estimate", "--model", "gpt2", "--cluster", LONG], "--cluster"),
    (["solve", "--model", "gpt2", "--cluster", "a100:1", "--global-batch-size", "8", "-o", LONG], "--output"),
    (["estimate", "--model", "gpt2", "--gpus", "8", "--global-batch-size", "8", "-o", LONG], "--output"),
    (["validate", "--report", LONG], "File name too long"),
    (["demo", "-o", LONG], "--output"),
    (["demo", "-o", ""], "--output"),
    (["demo", "--model", "gpt3"], "--model"),
    (["estimate", "--model", "gpt3", "-o", "never.html"], "--gpus"),
    (["estimate", "--model", "gpt3", "--time-limit", "3"], "--time-limit: 3.0 "),
    (["estimate", "--model", "gpt3", "--tp", "8", "--gap", "0"], "--gap: 0.0 "),
    (["estimate", "--model", "gpt3", "--gpus", "8", "--global-batch-size", "8", "--time-limit", "0"], "a positive number"),
    (["solve", "--model", "gpt2", "--cluster", "a100:1", "--global-batch-size", "8", "--gap", "nan"], "--gap"),
    (["solve", "--model", "gpt2", "--cluster", "a100:1", "--global-batch-size", "8", "--time-limit", "inf"], "--time-limit"),
    (["estimate", "--model", "gpt2", "--memory-fraction", "nan"], "--memory-fraction"),
    (["estimate", "--model", "gpt2", "--global-batch-size", "9" * 23], "at most 1,000,000,000"),
    (["estimate", "--model", "gpt2", "--cluster", f"a100:{'9' * 21}"], "at most 10,000,000"),
    (["estimate", "--model", "gpt2", "--cluster", "a100:²"], "--cluster"),
    ([*SOLVE, "--schedule", "zbvzerobubble", "--pp", "1"], "--pipeline-parallel: 1 "),
    ([*SOLVE, "--schedule", "zbvzerobubble", "--pp", "1", "--tp", "1"], "--schedule ZBVZeroBubble; change"),
    ([*SOLVE, "--num-virtual-stages", "4", "--schedule", "1f1b"], "--num-virtual-stages 4"),
    ([*SOLVE, "--forbid", "tensor_parallel=1", "--tp", "1"], "together with --forbid tensor_parallel=1"),
    ([*SOLVE, "--rank-order", "tp-dp-pp", "--forbid", "rank_order=tp-dp-pp"], "--forbid rank_order=tp-dp-pp"),
    ([*SOLVE, "--memory-fraction", "0.001"], "more than 0.0126 is expected"),
    ([*SOLVE, "--pp", "2", "--schedule", "zbvzerobubble", "--num-virtual-stages", "3"], "plan: --num-virtual-stages: 3 "),
    ([*SOLVE, "--pp", "2", "--schedule", "interleaved1f1b", "--num-virtual-stages", "1"], "plan: --num-virtual-stages: 1 "),
    ([*SOLVE, "--pp", "1", "--schedule", "interleaved1f1b", "--num-virtual-stages", "2"], "plan: --schedule: 'Interleaved1F1B' "),
    ([*SOLVE[:-1], "10", "--pp", "2", "--dp", "2", "--micro-batch-size", "1", "--schedule", "interleaved1f1b", "--num-virtual-stages", "2"],
     "plan: the number of micro-batches: 5 "),
    (["estimate", "--model", "gpt3", "--cluster", "a100:8", "--tp", "3"], "--tensor-parallel: 3 "),
    (["estimate", "--model", "llama-7b", "--gpus", "8,16", "--tp", "3", "--global-batch-size", "8"], "--tensor-parallel"),
    (["estimate", "--model", "gpt2", "--gpus", "9" * 5000, "--global-batch-size", "8"], "at most 1,000,000"),
    (["solve", "--model", "gpt2", "--cluster", "a100:8", "--global-batch-size", "8", "--forbid", "colour=red"], "--forbid"),
    (["solve", "--model", "gpt2", "--cluster", "a100:8", "--global-batch-size", "8", "--rank-order", "tp-tp-pp"], "--rank-order"),
    (["solve", "--model", "gpt2", "--cluster", "a100:8", "--global-batch-size", "8", "--within-days", "1"], "--num-tokens"),
    (["estimate", "--model", "gpt2", "--cluster", "a100-80gb:8", "--tp", "2", "--program", "megatrn"], "--program"),
    (["estimate", "--model", "gpt2", "--gpus", "8", "--global-batch-size", "8", "--explain"], "--explain"),
    (["estimate", "--model", "gpt2", "--gpus", "8,many", "--global-batch-size", "8"], "--gpus"),
    (["export", "/no/such/plan.json", "--to", "megatron"], "PLAN"),
    (["validate", "--rows", "/no/such/rows.json"], "--rows"),
    (["compare", "/no/such/plan.json", "/no/such/run.json"], "PLAN"),
    (["estimate", "--model", "gpt5"], "--model"),
    (["estimate", "--model", "gpt3", "--tp", "7"], "tensor-parallel"),
    (["estimate", "--model", "gpt3", "--tp", "0"], "--tensor-parallel"),
    (["estimate", "--model", "gpt3", "--cluster", "z100:8"], "--cluster"),
    (["estimate", "--model", "gpt3", "--cluster", "a100-80gb:many"], "--cluster"),
    (["estimate", "--model", "gpt3", "--cluster", "a100-80gb:100", "--tp", "8", "--pp", "8"], "--pipeline-parallel"),
    (["estimate", "--model", "gpt3", "--zero-stage", "9"], "--zero-stage"),
    (["estimate", "--model", "gpt3", "--schedule", "best"], "--schedule"),
    (["estimate", "--model", "gpt3", "--tp", "8", "--sequence-length", "4096"], "--sequence-length"),
    (["estimate", "--model", "gpt3", "--pp", "200"], "--pp"),
    (["estimate", "--model", "gpt3", "--memory-fraction", "2"], "--memory-fraction"),
    (["estimate", "--model", "/no/such/config.json"], "--model"),
    (["estimate"], "--model"),
    (["solve", "--model", "gpt3", "--cluster", "a100-80gb:8", "--global-batch-size", "8", "--gap", "1"], "--gap"),
    (["estimte"], "estimate"),
    (["models", "gpt"], "NAME"),
    (["show", "/no/such/plan.json"], "PLAN"),
    (["run", "/no/such/plan.json"], "PLAN"),
    (["solve", "--model", "gpt3", "--cluster", "a100-80gb:8"], "--global-batch-size"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[" ".join(arguments)[:100] for arguments, _ in WRONG])
def test_wrong_input_gives_one_clear_line_and_status_2(arguments: list[str], named: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and named in done.stderr


@pytest.mark.parametrize(("option", "value"), [("--model", "nope"), ("--output", __file__)])
def test_demo_looks_at_its_inputs_before_it_measures(tmp_path: Path, option: str, value: str) -> None:
    pytest.importorskip("torch")
    demo = [sys.executable, "-c", "from planner.cli import entry; entry()", "demo", "--output", str(tmp_path / "demo"), option, value]
    done = subprocess.run(demo, capture_output=True, text=True, cwd=ROOT, check=False, timeout=20)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and option in done.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("arguments", [["models"], ["estimate", "--model", "gpt2", "--json"], ["--help"]], ids=lambda words: words[0])
def test_a_stdout_that_takes_nothing_is_one_line_and_status_1(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "read-only").touch()
    command = [sys.executable, "-c", "from planner.cli import entry; entry()", *arguments]
    with open(tmp_path / "read-only") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and done.stderr == "plan: standard output: Bad file descriptor\n"
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (closed.returncode, closed.stderr) == (done.returncode, done.stderr)


def test_presets_are_listed() -> None:
    assert "gpt3-175b" in plan("models").stdout
    assert json.loads(plan("models", "bloom", "--json").stdout)["num_parameters"] == 176_247_271_424
    assert "a100-80gb" in plan("clusters").stdout
    assert json.loads(plan("clusters", "a100", "--json").stdout)["schema"] == "meshwright.cluster/1"


def test_solve_writes_a_plan_that_show_and_simulate_take(tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    trace = tmp_path / "trace.json"
    arguments = ["--model", "tiny-gpt", "--cluster", "a100-80gb:4", "--global-batch-size", "16", "--pp", "2", "--forbid", "schedule=GPipe"]
    done = plan("solve", *arguments, "-o", path, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document == json.loads(Path(path).read_text())
    assert document["solver"]["status"] == "optimal" and document["solver"]["gap_fraction"] == 0
    assert document["decisions"]["pipeline_parallel"] == 2 and document["decisions"]["schedule"] != "GPipe"
    assert plan("show", path).returncode == 0
    simulated = json.loads(plan("simulate", path, "--trace", str(trace), "--json").stdout)
    assert len(simulated["pipeline_ranks"]) == 2 and json.loads(trace.read_text())["traceEvents"]


def test_no_output_replaces_an_input(tmp_path: Path) -> None:
    file, link, hard, cluster = (tmp_path / name for name in ("plan.json", "link.json", "hard.json", "cluster.json"))
    cluster.write_text(plan("clusters", "a100", "--json").stdout)
    solve = ["solve", "--model", "tiny-gpt", "--cluster", f"{cluster}:2", "--global-batch-size", "4", "-o"]
    assert plan(*solve, str(file)).returncode == 0
    link.symlink_to(file)
    hard.hardlink_to(file)
    before = file.read_bytes(), cluster.read_bytes()
    for arguments in (
        ["run", str(file), "-o", str(file)],
        ["run", f"--output={link}", str(file), "--steps", "1"],
        ["dry-run", str(file), "-o", str(file)],
        ["simulate", str(file), "--trace", f"{tmp_path}/../{tmp_path.name}/plan.json"],
        ["report", str(file), "-o", str(link)],
        ["report", str(link), "-o", str(hard)],
        [*solve, str(cluster)],
        ["calibrate", "--from", "run.json", "--plan", str(file), "-o", str(file)],
        ["validate", "--rows", str(file), "--report", str(file)],
    ):
        done = plan(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "would be lost" in done.stderr
        assert (file.read_bytes(), cluster.read_bytes()) == before and len(list(tmp_path.iterdir())) == 4


def test_an_export_replaces_no_other_file(tmp_path: Path) -> None:
    file, folder = tmp_path / "plan.json", tmp_path / "job"
    solve = ["solve", "--model", "tiny-gpt", "--cluster", "a100:2", "--global-batch-size", "4", "-o", str(file)]
    assert plan(*solve).returncode == 0
    export = ["export", str(file), "--to", "torchrun", "-o"]
    assert plan(*export, str(folder)).returncode == plan(*export, str(folder)).returncode == 0
    (folder / "plan.json").write_text("mine")
    (folder / "torchrun.sh").unlink()
    for target, named in ((folder, "plan.json"), ("", "a path is expected"), (tmp_path / "no" / "such", "existing folder")):
        done = plan(*export, str(target))
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and named in done.stderr
    assert (folder / "plan.json").read_text() == "mine" and list(folder.iterdir()) == [folder / "plan.json"]


def test_what_cannot_fit_has_status_3_and_repairs() -> None:
    done = plan("solve", "--model", "gpt3", "--cluster", "a100-80gb:1", "--global-batch-size", "8")
    assert done.returncode == 3 and done.stdout == ""
    assert "short" in done.stderr and "would fit" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["gpt3", "--world-size", "8"], 3, "none of the 13 ways fits"),
        (["gpt3", "--world-size", "8", "--run"], 3, "none of the 13 ways could be run"),
        (["gpt2", "--world-size", "4", "--sequence-length", "100000"], 2, "--sequence-length: 100000"),
        (["gpt2", "--world-size", "4", "--global-batch-size", "3", "--micro-batch-size", "2"], 2, "--world-size: 4"),
    ],
    ids=["fits", "run", "length", "batch"],
)
def test_paradigms_of_which_none_is_possible_are_one_line_and_no_success(arguments: list[str], status: int, said: str) -> None:
    done = plan("paradigms", "--model", *arguments)
    assert done.returncode == status and len(done.stderr.strip().splitlines()) == 1 and said in done.stderr, done.stderr


def test_a_sweep_in_which_nothing_fits_says_what_would() -> None:
    done = plan("estimate", "--model", "gpt3", "--gpus", "1,2", "--cluster", "a100-80gb", "--global-batch-size", "2", "--json")
    assert done.returncode == 3 and [point["plan"] for point in json.loads(done.stdout)["points"]] == [None, None]
    assert "does not fit 2 x" in done.stderr and "would fit" in done.stderr
    none = plan("estimate", "--model", "gpt3", "--gpus", "7", "--cluster", "a100-80gb", "--global-batch-size", "1", "--pp", "1")
    assert none.returncode == 2 and none.stdout == "" and "--pipeline-parallel" in none.stderr.splitlines()[-1]


SWEEP = ["estimate", "--model", "gpt2", "--cluster", "a100-80gb", "--global-batch-size", "8", "--gpus", "1,2,4", "--json"]


def test_a_sweep_has_a_time_limit_and_says_what_it_leaves_unproven() -> None:
    done = plan(*SWEEP[:2], "llama-2-7b", *SWEEP[3:5], "--global-batch-size", "100", "--gpus", "100", "--time-limit", "0.001")
    assert done.returncode == 0 and "not proven, gap " in done.stdout, done.stderr
    proven = plan(*SWEEP[:-1])
    assert proven.returncode == 0 and "not proven" not in proven.stdout, proven.stderr


@pytest.mark.parametrize(("given", "expected"), [([], (60.0, 0.01)), (["--time-limit", "5", "--gap", "0"], (5.0, 0.0))], ids=["default", "given"])
def test_every_search_of_a_sweep_gets_the_limits(given: list[str], expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def none_found(inputs: Inputs, constraints: Constraints) -> None:
        limits.append((constraints.time_limit_seconds, constraints.accepted_gap))
        raise SolverError("no plan was found within the time limit")

    monkeypatch.setattr(planner.search, "search", none_found)
    with pytest.raises(SolverError, match="within the time limit"):
        cli.plan.main([*SWEEP, *given], standalone_mode=False)
    assert limits == [expected] * 3


def test_a_sweep_keeps_what_it_has_when_a_search_finds_nothing_or_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, ends = planner.search.search, {2: SolverError("no plan was found within the time limit"), 4: KeyboardInterrupt()}

    def ending(inputs: Inputs, constraints: Constraints) -> object:
        if inputs.cluster.num_gpus in ends:
            raise ends[inputs.cluster.num_gpus]
        return real(inputs, constraints)

    monkeypatch.setattr(planner.search, "search", ending)
    page = tmp_path / "sweep.html"
    with pytest.raises(click.exceptions.Abort):
        cli.plan.main([*SWEEP, "-o", str(page)], standalone_mode=False)
    points = json.loads(capsys.readouterr().out)["points"]
    assert [point["why_not"] for point in points] == [None, "no plan was found within the time limit", "interrupted"]
    assert points[0]["plan"] and "4 GPUs: interrupted" in page.read_text(encoding="utf-8")


def test_explain_names_every_term_and_its_letters_without_degrees_too() -> None:
    whole = plan("estimate", "--model", "gpt3", "--explain").stdout
    split = plan("estimate", "--model", "gpt3", "--cluster", "a100-80gb:64", "--tp", "8", "--pp", "8", "--explain").stdout
    assert "2 B x 174,604,259,328" in whole and "query, key, value" in whole and "t = 1 tensor-parallel" in whole
    assert "attention output" in split and "t = 8 tensor-parallel" in split


@pytest.mark.parametrize("degrees", [(), ("--cluster", "a100-80gb:64", "--tp", "8", "--pp", "8")])
def test_explain_is_in_the_json_too(degrees: tuple[str, ...]) -> None:
    terms = json.loads(plan("estimate", "--model", "gpt3", *degrees, "--explain", "--json").stdout)["explanation"]
    assert {"term", "part", "formula", "size_bytes", "counted_per", "why"} == set(terms[0]) and len(terms) > 8
    *whole, total = [term["size_bytes"] for term in terms if not term["part"]]
    assert sum(whole) == pytest.approx(total, rel=1e-6)
    assert "explanation" not in json.loads(plan("estimate", "--model", "gpt3", *degrees, "--json").stdout)


def test_paradigms_with_a_degree_of_1_are_not_possible() -> None:
    def rows(world_size: int) -> dict[str, object]:
        done = json.loads(plan("paradigms", "--model", "gpt2", "--world-size", str(world_size), "--global-batch-size", "36", "--json").stdout)
        return {row["name"]: row["decisions"] for row in done["paradigms"]}

    two, nine = rows(2), rows(9)
    assert two["tensor parallel"] and not any(two[name] for name in two if name[:2] in ("2D", "3D")) and any(name[:2] == "3D" for name in two)
    assert nine["2D: data x pipeline"]["data_parallel"] == 3 == nine["2D: data x pipeline"]["pipeline_parallel"]
    alone = plan("paradigms", "--model", "gpt2", "--world-size", "1")
    assert alone.returncode == 2 and "at least 2 ranks" in alone.stderr
