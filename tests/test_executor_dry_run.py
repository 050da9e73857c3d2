"""The dry run against the tracked memory of real steps, and its parts."""

from __future__ import annotations

from typing import Any

import pytest
from plans import make_plan

from planner.errors import InputError
from planner.memory import predict_memory
from planner.model import RopeScaling, load_model, replace
from planner.plan import Memory, Plan

torch = pytest.importorskip("torch", reason="the executor needs torch")

from executor.dry_run import dry_run, dry_run_in_process, dry_run_plan, steady_microbatches  # noqa: E402
from executor.mesh import make_mesh  # noqa: E402
from executor.train import RunOptions, Trainer  # noqa: E402


def real_memory(plan: Plan) -> Memory:
    """The tracked peak of a real step of a plan of one rank."""
    trainer = Trainer(plan, make_mesh(plan.decisions, 0), RunOptions(), torch.device("cpu"))
    trainer.load_empty()
    with trainer.track_memory() as tracker:
        trainer.step()
    memory: Memory = tracker.memory()
    return memory


@pytest.mark.parametrize("model", ["tiny-gpt", "tiny-llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"recompute": "selective"}, {"recompute": "full"}, {"precision": "fp32"},
        {"attention": "unfused"}, {"attention": "unfused", "recompute": "selective"}, {"attention": "unfused", "recompute": "full"},
    ],
    ids=str,
)  # fmt: skip
def test_one_rank_takes_what_the_dry_run_says(model: str, changes: dict[str, Any]) -> None:
    plan = make_plan(model, "cpu:1", micro=2, m=2, sequence_length=32, **changes)
    assert dry_run(plan, 0) == real_memory(plan)


@pytest.mark.parametrize(
    ("schedule", "virtual", "m"),
    [("1F1B", 1, 24), ("Interleaved1F1B", 2, 24), ("InterleavedZeroBubble", 2, 24), ("ZBVZeroBubble", 2, 24), ("GPipe", 1, 6)],
)
def test_micro_batches_beyond_the_steady_state_change_nothing(schedule: str, virtual: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from executor import dry_run as module

    plan = make_plan("tiny-gpt", "cpu:2", pp=2, m=m, schedule=schedule, virtual=virtual, sequence_length=16)
    assert (steady_microbatches(plan.decisions, 0) < m) == (schedule != "GPipe")
    short = [dry_run(plan, rank) for rank in range(2)]
    monkeypatch.setattr(module, "steady_microbatches", lambda decisions, pipeline_rank: decisions.num_microbatches)
    assert [dry_run(plan, rank) for rank in range(2)] == short


def test_what_no_process_could_do_is_refused_before_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device: 'cuda' is not valid; no CUDA device is available"):
        dry_run_plan(make_plan("tiny-gpt", "cpu:1"), "cuda")
    scaled = replace(load_model("tiny-llama"), rope_scaling=RopeScaling(rope_type="yarn"))
    with pytest.raises(InputError, match="rope_type"):
        dry_run_plan(make_plan(scaled, "cpu:1"))


def test_each_pipeline_rank_gets_a_process_of_its_own() -> None:
    plan = make_plan("tiny-gpt", "cpu:4", pp=2, tp=2, m=4, sequence_length=16)
    document = dry_run_plan(plan)
    assert [(row.pipeline_rank, row.rank) for row in document.pipeline_ranks] == [(0, 0), (1, 2)]
    assert document.pipeline_ranks[1].memory == dry_run(plan, 2)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_gpt3_on_1024_ranks_in_a_minute_and_two_gigabytes(attention: str) -> None:
    """The first rank of 175B parameters, in a process of its own; its peak is the predicted one."""
    import resource

    plan = make_plan(
        "gpt3", "a100-80gb:1024", tp=8, pp=8, dp=16, m=64, zero_stage=1, sequence_parallel=True, recompute="selective", attention=attention
    )
    row = dry_run_in_process(plan, 0)
    assert row.wall_seconds < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 2 * 10**9
    assert row.memory.total_bytes == pytest.approx(predict_memory(plan.inputs, plan.decisions)[0].total_bytes, rel=0.01)
