"""Sizes of the tensors that a model's layers handle on one rank, and the tape on which they are added up."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import UNSET

from planner.model import ModelSpec
from planner.plan import Decisions, Inputs


class Tape:
    """Live bytes: activations, and the buffers (gathered weights, gradients before their reduction) beside them."""

    def __init__(self) -> None:
        self.live = 0
        self.buffers = 0
        self.peak = 0
        self.peak_buffers = 0

    def take(self, size: int) -> None:
        self.live += size
        self._see()

    def give(self, size: int) -> None:
        self.live -= size

    def take_buffer(self, size: int) -> None:
        self.buffers += size
        self._see()

    def give_buffer(self, size: int) -> None:
        self.buffers -= size

    @contextmanager
    def during(self, size: int) -> Iterator[None]:
        """`size` bytes live inside the block."""
        self.take(size)
        yield
        self.give(size)

    def _see(self) -> None:
        if self.live + self.buffers > self.peak + self.peak_buffers:
            self.peak, self.peak_buffers = self.live, self.buffers


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes in bytes of the tensors that the layers of a model handle on one rank, per micro-batch."""

    row: int
    """R·h·e: an activation between layers."""
    whole: int
    """T·h·e."""
    query: int
    """T·(a/t)·d·e, and of the keys (and of the values) in `key`."""
    key: int
    inner: int
    """T·(f/t)·e: the input of the MLP's second linear."""
    up: int
    """The output of its first: as `inner`, or twice that with a gate."""
    rows: int
    """R, and T in `tokens`."""
    tokens: int
    vocabulary: int
    """V/t rows of the table on this rank."""
    head_stats: int
    """T·(a/t)·4: the fp32 log-sum-exp of fused attention; 0 where it is not fused."""
    scores: int
    """T·(a/t)·s·e: the scores of attention that is not fused, and as many bytes its probabilities; 0 where it is fused."""
    causal_mask: int
    """s²: which scores are masked, in bytes, for every sample and head; 0 where attention is fused."""
    rotated: int
    """Bytes of half of what is turned in the query and key heads."""
    rope: int
    """S·r/2 with r turned elements of a head: elements of a rotary table; 0 without rotary positions."""
    e: int
    hidden: int
    layernorm: bool
    gated: bool
    relu: bool
    biases: bool
    parallel: bool
    """Whether the MLP reads the block's input, as attention does."""
    shared_norm: bool
    """Whether through attention's norm (one norm a block)."""
    split: bool
    """Whether t > 1."""
    sequence_parallel: bool
    positions: bool
    embedding_norm: bool
    final_norm: bool
    heads: tuple[int, int]
    """Query and key heads of this rank."""
    head_dim: int
    qk_norm: bool
    branch_norms: bool
    """Whether what attention and MLP give goes through a norm before it is added (four norms a block)."""
    head_softcap: bool
    weights_buffer: int = 0
    """Gathered weights of the layer at hand, under ZeRO-3."""
    gradients_buffer: int = 0
    """Its gradients before they are reduced, under ZeRO-2 and 3; those of a vocabulary table apart in `table_buffer`."""
    table_buffer: int = 0

    @property
    def qkv(self) -> int:
        return self.query + 2 * self.key

    @property
    def row32(self) -> int:
        """An fp32 copy of a row tensor."""
        return self.row // self.e * 4

    @property
    def stats(self) -> int:
        """A norm's statistics."""
        return self.rows * (2 * self.e if self.layernorm else 4)

    @property
    def gains(self) -> int:
        """The gradients of a norm's parameters."""
        return self.hidden * (2 * self.e if self.layernorm else 4)

    @functools.cached_property
    def normed_heads(self) -> tuple[Shape, ...]:
        """For the query and the key heads, sizes under which their norm is one of rows of D elements; empty without such norms."""
        if not self.qk_norm:
            return ()
        parts = zip((self.query, self.key), self.heads, strict=True)
        alike = dataclasses.replace(self, hidden=self.head_dim, layernorm=False, qk_norm=False)
        return tuple(dataclasses.replace(alike, row=size, rows=self.tokens * heads) for size, heads in parts)

    @property
    def head_norms(self) -> int:
        """What the query/key norms keep: the heads before them, and their statistics."""
        return sum(part.row + part.stats for part in self.normed_heads)

    @property
    def late_gains(self) -> int:
        """Copies of a norm's parameters for a weight gradient that is put off, where ZeRO-3 frees the originals before."""
        return self.hidden * self.e * (2 if self.layernorm else 1) if self.weights_buffer else 0

    @property
    def gathered(self) -> int:
        """The buffer of a gather of rows; 0 without sequence parallelism, which needs none."""
        return self.whole if self.sequence_parallel else 0


def shape_of(inputs: Inputs, decisions: Decisions, buffers: tuple[int, int, int] = (0, 0, 0)) -> Shape:
    """The sizes for a plan; `decisions.stages` is not read."""
    return _shape(
        inputs.model,
        decisions.tensor_parallel,
        decisions.sequence_parallel,
        decisions.micro_batch_size * inputs.training.sequence_length,
        inputs.training.sequence_length,
        4 if inputs.training.precision == "fp32" else 2,
        inputs.training.attention == "unfused",
        buffers,
    )


@functools.lru_cache(maxsize=4096)
def _shape(
    model: ModelSpec, t: int, sequence_parallel: bool, tokens: int, length: int, e: int, unfused: bool, buffers: tuple[int, int, int]
) -> Shape:
    rows = tokens // t if sequence_parallel else tokens
    heads = model.num_attention_heads // t
    key_heads = max(model.num_key_value_heads // t, 1)
    inner = tokens * (model.ffn_hidden_size // t) * e
    return Shape(
        row=rows * model.hidden_size * e,
        whole=tokens * model.hidden_size * e,
        query=tokens * heads * model.head_dim * e,
        key=tokens * key_heads * model.head_dim * e,
        inner=inner,
        up=inner * (2 if model.gated_ffn else 1),
        rows=rows,
        tokens=tokens,
        vocabulary=-(-model.vocab_size // t),
        head_stats=0 if unfused else tokens * heads * 4,
        scores=tokens * heads * length * e if unfused else 0,
        causal_mask=length * length if unfused else 0,
        rotated=tokens * (heads + key_heads) * (model.rotary_size // 2) * e,
        rope=length * (model.rotary_size // 2),
        e=e,
        hidden=model.hidden_size,
        layernorm=model.norm == "layernorm",
        gated=model.gated_ffn,
        relu=model.activation == "relu",
        biases=model.mlp_bias,
        parallel=model.parallel_block,
        shared_norm=model.num_norms_per_layer == 1,
        split=t > 1,
        sequence_parallel=sequence_parallel,
        positions=model.num_position_embeddings > 0,
        embedding_norm=model.embedding_norm,
        heads=(heads, key_heads),
        head_dim=model.head_dim,
        qk_norm=model.qk_norm,
        branch_norms=model.num_norms_per_layer == 4,
        head_softcap=model.head_softcap is not UNSET,
        final_norm=model.final_norm,
        weights_buffer=buffers[0],
        gradients_buffer=buffers[1],
        table_buffer=buffers[2],
    )
