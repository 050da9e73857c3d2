"""The number of GPUs as a decision."""

import pytest

from planner.candidates import Constraints
from planner.cluster import load_cluster, with_num_gpus
from planner.errors import DoesNotFitError
from planner.goals import fastest_within, fewest_gpus, gpu_counts
from planner.model import load_model
from planner.plan import Inputs, Training, replace
from planner.search import search


@pytest.fixture
def inputs():
    return Inputs(
        model=load_model("gpt3-1.3b"), cluster=load_cluster("a100-80gb:8"), training=Training(global_batch_size=24, sequence_length=2048)
    )


def test_counts_fill_nodes(inputs):
    assert gpu_counts(inputs) == [1, 2, 3, 4, 6, 8]
    assert gpu_counts(replace(inputs, cluster=with_num_gpus(inputs.cluster, 40))) == [1, 2, 3, 4, 6, 8, 16, 24, 32, 40]


def test_fewest_gpus_meet_the_deadline_and_fewer_do_not(inputs):
    times = {
        count: search(replace(inputs, cluster=with_num_gpus(inputs.cluster, count)), Constraints()).predictions.time.step_seconds
        for count in gpu_counts(inputs)
    }
    deadline = times[4] * 1.01
    plan = fewest_gpus(inputs, Constraints(), deadline)
    assert plan.inputs.cluster.num_gpus == min(count for count, seconds in times.items() if seconds <= deadline)
    with pytest.raises(DoesNotFitError, match="s a step"):
        fewest_gpus(inputs, Constraints(), min(times.values()) * 0.9)
    with pytest.raises(DoesNotFitError, match=r"days for 3e\+11 tokens") as caught:
        fewest_gpus(inputs, Constraints(), min(times.values()) * 0.9, 3e11)
    days = min(times.values()) * 3e11 / (24 * 2048) / 86400
    assert f"a deadline of {days:.4g} days for 3e+11 tokens" in caught.value.repairs[0]
    budget = times[2] * 2 * 1.02
    plan = fastest_within(inputs, Constraints(), budget)
    allowed = {count: seconds for count, seconds in times.items() if seconds * count <= budget}
    assert plan.predictions.time.step_seconds == pytest.approx(min(allowed.values()))
    with pytest.raises(DoesNotFitError, match="GPU-seconds"):
        fastest_within(inputs, Constraints(), times[1] * 0.5)
