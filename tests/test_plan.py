import json
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import documents
from planner.cluster import load_cluster
from planner.errors import InputError
from planner.model import load_model
from planner.plan import (
    Decisions,
    Inputs,
    Memory,
    Plan,
    Predictions,
    RecomputeCounts,
    SolverReport,
    Time,
    Training,
    block_levels,
    check,
    digest,
    even_stages,
    has_embedding,
    has_head,
    load_plan,
    plan_hash,
    replace,
    stage_blocks,
)


def small(pp: int = 2, tp: int = 1, dp: int = 1, **changes: object) -> tuple[Inputs, Decisions]:
    model = load_model("tiny-gpt")
    decisions = Decisions(
        data_parallel=dp, tensor_parallel=tp, pipeline_parallel=pp, micro_batch_size=1, num_microbatches=4,
        stages=even_stages(model, "1F1B", pp, 1, "none"),
    )  # fmt: skip
    training = Training(global_batch_size=4 * dp, sequence_length=64, precision="fp32")
    return Inputs(model=model, cluster=load_cluster(f"cpu:{pp * tp * dp}"), training=training), replace(decisions, **changes)


def whole(inputs: Inputs, decisions: Decisions) -> Plan:
    zero = Memory.of(0, 0, 0)
    solver = SolverReport(
        name="none", status="given", objective_seconds=None, bound_seconds=None, gap_fraction=None, num_candidates=1, num_pruned=0, wall_seconds=0.0
    )
    predictions = Predictions(memory=zero, pipeline_ranks=(), time=Time())
    return Plan(inputs=inputs, inputs_hash=digest(inputs), decisions=decisions, predictions=predictions, solver=solver)


def test_a_plan_survives_being_written_and_read(tmp_path: Path) -> None:
    plan = whole(*small())
    path = tmp_path / "plan.json"
    documents.write_text(path, documents.dumps(plan))
    assert load_plan(str(path)) == plan
    assert list(tmp_path.iterdir()) == [path]


WRONG = [
    (lambda plan: plan.update(extra=1), "extra"),
    (lambda plan: plan.pop("decisions"), "decisions"),
    (lambda plan: plan.update(schema="meshwright.plan/2"), "schema"),
    (lambda plan: plan["decisions"].update(tensor_parallel="two"), "decisions.tensor_parallel"),
    (lambda plan: plan["decisions"].update(data_parallel=3), "decisions.data_parallel"),
    (lambda plan: plan["decisions"].update(schedule="2F2B"), "decisions.schedule"),
    (lambda plan: plan["decisions"].update(zero_stage=4), "decisions.zero_stage"),
    (lambda plan: plan["decisions"].update(num_microbatches=5), "decisions.num_microbatches"),
    (lambda plan: plan["decisions"].update(rank_order=["tp", "tp", "pp"]), "decisions.rank_order"),
    (lambda plan: plan["decisions"]["stages"][1].update(first_layer=2), "stages[1].first_layer"),
    (lambda plan: plan["decisions"]["stages"][1].update(num_layers=2), "decisions.stages"),
    (lambda plan: plan["decisions"]["stages"][0].update(pipeline_rank=1), "stages[0].pipeline_rank"),
    (lambda plan: plan["decisions"]["stages"][0].update(recompute="some"), "stages[0].recompute"),
    (lambda plan: plan["decisions"]["stages"][0].update(recompute={"full": 9}), "stages[0].recompute"),
    (lambda plan: plan["inputs"]["model"].update(num_layers=5), "decisions.stages"),
    (lambda plan: plan["inputs"]["training"].update(precision="fp8"), "inputs.training.precision"),
    (lambda plan: plan["inputs"]["cluster"]["gpu"].update(memory_bytes=1), "inputs_hash"),
]


@pytest.mark.parametrize(("damage", "named"), WRONG, ids=[named for _, named in WRONG])
def test_a_damaged_plan_is_refused_by_the_name_of_its_field(damage, named: str, tmp_path: Path) -> None:
    data = documents.builtins(whole(*small()))
    damage(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        load_plan(str(path))
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"schema": 1}', "\x00", "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError):
        load_plan(str(path))


def test_thirty_layers_on_four_stages_are_thirty_layers() -> None:
    model = replace(load_model("tiny-gpt"), num_layers=30)
    stages = even_stages(model, "1F1B", 4, 1, "none")
    assert [block for stage in stages for block in stage_blocks(stage, model)] == list(range(30))
    assert [has_embedding(stage) for stage in stages] == [True, False, False, False]
    assert [has_head(stage, model) for stage in stages] == [False, False, False, True]


@given(layers=st.integers(1, 60), count=st.integers(1, 16))
def test_even_stages_hold_every_layer_once(layers: int, count: int) -> None:
    model = replace(load_model("tiny-gpt"), num_layers=layers)
    if layers + 2 < count:
        with pytest.raises(InputError):
            even_stages(model, "1F1B", count, 1, "none")
        return
    stages = even_stages(model, "1F1B", count, 1, "none")
    blocks = [len(stage_blocks(stage, model)) for stage in stages]
    assert sum(blocks) == layers and max(blocks) - min(blocks) <= 1
    assert [stage.first_layer for stage in stages] == [sum(s.num_layers for s in stages[:i]) for i in range(count)]


def test_bloom_gets_the_cuts_that_it_ran_with() -> None:
    stages = even_stages(load_model("bloom"), "1F1B", 12, 1, "full")
    assert [stage.num_layers for stage in stages] == [6] * 12


def test_recompute_levels_follow_the_counts() -> None:
    inputs, decisions = small()
    first = replace(decisions.stages[0], recompute=RecomputeCounts(none=1, full=1))
    assert block_levels(first, inputs.model) == ["full", "none"]
    check(inputs, replace(decisions, stages=(first, decisions.stages[1])))


def test_interleaving_without_several_stages_a_rank_is_refused_by_name() -> None:
    inputs, decisions = small(dp=2)
    changed = replace(decisions, schedule="ZBVZeroBubble", stages=even_stages(inputs.model, "ZBVZeroBubble", 2, 2, "none"))
    with pytest.raises(InputError, match="ZBVZeroBubble has exactly 2"):
        check(inputs, changed)
    check(inputs, replace(changed, num_virtual_stages=2, zero_stage=3))


def test_the_hash_speaks_of_what_the_plan_does() -> None:
    plan = whole(*small())
    other = replace(plan, predictions=replace(plan.predictions, time=Time(step_seconds=1.0)))
    assert plan_hash(plan) == plan_hash(other)
    assert plan_hash(plan) != plan_hash(replace(plan, decisions=replace(plan.decisions, micro_batch_size=2)))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        documents.write_text(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="writable"):
        documents.write_text(tmp_path / "none" / "plan.json", "text")


def test_what_is_no_file_is_written_to_and_links_and_permissions_stay(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "file.json"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    read: list[str] = []
    reader.start()
    documents.write_text(pipe, "through")
    reader.join(10)
    assert read == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)
    link.symlink_to(file)
    documents.write_text(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    file.chmod(0o600)
    documents.write_text(link, "newer")
    assert link.is_symlink() and file.read_text() == "newer" and stat.S_IMODE(file.stat().st_mode) == 0o600
    documents.write_text(f"/dev/fd/{os.open(file, os.O_WRONLY)}", "by number")
    assert file.read_text() == "by number" and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_plan_made_before_the_model_had_its_later_fields_loads() -> None:
    plan = load_plan(str(Path(__file__).parent / "data" / "older_plan.json"))
    assert plan.inputs.model == load_model("tiny-llama")
    assert "rotary_dim" not in documents.builtins(plan.inputs.model)
