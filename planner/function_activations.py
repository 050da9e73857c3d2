"""Activation bytes of the executor's functions, of which `planner.activations` puts its layers together.

Each function here follows the executor's function of the same name, allocation by allocation, on a `Tape`; symbols as there.
"""

from __future__ import annotations

from planner.shapes import Shape, Tape


def norm_forward(tape: Tape, s: Shape) -> None:
    """Leaves norm(x) and its statistics. RMSNorm on a CPU goes through an fp32 copy."""
    tape.take(s.stats)
    if not s.layernorm and s.e < 4:
        with tape.during(s.row32):
            tape.take(s.row)
    else:
        tape.take(s.row)


def norm_again(tape: Tape, s: Shape) -> None:
    """Leaves norm(x)."""
    norm_forward(tape, s)
    tape.give(s.stats)


def norm_backward(tape: Tape, s: Shape) -> None:
    """Leaves the gradient of x."""
    gains = s.hidden * s.e * 2
    if s.layernorm:
        tape.take(s.row)
        with tape.during(gains):
            pass
        return
    tape.take(s.row32)
    with tape.during(s.row32):
        tape.take(s.hidden * 4)
    tape.take(s.row)
    with tape.during(s.row32):
        tape.take(s.rows * 4)
    if s.e < 4:
        tape.take(s.row)
        tape.give(s.row32)
    tape.give(s.row + s.rows * 4 + s.hidden * 4)


def rotate(tape: Tape, s: Shape) -> None:
    if not s.rope:
        return
    tables = s.rope * s.e * 2 if s.e < 4 else s.rope * 4
    with tape.during(s.rope * (s.e if s.e < 4 else 0)), tape.during(s.rope * 4):
        tape.take(s.rope * s.e if s.e < 4 else 0)
        tape.give(s.rope * s.e if s.e < 4 else 0)
    with tape.during(tables), tape.during(s.rotated):
        pass


def head_norms_forward(tape: Tape, s: Shape) -> None:
    """Leaves the heads before their norms, and the statistics."""
    for part in s.normed_heads:
        tape.take(part.row)
        norm_forward(tape, part)
        tape.give(part.row)


def head_norms_backward(tape: Tape, s: Shape, split: bool) -> None:
    """The gradient of the projection is made in place. With `split`, leaves the gradients of the gains."""
    for part in s.normed_heads:
        tape.take(part.row)
        norm_backward(tape, part)
        tape.give(2 * part.row)
        tape.take(part.gains if split else 0)


def norm_linear_forward(tape: Tape, s: Shape, output: int, lean: bool, *, heads: bool = False) -> None:
    """Leaves the statistics, norm(x) unless `lean`, and the output; with `heads`, what the query/key norms keep."""
    norm_forward(tape, s)
    with tape.during(s.gathered):
        tape.take(output)
        if heads:
            head_norms_forward(tape, s)
            rotate(tape, s)
    if lean:
        tape.give(s.row)


def norm_linear_backward(tape: Tape, s: Shape, output: int, lean: bool, split: bool, *, heads: bool = False, bias: bool = True) -> None:
    """From the output's gradient to x's; frees what the forward pass left, x with it, unless `split` puts the weight gradients off."""
    if heads:
        rotate(tape, s)
        head_norms_backward(tape, s, split)
    tape.take(s.whole)
    if s.sequence_parallel:
        tape.take(s.row)
    if not split:
        norm_linear_weights(tape, s, output, lean, bias=bias)
    elif lean:
        tape.take(s.late_gains)
    if s.sequence_parallel:
        tape.give(s.whole)
    norm_backward(tape, s)
    tape.give(s.row)
    tape.give(s.head_norms if heads else 0)
    if split:
        tape.take(s.gains)
    else:
        tape.give(output + s.stats + (0 if lean else s.row) + s.row)


def norm_linear_weights(tape: Tape, s: Shape, output: int, lean: bool, *, bias: bool) -> None:
    """The weight gradients: norm(x) once more where it was not kept, and gathered."""
    if lean:
        norm_again(tape, s)
    with tape.during(s.gathered), tape.during(output // s.tokens if bias else 0):
        pass
    if lean:
        tape.give(s.row)


def row_linear_forward(tape: Tape, s: Shape) -> None:
    """Leaves the output."""
    with tape.during(s.gathered):
        tape.take(s.row)


def sum_gradients(tape: Tape, s: Shape, *, held: bool) -> None:
    """A residual's two gradients added up in a new tensor; the incoming one stays when it is `held` elsewhere."""
    tape.take(s.row)
    tape.give(s.row if held else 2 * s.row)


def attention_forward(tape: Tape, s: Shape, lean: bool) -> None:
    """Leaves the output, and the log-sum-exp of fused attention or the probabilities of unfused, those unless `lean`; qkv is there before."""
    if not s.scores:
        tape.take(s.query + s.head_stats)
        return
    with tape.during(s.query), tape.during(s.key):
        probabilities(tape, s)
    with tape.during(s.key):
        tape.take(s.query)
    if lean:
        tape.give(s.scores)
    tape.take(s.query)
    tape.give(s.query)


def probabilities(tape: Tape, s: Shape) -> None:
    """Leaves the softmax of the scores."""
    with tape.during(s.scores):
        with tape.during(s.causal_mask):
            pass
        tape.take(s.scores)


def attention_backward(tape: Tape, s: Shape, lean: bool, split: bool) -> None:
    """From the output's gradient to that of qkv; frees what the forward pass left, qkv with it, but with `split` not the output."""
    if not s.scores:
        tape.take(s.qkv)
        tape.give(s.query + s.qkv + s.head_stats + (0 if split else s.query))
        with tape.during(s.qkv):  # the gradients of query, key and value, put together in one tensor
            pass
        return
    tape.give(0 if split else s.query)  # the output, which only the projection behind it needs
    with tape.during(s.query), tape.during(s.key):
        if lean:
            probabilities(tape, s)
        tape.take(s.qkv)
        with tape.during(s.query), tape.during(s.key):
            tape.take(s.scores)
        with tape.during(s.scores):
            pass
        with tape.during(s.query):
            pass
        tape.give(s.scores)
    tape.give(s.scores + s.qkv + s.query)


def activation_backward(tape: Tape, s: Shape) -> None:
    """Leaves the gradient of the first linear's output; that of the second's input is the caller's."""
    tape.take(s.up)
    if s.gated:
        with tape.during(s.inner), tape.during(s.inner // s.e if s.relu else 0), tape.during(s.inner):
            pass
    elif s.relu:
        with tape.during(s.up // s.e):
            pass


def branch_norm_forward(tape: Tape, s: Shape, free: bool) -> None:
    """Leaves the branch before its norm and the statistics, unless `free`, and the sum with the residual; the branch is there before."""
    if s.branch_norms:
        norm_forward(tape, s)
        tape.give(s.row + s.stats if free else 0)


def branch_norm_backward(tape: Tape, s: Shape, split: bool) -> None:
    """Leaves the gradient of the branch beside that of the sum, which is the residual's too; frees what the forward pass left. With `split`, the
    gradients of the gains stay."""
    if s.branch_norms:
        norm_backward(tape, s)
        tape.give(s.row + s.stats)
        tape.take(s.gains if split else 0)
