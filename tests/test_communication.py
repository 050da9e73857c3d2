"""Bytes sent by formula, against small sums done by hand; `tests/test_executor_run.py` and `plan paradigms --run` count them for real."""

import pytest
from plans import make_plan

from planner.cluster import load_cluster
from planner.communication import communication_bytes
from planner.model import load_model
from planner.paradigms import paradigms
from planner.plan import Training


def test_data_parallel_all_reduces_every_gradient() -> None:
    plan = make_plan("tiny-gpt", dp=4, precision="fp32")
    expected = 2 * 3 / 4 * load_model("tiny-gpt").num_parameters * 4
    assert communication_bytes(plan.inputs, plan.decisions, 0) == {"tp": 0.0, "dp": pytest.approx(expected), "pp": 0.0}


@pytest.mark.parametrize(("stage", "times"), [(1, 2), (2, 4 + 1), (3, 3 * 4)])
def test_zero_sends_gathers_and_scatters(stage: int, times: int) -> None:
    plan = make_plan("tiny-llama", dp=4, m=4, zero_stage=stage, precision="fp32")
    assert communication_bytes(plan.inputs, plan.decisions, 0)["dp"] == pytest.approx(times * 3 / 4 * load_model("tiny-llama").num_parameters * 4)


def test_zero_sends_a_tied_table_for_the_embedding_and_for_the_head() -> None:
    plan = make_plan("tiny-gpt", dp=4, m=4, zero_stage=3, precision="fp32")
    model = plan.inputs.model
    moved = model.num_parameters + model.vocab_size * model.hidden_size
    assert communication_bytes(plan.inputs, plan.decisions, 0)["dp"] == pytest.approx(3 * 4 * 3 / 4 * moved * 4)


def test_a_pipeline_sends_one_message_a_microbatch_and_direction() -> None:
    plan = make_plan("tiny-llama", pp=4, m=8, micro=2, sequence_length=64, precision="fp32")
    message = 2 * 64 * 64 * 4
    sent = [communication_bytes(plan.inputs, plan.decisions, rank)["pp"] for rank in range(4)]
    assert sent == [8 * message, 2 * 8 * message, 2 * 8 * message, 8 * message]


def test_sequence_parallelism_adds_the_gathers_of_the_backward_pass() -> None:
    plain = make_plan("mini-llama", tp=4, m=2, precision="fp32", sequence_length=256)
    split = make_plan("mini-llama", tp=4, m=2, precision="fp32", sequence_length=256, sequence_parallel=True)
    one, other = (communication_bytes(plan.inputs, plan.decisions, 0)["tp"] for plan in (plain, split))
    assert one < other < 1.6 * one


def test_every_paradigm_is_there_with_a_plan_or_a_reason() -> None:
    document = paradigms(load_model("mini-gpt"), load_cluster("cpu"), Training(global_batch_size=32, sequence_length=64, precision="fp32"), 4)
    names = {row.name for row in document.paradigms}
    assert {"naive model parallel", "data parallel", "FSDP / ZeRO-3", "tensor parallel"} <= names
    assert all((row.decisions is None) == bool(row.why_not) for row in document.paradigms)
    naive = next(row for row in document.paradigms if row.name == "naive model parallel")
    assert naive.bubble_fraction is not None and naive.bubble_fraction >= 0.74


def test_why_a_paradigm_is_not_possible_does_not_name_it_again():
    training = Training(global_batch_size=32, sequence_length=100_000, precision="fp32")
    document = paradigms(load_model("tiny-gpt"), load_cluster("cpu"), training, 8)
    assert {row.why_not.partition(":")[0] for row in document.paradigms if row.why_not} >= {"sequence_length", "--pp"}
    assert not any(row.why_not.startswith(row.name) for row in document.paradigms if row.why_not)
