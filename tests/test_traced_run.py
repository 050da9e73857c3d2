"""Plans of modules, run on real process groups: losses against one process with the plain module, memory against the prediction, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the executor needs torch")

from executor.checkpoint import read_whole
from executor.processes import run_ranks
from executor.start import main as start
from planner.documents import dumps, write_text
from planner.errors import InputError
from planner.plan import replace
from planner.run import load_run
from tests import module_ranks
from tests.modules import module_plan

ROOT = Path(__file__).parent.parent
RESIDUAL, AWKWARD, SEVERAL, FROZEN = (f"tests.modules:{name}" for name in ("residual", "Awkward", "Several", "frozen_norms"))
REMEMBERING, COUNTING = "tests.modules:remembering", "tests.modules:counting"
MULTIMODAL, ALTERNATING = "examples.multimodal:small", "examples.alternating:small"
ON_TWO = [
    dict(reference=RESIDUAL, pp=2, micro=4, m=3, cuts=(2,), again=(1, 3, 4)),
    dict(reference=RESIDUAL, pp=2, micro=4, schedule="GPipe", cuts=(4,)),
    dict(reference=RESIDUAL, dp=2, micro=4, m=1, zero=1, again=(0, 1, 2, 3, 4, 5)),
    dict(reference=MULTIMODAL, pp=2, m=3, cuts=(5,), again=(5, 6)),
    dict(reference=MULTIMODAL, dp=2, m=2),
    dict(reference=AWKWARD, pp=2, schedule="GPipe", again=(1, 2, 5)),
    dict(reference=AWKWARD, dp=2, zero=1, again=(3,)),
    dict(reference=ALTERNATING, pp=2, length=16, micro=1, m=4, schedule="Naive"),
    dict(reference=SEVERAL, pp=2, cuts=(1,)),
    dict(reference=FROZEN, pp=2, again=(1,)),
    dict(reference=COUNTING, pp=2, m=3, cuts=(1,)),
    dict(reference=REMEMBERING, pp=2, m=3, cuts=(3,)),
    dict(reference=REMEMBERING, pp=2, m=3, cuts=(2,), again=(0, 1, 2, 3)),
]
ON_FOUR = [
    dict(reference=RESIDUAL, dp=2, pp=2, micro=4, zero=1, order=("tp", "pp", "dp")),
    dict(reference=MULTIMODAL, dp=2, pp=2, cuts=(9,), again=(2, 3)),
    dict(reference=ALTERNATING, pp=4, length=16, micro=1, m=4, cuts=(1, 6, 7), again=(3, 8)),
    dict(reference=AWKWARD, dp=2, pp=2, zero=1, m=3),
    dict(reference=AWKWARD, pp=4, m=4),
]


def trained(cases, num_ranks, clip, folder):
    """Each case's plan with what its ranks found."""
    plans, paths = [module_plan(**case) for case in cases], []
    for index, plan in enumerate(plans):
        paths.append(str(folder / f"{num_ranks}-{index}.json"))
        write_text(paths[-1], dumps(plan))
    output = folder / f"{num_ranks}.json"
    run_ranks(num_ranks, module_ranks.work, (paths, clip, str(output)))
    return list(zip(plans, json.loads(output.read_text()), strict=True))


@pytest.mark.parametrize(("cases", "num_ranks", "clip"), [(ON_TWO, 2, 0.0), (ON_FOUR, 4, 0.5)], ids=["two ranks", "four ranks"])
def test_losses_are_those_of_the_plain_module_and_memory_is_as_predicted(cases, num_ranks, clip, tmp_path):
    for plan, found in trained(cases, num_ranks, clip, tmp_path):
        name = f"{plan.inputs.model.name} {plan.decisions}"
        losses, norms, module = module_ranks.plain(plan, clip)
        assert found["losses"] == pytest.approx(losses, abs=1e-5), name
        assert found["norms"] == pytest.approx(norms, rel=1e-4), name
        assert len(set(losses)) == len(losses)
        if plan.decisions.data_parallel == 1:  # a batch norm's statistics are of its rank's micro-batches
            sums = {name: value.double().sum().item() for name, value in module.named_buffers()}
            assert plan.inputs.model.name != REMEMBERING or sums.keys() == {name for rank in found["ranks"] for name in rank["fixed"]}
            for rank in found["ranks"]:
                shared = sums.keys() & rank["fixed"].keys()
                assert {key: rank["fixed"][key] for key in shared} == pytest.approx({key: sums[key] for key in shared}, rel=1e-4), name
        if plan.inputs.model.name not in (AWKWARD, SEVERAL, FROZEN, REMEMBERING, COUNTING):
            for rank in found["ranks"]:
                predicted = plan.predictions.pipeline_ranks[rank["place"]["pp"]].memory
                assert predicted.weights_bytes >= rank["memory"]["weights_bytes"] >= 0.9 * predicted.weights_bytes
                # the largest gradient counts beside everything saved: too much for a large table's, made when nothing is saved any more
                above = 1.5 if plan.inputs.model.name == ALTERNATING else 1.05
                assert 0.95 < predicted.total_bytes / rank["memory"]["total_bytes"] < above, name


def test_16_bit_training_keeps_16_bytes_a_parameter(tmp_path):
    cases = [dict(reference=MULTIMODAL, pp=2, precision=precision) for precision in ("mixed-bf16", "fp32")]
    (plan, found), (exact, _) = trained(cases, 2, 0.0, tmp_path)
    losses, _, _ = module_ranks.plain(exact)
    assert found["losses"] == pytest.approx(losses, abs=0.05)
    for rank in found["ranks"]:
        memory = rank["memory"]
        assert memory["gradients_bytes"] == memory["weights_bytes"]
        assert memory["optimizer_bytes"] == pytest.approx(6 * memory["weights_bytes"], rel=1e-3)
    assert plan.inputs.model.precision == "mixed-bf16"


def test_a_checkpoint_goes_on_under_another_plan(tmp_path):
    """Three steps of dp 2 with ZeRO-1 and then two of pp 2 are five steps of either; batch norms' statistics are carried over."""
    first, second = module_plan(RESIDUAL, dp=2, micro=4, m=1, zero=1), module_plan(RESIDUAL, pp=2, micro=4, m=2, again=(4,))
    for name, plan in (("first", first), ("second", second)):
        write_text(tmp_path / f"{name}.json", dumps(plan))
    found = []
    saved = str(tmp_path / "checkpoints")
    save = ["--checkpoint-folder", saved, "--checkpoint-every"]
    for name, steps, more in (("second", 5, []), ("first", 3, [*save, "3"]), ("second", 2, ["--resume", saved, *save, "5"])):
        run = tmp_path / "run.json"
        done = command("run", str(tmp_path / f"{name}.json"), "--model", RESIDUAL, "--steps", str(steps), "-o", str(run), *more)
        assert done.returncode == 0, done.stderr
        found.append([step.loss for step in load_run(str(run)).steps])
    whole, *parts = found
    assert parts[0] + parts[1] == pytest.approx(whole, abs=1e-5)
    sizes = {"buffer.1.num_batches_tracked": (1,)}
    tracked = read_whole(tmp_path / "checkpoints" / "step-5", sizes, "CHECKPOINT")
    assert tracked["buffer.1.num_batches_tracked"].tolist() == [3 + 2 * 2]  # of one data-parallel rank's micro-batches
    write_text(tmp_path / "second.json", dumps(module_plan(RESIDUAL, pp=2, micro=4, m=2, precision="mixed-bf16")))
    again = command("run", str(tmp_path / "second.json"), "--model", RESIDUAL, "--steps", "1", "--resume", f"{saved}/step-3", "-o", str(run))
    assert again.returncode == 0, again.stderr
    assert [step.loss for step in load_run(str(run)).steps] == pytest.approx(whole[3:4], abs=0.05)
    wrong = command("run", str(tmp_path / "second.json"), "--model", RESIDUAL, "--resume", str(tmp_path / "nowhere"))
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1


def command(*arguments):
    entry = [sys.executable, "-W", "ignore", "-c", "from planner.cli import entry; entry()", *arguments]
    return subprocess.run(entry, capture_output=True, text=True, cwd=ROOT)


def test_solve_run_compare_and_report_through_the_command(tmp_path):
    plan, run, page = str(tmp_path / "plan.json"), str(tmp_path / "run.json"), tmp_path / "report.html"
    solved = command(
        "solve", "--model", RESIDUAL, "--cluster", "cpu:2", "--global-batch-size", "8", "--pp", "2", "--micro-batch-size", "2",
        "--precision", "fp32", "-o", plan,
    )  # fmt: skip
    assert solved.returncode == 0, solved.stderr
    ran = command("run", plan, "--model", RESIDUAL, "--steps", "2", "-o", run)
    assert ran.returncode == 0, ran.stderr
    assert "step 2/2  loss" in ran.stderr and "samples/s" in ran.stderr
    document = load_run(run)
    assert len(document.steps) == 2 and len(document.ranks) == 2 and not document.rehearsed
    compared = command("compare", plan, run, "--json")
    assert compared.returncode == 0, compared.stderr
    rows = {(row["quantity"], row["rank"]): row for row in json.loads(compared.stdout)["rows"]}
    assert abs(rows["peak_bytes", None]["error_fraction"]) < 0.05
    assert rows["step_seconds", None]["measured"] > 0 and rows["step_seconds", None]["predicted"] > 0
    reported = command("report", plan, run, "-o", str(page))
    assert reported.returncode == 0, reported.stderr
    text = page.read_text()
    assert "measured, last step" in text and "Samples per second" in text and "0–" in text
    rehearsed = command("run", plan, "--rehearse", "--steps", "1", "-o", run)
    assert rehearsed.returncode == 0, rehearsed.stderr
    assert load_run(run).rehearsed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--model: '' is not valid; the plan is of a traced module"),
        (("--model", "tests/modules.py"), "package.module:callable is expected"),
        (("--model", "tests.modules:nothing"), "has no callable named nothing"),
        (("--model", "tests.modules:wider"), "the plan is of another module: its layer 0 is 0 with 216 parameters, this one's 0 with 324"),
        (("--model", "examples.multimodal:small"), "the plan is of another module: its chain has 6 layers, this one's 14"),
        (("--model", RESIDUAL, "--data", "tokens.bin"), "--data"),
        (("--model", RESIDUAL, "--load", "."), "--load"),
        (("--model", RESIDUAL, "--dropout", "0.1"), "--dropout"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = str(tmp_path / "plan.json")
    write_text(path, dumps(module_plan(RESIDUAL, pp=2)))
    assert start([path, *arguments]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_an_input_that_does_not_fit_is_one_line(tmp_path):
    path = str(tmp_path / "plan.json")
    write_text(path, dumps(module_plan("tests.modules:plain", pp=2, cuts=(1,))))
    for arguments in (("estimate",), ("run", path)):
        done = command(*arguments, "--model", "tests.modules:misfit")
        assert done.returncode == 2 and "same reduction dim" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_cut_that_sends_something_else_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, path = module_plan("tests.modules:small_image", pp=2), str(tmp_path / "plan.json")
    write_text(path, dumps(plan))
    assert start([path, "--model", "tests.modules:large_image"]) == 2
    assert "the plan is of another module: before layer 2 it sends 2,048 bytes, this one 8,192" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("planned", "run", "said"),
    [
        ("plain", "unexportable", "torch.export can't write its operations down"),
        ("Noisy", "Noisy", "is random and depends on no parameter"),
        ("Autocast", "Autocast", "under autocast or no_grad"),
        ("Attending", "Attending", "it can't be cut before layer 1"),
    ],
)
def test_what_can_not_be_cut_is_refused_by_name(planned, run, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = str(tmp_path / "plan.json")
    write_text(path, dumps(module_plan(f"tests.modules:{planned}", pp=2, cuts=(1,))))
    assert start([path, "--model", f"tests.modules:{run}"]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "said"), [("counting", "its buffer steps is updated by operations that no parameter"), ("adding", "by values of several segments")]
)
def test_a_buffer_that_segments_would_not_update_once_is_refused(name, said):
    from executor.traced_build import fake_cut

    reference = f"tests.modules:{name}"
    assert fake_cut(module_plan(reference), reference)
    with pytest.raises(InputError, match=said):
        fake_cut(module_plan(reference, again=(1,)), reference)


def test_layers_copied_by_torch_and_modules_of_transformers_can_be_cut_anywhere():
    from executor.traced_build import fake_cut

    for reference in ("tests.modules:copied", "tests.modules:gpt2"):
        layers = module_plan(reference).inputs.model.num_layers
        for cut in range(1, layers):
            plan = module_plan(reference, pp=2, cuts=(cut,), again=(cut,))
            found = fake_cut(plan, reference)
            assert [len(stage) for stage in found.stages] == [1, 1 if cut == layers - 1 else 2]
        assert layers >= 7 and found.highest


@pytest.mark.parametrize("name", ["doubled", "moved"])
def test_device_and_type_are_the_plans_whatever_the_callable_asks_for(name):
    import torch

    from executor.traced_build import fake_cut, prepare

    plan = module_plan(f"tests.modules:{name}", pp=2, cuts=(2,))
    assert plan.inputs.model.num_parameters == 12 * 8 + 2 * 8 * 4 * 8 + 2 * 4 * 8 + 2 * 48
    prepared, cut = prepare(plan, f"tests.modules:{name}", 0), fake_cut(plan, f"tests.modules:{name}")
    assert prepared.cut.layer_parameters == cut.layer_parameters and prepared.cut.layer_parameters[-1] == ("0.weight",)
    assert {value.dtype for value in prepared.state.trained.values()} == {torch.float32}


def test_too_few_processes(tmp_path):
    path = str(tmp_path / "plan.json")
    write_text(path, dumps(module_plan(RESIDUAL, pp=2)))
    done = subprocess.run(
        [sys.executable, "-m", "executor", path, "--model", RESIDUAL], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"WORLD_SIZE": "1"}
    )
    assert done.returncode == 2 and "the plan needs 2 processes" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_every_rank_needs_memory_for_the_whole_module():
    from executor.start import peaks

    plan = module_plan(RESIDUAL, pp=2)
    small = replace(plan.predictions.pipeline_ranks[0].memory, total_bytes=1)
    ranks = tuple(replace(rank, memory=small) for rank in plan.predictions.pipeline_ranks)
    assert peaks(replace(plan, predictions=replace(plan.predictions, pipeline_ranks=ranks))) == [4 * plan.inputs.model.num_parameters] * 2
