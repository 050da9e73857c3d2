"""`plan run` before torchrun: its options, and whether this machine can hold the plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from executor.options import arguments, check_outputs
from executor.start import GIB, PROCESS_BYTES, check_host_memory, main, peaks
from planner.documents import dumps, write_text
from planner.errors import DoesNotFitError, InputError
from planner.plan import Memory, replace
from tests.plans import make_plan


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        ([], "PLAN"),
        (["p.json", "--steps", "0"], "--steps"),
        (["p.json", "--steps", "many"], "--steps"),
        (["p.json", "--dropout", "1"], "--dropout"),
        (["p.json", "--learning-rate", "nan"], "--learning-rate"),
        (["p.json", "--device", "tpu"], "--device"),
        (["p.json", "--timeout", "0"], "--timeout"),
        (["p.json", "--step", "3"], "unrecognized arguments"),
        (["p.json", "--min-learning-rate", "1e-3", "--decay-steps", "5"], "--min-learning-rate"),
        (["p.json", "--min-learning-rate", "1e-5"], "--min-learning-rate"),
        (["p.json", "--resume", ""], "--resume"),
        (["p.json", "--output", ""], "--output"),
        ([""], "PLAN"),
        (["p.json", "--rehearse", "--resume", "saved"], "--resume"),
        (["p.json", "--rehearse", "--data", "text.txt"], "--data"),
        (["p.json", "--rehearse", "--checkpoint-every", "2"], "--checkpoint-every"),
        (["p.json", "--rehearse", "--clip-norm", "0"], "--clip-norm"),
        (["p.json", "--keep-checkpoints", "2"], "--keep-checkpoints"),
        (["p.json", "--checkpoint-folder", "saved"], "--checkpoint-folder"),
        (["p.json", "--resume", "saved", "--load", "weights"], "--load"),
    ],
)
def test_a_wrong_option_is_named(argv: list[str], field: str) -> None:
    with pytest.raises(InputError) as error:
        arguments(argv)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--output", "."),
        ("--output", "file/run.json"),
        ("--output", "/proc/run.json"),
        ("--checkpoint-folder", "file"),
        ("--checkpoint-folder", "file/below/it"),
        ("--tensorboard", "/proc/logs"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, place: str
) -> None:
    write_text(tmp_path / "plan.json", dumps(make_plan()))
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path)
    assert main(["plan.json", "--device", "cpu", "--checkpoint-every", "2", option, place]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"plan: {option}: '{place}' is not valid; "), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plan.json"] and (tmp_path / "file").read_text() == "kept"


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    places = ["--output", str(tmp_path / "run.json"), "--checkpoint-folder", str(tmp_path / "a" / "b"), "--tensorboard", str(tmp_path)]
    check_outputs(arguments(["plan.json", "--checkpoint-every", "2", *places]))
    assert not list(tmp_path.iterdir())


def test_a_rank_that_is_started_without_plan_run_refuses_to_replace_its_plan_or_data(tmp_path: Path) -> None:
    plan, data = tmp_path / "plan.json", tmp_path / "tokens.actions.json"
    plan.touch()
    data.touch()
    for output in ("plan.json", "tokens.actions.json", "tokens.json"):
        with pytest.raises(InputError, match="would be lost"):
            check_outputs(arguments([str(plan), "--data", str(data), "--output", str(tmp_path / output)]))
    check_outputs(arguments([str(plan), "--data", str(data), "--output", str(tmp_path / "run.json")]))


def test_ranks_that_exceed_the_free_memory_are_refused_with_what_would_fit() -> None:
    check_host_memory([3 * GIB, 4 * GIB], 7 * GIB + 2 * PROCESS_BYTES)
    with pytest.raises(DoesNotFitError, match=r"2 ranks .* would fit: `plan dry-run`"):
        check_host_memory([3 * GIB, 4 * GIB], 7 * GIB + 2 * PROCESS_BYTES - 1)


def test_every_rank_counts_with_its_own_pipeline_ranks_peak() -> None:
    plan = make_plan(dp=2, pp=2)
    first, last = (rank.memory.total_bytes for rank in plan.predictions.pipeline_ranks)
    assert peaks(plan) == [first, first, last, last]


def test_plan_run_refuses_a_plan_for_a_larger_machine_before_it_starts_a_rank(tmp_path: Path) -> None:
    plan = make_plan(pp=2)
    huge = Memory.of(2**50, 0, 0, 0, 0)
    ranks = tuple(replace(rank, memory=huge) for rank in plan.predictions.pipeline_ranks)
    path = tmp_path / "plan.json"
    write_text(path, dumps(replace(plan, predictions=replace(plan.predictions, memory=huge, pipeline_ranks=ranks))))
    run = tmp_path / "run.json"
    done = subprocess.run([sys.executable, "-m", "executor.start", str(path), "-o", str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 1 and "would fit" in done.stderr
    assert not run.exists()
