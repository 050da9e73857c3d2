import pytest

from planner.cluster import load_cluster
from planner.defaults import Fixed, complete, repairs, shortage
from planner.errors import InputError
from planner.estimate import capacity_bytes, fits, memory_wall, offload_rows, predict
from planner.memory import in_flight, layer_needs, predict_memory
from planner.model import load_model, presets
from planner.plan import Decisions, Inputs, Training, even_stages, replace, stage_blocks
from planner.states import local_parameters, state_bytes
from planner.tables.plans import memory_line
from planner.tables.text import size

GB = 1e9
GIB = 2**30


def asked(model: str, cluster: str, **fixed: object):
    spec = load_model(model)
    training = Training(global_batch_size=1, sequence_length=min(spec.max_sequence_length, 4096))
    return complete(spec, load_cluster(cluster), training, Fixed(**fixed), batch_given=False)


def test_gpt3_against_the_memory_wall() -> None:
    model = load_model("gpt3")
    wall = memory_wall(model, load_cluster("a100-80gb"), Training(global_batch_size=1, sequence_length=2048), 300e9)
    assert wall.memory.weights_bytes == pytest.approx(350 * GB, rel=0.01)
    assert wall.memory.gradients_bytes == pytest.approx(350 * GB, rel=0.01)
    assert wall.memory.optimizer_bytes == pytest.approx(2100 * GB, rel=0.01)
    assert wall.memory.total_bytes == pytest.approx(2800 * GB, rel=0.01)
    assert wall.wall is not None and wall.wall.num_gpus_for_states == 33
    assert wall.wall.training_flops == pytest.approx(3.14e23, rel=0.002)
    assert wall.wall.v100_years == pytest.approx(355, rel=0.003)


def test_a_7b_fine_tune_needs_over_100_gb() -> None:
    model = load_model("llama-2-7b")
    wall = memory_wall(model, load_cluster("a100-80gb"), Training(global_batch_size=1, sequence_length=4096), None)
    assert 100 * GB < wall.memory.total_bytes < 110 * GB


@pytest.mark.parametrize(
    ("precision", "optimizer", "expected"),
    [
        ("mixed-bf16", "adam", (2, 2, 12)),
        ("fp32", "adam", (4, 4, 8)),
        ("bf16", "adam", (2, 2, 4)),
        ("mixed-bf16", "sgd", (2, 2, 4)),
        ("fp32", "sgd", (4, 4, 0)),
    ],
)
def test_bytes_per_parameter(precision: str, optimizer: str, expected: tuple[int, ...]) -> None:
    assert tuple(state_bytes(precision, optimizer)) == expected


def test_bloom_fits_where_it_ran() -> None:
    completed = asked("bloom-176b", "a100-80gb:384", tensor_parallel=4, pipeline_parallel=12, data_parallel=8)
    predictions = predict(completed.inputs, completed.decisions)
    assert fits(predictions)
    assert predictions.time.bubble_fraction is not None and 0.05 < predictions.time.bubble_fraction < 0.2


def test_gpt3_on_one_gpu_does_not_fit_and_the_repair_does() -> None:
    completed = asked("gpt3", "a100-80gb:1")
    assert not fits(predict(completed.inputs, completed.decisions))
    assert "does not fit" in shortage(completed.inputs, completed.decisions)
    (repair,) = repairs(completed.inputs, completed.decisions)
    words = repair.split()
    number = int(words[0])
    degrees = {words[i]: int(words[i + 1]) for i in range(len(words) - 1) if words[i] in ("--tp", "--pp", "--dp", "--zero-stage")}
    assert degrees["--tp"] * degrees["--pp"] * degrees["--dp"] == number < 100
    again = asked(
        "gpt3", f"a100-80gb:{number}", tensor_parallel=degrees["--tp"], pipeline_parallel=degrees["--pp"],
        zero_stage=degrees.get("--zero-stage", 0), sequence_parallel="--sequence-parallel" in words, recompute="full", micro_batch_size=1,
    )  # fmt: skip
    assert fits(predict(again.inputs, again.decisions))


def test_world_size_that_is_no_product_is_refused() -> None:
    with pytest.raises(InputError, match=r"--pipeline-parallel: 8 .* must divide the 100 GPUs"):
        asked("gpt3", "a100-80gb:100", tensor_parallel=8, pipeline_parallel=8)


@pytest.mark.parametrize(("dp", "stage", "expected"), [(4, 1, 52.5), (4, 2, 41.25), (4, 3, 30), (64, 1, 31.4), (64, 2, 16.6), (64, 3, 1.88)])
def test_zero_divides_what_its_table_says(dp: int, stage: int, expected: float) -> None:
    """Rajbhandari et al. 2020, Table 1: 7.5B parameters, GB of model states."""
    model = load_model("gpt2")
    inputs = Inputs(model=model, cluster=load_cluster(f"a100-80gb:{dp}"), training=Training(global_batch_size=dp, sequence_length=64))
    decisions = Decisions(
        data_parallel=dp, tensor_parallel=1, pipeline_parallel=1, zero_stage=stage, micro_batch_size=1, num_microbatches=1,
        stages=even_stages(model, "1F1B", 1, 1, "none"),
    )  # fmt: skip
    need = predict_memory(inputs, decisions)[0]
    states = need.weights_bytes + need.gradients_bytes + need.optimizer_bytes
    assert states / model.num_parameters * 7.5 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("model", "printed"),
    [
        (
            "llama-2-7b",
            {
                ("cpu", "cpu", True): (0.49, 169.44),
                ("none", "cpu", True): (3.63, 150.62),
                ("none", "none", True): (28.73, 2.93),
                ("none", "none", False): (28.73, 150.62),
            },
        ),
        ("llama-2-13b", {("cpu", "cpu", True): (0.61, 327.29), ("none", "cpu", True): (6.67, 290.93), ("none", "none", True): (55.16, 3.66)}),
    ],
)
def test_deepspeeds_rows(model: str, printed: dict[tuple[str, str, bool], tuple[float, float]]) -> None:
    """Its estimator's printed GiB for 4 GPUs on one node (gpu, host), by offload of parameters and optimizer and zero.Init."""
    completed = asked(model, "a100-80gb:4", zero_stage=3)
    rows = {(row.offload_param, row.offload_optimizer, row.zero_init): row for row in offload_rows(completed.inputs, completed.decisions)}
    assert len(rows) == 6
    for key, (gpu, host) in printed.items():
        assert rows[key].gpu_bytes / GIB == pytest.approx(gpu, rel=0.01)
        assert rows[key].cpu_bytes / GIB == pytest.approx(host, rel=0.01)
    for param, optimizer, init in rows:  # where parameters lie on the GPU says all of its figure
        assert rows[param, optimizer, init].gpu_bytes == rows[param, optimizer, True].gpu_bytes
    host = {key: row.cpu_bytes for key, row in rows.items()}
    assert host["cpu", "cpu", False] == host["cpu", "cpu", True] and host["none", "cpu", False] == host["none", "cpu", True]


@pytest.mark.parametrize("profile", ["meshwright", "megatron"])
def test_gpt3_keeps_6_2_gb_of_checkpointed_activations_on_its_first_rank(profile: str) -> None:
    """TP 8, PP 8 in 3 stages a rank of 4 blocks each, full recomputation: 31 stages' inputs of 2·s·b·h bytes a block in flight on rank 0
    (Narayanan et al. 2021, section 2.2), and an eighth of it under sequence parallelism (Korthikanti et al. 2022, section 5)."""
    held = {}
    for sequence_parallel in (False, True):
        training = Training(global_batch_size=64, sequence_length=2048, profile=profile)  # type: ignore[arg-type]
        fixed = Fixed(
            tensor_parallel=8, pipeline_parallel=8, recompute="full", micro_batch_size=1, schedule="Interleaved1F1B", num_virtual_stages=3,
            sequence_parallel=sequence_parallel,
        )  # fmt: skip
        completed = complete(load_model("gpt3"), load_cluster("a100-80gb:64"), training, fixed, batch_given=True)
        kept = layer_needs(completed.inputs, completed.decisions, "block", "full").kept
        counts = in_flight(completed.decisions)
        blocks = [len(stage_blocks(stage, completed.inputs.model)) for stage in completed.decisions.stages]
        held[sequence_parallel] = sum(kept * counts[stage] * blocks[stage] for stage in (0, 8, 16))
    assert held[False] == pytest.approx(6.2 * GB, rel=0.01)
    assert held[True] == pytest.approx(held[False] / 8)


def megatron(model: str, level: str, tp: int, sequence_parallel: bool) -> tuple[float, Inputs]:
    spec = load_model(model)
    inputs = Inputs(
        model=spec, cluster=load_cluster(f"a100-80gb:{tp}"), training=Training(global_batch_size=1, sequence_length=2048, profile="megatron")
    )
    decisions = Decisions(
        data_parallel=1, tensor_parallel=tp, pipeline_parallel=1, micro_batch_size=1, num_microbatches=1, sequence_parallel=sequence_parallel,
        stages=(),
    )  # fmt: skip
    return layer_needs(inputs, decisions, "block", level).kept, inputs  # type: ignore[arg-type]


@pytest.mark.parametrize("tp", [1, 8])
def test_the_megatron_profile_is_korthikantis_equations(tp: int) -> None:
    spec = load_model("megatron-175b")
    s, h, a = 2048, spec.hidden_size, spec.num_attention_heads
    sbh = s * h
    assert megatron("megatron-175b", "none", tp, False)[0] == pytest.approx(sbh * (10 + 24 / tp + 5 * a * s / h / tp))
    assert megatron("megatron-175b", "selective", tp, False)[0] == pytest.approx(sbh * (10 + 24 / tp))
    assert megatron("megatron-175b", "full", tp, False)[0] == pytest.approx(sbh * 2)
    if tp > 1:
        assert megatron("megatron-175b", "none", tp, True)[0] == pytest.approx(sbh / tp * (34 + 5 * a * s / h))
        assert megatron("megatron-175b", "selective", tp, True)[0] == pytest.approx(sbh / tp * 34)
        assert megatron("megatron-175b", "full", tp, True)[0] == pytest.approx(sbh / tp * 2)


def test_tensor_parallel_ranks_hold_all_parameters_together() -> None:
    for name in ("gpt3-175b", "llama-3-8b", "bloom-7b1", "qwen2-7b"):
        model = presets()[name]
        assert local_parameters(model, "block", 1) == model.block_parameters
        assert local_parameters(model, "embedding", 1) == model.embedding_parameters
        assert local_parameters(model, "head", 1) == model.head_parameters
        for tp in (2, 4):
            if model.num_attention_heads % tp == 0:
                assert local_parameters(model, "block", tp) * tp >= model.block_parameters


def test_the_figures_of_the_memory_line_add_up() -> None:
    done = asked("llama-7b", "a100-80gb:8", tensor_parallel=8)
    for fraction, reserved, less in ((1.0, 2**30, " less 1.00 GiB reserved"), (0.5, 2**30, "reserved and 39.60 GiB kept free"), (1.0, 0, "")):
        gpu = replace(done.inputs.cluster.gpu, reserved_bytes=reserved)
        inputs = replace(done.inputs, training=replace(done.inputs.training, memory_fraction=fraction), cluster=replace(done.inputs.cluster, gpu=gpu))
        predictions = predict(inputs, done.decisions)
        line, need = memory_line(inputs, predictions.memory, predictions.pipeline_ranks), predictions.memory.total_bytes
        usable = 85040352460 * fraction - reserved
        assert f"{size(need)} at its peak on every GPU, of {size(usable)} that can be used" in line and capacity_bytes(inputs) == usable
        assert line.endswith(f": {size(usable - need)} to spare") and less in line and ("less" in line) == bool(less)


@pytest.mark.parametrize(
    ("fixed", "named"),
    [
        ({"schedule": "Interleaved1F1B", "num_virtual_stages": 1, "pipeline_parallel": 2}, "--num-virtual-stages: 1"),
        ({"schedule": "Interleaved1F1B"}, "--schedule: 'Interleaved1F1B'"),
        ({"tensor_parallel": 1, "pipeline_parallel": 2, "sequence_parallel": True}, "--sequence-parallel: True"),
    ],
)
def test_decisions_that_can_not_be_are_named_by_their_option(fixed: dict[str, object], named: str) -> None:
    with pytest.raises(InputError) as caught:
        asked("gpt2", "a100-80gb:2", **fixed)
    assert str(caught.value).startswith(named)


def test_what_would_fit_keeps_the_given_batch_and_takes_any_number_of_gpus() -> None:
    model = load_model("llama-3-70b")
    training = Training(global_batch_size=8, sequence_length=1024)
    fixed = Fixed(data_parallel=8)
    completed = complete(model, load_cluster("a100-40gb:8"), training, fixed, batch_given=True)
    words = repairs(completed.inputs, completed.decisions, batch_given=True)[0].split()
    given = {word: int(words[i + 1]) for i, word in enumerate(words) if word in ("--tp", "--pp", "--dp", "--zero-stage")}
    again = Fixed(
        tensor_parallel=given["--tp"], pipeline_parallel=given["--pp"], data_parallel=given["--dp"], zero_stage=given.get("--zero-stage", 0),
        sequence_parallel="--sequence-parallel" in words, recompute="full", micro_batch_size=1,
    )  # fmt: skip
    found = complete(model, load_cluster(f"a100-40gb:{words[0]}"), training, again, batch_given=True)
    assert fits(predict(found.inputs, found.decisions))


def test_the_fewest_gpus_are_found_between_the_powers() -> None:
    model = load_model("llama-2-7b")
    completed = complete(model, load_cluster("l4-24gb:1"), Training(global_batch_size=1, sequence_length=1024), Fixed(), batch_given=False)
    assert repairs(completed.inputs, completed.decisions)[0].startswith("5 GPUs: ")


def test_where_nothing_would_fit_no_change_is_found() -> None:
    model = replace(load_model("llama-3-70b"), max_sequence_length=2_000_000)
    training = Training(global_batch_size=1, sequence_length=1_024_001)
    completed = complete(model, load_cluster("h100-80gb:8"), training, Fixed(tensor_parallel=8), batch_given=False)
    assert repairs(completed.inputs, completed.decisions) == ()
