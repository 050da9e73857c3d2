"""The number of GPUs as a decision."""

import pytest

from planner.candidates import Constraints
from planner.cluster import load_cluster, with_num_gpus
from planner.errors import DoesNotFitError
from planner.goals import counts_between, fastest_within, fewest_gpus, gpu_counts
from planner.model import load_model
from planner.plan import Inputs, Training, replace
from planner.search import search
from planner.words import rounded_up


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
    assert f"a deadline of {rounded_up(days)} days for 3e+11 tokens" in caught.value.repairs[0]
    budget = times[2] * 2 * 1.02
    plan = fastest_within(inputs, Constraints(), budget)
    allowed = {count: seconds for count, seconds in times.items() if seconds * count <= budget}
    assert plan.predictions.time.step_seconds == pytest.approx(min(allowed.values()))
    with pytest.raises(DoesNotFitError, match="GPU-seconds"):
        fastest_within(inputs, Constraints(), times[1] * 0.5)


def test_counts_between_are_within_a_node_or_whole_nodes(inputs):
    assert counts_between(inputs, 4, 6) == [5]
    many = replace(inputs, cluster=with_num_gpus(inputs.cluster, 1024))
    assert counts_between(many, 4, 32) == [5, 6, 7, 8, 16, 24]
    assert counts_between(many, 8, 16) == []
    assert counts_between(many, 64, 96) == [72, 80, 88]
    assert len(counts_between(many, 512, 768)) <= 16


def test_counts_between_the_powers_are_tried_for_a_deadline(inputs):
    five = replace(inputs, training=replace(inputs.training, global_batch_size=40))
    reached = search(replace(five, cluster=with_num_gpus(five.cluster, 5)), Constraints()).predictions.time.step_seconds
    assert fewest_gpus(five, Constraints(), reached * 1.001).inputs.cluster.num_gpus == 5


def test_what_would_fit_fits():
    assert [rounded_up(value) for value in (3.23201, 3.232, 1234567.0, 0.000123441, 99995.1)] == ["3.233", "3.232", "1235000", "0.0001235", "100000"]
    small = Inputs(model=load_model("gpt2"), cluster=load_cluster("a100-80gb:8"), training=Training(global_batch_size=512, sequence_length=1024))
    steps = 300e9 / (512 * 1024)
    with pytest.raises(DoesNotFitError) as caught:
        fewest_gpus(small, Constraints(), 0.1 * 86400 / steps, 300e9)
    days = float(caught.value.repairs[0].split()[3])
    assert fewest_gpus(small, Constraints(), days * 86400 / steps, 300e9).inputs.cluster.num_gpus == 8
    with pytest.raises(DoesNotFitError, match="at most 1 GPU-hours for 3e") as caught:
        fastest_within(small, Constraints(), 3600 / steps, 300e9)
    hours = float(caught.value.repairs[0].split()[3])
    assert "GPU-hours" in caught.value.repairs[0] and fastest_within(small, Constraints(), hours * 3600 / steps, 300e9)
