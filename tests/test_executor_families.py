"""Families of blocks beside GPT and Llama: exact parameter counts, memory in closed form, and what positions add to scores."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from planner.memory import predict_memory

torch = pytest.importorskip("torch", reason="the executor needs torch")
import torch.nn.functional as F  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import parity  # noqa: E402

from executor.attention import alibi_slopes, make_alibi, make_window  # noqa: E402
from executor.dry_run import dry_run, rank_of_pipeline_rank  # noqa: E402
from executor.functions import State, activation_backward, activation_forward  # noqa: E402
from executor.huggingface import global_names  # noqa: E402
from executor.mesh import Axis  # noqa: E402
from executor.units import Piece  # noqa: E402

FAMILIES = sorted(set(parity.FAMILIES) - {"gpt", "llama"})


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_as_many_as_the_planner_counts(family: str) -> None:
    pieces: list[Piece] = list(global_names(parity.model_of(family)))
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert sum(piece.numel for piece in pieces) == parity.model_of(family).num_parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("decisions", "precision"),
    [
        ({"tp": 2, "sp": True, "recompute": "selective"}, "mixed-bf16"),
        ({"dp": 2, "zero": 3, "recompute": "full"}, "fp32"),
        ({"tp": 2}, "fp32"),
        ({"pp": 2, "v": 2, "schedule": "ZBVZeroBubble"}, "mixed-bf16"),
    ],
    ids=str,
)
def test_memory_in_closed_form_is_that_of_the_dry_run(family: str, decisions: dict[str, Any], precision: str) -> None:
    plan = parity.plan_of(parity.combination(family, **decisions, **parity.ALONE.get(family, {})), precision)
    predicted = predict_memory(plan.inputs, plan.decisions)
    for pipeline_rank, need in enumerate(predicted):
        traced = dry_run(plan, rank_of_pipeline_rank(plan, pipeline_rank))
        assert need.total_bytes == pytest.approx(traced.total_bytes, rel=0.01)


def test_slopes_are_powers_of_one_ratio() -> None:
    assert alibi_slopes(8) == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(6)[:4] == [2.0 ** (-2 * power) for power in range(1, 5)]
    assert alibi_slopes(6)[4:] == [0.5, 0.125]


def test_biases_fall_with_distance_and_shut_out_what_is_later() -> None:
    bias = make_alibi(4, 8, 2, 4, torch.float32, torch.device("cpu"))
    assert bias.shape == (1, 2, 4, 4)
    assert bias[0, 0, 3].tolist() == [-0.375, -0.25, -0.125, 0.0]
    assert bias[0, 1, 1].tolist() == [-0.0625, 0.0, -torch.inf, -torch.inf]


def test_a_window_shuts_out_what_is_later_or_farther() -> None:
    mask = make_window(5, 2, torch.float32, torch.device("cpu"))
    seen = [[place for place in range(5) if mask[0, 0, row, place] == 0] for row in range(5)]
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]


def test_only_blocks_whose_window_is_shorter_than_the_sequence_have_a_mask() -> None:
    model = parity.model_of("gemma")
    assert [model.window_of(block, 16) for block in range(4)] == [6, None, 6, None]
    assert model.window_of(0, 6) is None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "silu", "relu"])
def test_activation_gradients_are_those_of_autograd(activation: str, gated: bool) -> None:
    state = State(tp=Axis("tp", (0,), 0), sequence_parallel=False, norm="rmsnorm", epsilon=1e-5, activation=activation, gated=gated)
    torch.manual_seed(0)
    u = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    act = {"gelu": partial(F.gelu, approximate="tanh"), "gelu_erf": F.gelu, "silu": F.silu, "relu": F.relu}[activation]
    a = act(u[:, :4]) * u[:, 4:] if gated else act(u)
    assert torch.allclose(activation_forward(state, u.detach()), a)
    da = torch.randn_like(a)
    (expected,) = torch.autograd.grad(a, u, da)
    assert torch.allclose(activation_backward(state, da, u.detach()), expected, atol=1e-12)
