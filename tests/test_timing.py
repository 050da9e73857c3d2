"""planner.timing: the walk and its short form agree, and times move the way physics says."""

from __future__ import annotations

import msgspec
import pytest

from planner import cluster, model
from planner.plan import Decisions, Inputs, Training, check, even_stages
from planner.timing import layer_seconds, predict_time, predict_timeline, reduce_seconds, transfer_seconds


def case(name="tiny-gpt", hardware="a100-80gb", tp=1, pp=1, dp=1, micro=1, m=8, schedule="1F1B", v=1, recompute="none", zero=0, **rest):
    spec = model.load_model(name)
    machine = cluster.load_cluster(f"{hardware}:{tp * pp * dp}")
    sequence = rest.pop("sequence_length", min(2048, spec.max_sequence_length))
    training = Training(global_batch_size=dp * micro * m, sequence_length=sequence, profile=rest.pop("profile", "megatron"))
    inputs = Inputs(model=spec, cluster=machine, training=training)
    decisions = Decisions(
        data_parallel=dp, tensor_parallel=tp, pipeline_parallel=pp, zero_stage=zero, micro_batch_size=micro, num_microbatches=m,
        schedule=schedule, num_virtual_stages=v, stages=even_stages(spec, schedule, pp, v, recompute), **rest,
    )  # fmt: skip
    check(inputs, decisions)
    return inputs, decisions


SCHEDULES = [("GPipe", 1), ("1F1B", 1), ("Naive", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]


@pytest.mark.parametrize(("schedule", "v"), SCHEDULES)
@pytest.mark.parametrize("m", [4, 8, 20, 64])
def test_step_equals_the_walk(schedule, v, m):
    inputs, decisions = case("gpt3", tp=8, pp=4, m=m, schedule=schedule, v=v)
    assert predict_time(inputs, decisions).time.step_seconds == pytest.approx(predict_timeline(inputs, decisions).end, rel=5e-3)
