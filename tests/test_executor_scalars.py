"""TensorBoard scalars: what a run writes is what it did; without the extra, one line and exit status 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from plans import make_plan
from test_executor_run import launch

from planner.documents import dumps, write_text
from planner.run import load_run

pytest.importorskip("torch", reason="the executor needs torch")

from executor.launch import main


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    write_text(tmp_path / "plan.json", dumps(make_plan("tiny-gpt", "cpu:1", m=2, precision="fp32", sequence_length=16)))
    return str(tmp_path / "plan.json")


def test_scalars_are_those_of_the_run(plan_file: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    done = launch(1, [plan_file, "--steps", "3", "-o", str(tmp_path / "run.json"), "--tensorboard", str(tmp_path / "logs")])
    assert done.returncode == 0, done.stderr
    written = accumulator.EventAccumulator(str(tmp_path / "logs"))
    written.Reload()
    names = {"loss_metrics/global_avg_loss", "grad_norm", "lr", "throughput(tps)", "time_metrics/end_to_end(s)"}
    assert set(written.Tags()["scalars"]) == names
    steps = load_run(tmp_path / "run.json").steps
    losses = written.Scalars("loss_metrics/global_avg_loss")
    assert [(event.step, event.value) for event in losses] == [(step.step, pytest.approx(step.loss, rel=1e-6)) for step in steps]
    rates = written.Scalars("lr")
    assert [event.value for event in rates] == [pytest.approx(3e-4)] * 3


def test_a_missing_extra_is_one_line(
    plan_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main([plan_file, "--tensorboard", str(tmp_path / "logs")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--tensorboard" in said and "pip install 'meshwright[tensorboard]'" in said


def test_a_folder_that_cannot_be_made_is_one_line(plan_file: str) -> None:
    done = launch(1, [plan_file, "--steps", "1", "--tensorboard", f"{plan_file}/logs"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--tensorboard" in done.stderr
