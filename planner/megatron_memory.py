"""Activation bytes of Megatron-LM, by the published formula s·b·h·(34 + 5·a·s/h) and its variants.

Korthikanti et al. 2022 (arXiv 2205.05198): equations 1 (serial), 2 (tensor parallel), 4 (with sequence parallelism), 5 (first and last stage),
6 (selective recomputation), and 2·s·b·h for full recomputation; generalised to grouped queries and gated MLPs term by term.
"""

from __future__ import annotations

from typing import NamedTuple

from planner.activations import LayerActivations, Peak
from planner.graph import LayerKind
from planner.model import ModelSpec
from planner.plan import Decisions, Inputs, Recompute


class BlockTerms(NamedTuple):
    """A block's activations in bytes per token on one rank, at 2 bytes an element."""

    row: float
    """2h: one row of the residual stream, split by sequence parallelism."""
    rows: float
    """The inputs and outputs of both norms: 4 x 2h."""
    masks: float
    """Two dropout masks of 1 byte an element: 2h."""
    split: float
    """Queries, keys, values and attention's output; the MLP's activations: what tensor parallelism splits."""
    qkv: float
    """Queries, keys and values."""
    attention: float
    """Attention's output."""
    inner: float
    """2f."""
    up: float
    """The output of the MLP's first linear: 2f, or twice that with a gate."""
    scores: float
    """5·a·s: softmax output, dropout mask and dropout output of attention that is not fused."""
    statistics: float
    """4a: the log-sum-exp that fused attention keeps."""
    gathered: float
    """2h where sequence parallelism gathers a row for a linear layer, else 0."""


def block_terms(model: ModelSpec, sequence_length: int, tensor_parallel: int, sequence_parallel: bool) -> BlockTerms:
    """The terms of Korthikanti et al. 2022, section 4.1, for any block of `planner.model`."""
    t, h, f = tensor_parallel, model.hidden_size, model.ffn_hidden_size
    shard = t if sequence_parallel else 1
    ups = 2 if model.gated_ffn else 1
    qkv = 2 * model.query_size + 4 * model.key_value_size
    return BlockTerms(
        row=2 * h / shard,
        rows=8 * h / shard,
        masks=2 * h / shard,
        split=(qkv + 2 * model.query_size + (ups + 1) * 2 * f) / t,
        qkv=qkv / t,
        attention=2 * model.query_size / t,
        inner=2 * f / t,
        up=ups * 2 * f / t,
        scores=5 * model.num_attention_heads * sequence_length / t,
        statistics=4 * model.num_attention_heads / t,
        gathered=2 * h if sequence_parallel else 0,
    )


def megatron_activations(inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute) -> LayerActivations:
    """One layer on one rank, per micro-batch. Fused attention, where the inputs ask for it, keeps its log-sum-exp for the 5·a·s."""
    model = inputs.model
    tokens = decisions.micro_batch_size * inputs.training.sequence_length
    terms = block_terms(model, inputs.training.sequence_length, decisions.tensor_parallel, decisions.sequence_parallel)
    if kind == "embedding":
        return _of(tokens * terms.row / 2, 0.0)
    if kind == "head":
        # The logits in fp32 and the inputs of the final norm and of the projection live only while the head runs.
        return _of(0.0, tokens * (2 * terms.row + 4 * model.vocab_size / decisions.tensor_parallel))
    masks = terms.masks / 2 if model.gated_ffn else terms.masks  # a gated MLP has no dropout
    fused = inputs.training.attention == "fused"
    scores = 0.0 if fused else tokens * terms.scores
    block = tokens * (terms.rows + masks + terms.split + (terms.statistics if fused else 0))
    if recompute == "full":
        return _of(tokens * terms.row, block + scores)
    if recompute == "selective":
        return _of(block, scores)
    return _of(block + scores, 0.0)


def _of(kept: float, transient: float) -> LayerActivations:
    """What is made again in the backward pass comes on top of what is kept."""
    size, peak = round(kept), round(kept + transient)
    return LayerActivations(size, Peak(size, 0), Peak(peak, 0), size, Peak(size, 0))
