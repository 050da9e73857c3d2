"""What a rank waits for beside its own work: late receives, collectives between pieces of compute, and slow links, which move a plan."""

import pytest

from planner.candidates import Constraints
from planner.cluster import load_cluster
from planner.defaults import Fixed
from planner.layer_time import layer_seconds, reduce_seconds
from planner.model import load_model
from planner.network import axis_group, message_seconds
from planner.plan import Decisions, Inputs, Training, even_stages, replace
from planner.search import search
from planner.timing import predict_time, predict_timeline

MODEL = load_model("tiny-gpt")


def with_constants(**constants):
    cluster = load_cluster("cpu:2")
    return replace(cluster, cores_per_node=None, efficiency=replace(cluster.efficiency, **constants))


def case(cluster, schedule="1F1B", virtual=1, **degrees):
    sizes = {"data_parallel": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "micro_batch_size": 2, "num_microbatches": 6, **degrees}
    model = replace(MODEL, num_layers=8)
    inputs = Inputs(
        model=model, cluster=cluster, training=Training(global_batch_size=12 * sizes["data_parallel"], sequence_length=64, precision="fp32")
    )
    stages = even_stages(model, schedule, sizes["pipeline_parallel"], virtual, "none")
    return inputs, Decisions(**sizes, schedule=schedule, num_virtual_stages=virtual, stages=stages)


SCHEDULES = [("Naive", 1), ("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_late_receives_lengthen_the_walk_and_the_timeline_alike(schedule, virtual):
    without, late = (with_constants(receive_seconds=seconds) for seconds in (0.0, 0.002))
    plain = predict_time(*case(without, schedule, virtual, pipeline_parallel=2)).time.step_seconds
    inputs, decisions = case(late, schedule, virtual, pipeline_parallel=2)
    slower = predict_time(inputs, decisions).time.step_seconds
    timeline = predict_timeline(inputs, decisions)
    assert slower == plain if schedule == "Naive" else slower > plain, "under Naive every receiver waits for its message"
    assert timeline.end == pytest.approx(slower, rel=1e-9)
    message = message_seconds(late, 2 * 64 * MODEL.hidden_size * 4, same_node=True)
    least = 0.002 + message
    received = [event.end - event.start for event in timeline.events if event.kind.startswith("RECV")]
    assert min(received) > least if schedule == "Naive" else min(received) == pytest.approx(least), "the message moves once it is asked for"


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_messages_that_wait_to_be_asked_for_take_their_time_in_the_receive(schedule, virtual):
    slow = with_constants(receive_seconds=1e-6)
    slow = replace(slow, intra_node=replace(slow.intra_node, latency_seconds=0.004))
    inputs, decisions = case(slow, schedule, virtual, pipeline_parallel=2)
    timeline = predict_timeline(inputs, decisions)
    assert timeline.end == pytest.approx(predict_time(inputs, decisions).time.step_seconds, rel=1e-9)
    assert min(event.end - event.start for event in timeline.events if event.kind.startswith("RECV")) >= 0.004 + 1e-6


def test_late_receives_count_where_ranks_share_cores():
    shared = replace(with_constants(receive_seconds=0.003), cores_per_node=1, gpus_per_node=2)
    timeline = predict_timeline(*case(shared, pipeline_parallel=2))
    assert min(event.end - event.start for event in timeline.events if event.kind.startswith("RECV")) >= 0.003 - 1e-12


def test_a_block_waits_twice_forward_and_twice_backward_and_the_loss_once():
    wait = 0.001
    plans = [case(with_constants(wait_seconds=seconds), tensor_parallel=2) for seconds in (0.0, wait)]
    for kind, forward, backward in (("embedding", 1, 0), ("block", 2, 2), ("head", 1, 1)):
        before, after = (layer_seconds(*plan, kind) for plan in plans)
        assert after.forward - before.forward == pytest.approx(forward * wait)
        assert after.backward - before.backward == pytest.approx(backward * wait)


def test_data_parallel_ranks_wait_once_a_step_and_sharded_ones_at_every_layer():
    wait = 0.001

    def added(zero: int) -> float:
        plans = [case(with_constants(wait_seconds=seconds), data_parallel=2, zero_stage=zero) for seconds in (0.0, wait)]
        return (reduce_seconds(*plans[1], MODEL.num_parameters) - reduce_seconds(*plans[0], MODEL.num_parameters)) / wait

    assert added(0) == added(1) == pytest.approx(1.0)
    assert added(3) == pytest.approx(2 * added(2))
    assert added(2) > 6 * MODEL.num_layers, "a wait for each block and micro-batch at least"


def test_new_buffers_take_time_by_their_bytes_a_tied_table_twice():
    moved = 1e6 + MODEL.token_embedding_parameters

    def added(zero: int) -> float:
        plans = [case(with_constants(fresh_bandwidth_bytes_per_second=rate), data_parallel=2, zero_stage=zero) for rate in (None, 1e9)]
        return reduce_seconds(*plans[1], 1e6) - reduce_seconds(*plans[0], 1e6)

    assert added(1) == 0.0
    assert added(2) == pytest.approx(6 * 4 * moved / 1e9)
    assert added(3) == pytest.approx(6 * 12 * moved / 1e9)


@pytest.mark.parametrize("free", [True, False])
def test_a_slow_link_moves_tensor_parallelism_inside_the_host(free):
    """Two hosts of two GPUs, one sequence a step. Across a link as fast as the one inside, the search takes tensor parallelism of 4; across
    1 GB/s it keeps it inside the host, also where nothing but the placement is left to choose."""
    nodes = replace(load_cluster("a100-80gb:4"), gpus_per_node=2)
    fixed = Fixed() if free else Fixed(tensor_parallel=2, pipeline_parallel=2, schedule="1F1B", recompute="none")
    found = {}
    for name, bandwidth in (("fast", nodes.intra_node.bandwidth_bytes_per_second), ("slow", 1e9)):
        link = replace(nodes.inter_node, bandwidth_bytes_per_second=bandwidth, latency_seconds=nodes.intra_node.latency_seconds)
        cluster = replace(nodes, inter_node=link)
        inputs = Inputs(model=load_model("gpt3-6.7b"), cluster=cluster, training=Training(global_batch_size=2 - free, sequence_length=2048))
        found[name] = search(inputs, Constraints(fixed=fixed))
    fast, slow = found["fast"].decisions, found["slow"].decisions
    assert fast.tensor_parallel == (4 if free else 2) and slow.tensor_parallel == 2
    assert axis_group(found["slow"].inputs.cluster, slow, "tp").nodes == 1
    across = replace(slow, rank_order=("dp", "pp", "tp"))
    assert axis_group(found["slow"].inputs.cluster, across, "tp").nodes == 2
    inputs = found["slow"].inputs
    assert predict_time(inputs, across).time.step_seconds > 1.2 * predict_time(inputs, slow).time.step_seconds


def test_passes_of_a_pipeline_are_longer_and_no_others():
    plain, cold = with_constants(), with_constants(pipeline_scale=1.1)
    for degrees, factor in (({"pipeline_parallel": 2}, 1.1), ({"data_parallel": 2}, 1.0), ({"tensor_parallel": 2}, 1.0)):
        before, after = (layer_seconds(*case(cluster, **degrees), "block") for cluster in (plain, cold))
        assert after.forward == pytest.approx(factor * before.forward) and after.backward == pytest.approx(factor * before.backward)
