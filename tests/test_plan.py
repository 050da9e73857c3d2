import copy
import json
import math
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from plans import make_plan

from planner import documents
from planner.cli.planning import show, simulate
from planner.cluster import CollectiveCurve, compute_efficiency, load_cluster
from planner.cluster import presets as cluster_presets
from planner.errors import InputError
from planner.model import load_model, read_hf_config
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
from planner.run import load_run


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


def runner_up(**changes: object) -> dict:
    return {"decisions": documents.builtins(small()[1]) | changes, "step_seconds": 1.0, "peak_bytes": 1, "why_not": "slower"}


def pipeline_rank(rank: int = 0) -> dict:
    return {"pipeline_rank": rank, "stages": [rank], "num_in_flight": 1, "memory": documents.builtins(Memory.of(1, 2, 3)), "headroom_bytes": 4,
            "forward_seconds": 1.0, "backward_seconds": 2.0}  # fmt: skip


WRONG = [
    (lambda plan: plan.update(extra=1), "extra"),
    (lambda plan: plan.pop("decisions"), "decisions"),
    (lambda plan: plan.update(schema="meshwright.plan/2"), "schema"),
    (lambda plan: plan["decisions"].update(tensor_parallel="two"), "decisions.tensor_parallel"),
    (lambda plan: plan["decisions"].update(data_parallel=3), "decisions.data_parallel"),
    (lambda plan: plan["decisions"].update(schedule="2F2B"), "decisions.schedule: '2F2B' is not valid; one of 1F1B, GPipe,"),
    (lambda plan: plan["inputs"]["cluster"].update(device="tpu"), "one of cpu, cuda, other is expected"),
    (lambda plan: plan["decisions"].update(rank_order=["tp", "ep", "pp"]), "decisions.rank_order[1]: 'ep' is not valid; one of dp, pp, tp"),
    (lambda plan: plan["decisions"].update(zero_stage=4), "decisions.zero_stage"),
    (lambda plan: plan["decisions"].update(num_microbatches=5), "decisions.num_microbatches"),
    (lambda plan: plan["decisions"].update(rank_order=["tp", "tp", "pp"]), "decisions.rank_order"),
    (lambda plan: plan["decisions"]["stages"][1].update(first_layer=2), "stages[1].first_layer"),
    (lambda plan: plan["decisions"]["stages"][1].update(num_layers=2), "decisions.stages"),
    (lambda plan: plan["decisions"]["stages"][0].update(pipeline_rank=1), "stages[0].pipeline_rank"),
    (lambda plan: plan["decisions"]["stages"][0].update(recompute="some"), "one of full, none, selective is expected"),
    (lambda plan: plan["decisions"]["stages"][0].update(recompute={"full": 9}), "stages[0].recompute"),
    (lambda plan: plan["inputs"]["model"].update(num_layers=5), "decisions.stages"),
    (lambda plan: plan["inputs"]["training"].update(precision="fp8"), "inputs.training.precision"),
    (lambda plan: plan["inputs"]["cluster"]["gpu"].update(memory_bytes=1), "inputs_hash"),
    (lambda plan: plan["solver"].update(name="\ud800"), "solver.name"),
    (lambda plan: plan["solver"].update(runners_up=[runner_up(data_parallel_replicate=0)]), "data_parallel_replicate"),
    (lambda plan: plan["predictions"].update(pipeline_ranks=[pipeline_rank()]), "predictions.pipeline_ranks"),
    (lambda plan: plan["predictions"].update(pipeline_ranks=[pipeline_rank(), pipeline_rank(1) | {"stages": [2]}]), "pipeline_ranks[1].stages"),
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


def test_a_plan_without_predictions_by_rank_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(documents.dumps(whole(*small())))
    done = CliRunner().invoke(show, [str(path)])
    assert done.exception is None and "FITS" in done.output


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


def calibrated() -> dict:
    """A cluster document with every field that a calibration can write."""
    cluster = load_cluster("a100-80gb:4")
    gpu = replace(cluster.gpu, fp8_matmul_speedup=1.6)
    efficiency = replace(
        cluster.efficiency, layer_scale={"block.forward": 1.1, "head.backward": 0.9}, pipeline_scale=1.1, attention_block_seconds=1e-6,
        receive_seconds=1e-6, matmul_misaligned=1.3, fresh_bandwidth_bytes_per_second=1e9, wait_seconds=1e-4, step_seconds=1e-3,
    )  # fmt: skip
    efficiency = replace(efficiency, bf16=compute_efficiency(replace(cluster, efficiency=efficiency)))
    curve = CollectiveCurve(kind="all_reduce", num_ranks=2, num_nodes=1, latency_seconds=1e-4, bandwidth_bytes_per_second=1e9)
    link = replace(cluster.inter_node, alone_speedup=1.5)
    return documents.builtins(
        replace(cluster, gpu=gpu, efficiency=efficiency, inter_node=link, collectives=(curve,), cores_per_node=2, price_per_gpu_hour=2.0)
    )


def numbers(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all numbers in a JSON value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ():
        yield from numbers(item, (*path, key))


def changed(data: dict, path: tuple[str | int, ...], value: object) -> dict:
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


def refused(load, path: Path, data: object) -> str:
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -1e-9, 10**40])
def test_no_number_of_a_cluster_file_may_be_negative_or_endless(value: float, tmp_path: Path) -> None:
    data, file = calibrated(), tmp_path / "cluster.json"
    file.write_text(json.dumps(data))
    assert load_cluster(str(file)).efficiency.receive_seconds == 1e-6
    paths = list(numbers(data))
    assert len(paths) > 50
    for path in paths:
        assert str(path[-1]) in refused(load_cluster, file, changed(data, path, value)) or isinstance(path[-1], int)


@pytest.mark.parametrize("name", [
    "efficiency.attention_backward", "efficiency.bf16.attention_backward", "efficiency.time_scale", "efficiency.native_matmul",
    "efficiency.bf16.pipeline_scale", "efficiency.layer_scale", "collectives", "gpu.memory_bytes", "cores_per_node", "num_gpus",
])  # fmt: skip
def test_what_divides_may_not_be_0(name: str, tmp_path: Path) -> None:
    data = calibrated()
    where = {
        "efficiency.layer_scale": ("efficiency", "layer_scale", "block.forward"), "collectives": ("collectives", 0, "bandwidth_bytes_per_second"),
    }.get(name, tuple(name.split(".")))  # fmt: skip
    assert name in refused(load_cluster, tmp_path / "cluster.json", changed(data, where, 0))


def test_other_rules_of_a_cluster_file(tmp_path: Path) -> None:
    data, file = calibrated(), tmp_path / "cluster.json"
    assert "head.backward" in refused(load_cluster, file, changed(data, ("efficiency", "layer_scale", "blok.forward"), 1.0))
    assert "head.backward" in refused(load_cluster, file, changed(data, ("efficiency", "bf16", "layer_scale", "blok.forward"), 1.0))
    assert "reserved_bytes" in refused(load_cluster, file, changed(data, ("gpu", "reserved_bytes"), data["gpu"]["memory_bytes"]))
    assert "bf16" in refused(load_cluster, file, changed(data, ("efficiency", "bf16", "matmul"), 1.5))


def test_every_cluster_preset_keeps_the_rules() -> None:
    for name in cluster_presets():
        load_cluster(name)


@pytest.mark.parametrize(("field", "value"), [
    ("rope_theta", 0), ("rope_theta", -1), ("num_hidden_layers", 10**9), ("rms_norm_eps", -1.0), ("model_type", ["llama"]), ("hidden_act", ["silu"]),
    ("max_position_embeddings", "long"), ("_name_or_path", "\ud800"),
])  # fmt: skip
def test_impossible_values_of_a_config_are_refused(field: str, value: object, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100} | {field: value}
    assert field in refused(
        lambda path: read_hf_config(Path(path)), tmp_path / "config.json", config
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_predictions_and_measurements_are_finite_and_no_time_is_negative(value: float, tmp_path: Path) -> None:
    plan = whole(*small())
    solver = replace(plan.solver, objective_seconds=1.0, gap_fraction=0.1)
    time = Time(step_seconds=1.0, step_seconds_interval=(0.9, 1.1), training_days=3.0, breakdown_seconds={"compute": 1.0})
    data = json.loads(documents.dumps(replace(plan, solver=solver, predictions=replace(plan.predictions, time=time))))
    for part in ("predictions", "solver"):
        for path in numbers(data[part]):
            refused(load_plan, tmp_path / "plan.json", changed(data, (part, *path), value))
    memory = documents.builtins(Memory.of(1, 2, 3))
    place = {"pp": 0, "dp": 0, "tp": 0}
    rank = {"rank": 0, "coordinates": place, "memory": memory, "bubble_fraction": 0.1, "busy_seconds": 1.0, "actions_file": None}
    run = {
        "schema": "meshwright.run/1", "plan_hash": "", "rehearsed": False, "environment": {}, "steps": [], "ranks": [rank],
        "summary": {"step_seconds": 1.0, "bubble_fraction": 0.1, "peak_bytes": 6, "tokens_per_second": 1.0},
    }  # fmt: skip
    assert "ranks" in refused(load_run, tmp_path / "run.json", run | {"ranks": []})
    for path in numbers(run):
        if path[-1] != "bubble_fraction" or value != -1.0:
            refused(load_run, tmp_path / "run.json", changed(run, path, value))


def test_predictions_whose_memory_does_not_add_up_are_refused(tmp_path: Path) -> None:
    data, file = documents.builtins(make_plan("tiny-gpt", pp=2)), tmp_path / "plan.json"
    memory = data["predictions"]["memory"]
    assert "predictions.memory.total_bytes: 1 " in refused(load_plan, file, changed(data, ("predictions", "memory", "total_bytes"), 1))
    rank = ("predictions", "pipeline_ranks", 1, "memory", "total_bytes")
    assert "pipeline_ranks[1].memory.total_bytes: 1 " in refused(load_plan, file, changed(data, rank, 1))
    less = memory | {"weights_bytes": memory["weights_bytes"] - 8, "total_bytes": memory["total_bytes"] - 8}
    assert "heaviest pipeline rank" in refused(load_plan, file, changed(data, ("predictions", "memory"), less))


def test_a_plan_whose_predictions_are_not_of_its_decisions_is_shown_with_a_warning(tmp_path: Path) -> None:
    plan, file = make_plan("tiny-gpt", pp=2), tmp_path / "plan.json"
    for decisions, warned in ((plan.decisions, False), (replace(plan.decisions, schedule="GPipe"), True)):
        file.write_text(documents.dumps(replace(plan, decisions=decisions)))
        for command in (show, simulate):
            done = CliRunner().invoke(command, [str(file)])
            assert done.exit_code == 0 and ("was edited, or made by another version" in done.stderr) is warned
