"""The layers' arithmetic: autograd functions on plain tensors, with tensor and sequence parallelism inside them.

Activations are [tokens, hidden] with tokens = micro-batch x sequence, batch first. Under sequence parallelism a rank holds
consecutive rows of it, tokens / t of them, between the tensor-parallel regions (Korthikanti et al. 2022, section 4.2.2).

Weights are not inputs of the functions: each function looks them up in its unit, in the forward and again in the backward
pass (where ZeRO-3 has gathered them anew), and adds weight gradients straight into the unit's buffer. With a split
backward (`State.deferred` is a list) the weight gradients become closures in that list and run in the W action.

What each function saves for the backward pass is in its docstring, per token and in elements of the compute type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from executor.mesh import Axis
from executor.norms import QueryKey, rms_backward, rms_forward
from executor.units import Unit

P = ParamSpec("P")
R = TypeVar("R")

HEAD_CHUNK_ELEMENTS = 1 << 22
"""Logits that the loss handles at a time in fp32 (16 MiB)."""


@dataclass(slots=True)
class State:
    """What all layers of a rank share."""

    tp: Axis
    sequence_parallel: bool
    norm: str
    epsilon: float
    activation: str
    gated: bool
    deferred: list[Callable[[], None]] | None = None
    """Weight gradients that the running I action has put off, or None to compute them at once."""
    loss_sum: torch.Tensor | None = None
    """Sum of the losses of all tokens of the step so far, on this rank's last stage."""
    compiled: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Kernels by name that `compile_kernels` has compiled."""
    loss_scale: float = 1.0
    """1 / tokens of the global batch: the gradient of the mean loss with respect to one token's."""

    def kept(self, unit: Unit, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """A small weight for use in a put-off weight gradient: a copy where ZeRO-3 frees the original before."""
        return tensor.clone() if tensor is not None and self.deferred is not None and unit.zero_stage == 3 else tensor

    def weight_gradient(self, compute: Callable[[], None]) -> None:
        """Runs `compute` now, or keeps it for the W action."""
        if self.deferred is None:
            compute()
        else:
            self.deferred.append(compute)


KERNELS: list[Callable[..., Any]] = []


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """An element-wise function of (state, ...) that `compile_kernels` can replace."""
    KERNELS.append(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        state: State = args[0]  # type: ignore[assignment]
        chosen = state.compiled.get(function.__name__, function) if state.compiled else function
        return chosen(*args, **kwargs)  # type: ignore[no-any-return]

    return call


def compile_kernels(state: State) -> None:
    """Compiles norms and activation functions; matrix products, attention and communication stay as they are."""
    for function in KERNELS:
        state.compiled[function.__name__] = torch.compile(function, dynamic=False)


# norms


@kernel
def norm_forward(state: State, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The norm's output, and its fp32 statistics per row: (mean, reciprocal deviation), or only the latter for RMSNorm."""
    if state.norm == "layernorm":
        y, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), gain, bias, state.epsilon)
        return y, mean, rstd
    return rms_forward(x, gain, state.epsilon)


def norm_again(
    state: State, x: torch.Tensor, statistics: tuple[torch.Tensor, ...], gain: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """The norm's output once more."""
    assert gain is not None
    if state.norm == "rmsnorm" and not x.is_cuda:
        return (x * statistics[0]).to(x.dtype).mul_(gain)
    return norm_forward(state, x, gain, bias)[0]


@kernel
def norm_backward(
    state: State, dy: torch.Tensor, x: torch.Tensor, statistics: tuple[torch.Tensor, ...], gain: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of the input, the gain and the bias."""
    shape = [x.shape[-1]]
    if state.norm == "layernorm":
        assert bias is not None
        mean, rstd = statistics
        dx, dgain, dbias = torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, gain, bias, [True, True, True])
        return dx, dgain, dbias
    dx, dgain = rms_backward(dy, x, statistics[0], gain)
    return dx, dgain, None


def put_off_addition(state: State, unit: Unit, key: str, gradient: torch.Tensor) -> None:
    """Adds `gradient` to that of the entry `key`, now or in the W action."""

    def add() -> None:
        unit.gradient(key).add_(gradient)

    state.weight_gradient(add)


def norm_weight_gradient(state: State, unit: Unit, key: str, dgain: torch.Tensor, dbias: torch.Tensor | None) -> None:
    def add() -> None:
        unit.gradient(f"{key}.gain").add_(dgain)
        if dbias is not None:
            unit.gradient(f"{key}.bias").add_(dbias)

    state.weight_gradient(add)


# activation functions


def _activate(state: State, u: torch.Tensor) -> torch.Tensor:
    if state.activation == "silu":
        return F.silu(u)
    if state.activation == "relu":
        return F.relu(u)
    return F.gelu(u, approximate=_approximation(state))


def _approximation(state: State) -> str:
    return "none" if state.activation == "gelu_erf" else "tanh"


@kernel
def activation_forward(state: State, u: torch.Tensor) -> torch.Tensor:
    """act(u), or act(gate) · up where u = [gate, up] along the last dim."""
    if state.gated:
        gate, up = u.chunk(2, -1)
        return _activate(state, gate).mul_(up)
    return _activate(state, u)


@kernel
def activation_backward(state: State, da: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The gradient of u."""
    if state.gated:
        gate, up = u.chunk(2, -1)
        du = torch.empty_like(u)
        dgate, dup = du.chunk(2, -1)
        torch.mul(da, _activate(state, gate), out=dup)
        dgate.copy_(_activate_backward(state, da * up, gate))
        return du
    return _activate_backward(state, da, u)


def _activate_backward(state: State, da: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    gradient: torch.Tensor
    if state.activation == "relu":
        return da * (u > 0)
    if state.activation == "silu":
        gradient = torch.ops.aten.silu_backward(da, u)
    else:
        gradient = torch.ops.aten.gelu_backward(da, u, approximate=_approximation(state))
    return gradient


# tensor parallelism


def gather_tokens(state: State, x: torch.Tensor) -> torch.Tensor:
    """All tokens from each rank's rows, under sequence parallelism."""
    if not state.sequence_parallel:
        return x
    whole = x.new_empty((x.shape[0] * state.tp.size, *x.shape[1:]))
    state.tp.all_gather(whole, x.contiguous())
    return whole


def sum_partials(state: State, x: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's partial result: whole, or this rank's rows under sequence parallelism."""
    if not state.sequence_parallel:
        state.tp.all_reduce(x)
        return x
    rows = x.new_empty((x.shape[0] // state.tp.size, *x.shape[1:]))
    state.tp.reduce_scatter(rows, x)
    return rows


class NormLinear(torch.autograd.Function):
    """norm, then column-parallel linears, a result for each: y = norm(x) W^T + b; with `query_key`, then what it does to the query and key heads of
    the first. However many they are, norm(x) is gathered once, and its gradient summed once.

    Saves x (h), the norm's statistics, and norm(x) (h) unless `lean`, which computes it again; and what `query_key` saves. Under sequence parallelism
    x and norm(x) are this rank's rows; norm(x) is gathered again for the weight gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, state: State, unit: Unit, norm: str, linears: tuple[str, ...], lean: bool, query_key: QueryKey | None
    ) -> tuple[torch.Tensor, ...]:
        w = unit.w
        normed, *statistics = norm_forward(state, x, w[f"{norm}.gain"], w.get(f"{norm}.bias"))
        ctx.state, ctx.unit, ctx.norm, ctx.linears, ctx.lean, ctx.query_key = state, unit, norm, linears, lean, query_key
        whole = gather_tokens(state, normed)
        results = tuple(linear_forward(whole, w[f"{linear}.weight"], w.get(f"{linear}.bias")) for linear in linears)
        heads = query_key.forward_(results[0], unit) if query_key is not None else ()
        ctx.num_heads_saved = len(heads)
        ctx.save_for_backward(*heads, x, *statistics, *(() if lean else (normed,)))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state, unit, norm, linears = ctx.state, ctx.unit, ctx.norm, ctx.linears
        w = unit.w
        saved = ctx.saved_tensors
        heads, (x, *statistics) = saved[: ctx.num_heads_saved], saved[ctx.num_heads_saved :]
        normed = None if ctx.lean else statistics.pop()
        statistics = tuple(statistics)
        gain, bias = w[f"{norm}.gain"], w.get(f"{norm}.bias")
        if ctx.query_key is not None:
            ctx.query_key.backward_(gradients[0], unit, heads, lambda key, gradient: put_off_addition(state, unit, key, gradient))
        dwhole = gradients[0] @ w[f"{linears[0]}.weight"]
        for linear, dy in zip(linears[1:], gradients[1:], strict=True):
            dwhole.addmm_(dy, w[f"{linear}.weight"])
        if state.sequence_parallel:
            dnormed = dwhole.new_empty(x.shape)
            work = state.tp.reduce_scatter(dnormed, dwhole, wait=False)
        else:
            dnormed = dwhole
            work = state.tp.all_reduce(dnormed, wait=False)

        late = (state.kept(unit, gain), state.kept(unit, bias)) if normed is None else (None, None)

        def add() -> None:
            again = norm_again(state, x, statistics, *late) if normed is None else normed
            whole = gather_tokens(state, again)
            for linear, dy in zip(linears, gradients, strict=True):
                linear_weight_gradient(unit, linear, dy, whole)

        state.weight_gradient(add)
        work.wait()
        del dwhole, work
        dx, dgain, dbias = norm_backward(state, dnormed, x, statistics, gain, bias)
        norm_weight_gradient(state, unit, norm, dgain, dbias)
        return dx, None, None, None, None, None, None


class Norm(torch.autograd.Function):
    """A norm by itself, and the residual: y = norm(x) + residual. Saves x (h) and its statistics."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, state: State, unit: Unit, key: str) -> torch.Tensor:
        y, *statistics = norm_forward(state, x, unit.w[f"{key}.gain"], unit.w.get(f"{key}.bias"))
        ctx.state, ctx.unit, ctx.key = state, unit, key
        ctx.save_for_backward(x, *statistics)
        return y if residual is None else y.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *statistics = ctx.saved_tensors
        w = ctx.unit.w
        dx, dgain, dbias = norm_backward(ctx.state, dy, x, tuple(statistics), w[f"{ctx.key}.gain"], w.get(f"{ctx.key}.bias"))
        norm_weight_gradient(ctx.state, ctx.unit, ctx.key, dgain, dbias)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, None


class RowLinear(torch.autograd.Function):
    """A row-parallel linear, the sum over ranks, its bias and the residual: y = Σ a W^T + b + residual.

    Saves a (the rank's part of the inner size). With `activate`, a = act(u): saves u, and a unless `lean`, which computes it again.
    """

    @staticmethod
    def forward(
        ctx: Any, u: torch.Tensor, residual: torch.Tensor | None, state: State, unit: Unit, linear: str, activate: bool, lean: bool
    ) -> torch.Tensor:
        w = unit.w
        a = activation_forward(state, u) if activate else u
        ctx.state, ctx.unit, ctx.linear, ctx.activate, ctx.lean = state, unit, linear, activate, lean
        ctx.save_for_backward(u, *((a,) if activate and not lean else ()))
        y = sum_partials(state, a @ w[f"{linear}.weight"].t())
        del a
        if residual is not None:
            y.add_(residual)
        bias = w.get(f"{linear}.bias")
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state, unit, linear = ctx.state, ctx.unit, ctx.linear
        w = unit.w
        u, *rest = ctx.saved_tensors
        dwhole = gather_tokens(state, dy)
        da = dwhole @ w[f"{linear}.weight"]
        activate = ctx.activate
        a = rest[0] if rest else None if activate else u
        dbias = dy.sum(0) if f"{linear}.bias" in unit.keys else None

        def add() -> None:
            again = activation_forward(state, u) if a is None else a
            unit.gradient(f"{linear}.weight").addmm_(dwhole.t(), again)
            if dbias is not None:
                unit.gradient(f"{linear}.bias").add_(dbias)

        state.weight_gradient(add)
        du = activation_backward(state, da, u) if activate else da
        return du, dy if ctx.needs_input_grad[1] else None, None, None, None, None, None


class RowLinears(torch.autograd.Function):
    """The second linears of attention and of an MLP beside it, whose partial results are added up before their one sum over ranks:
    y = Σ (mixed W1^T + a W2^T) + biases + residual with a = act(u). Saves what the two by themselves would."""

    @staticmethod
    def forward(
        ctx: Any, mixed: torch.Tensor, u: torch.Tensor, residual: torch.Tensor | None, state: State, unit: Unit, linears: tuple[str, str], lean: bool
    ) -> torch.Tensor:
        w = unit.w
        first, second = linears
        a = activation_forward(state, u)
        ctx.state, ctx.unit, ctx.linears = state, unit, linears
        ctx.save_for_backward(mixed, u, *(() if lean else (a,)))
        partial = (mixed @ w[f"{first}.weight"].t()).addmm_(a, w[f"{second}.weight"].t())
        del a
        y = sum_partials(state, partial)
        if residual is not None:
            y.add_(residual)
        for linear in linears:
            if f"{linear}.bias" in w:
                y.add_(w[f"{linear}.bias"])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state, unit = ctx.state, ctx.unit
        first, second = ctx.linears
        mixed, u, *rest = ctx.saved_tensors
        dwhole = gather_tokens(state, dy)
        biased = [f"{linear}.bias" for linear in ctx.linears if f"{linear}.bias" in unit.keys]
        dbias = dy.sum(0) if biased else None
        da = dwhole @ unit.w[f"{second}.weight"]

        def add() -> None:
            again = rest[0] if rest else activation_forward(state, u)
            unit.gradient(f"{second}.weight").addmm_(dwhole.t(), again)
            unit.gradient(f"{first}.weight").addmm_(dwhole.t(), mixed)
            for key in biased:
                unit.gradient(key).add_(dbias)

        state.weight_gradient(add)
        du = activation_backward(state, da, u)
        del da
        dmixed = dwhole @ unit.w[f"{first}.weight"]
        return dmixed, du, dy if ctx.needs_input_grad[2] else None, None, None, None, None


def linear_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def linear_weight_gradient(unit: Unit, linear: str, dy: torch.Tensor, x: torch.Tensor) -> None:
    """Adds dy^T x to the weight's gradient in place, and the sum of dy to the bias's."""
    unit.gradient(f"{linear}.weight").addmm_(dy.t(), x)
    if f"{linear}.bias" in unit.keys:
        unit.gradient(f"{linear}.bias").add_(dy.sum(0))
