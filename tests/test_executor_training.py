"""What a step does beside splitting: accumulation, clipping, dropout, learning rates, and bf16 with fp32 masters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plans import make_plan
from test_executor_run import launch

from planner.documents import dumps, write_text
from planner.plan import Plan
from planner.run import load_run

torch = pytest.importorskip("torch", reason="the executor needs torch")
import torch.distributed as dist  # noqa: E402

from executor.data import Data, open_tokens  # noqa: E402
from executor.mesh import make_mesh  # noqa: E402
from executor.optimizer import OptimizerOptions  # noqa: E402
from executor.train import RunOptions, Trainer, learning_rate  # noqa: E402

SHAPE: dict[str, Any] = {"precision": "fp32", "sequence_length": 16}
BF16_TOLERANCE = 0.005
"""Of a loss near 5.5: bf16 rounds to 1 part in 256, and sums over ranks round partial results that one process does not have."""


def train(plan: Plan, steps: int, **options: Any) -> tuple[Trainer, list[float], list[float]]:
    """One process's losses and gradient norms."""
    trainer = Trainer(plan, make_mesh(plan.decisions, 0), RunOptions(**options), torch.device("cpu"))
    training, spec = plan.inputs.training, plan.inputs.model
    data = Data(open_tokens(None, spec.vocab_size), spec.vocab_size, training.sequence_length, training.global_batch_size, 0)
    losses, norms = [], []
    for _ in range(steps):
        trainer.load(data)
        result = trainer.step()
        losses.append(float(result.loss))
        norms.append(float(result.gradient_norm))
    return trainer, losses, norms


def run(plan: Plan, folder: Path, name: str, *arguments: str) -> list[float]:
    """The losses of a launch."""
    write_text(folder / f"{name}.json", dumps(plan))
    output = folder / f"{name}-run.json"
    done = launch(plan.decisions.world_size, [str(folder / f"{name}.json"), "-o", str(output), *arguments])
    assert done.returncode == 0, done.stderr[-2000:]
    return [step.loss for step in load_run(output).steps]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole = train(make_plan("tiny-gpt", "cpu:1", micro=8, m=1, **SHAPE), 4, learning_rate=1e-3)
    parts = train(make_plan("tiny-gpt", "cpu:1", micro=1, m=8, **SHAPE), 4, learning_rate=1e-3)
    assert apart(whole[1], parts[1]) < 1e-5
    assert apart(whole[2], parts[2]) < 1e-4


def test_clipping_scales_the_update_by_the_norm() -> None:
    """With SGD, without weight decay, an update is the rate times the clipped gradient."""
    plan = make_plan("tiny-llama", "cpu:1", m=2, optimizer="sgd", **SHAPE)
    optimizer = OptimizerOptions(kind="sgd", weight_decay=0.0)
    start = train(plan, 0, optimizer=optimizer)[0]
    free, _, (norm,) = train(plan, 1, optimizer=optimizer, learning_rate=0.1, clip_norm=0.0)
    clipped, _, _ = train(plan, 1, optimizer=optimizer, learning_rate=0.1, clip_norm=norm / 4)
    for before, full, part in zip(start.units, free.units, clipped.units, strict=True):
        torch.testing.assert_close(4 * (part.weights - before.weights), full.weights - before.weights, rtol=1e-2, atol=1e-6)


def test_clipping_leaves_small_gradients_alone() -> None:
    plan = make_plan("tiny-gpt", "cpu:1", m=2, **SHAPE)
    assert train(plan, 3, clip_norm=1e6)[1] == train(plan, 3, clip_norm=0.0)[1]


def test_rates_warm_up_and_follow_a_cosine() -> None:
    options = RunOptions(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=4, decay_steps=10)
    rates = [learning_rate(options, step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.6)  # half-way down
    assert rates[14:] == [pytest.approx(0.2)] * 6
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


@pytest.fixture
def masks(request: pytest.FixtureRequest) -> Iterator[dict[tuple[int, int], list[float]]]:
    """What each rank of dp 2 x tp 2 draws in a step, by (dp, tp)."""
    import torch.testing._internal.distributed.fake_pg  # registers the backend

    plan = make_plan("tiny-gpt", "cpu:4", tp=2, dp=2, m=2, sequence_parallel=request.param, **SHAPE)
    drawn = {}
    for rank in range(4):
        dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=4)
        try:
            mesh = make_mesh(plan.decisions, rank, only_own_groups=True)
            trainer = Trainer(plan, mesh, RunOptions(dropout=0.5), torch.device("cpu"), initialise=False)
            trainer._seed_dropout()
            drawn[mesh.coordinates["dp"], mesh.coordinates["tp"]] = torch.rand(4).tolist()
        finally:
            dist.destroy_process_group()
    yield drawn


@pytest.mark.parametrize("masks", [False], indirect=True)
def test_dropout_agrees_over_tensor_parallel_ranks_and_differs_over_data_parallel_ones(masks: dict[tuple[int, int], list[float]]) -> None:
    assert masks[0, 0] == masks[0, 1]
    assert masks[1, 0] == masks[1, 1]
    assert masks[0, 0] != masks[1, 0]


@pytest.mark.parametrize("masks", [True], indirect=True)
def test_dropout_differs_where_ranks_hold_different_tokens(masks: dict[tuple[int, int], list[float]]) -> None:
    assert len({tuple(values) for values in masks.values()}) == 4


def test_recomputed_blocks_drop_the_same_again() -> None:
    plain, full = (train(make_plan("tiny-gpt", "cpu:1", m=2, recompute=level, **SHAPE), 3, dropout=0.3)[1] for level in ("none", "full"))
    assert apart(plain, full) < 1e-5
    assert apart(plain, train(make_plan("tiny-gpt", "cpu:1", m=2, **SHAPE), 3)[1]) > 1e-3


def test_tensor_parallel_ranks_drop_as_one_process_does(tmp_path: Path) -> None:
    one = train(make_plan("tiny-gpt", "cpu:1", m=2, **SHAPE), 3, dropout=0.3)[1]
    two = run(make_plan("tiny-gpt", "cpu:2", tp=2, m=2, **SHAPE), tmp_path, "two", "--steps", "3", "--dropout", "0.3")
    assert apart(one, two) < 1e-5


@pytest.mark.parametrize(
    "decisions",
    [{"dp": 2, "tp": 2, "m": 4, "zero_stage": 3, "sequence_parallel": True}, {"tp": 2, "pp": 2, "m": 8, "virtual": 2, "schedule": "ZBVZeroBubble"}],
    ids=["dp2 tp2 ZeRO-3", "tp2 pp2 ZBV"],
)
def test_bf16_with_fp32_masters_trains_like_one_process(decisions: dict[str, Any], tmp_path: Path) -> None:
    shape = {"precision": "mixed-bf16", "sequence_length": 16}
    one = train(make_plan("tiny-llama", "cpu:1", m=8, **shape), 10, learning_rate=1e-3)[1]
    four = run(make_plan("tiny-llama", "cpu:4", **decisions, **shape), tmp_path, "four", "--steps", "10", "--learning-rate", "0.001")
    exact = train(make_plan("tiny-llama", "cpu:1", m=8, **SHAPE), 10, learning_rate=1e-3)[1]
    assert exact[-1] < exact[0] - 0.3
    assert 0 < apart(one, four) < BF16_TOLERANCE
    assert apart(exact, four) < BF16_TOLERANCE
