"""Activation bytes of this package's executor, layer by layer: what a layer keeps for its backward pass, and its peaks.

Each layer here follows the executor's layer, function by function (`planner.function_activations`), on a `Tape` that adds up the
live bytes; the result is a closed form, the largest of a handful of sums. `docs/memory.md` has the sums written out.

Symbols as in `planner.model`, per tensor-parallel rank: T tokens of a micro-batch, R rows of an activation between layers (T, or T/t
under sequence parallelism), e bytes of an element. Every layer counts its own input among what it keeps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from planner.function_activations import (
    activation_backward,
    attention_backward,
    attention_forward,
    branch_norm_backward,
    branch_norm_forward,
    norm_again,
    norm_backward,
    norm_forward,
    norm_linear_backward,
    norm_linear_forward,
    norm_linear_weights,
    row_linear_forward,
    sum_gradients,
)
from planner.graph import LayerKind
from planner.plan import Recompute
from planner.shapes import Shape, Tape

HEAD_CHUNK_ELEMENTS = 1 << 22
"""Logits that the executor's loss handles at a time in fp32."""


def parallel_block_forward(tape: Tape, s: Shape, level: Recompute) -> None:
    """As `block_forward`, the MLP beside attention."""
    before = tape.live
    lean = level == "selective"
    free = level == "full"
    norm_linear_forward(tape, s, s.qkv + (s.up if s.shared_norm else 0), lean, heads=True)
    if free:
        tape.give(s.row + s.stats + s.head_norms)
    attention_forward(tape, s, lean)
    if free:
        tape.give(s.head_stats + s.scores + s.qkv)
    if not s.shared_norm:
        norm_linear_forward(tape, s, s.up, lean)
        if free:
            tape.give(s.row + s.stats)
    tape.take(s.inner)
    row_linear_forward(tape, s)
    if lean:
        tape.give(s.inner)
    if free:
        tape.live = before + s.row


def parallel_block_backward(tape: Tape, s: Shape, level: Recompute, held: bool, split: bool) -> None:
    """As `block_backward`, the MLP beside attention."""
    lean = level == "selective"
    if level == "full":
        parallel_block_forward(tape, s, "none")
        tape.give(s.row)
    bias = s.hidden * s.e if s.biases else 0
    kept = split and not s.sequence_parallel
    tape.take(s.gathered)
    with tape.during(s.inner):
        tape.take(bias)
        if not split:
            tape.take_buffer(s.gradients_buffer)
            with tape.during(s.inner if lean else 0):
                pass
        activation_backward(tape, s)
    tape.take(s.query)
    if not split:
        tape.give(s.gathered + bias + s.up + (0 if lean else s.inner))
    if not s.shared_norm:
        norm_linear_backward(tape, s, s.up, lean, split, bias=s.biases)
        tape.take(0 if split else s.row)  # the block's input, which attention's norm still needs
        sum_gradients(tape, s, held=held or kept)
    attention_backward(tape, s, lean, split)
    norm_linear_backward(tape, s, s.qkv + (s.up if s.shared_norm else 0), lean, split, heads=True, bias=s.biases)
    sum_gradients(tape, s, held=(held or kept) and s.shared_norm)


def parallel_block_weights(tape: Tape, s: Shape, level: Recompute) -> None:
    """As `block_weights`, the MLP beside attention."""
    lean = level == "selective"
    tape.take_buffer(s.gradients_buffer)
    with tape.during(s.inner if lean else 0):
        pass
    tape.give(s.whole + (s.hidden * s.e if s.biases else 0) + s.up + (0 if lean else s.inner) + s.query)
    norm = s.stats + (s.late_gains if lean else s.row) + s.gains
    if not s.shared_norm:
        norm_linear_weights(tape, s, s.up, lean, bias=s.biases)
        tape.give(s.up + norm)
    output = s.qkv + (s.up if s.shared_norm else 0)
    norm_linear_weights(tape, s, output, lean, bias=s.biases)
    tape.give(output + norm + s.row + sum(part.gains for part in s.normed_heads))


def block_forward(tape: Tape, s: Shape, level: Recompute) -> None:
    """Leaves what the block keeps and its output; its input is there before."""
    if s.parallel:
        return parallel_block_forward(tape, s, level)
    before = tape.live
    lean = level == "selective"
    free = level == "full"
    norm_linear_forward(tape, s, s.qkv, lean, heads=True)
    if free:
        tape.give(s.row + s.stats + s.head_norms)
    attention_forward(tape, s, lean)
    if free:
        tape.give(s.head_stats + s.scores + s.qkv)
    row_linear_forward(tape, s)
    if free:
        tape.give(s.query)
    branch_norm_forward(tape, s, free)
    norm_linear_forward(tape, s, s.up, lean)
    if free:
        tape.give(s.row + s.stats)
    tape.take(s.inner)
    row_linear_forward(tape, s)
    branch_norm_forward(tape, s, free)
    if lean:
        tape.give(s.inner)
    if free:
        tape.live = before + s.row


def block_backward(tape: Tape, s: Shape, level: Recompute, held: bool, split: bool) -> None:
    """From the gradient of the output (live before) to that of the input.

    Frees what the block kept, or with `split` leaves what its weight gradients need. An output gradient that is `held` elsewhere stays.
    """
    if s.parallel:
        return parallel_block_backward(tape, s, level, held, split)
    lean = level == "selective"
    if level == "full":
        # once more forward; the output is made, and dropped since the backward pass does not need it
        block_forward(tape, s, "none")
        tape.give(s.row)
    bias = s.hidden * s.e if s.biases else 0
    kept = split and not s.sequence_parallel and not s.branch_norms
    branch = s.row if s.branch_norms and not (split and not s.sequence_parallel) else 0
    branch_norm_backward(tape, s, split)
    if s.branch_norms and not split:
        tape.take_buffer(s.gradients_buffer)
    tape.take(s.gathered)
    with tape.during(s.inner):
        tape.take(bias)
        if not split and not s.branch_norms:
            tape.take_buffer(s.gradients_buffer)
            with tape.during(s.inner if lean else 0):
                pass
        activation_backward(tape, s)
    tape.give(branch)
    if not split:
        tape.give(s.gathered + bias + s.up + (0 if lean else s.inner))
    norm_linear_backward(tape, s, s.up, lean, split, bias=s.biases)
    sum_gradients(tape, s, held=held or kept)
    branch_norm_backward(tape, s, split)
    tape.take(s.gathered)
    tape.take(s.query)
    tape.take(bias)
    tape.give(branch)
    if not split:
        tape.give(s.gathered + bias)
    attention_backward(tape, s, lean, split)
    norm_linear_backward(tape, s, s.qkv, lean, split, heads=True, bias=s.biases)
    sum_gradients(tape, s, held=kept)


def block_weights(tape: Tape, s: Shape, level: Recompute) -> None:
    """The weight gradients that a split backward pass put off; frees all that it left."""
    if s.parallel:
        return parallel_block_weights(tape, s, level)
    lean = level == "selective"
    bias = s.hidden * s.e if s.biases else 0
    gradient = s.whole
    tape.take_buffer(s.gradients_buffer)
    tape.give(2 * s.gains if s.branch_norms else 0)
    with tape.during(s.inner if lean else 0):
        pass
    tape.give(gradient + bias + s.up + (0 if lean else s.inner))
    norm_linear_weights(tape, s, s.up, lean, bias=s.biases)
    norm = s.stats + (s.late_gains if lean else s.row) + s.row + s.gains
    tape.give(s.up + norm)
    tape.give(gradient + bias + s.query)
    norm_linear_weights(tape, s, s.qkv, lean, bias=s.biases)
    tape.give(s.qkv + norm + sum(part.gains for part in s.normed_heads))


def embedding_forward(tape: Tape, s: Shape) -> None:
    """Leaves what the embedding keeps (masked tokens, where the table is split) and its output."""
    if s.split:
        with tape.during(3 * s.tokens):
            pass
        tape.take(9 * s.tokens)
    with tape.during(s.gathered):
        tape.take(s.row)
    if s.positions:
        with tape.during(8 * s.rows), tape.during(s.row):
            pass
    if s.embedding_norm:
        norm_forward(tape, s)


def embedding_backward(tape: Tape, s: Shape, split: bool) -> None:
    """Frees what the embedding kept and the gradient of its output, or with `split` leaves them."""
    if s.embedding_norm:
        norm_backward(tape, s)
        tape.give(2 * s.row + s.stats)
    if not split:
        embedding_weights(tape, s)


def embedding_weights(tape: Tape, s: Shape) -> None:
    tape.take_buffer(s.gradients_buffer)
    if s.positions:
        with tape.during(8 * s.rows):
            pass
    with tape.during(s.gathered), tape.during(s.whole if s.split else 0):
        pass
    with tape.during(s.whole if s.split else 0):
        tape.take_buffer(s.table_buffer)
    tape.give(s.row + (9 * s.tokens if s.split else 0))


def _chunk_bytes(s: Shape) -> int:
    """fp32 logits of one chunk of rows, and a figure for each row."""
    return min(s.tokens, max(1, HEAD_CHUNK_ELEMENTS // s.vocabulary)) * (s.vocabulary + 1) * 4


def head_forward(tape: Tape, s: Shape) -> None:
    """Leaves what the head keeps: statistics, logits, and two fp32 figures a token; its input is there before."""
    norm_forward(tape, s)
    logits = s.tokens * s.vocabulary * s.e
    with tape.during(s.gathered):
        tape.take(logits)
    tape.give(s.row)
    tape.take(3 * 4 * s.tokens)
    with tape.during(9 * s.tokens), tape.during(_chunk_bytes(s)):
        pass
    tape.give(4 * s.tokens)


def head_backward(tape: Tape, s: Shape, split: bool) -> None:
    """Leaves the gradient of the head's input; frees what the head kept, its input with it, unless `split`."""
    with tape.during(9 * s.tokens + 2 * 4 * s.tokens), tape.during(_chunk_bytes(s) * (2 if s.head_softcap else 1)):
        pass
    tape.take(s.whole)
    if s.sequence_parallel:
        tape.take(s.row)
        tape.give(s.whole)
    if not split:
        head_weights(tape, s)
    else:
        tape.take(s.late_gains)
    norm_backward(tape, s)
    tape.give(s.row)
    tape.give(8 * s.tokens)
    if split:
        tape.take(s.gains)
    else:
        tape.give(s.row + s.stats + s.tokens * s.vocabulary * s.e)


def head_weights(tape: Tape, s: Shape) -> None:
    norm_again(tape, s)
    tape.take_buffer(s.table_buffer)
    with tape.during(s.gathered):
        pass
    tape.give(s.row)


class Peak(NamedTuple):
    """Bytes at the moment when a layer needs most: activations, and buffers beside them."""

    activations: int
    buffers: int


class LayerActivations(NamedTuple):
    """One layer, per micro-batch. The peaks include what the layer keeps, its input, and the gradient of its output."""

    kept: int
    """From the forward to the backward pass, the layer's input included."""
    forward: Peak
    backward: Peak
    """Of a backward pass, or of its part for the inputs when it is split."""
    deferred: int
    """Kept from the inputs' part of a split backward pass to the weights' part."""
    weights: Peak


@functools.lru_cache(maxsize=8192)
def layer_activations(s: Shape, kind: LayerKind, level: Recompute = "none", held: bool = False, split: bool = False) -> LayerActivations:
    """The closed forms of one layer. `held` says that the gradient of its output stays live to the end of the stage."""
    tape, back, weights = Tape(), Tape(), Tape()
    tape.take_buffer(s.weights_buffer)
    if kind != "embedding":
        tape.take(s.row)
    if kind == "embedding":
        embedding_forward(tape, s)
    elif kind == "head":
        head_forward(tape, s)
    else:
        block_forward(tape, s, level)
    kept = tape.live - (0 if kind == "head" else s.row)
    gradient = 0 if kind == "head" else s.row
    back.take_buffer(s.weights_buffer)
    back.take(kept + gradient)
    if kind == "embedding":
        embedding_backward(back, s, split)
        deferred = back.live
    elif kind == "head":
        head_backward(back, s, split)
        deferred = back.live - s.row
    else:
        block_backward(back, s, level, held, split)
        deferred = back.live - s.row - (s.row if held and (s.sequence_parallel or s.branch_norms or not split) else 0)
    weights.take(deferred)
    if split:
        if kind == "embedding":
            embedding_weights(weights, s)
        elif kind == "head":
            head_weights(weights, s)
        else:
            block_weights(weights, s, level)
    return LayerActivations(kept, _peak(tape), _peak(back), deferred, _peak(weights))


def _peak(tape: Tape) -> Peak:
    return Peak(tape.peak, tape.peak_buffers)
