"""Checkpoints: what a shard is made of, exact resumption, and another plan."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from plans import make_plan
from test_agent import refused
from test_executor_run import launch

from planner.documents import dumps, write_text
from planner.errors import InputError
from planner.model import load_model, replace
from planner.plan import Plan
from planner.run import load_run
from tests.modules import module_plan

torch = pytest.importorskip("torch", reason="the executor needs torch")
load_file = pytest.importorskip("safetensors.torch", reason="the export needs safetensors").load_file

from executor.checkpoint import SCHEMA, TrainingState, _check_model, load_state, read_whole, steps_in  # noqa: E402
from executor.chunks import rectangles  # noqa: E402
from executor.huggingface import main as export  # noqa: E402
from executor.units import Piece  # noqa: E402


@pytest.mark.parametrize(
    "piece",
    [Piece("a", (11,), start=3, stop=9), Piece("b", (7, 5), 0, 2, 6), Piece("c", (4, 9), 1, 3, 7), Piece("d", (6, 1), 0, 1, 5)],
    ids=lambda piece: piece.name,
)
def test_rectangles_cover_a_run_of_elements_once(piece: Piece) -> None:
    whole = torch.arange(torch.Size(piece.shape).numel()).view(piece.shape)
    flat = piece.slice_of(whole).reshape(-1)
    for first in range(piece.numel):
        for last in range(first + 1, piece.numel + 1):
            found = []
            for offsets, shape, before in rectangles(piece, first, last):
                assert before == len(found)
                part = whole
                for dim, (offset, size) in enumerate(zip(offsets, shape, strict=True)):
                    part = part.narrow(dim, offset, size)
                found += part.reshape(-1).tolist()
            assert found == flat[first:last].tolist()


def losses(plan: Plan, folder: Path, name: str, *arguments: str) -> list[float]:
    write_text(folder / f"{name}.json", dumps(plan))
    output = folder / f"{name}-run.json"
    done = launch(plan.decisions.world_size, [str(folder / f"{name}.json"), "-o", str(output), *arguments])
    assert done.returncode == 0, done.stderr[-2000:]
    return [step.loss for step in load_run(output).steps]


def test_resumed_exactly_and_under_another_plan(tmp_path: Path) -> None:
    shape = {"precision": "fp32", "sequence_length": 16}
    plan = make_plan("tiny-gpt", "cpu:4", tp=2, pp=2, m=8, **shape)
    saved = str(tmp_path / "saved")
    whole = losses(plan, tmp_path, "whole", "--steps", "4", "--checkpoint-every", "2", "--checkpoint-folder", saved)
    assert [step for step, _ in sorted(steps_in(Path(saved)))] == [2, 4]
    middle = f"{saved}/step-2"
    assert losses(plan, tmp_path, "again", "--steps", "2", "--resume", middle) == whole[2:]
    for name, other in (
        ("dp4", make_plan("tiny-gpt", "cpu:4", dp=4, m=2, zero_stage=2, **shape)),
        ("one", make_plan("tiny-gpt", "cpu:1", m=8, **shape)),
    ):
        found = losses(other, tmp_path, name, "--steps", "2", "--resume", middle)
        assert max(abs(a - b) for a, b in zip(found, whole[2:], strict=True)) < 1e-5, name


def flip(path: Path) -> None:
    """Eight bytes in the middle of a file, upside down."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(255 - byte for byte in data[middle : middle + 8])
    path.write_bytes(data)


def test_a_damaged_file_is_named_by_whichever_rank_finds_it_and_old_checkpoints_load(tmp_path: Path) -> None:
    plan = make_plan("tiny-gpt", "cpu:2", pp=2, m=2, precision="fp32", sequence_length=16)
    checkpoint = tmp_path / "saved" / "step-1"
    losses(plan, tmp_path, "plan", "--steps", "1", "--checkpoint-every", "1", "--checkpoint-folder", str(checkpoint.parent))
    again = ["--steps", "1", "--resume", str(checkpoint)]
    for name in (".metadata", "__0_0.distcp"):
        flip(checkpoint / name)
        with pytest.raises(InputError, match=rf"{re.escape(name)}.*CRC-32"):
            read_whole(checkpoint, {}, "CHECKPOINT")
        flip(checkpoint / name)
    flip(checkpoint / "__1_0.distcp")
    line = refused(tmp_path, *again)
    assert line.startswith("plan: --resume: ") and "__1_0.distcp" in line and "CRC-32" in line
    state = json.loads((checkpoint / "training.json").read_text())
    (checkpoint / "training.json").write_text(json.dumps({**state, "step": 3}))
    with pytest.raises(InputError, match=r"training\.json.*its own digest"):
        load_state(checkpoint, "--resume")
    assert set(state.pop("checksums")) == {".metadata", "__0_0.distcp", "__1_0.distcp"} and len(state.pop("digest")) == 64
    (checkpoint / "training.json").write_text(json.dumps(state))
    losses(plan, tmp_path, "plan", *again)


def test_a_save_that_fails_is_said_and_the_next_is_tried(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.json", dumps(make_plan("tiny-gpt", "cpu:2", pp=2, m=2, precision="fp32", sequence_length=16)))
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("step-1", "step-2.partial"):
        (saved / name).write_text("in the way")
    common = [str(tmp_path / "plan.json"), "-o", str(tmp_path / "run.json"), "--checkpoint-every", "1", "--checkpoint-folder", str(saved), "--steps"]
    done = launch(2, [*common, "3"])
    warnings = [line for line in done.stderr.splitlines() if not re.match(r"step \d/3", line)]
    assert (done.returncode, len(warnings)) == (0, 2), done.stderr
    for line, step, reason in zip(warnings, (1, 2), ("Not a directory", "File exists"), strict=True):
        assert line == f"warning: checkpoint: step {step} could not be saved in {saved} ({reason}); there is no whole one there"
    assert [step for step, _ in steps_in(saved)] == [3] and (saved / "step-1").read_text() == "in the way"
    (saved / "step-4").write_text("in the way")
    done = launch(2, [*common, "1", "--resume", str(saved)])
    last = f"step 4 could not be saved in {saved} (Not a directory); the last whole one is {saved / 'step-3'}"
    assert done.returncode == 1 and f"error: all steps are done, but the last checkpoint is missing: {last}\n" in done.stderr
    assert len(load_run(tmp_path / "run.json").steps) == 1
    assert sorted(path.name for path in saved.iterdir()) == ["run.json", "step-1", "step-2.partial", "step-3", "step-4"]


def test_only_the_runs_own_checkpoints_make_room_for_newer_ones(tmp_path: Path) -> None:
    plan = make_plan("tiny-gpt", "cpu:1", m=2, precision="fp32", sequence_length=16)
    saved = tmp_path / "saved"
    every = ["--checkpoint-every", "1", "--checkpoint-folder", str(saved), "--steps"]
    losses(plan, tmp_path, "earlier", *every, "6")
    for step in (1, 2, 3, 4):
        shutil.rmtree(saved / f"step-{step}")
    losses(plan, tmp_path, "later", *every, "4", "--keep-checkpoints", "2")
    assert sorted(step for step, _ in steps_in(saved)) == [3, 4, 5, 6]


@pytest.mark.parametrize("step", [-4, 2**62])
def test_a_checkpoint_of_no_possible_step_is_refused(tmp_path: Path, step: int) -> None:
    state = {"schema": SCHEMA, "step": step, "seed": 0, "plan_hash": ""}
    (tmp_path / "training.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=rf"training\.json: step: {step} is not valid"):
        load_state(tmp_path, "--resume")


def test_a_model_is_told_by_what_it_computes() -> None:
    spec = load_model("tiny-llama")
    _check_model(spec, replace(spec, name="other", source="elsewhere", rotary_dim=spec.head_dim), "saved")
    with pytest.raises(InputError, match=rf"rope_theta of the checkpoint's is {spec.rope_theta}, of the plan's 5.0"):
        _check_model(spec, replace(spec, rope_theta=5.0), "saved")
    traced = module_plan("tests.modules:plain").inputs.model
    _check_model(traced, module_plan("tests.modules:plain", precision="mixed-bf16").inputs.model, "saved")
    for other, said in (("residual", "num_layers of the checkpoint's is 2, of the plan's 6"), ("wide", "layer 1 of the checkpoint's is 20, of")):
        with pytest.raises(InputError, match=said):
            _check_model(traced, module_plan(f"tests.modules:{other}").inputs.model, "saved")
    with pytest.raises(InputError, match=r"a checkpoint of tiny-llama is expected, not of tests\.modules:plain"):
        _check_model(traced, spec, "saved")


def test_a_checkpoint_is_exported_and_refused_for_another_model_or_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan("tiny-gpt", "cpu:1", m=2, precision="fp32", sequence_length=16)
    saved = str(tmp_path / "saved")
    losses(plan, tmp_path, "one", "--steps", "1", "--checkpoint-every", "1", "--checkpoint-folder", saved)
    assert export(["export", saved, str(tmp_path / "exported")]) == 0
    weights = load_file(tmp_path / "exported" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == plan.inputs.model.num_parameters
    (tmp_path / "taken" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    for place in ("/proc", str(tmp_path / "taken"), str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        assert export(["export", saved, place]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: FOLDER: '{place}") and line.count("\n") == 1
    traced = TrainingState(step=1, seed=0, plan_hash="", traced=module_plan("tests.modules:plain").inputs.model)
    write_text(tmp_path / "training.json", dumps(traced))
    assert export(["export", str(tmp_path), str(tmp_path / "exported")]) == 2
    assert f"CHECKPOINT: '{tmp_path}' is not valid; a checkpoint of a transformer is expected" in capsys.readouterr().err
    (tmp_path / "training.json").unlink()
    other = make_plan("tiny-llama", "cpu:1", m=2, precision="fp32", sequence_length=16)
    write_text(tmp_path / "other.json", dumps(other))
    for arguments, expected in (
        ([str(tmp_path / "other.json"), "--resume", saved], "ffn_hidden_size of the checkpoint's is 256, of the plan's 192"),
        ([str(tmp_path / "one.json"), "--resume", saved, "--seed", "3"], "--seed"),
        ([str(tmp_path / "one.json"), "--resume", str(tmp_path)], "--resume"),
    ):
        done = launch(1, arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert expected in done.stderr
