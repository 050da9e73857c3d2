"""planner.timing and its parts: the short walk equals the full one, and times move the way physics says."""

from __future__ import annotations

import msgspec
import pytest
from plans import make_plan

from planner import cluster, economics, model
from planner.communication import communication_bytes
from planner.kernels import elementwise_seconds, matmul_seconds, slowest_node_factor
from planner.layer_time import final_sums_seconds, timed_layer
from planner.network import Group, all_gather_seconds, all_reduce_seconds, axis_group, reduce_scatter_seconds
from planner.plan import Decisions, Inputs, Training, check, even_stages, stage_ranks
from planner.software import load_software, presets
from planner.timeline import bubble_fraction
from planner.timing import layer_seconds, optimizer_seconds, predict_time, predict_timeline, reduce_seconds, transfer_seconds

SCHEDULES = [("GPipe", 1), ("1F1B", 1), ("Naive", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]


def case(name="gpt2", hardware="a100-80gb", tp=1, pp=1, dp=1, micro=1, m=8, schedule="1F1B", v=1, recompute="none", zero=0, **rest):
    spec = model.load_model(name)
    machine = cluster.load_cluster(f"{hardware}:{tp * pp * dp}") if isinstance(hardware, str) else hardware
    sequence = rest.pop("sequence_length", min(2048, spec.max_sequence_length))
    programs = {"profile": rest.pop("profile", "megatron"), "program": rest.pop("program", None)}
    training = Training(global_batch_size=dp * micro * m, sequence_length=sequence, **programs)
    inputs = Inputs(model=spec, cluster=machine, training=training)
    decisions = Decisions(
        data_parallel=dp, tensor_parallel=tp, pipeline_parallel=pp, zero_stage=zero, micro_batch_size=micro, num_microbatches=m,
        schedule=schedule, num_virtual_stages=v, stages=even_stages(spec, schedule, pp, v, recompute), **rest,
    )  # fmt: skip
    check(inputs, decisions)
    return inputs, decisions


def step(*args, **kwargs) -> float:
    inputs, decisions = case(*args, **kwargs)
    return predict_time(inputs, decisions).time.step_seconds


def changed(document, **changes):
    return msgspec.structs.replace(document, **changes)


# the walk


@pytest.mark.parametrize(("schedule", "v"), SCHEDULES)
@pytest.mark.parametrize("m", [4, 8, 20, 64, 200])
def test_a_step_is_the_walk_of_its_timeline(schedule, v, m):
    inputs, decisions = case("gpt3", tp=8, pp=4, m=m, schedule=schedule, v=v)
    assert predict_time(inputs, decisions).time.step_seconds == pytest.approx(predict_timeline(inputs, decisions).end, rel=1e-3)


@pytest.mark.parametrize(("schedule", "v"), SCHEDULES)
@pytest.mark.parametrize("m", [4, 8, 64])
def test_a_plans_bubble_is_that_of_its_timeline(schedule, v, m):
    inputs, decisions = case("gpt3", tp=8, pp=4, dp=4, m=m, schedule=schedule, v=v)
    assert predict_time(inputs, decisions).time.bubble_fraction == pytest.approx(bubble_fraction(predict_timeline(inputs, decisions)), rel=1e-3)


def test_a_step_with_blocking_sends_is_the_walk_of_its_timeline():
    inputs, decisions = case("gpt3", tp=8, pp=4, m=40, recompute="full")
    program = load_software("megatron-2021")
    expected = predict_timeline(inputs, decisions, program).end + program.step_seconds
    assert predict_time(inputs, decisions, program).time.step_seconds == pytest.approx(expected, rel=1e-6)


def test_a_slower_last_stage_governs():
    inputs, decisions = case("gpt3", tp=8, pp=4, m=64)
    sizes = [stage.num_layers for stage in decisions.stages]
    moved = [sizes[0] - 3, sizes[1], sizes[2], sizes[3] + 3]
    from planner.plan import make_stages

    uneven = changed(decisions, stages=make_stages(moved, ["none"] * 4, stage_ranks("1F1B", 4, 1)))
    block = layer_seconds(inputs, decisions, "block")
    slower = predict_time(inputs, uneven).time.step_seconds - predict_time(inputs, decisions).time.step_seconds
    assert slower == pytest.approx(63 * 3 * (block.forward + block.backward), rel=0.05)


def test_the_breakdown_adds_up_to_the_step():
    for kwargs in ({"tp": 8, "pp": 8, "dp": 2, "zero": 1, "recompute": "full", "m": 32}, {"tp": 8, "dp": 4, "zero": 3}, {"tp": 2, "pp": 4}):
        inputs, decisions = case("gpt3", **kwargs)
        found = predict_time(inputs, decisions)
        assert sum(found.breakdown.values()) == pytest.approx(found.time.step_seconds, rel=1e-6)
        assert all(seconds >= 0 for seconds in found.breakdown.values())


def test_a_stage_takes_the_sum_over_its_layers():
    inputs, decisions = case("gpt3", tp=8, pp=4, m=16, recompute="full")
    block, head, embedding = (layer_seconds(inputs, decisions, kind, "full") for kind in ("block", "head", "embedding"))
    found = predict_time(inputs, decisions)
    assert found.forward_seconds[0] == pytest.approx(embedding.forward + 24 * block.forward)
    assert found.backward_seconds[3] == pytest.approx(head.backward + 24 * block.backward)
    assert block.backward == pytest.approx(block.backward_input + block.backward_weight)


def test_70_and_78_layers_over_12_stages_are_evaluated():
    bloom = model.load_model("bloom")
    for layers in (70, 78):
        spec = changed(bloom, num_layers=layers)
        machine = cluster.load_cluster("a100-80gb:48")
        inputs = Inputs(model=spec, cluster=machine, training=Training(global_batch_size=64, sequence_length=2048, profile="megatron"))
        decisions = Decisions(
            data_parallel=1, tensor_parallel=4, pipeline_parallel=12, micro_batch_size=1, num_microbatches=64,
            stages=even_stages(spec, "1F1B", 12, 1, "full"),
        )  # fmt: skip
        check(inputs, decisions)
        assert predict_time(inputs, decisions).time.step_seconds > 0


# every preset


@pytest.mark.parametrize("hardware", sorted(cluster.presets()))
def test_every_model_on_every_cluster_has_a_time(hardware):
    machine = cluster.presets()[hardware]
    for name in model.presets():
        for profile in ("meshwright", "megatron"):
            inputs, decisions = case(name, machine, dp=machine.num_gpus, m=2, sequence_length=128, profile=profile)
            time = predict_time(inputs, decisions).time
            assert 0 < time.step_seconds < 1e7
            assert 0 < time.model_flops_utilization < 0.95
            assert time.step_seconds_interval[0] < time.step_seconds < time.step_seconds_interval[1]


# kernels


def test_a_large_product_reaches_the_efficiency_and_a_thin_one_the_bandwidth():
    machine = cluster.load_cluster("a100-80gb:8")
    large = 2 * 16384.0**3 / matmul_seconds(machine, "mixed-bf16", 16384, 16384, 16384) / 312e12
    assert large == pytest.approx(machine.efficiency.matmul, rel=0.03)
    thin = matmul_seconds(machine, "mixed-bf16", 65536, 8192, 1)
    assert thin > 0.5 * elementwise_seconds(machine, 2 * 65536 * 8192)
    narrow = matmul_seconds(machine, "mixed-bf16", 8, 16384, 16384)
    assert narrow == pytest.approx(elementwise_seconds(machine, 2 * (16384**2 + 2 * 8 * 16384)), rel=1e-6)


def test_products_with_sizes_off_the_grid_of_8_run_without_tensor_cores():
    """BigScience measured 25 to 30 % slower steps with a head size of 225 or 108 (chronicles-prequel.md, 2022)."""
    machine = cluster.load_cluster("a100-80gb:8")
    seconds = matmul_seconds(machine, "mixed-bf16", 2048, 2048, 225, 8)
    assert 2 * 8 * 2048**2 * 225 / seconds < 19.5e12
    assert seconds > 5 * matmul_seconds(machine, "mixed-bf16", 2048, 2048, 224, 8)
    measured = changed(machine, efficiency=changed(machine.efficiency, matmul_misaligned=2.0))
    assert matmul_seconds(measured, "mixed-bf16", 2048, 2048, 225, 8) < 0.5 * seconds


def test_each_tensor_parallel_sum_takes_the_program_s_own_time():
    """Six in a block with full recomputation: two forward, two again, two backward."""
    inputs, decisions = case("gpt3", tp=8, recompute="full")
    program = load_software("megatron-2021")
    slow = changed(program, collective_seconds=1e-3)
    plain, later = (layer_seconds(inputs, decisions, "block", "full", software) for software in (program, slow))
    assert later.forward + later.backward - plain.forward - plain.backward == pytest.approx(6e-3)
    inputs, decisions = case("gpt2", tp=1)
    plain, later = (layer_seconds(inputs, decisions, "block", "none", software) for software in (program, slow))
    assert plain == later


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("name", "changes"), [("gpt2", {}), ("pythia-1.4b", {}), ("pythia-1.4b", {"num_norms_per_layer": 1})])
def test_a_block_of_our_executor_communicates_for_as_long_as_the_bytes_that_it_sends(name, changes, together):
    inputs, decisions = case(name, tp=2, profile="meshwright", sequence_parallel=together)
    network = changed(inputs.cluster.intra_node, latency_seconds=0.0)
    inputs = changed(inputs, cluster=changed(inputs.cluster, intra_node=network), model=model.replace(inputs.model, **changes))
    program = load_software("meshwright")
    tokens = decisions.micro_batch_size * inputs.training.sequence_length
    half = all_gather_seconds(axis_group(inputs.cluster, decisions, "tp"), float(tokens * inputs.model.hidden_size * 2))
    fewer = changed(inputs, model=model.replace(inputs.model, num_layers=inputs.model.num_layers - 1))
    stages = even_stages(fewer.model, "1F1B", 1, 1, "none")
    sent = communication_bytes(inputs, decisions, 0)["tp"] - communication_bytes(fewer, changed(decisions, stages=stages), 0)["tp"]
    replicated = sent % (tokens * inputs.model.hidden_size)  # the gradients of norms and biases, once a step
    halves = (sent - replicated) / decisions.num_microbatches / (tokens * inputs.model.hidden_size)
    assert timed_layer(inputs, decisions, "block", "none", program)[1] == pytest.approx(halves * half, rel=1e-6)


def test_twice_the_rows_take_at_most_twice_the_time():
    machine = cluster.load_cluster("a100-80gb:8")
    for rows in (64, 100, 1000, 5000):
        one, two = (matmul_seconds(machine, "mixed-bf16", n, 4096, 4096) for n in (rows, 2 * rows))
        assert one <= two <= 2.001 * one


def test_more_nodes_wait_longer_for_the_slowest():
    factors = [slowest_node_factor(cluster.load_cluster(f"a100-80gb:{count}")) for count in (8, 16, 128, 1024)]
    assert factors[0] == 1.0
    assert factors == sorted(factors)
    assert factors[-1] < 1.05


# network


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    ranks = Group(8, 1, 200e9, 5e-6)
    assert all_reduce_seconds(ranks, 1e9) == pytest.approx(reduce_scatter_seconds(ranks, 1e9) + all_gather_seconds(ranks, 1e9))
    assert all_gather_seconds(ranks, 1e9) == pytest.approx(7 / 8 * 1e9 / 200e9 + 7 * 5e-6)
    assert all_gather_seconds(Group(1, 1, 1e9, 1.0), 1e9) == 0.0


def test_the_rank_order_decides_which_axis_crosses_nodes():
    inputs, inner = case("gpt3", tp=8, dp=16, m=1)
    outer = changed(inner, rank_order=("dp", "tp", "pp"))
    inside, across = (axis_group(inputs.cluster, decisions, "tp") for decisions in (inner, outer))
    assert (inside.nodes, across.nodes) == (1, 8)
    assert inside.bandwidth > 5 * across.bandwidth
    assert layer_seconds(inputs, inner, "block").forward < layer_seconds(inputs, outer, "block").forward


def test_a_group_with_several_ranks_on_a_node_shares_their_network_cards():
    inputs, decisions = case("gpt2", dp=64, m=1)
    alone = axis_group(inputs.cluster, *[case("gpt3", tp=8, dp=8, m=1)[1]], "dp")
    together = axis_group(inputs.cluster, decisions, "dp")
    assert together.bandwidth == pytest.approx(8 * alone.bandwidth)


def test_messages_inside_a_node_are_faster_and_shrink_with_sequence_parallelism():
    inputs, decisions = case("gpt3", tp=2, pp=8, m=16)
    inside, across = (transfer_seconds(inputs, decisions, rank) for rank in (0, 3))
    assert inside < across / 3
    scattered = changed(load_software("megatron"), scatter_transfers=False)
    cut = changed(decisions, sequence_parallel=True)
    assert transfer_seconds(inputs, cut, 3, scattered) < 0.6 * transfer_seconds(inputs, decisions, 3, scattered)


def test_a_stage_that_has_the_link_between_nodes_to_itself_sends_as_fast_as_a_pair_does():
    two_hosts = changed(cluster.load_cluster("cpu:8"), gpus_per_node=4, inter_node=cluster.Link(bandwidth_bytes_per_second=1e7, latency_seconds=1e-4))
    alone = changed(two_hosts, inter_node=changed(two_hosts.inter_node, alone_speedup=3.0))
    for stages, tp, border, faster in ((8, 1, 3, 3.0), (4, 2, 1, 2.0), (2, 4, 0, 1.0)):
        message, tied = [], []
        for hardware in (two_hosts, alone):
            inputs, decisions = case("gpt2", hardware, tp=tp, pp=stages, m=8, profile="meshwright")
            message.append(transfer_seconds(inputs, decisions, border) - 1e-4)
            tied.append(final_sums_seconds(inputs, decisions))
            assert transfer_seconds(inputs, decisions, border + 1) == transfer_seconds(changed(inputs, cluster=two_hosts), decisions, border + 1)
        assert message[0] / message[1] == pytest.approx(faster), "four ranks of a node share what one alone has three times as much of"
        assert tied[0] / tied[1] == pytest.approx(faster, rel=0.4 if faster > 1 else 1e-9)


# layers and data parallelism


def test_recomputation_costs_what_it_runs_again():
    inputs, decisions = case("gpt3", tp=8)
    none, selective, full = (layer_seconds(inputs, decisions, "block", level) for level in ("none", "selective", "full"))
    assert none.forward == selective.forward == full.forward
    assert full.backward == pytest.approx(none.backward + none.forward)
    assert none.backward < selective.backward < none.backward + 0.35 * none.forward


def test_sequence_parallelism_makes_the_forward_pass_faster():
    """Korthikanti et al. 2022, table 4: 7.7 to 7.2 ms."""
    inputs, decisions = case("gpt3", tp=8)
    assert layer_seconds(inputs, changed(decisions, sequence_parallel=True), "block").forward < layer_seconds(inputs, decisions, "block").forward


@pytest.mark.parametrize("profile", ["meshwright", "megatron"])
@pytest.mark.parametrize("hardware", ["a100-80gb", "h100-80gb", "v100-32gb"])
def test_zero_3_is_never_faster_than_zero_1(hardware, profile):
    for tp, pp, dp, micro, m in ((1, 1, 8, 1, 1), (1, 1, 8, 4, 2), (1, 1, 64, 1, 1), (8, 1, 16, 1, 4), (4, 4, 8, 1, 8), (1, 1, 512, 8, 1)):
        for replicas in (1, 2):
            degrees = {"tp": tp, "pp": pp, "dp": dp, "micro": micro, "m": m, "profile": profile, "data_parallel_replicate": replicas}
            times = [step("llama-2-7b", hardware, zero=zero, sequence_length=1024, **degrees) for zero in (1, 2, 3)]
            assert times[0] <= times[1] * (1 + 1e-9)
            assert times[0] <= times[2] * (1 + 1e-9)


def test_reduction_and_optimizer_follow_the_parameters_and_the_shards():
    inputs, decisions = case("gpt3", tp=8, dp=16, m=1, profile="meshwright")
    assert reduce_seconds(inputs, decisions, 2e9) == pytest.approx(2 * reduce_seconds(inputs, decisions, 1e9), rel=0.02)
    assert reduce_seconds(inputs, changed(decisions, data_parallel=1), 1e9) == 0.0
    program = load_software("megatron")
    whole, shard = (optimizer_seconds(inputs, changed(decisions, zero_stage=zero), 1e9, program) for zero in (0, 1))
    assert whole == pytest.approx(16 * shard, rel=0.02)


def test_overlapped_reductions_hide_behind_the_backward_pass():
    inputs, decisions = case("gpt3", tp=8, dp=16, m=1, micro=8)
    beside = changed(load_software("megatron"), overlap_reduction=True)
    after = changed(load_software("megatron"), overlap_reduction=False)
    assert reduce_seconds(inputs, decisions, 1e9, beside) < 0.5 * reduce_seconds(inputs, decisions, 1e9, after)


def test_every_program_of_the_data_file_has_a_source():
    assert all(program.source for program in presets().values())


# the whole


def test_more_gpus_in_data_parallel_make_the_same_batch_faster():
    times = [step("llama-2-7b", dp=dp, m=128 // dp, zero=1) for dp in (8, 16, 32, 64)]
    assert times == sorted(times, reverse=True)


def test_utilizations_by_their_conventions():
    inputs, decisions = case("gpt3", tp=8, pp=8, m=64, recompute="full")
    found = predict_time(inputs, decisions).time
    flops = 64 * 2048 * 96 * 12288**2 * 72 * (1 + 2048 / (6 * 12288) + 50257 / (12 * 96 * 12288))
    assert found.step_flops == pytest.approx(flops, rel=1e-3)  # three quarters of equation 3 of Narayanan et al. 2021, no recomputation
    assert found.model_flops_utilization == pytest.approx(found.step_flops / found.step_seconds / (64 * 312e12))
    assert found.hardware_flops_utilization / found.model_flops_utilization == pytest.approx(4 / 3, rel=0.01)


def test_a_run_costs_gpu_hours_money_and_energy():
    inputs, decisions = case("gpt3", tp=8, pp=8, m=64)
    inputs = changed(inputs, cluster=changed(inputs.cluster, price_per_gpu_hour=2.0))
    cost = economics.run_cost(inputs, decisions, 10.0, 100 * 64 * 2048)
    assert cost.num_steps == pytest.approx(100)
    assert cost.gpu_hours == pytest.approx(64 * 1000 / 3600)
    assert cost.cost == pytest.approx(2 * cost.gpu_hours)
    assert cost.energy_kilowatt_hours == pytest.approx(0.4 * cost.gpu_hours)
    assert predict_time(inputs, decisions, num_tokens=1e9).time.gpu_years > 0


@pytest.mark.parametrize(
    ("name", "hardware", "num_tokens", "published", "kwargs"),
    [
        # Llama 2 model card; a plan of that size, since the paper gives none.
        (
            "llama-2-70b", "a100-80gb", 2e12, 1_720_320,
            {"tp": 8, "pp": 4, "dp": 32, "m": 32, "zero": 1, "sequence_length": 4096, "recompute": "selective", "sequence_parallel": True},
        ),
        # Narayanan et al. 2021, section 5.1: 34 days on 1,024 A100.
        ("gpt3", "a100-80gb", 300e9, 34 * 24 * 1024, {"tp": 8, "pp": 16, "dp": 8, "micro": 1, "m": 192, "recompute": "full"}),
        # BLOOM's model card: 1,082,990 hours on 384 A100 for 366B tokens; its README's plan.
        ("bloom", "jean-zay-a100", 366e9, 1_082_990, {"tp": 4, "pp": 12, "dp": 8, "micro": 2, "m": 128, "zero": 1, "recompute": "full"}),
    ],
)  # fmt: skip
def test_published_runs_come_out_within_15_percent(name, hardware, num_tokens, published, kwargs):
    program = {"llama-2-70b": "megatron", "gpt3": "megatron-2021", "bloom": "megatron-deepspeed"}[name]
    inputs, decisions = case(name, hardware, program=program, **kwargs)
    seconds = predict_time(inputs, decisions).time.step_seconds
    assert seconds == predict_time(inputs, decisions, load_software(program)).time.step_seconds
    assert economics.run_cost(inputs, decisions, seconds, num_tokens).gpu_hours == pytest.approx(published, rel=0.15)


def test_no_bubble_is_negative() -> None:
    for number in (1, 3, 7, 13):
        plan = make_plan("gpt2", "a100-80gb:13", dp=13, m=number)
        assert plan.predictions.time.bubble_fraction is not None and 0 <= plan.predictions.time.bubble_fraction < 1e-9
        assert 0 <= bubble_fraction(predict_timeline(plan.inputs, plan.decisions)) < 1e-9
