"""The reference transformer, cut by stage: which parameters each layer holds on this rank, and its forward pass.

Parameter names are global and the same under every plan: `embedding.tokens`, `blocks.7.attention.query.weight`,
`head.norm.gain`; initial values depend on the name and the seed alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from msgspec import UNSET
from torch.utils.checkpoint import checkpoint

from executor.attention import Scores, UnfusedAttention, attention, make_alibi, make_rope, make_window
from executor.functions import Norm, NormLinear, RowLinear, RowLinears, State
from executor.mesh import Mesh
from executor.norms import QueryKey
from executor.units import Entry, Layout, Piece, Unit, make_layout
from executor.vocabulary import Embed, Head, HeadLoss, head_logits, vocabulary_range
from planner.errors import InputError
from planner.model import ROPE_SCALINGS, ModelSpec
from planner.plan import Decisions, Recompute, Stage, block_levels, has_embedding, has_head, stage_blocks

INITIAL_STD = 0.02


def check_model(model: ModelSpec, tensor_parallel: int, where: str = "plan") -> None:
    """Raises InputError naming what the executor has no code for."""
    first, last = vocabulary_range(model.vocab_size, tensor_parallel - 1, tensor_parallel)
    if first >= last:
        raise InputError(f"{where}: decisions.tensor_parallel", tensor_parallel, f"some ranks would get none of {model.vocab_size} vocabulary rows")
    where = f"{where}: inputs.model"
    if not model.final_norm:
        raise InputError(f"{where}.final_norm", model.final_norm, "the executor runs models with one")
    if model.rope_scaling is not UNSET and model.rope_scaling.rope_type not in ROPE_SCALINGS:
        allowed = f"the executor scales rotary positions by {' or '.join(ROPE_SCALINGS)}"
        raise InputError(f"{where}.rope_scaling.rope_type", model.rope_scaling.rope_type, allowed)
    norms = (1, 2) if model.parallel_block else (2, 4)
    if model.num_norms_per_layer not in norms:
        allowed = " or ".join(map(str, norms))
        raise InputError(f"{where}.num_norms_per_layer", model.num_norms_per_layer, f"the executor runs such blocks with {allowed}")


# what a rank holds


def norm_entries(model: ModelSpec, key: str, name: str) -> list[Entry]:
    shape = (model.hidden_size,)
    entries = [Entry(f"{key}.gain", shape, (Piece(f"{name}.gain", shape, std=1.0),), replicated=True)]
    if model.norm == "layernorm":
        entries.append(Entry(f"{key}.bias", shape, (Piece(f"{name}.bias", shape, std=0.0),), replicated=True))
    return entries


def _rows(key: str, pieces: list[Piece]) -> Entry:
    """An entry of pieces one below the other."""
    rows = sum(piece.local_shape[0] for piece in pieces)
    return Entry(key, (rows, *pieces[0].local_shape[1:]), tuple(pieces), replicated=False)


def block_layout(model: ModelSpec, index: int, rank: int, degree: int) -> Layout:
    """The parameters of transformer block `index` on tensor-parallel rank `rank` of `degree`."""
    h, f, d, prefix = model.hidden_size, model.ffn_hidden_size, model.head_dim, f"blocks.{index}"
    copies = max(1, degree // model.num_key_value_heads)
    queries = model.num_attention_heads // degree * d
    keys = model.num_key_value_heads * copies // degree * d
    query_start, key_start = rank * queries, rank // copies * keys
    inner = f // degree

    def projections(kind: str, shape_end: tuple[int, ...], std: float) -> list[Piece]:
        found = [Piece(f"{prefix}.attention.query.{kind}", (model.query_size, *shape_end), 0, query_start, query_start + queries, std)]
        for name in ("key", "value"):
            shape = (model.key_value_size, *shape_end)
            found.append(Piece(f"{prefix}.attention.{name}.{kind}", shape, 0, key_start, key_start + keys, std, copies > 1))
        return found

    def ups(kind: str, shape_end: tuple[int, ...], std: float) -> list[Piece]:
        names = ("gate", "up") if model.gated_ffn else ("up",)
        return [Piece(f"{prefix}.mlp.{name}.{kind}", (f, *shape_end), 0, rank * inner, (rank + 1) * inner, std) for name in names]

    std, out_std = INITIAL_STD, INITIAL_STD / math.sqrt(2 * model.num_layers)
    output = Piece(f"{prefix}.attention.output.weight", (h, model.query_size), 1, query_start, query_start + queries, out_std)
    down = Piece(f"{prefix}.mlp.down.weight", (h, f), 1, rank * inner, (rank + 1) * inner, out_std)
    entries = [
        *norm_entries(model, "norm1", f"{prefix}.attention.norm"),
        *(norm_entries(model, "norm2", f"{prefix}.mlp.norm") if model.num_norms_per_layer > 1 else ()),
        _rows("qkv.weight", projections("weight", (h,), std)),
        *(norm_entries(model, "norm3", f"{prefix}.attention.output_norm") if model.num_norms_per_layer == 4 else ()),
        *(norm_entries(model, "norm4", f"{prefix}.mlp.output_norm") if model.num_norms_per_layer == 4 else ()),
        Entry("output.weight", output.local_shape, (output,), replicated=False),
        _rows("up.weight", ups("weight", (h,), std)),
        Entry("down.weight", down.local_shape, (down,), replicated=False),
    ]
    if model.qkv_bias:
        entries.append(_rows("qkv.bias", projections("bias", (), 0.0)))
    if model.attention_output_bias:
        entries.append(Entry("output.bias", (h,), (Piece(f"{prefix}.attention.output.bias", (h,), std=0.0),), replicated=True))
    if model.qk_norm:
        for name in ("query_norm", "key_norm"):
            piece = Piece(f"{prefix}.attention.{name}.gain", (d,), std=1.0)
            entries.append(Entry(f"{name}.gain", (d,), (piece,), replicated=True, partial=True))
    if model.mlp_bias:
        entries.append(_rows("up.bias", ups("bias", (), 0.0)))
        entries.append(Entry("down.bias", (h,), (Piece(f"{prefix}.mlp.down.bias", (h,), std=0.0),), replicated=True))
    return make_layout(prefix, entries)


def table_layout(model: ModelSpec, name: str, rank: int, degree: int) -> Layout:
    """The rows of a vocabulary table (the embedding's or the head's)."""
    start, stop = vocabulary_range(model.vocab_size, rank, degree)
    piece = Piece(name, (model.vocab_size, model.hidden_size), 0, start, stop, INITIAL_STD)
    return make_layout(name, [Entry("weight", piece.local_shape, (piece,), replicated=False)])


def embedding_layout(model: ModelSpec) -> Layout:
    """What the embedding holds beside its table."""
    entries = []
    if model.num_position_embeddings:
        shape = (model.num_position_embeddings, model.hidden_size)
        entries.append(Entry("positions", shape, (Piece("embedding.positions", shape, std=INITIAL_STD),), replicated=True))
    if model.embedding_norm:
        entries += norm_entries(model, "norm", "embedding.norm")
    return make_layout("embedding", entries)


def head_layout(model: ModelSpec, rank: int, degree: int) -> Layout:
    """What the head holds beside its table."""
    entries = norm_entries(model, "norm", "head.norm") if model.final_norm else []
    if model.head_bias:
        start, stop = vocabulary_range(model.vocab_size, rank, degree)
        piece = Piece("head.bias", (model.vocab_size,), 0, start, stop, 0.0)
        entries.append(Entry("bias", piece.local_shape, (piece,), replicated=False))
    return make_layout("head", entries)


# a rank's stages


@dataclass(frozen=True, slots=True)
class Shape:
    """What every layer's forward pass needs to know; counts per micro-batch."""

    micro_batch_size: int
    sequence_length: int
    rows: int
    """Rows of an activation on this rank between layers."""
    heads: tuple[int, int, int]
    """Query, key and value heads of this rank."""
    head_dim: int
    dropout: float = 0.0
    unfused_attention: bool = False
    parallel_block: bool = False
    """Whether the MLP reads the block's input, as attention does."""
    shared_norm: bool = False
    """Whether it reads it through attention's norm (one norm)."""
    branch_norms: bool = False
    """Whether what attention and MLP give goes through a norm before it is added (four norms)."""


class Enter(torch.autograd.Function):
    """Stands before a layer: in the backward pass, the layer is done, so its gradients are reduced and its weights freed."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, units: tuple[Unit, ...], state: State) -> torch.Tensor:
        ctx.units, ctx.state = units, state  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, dx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for unit in ctx.units:  # type: ignore[attr-defined]
            ctx.state.weight_gradient(unit.reduce_now)  # type: ignore[attr-defined]
            unit.release()
        return dx, None, None


class Leave(torch.autograd.Function):
    """Stands after a layer: in the backward pass, the layer begins, so its weights are gathered."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, units: tuple[Unit, ...]) -> torch.Tensor:
        ctx.units = units  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, dx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for unit in ctx.units:  # type: ignore[attr-defined]
            unit.gather()
        return dx, None


@dataclass(frozen=True, slots=True)
class Block:
    """One block's part of what `_block_forward` needs."""

    shape: Shape
    scores: Scores
    query_key: QueryKey | None


def _mix(qkv: torch.Tensor, block: Block, lean: bool) -> torch.Tensor:
    """Attention between its projections."""
    shape = block.shape
    if not shape.unfused_attention:
        return attention(qkv, shape.micro_batch_size, shape.heads, shape.head_dim, block.scores)
    mixed: torch.Tensor = UnfusedAttention.apply(qkv, shape.micro_batch_size, shape.heads, shape.head_dim, shape.dropout, lean, block.scores)
    return mixed


def _parallel_block_forward(x: torch.Tensor, state: State, unit: Unit, block: Block, lean: bool) -> torch.Tensor:
    """One pre-norm transformer block whose MLP reads the block's input, as attention does; dropout is of the sum of both."""
    shape = block.shape
    if shape.shared_norm:
        qkv, inner = NormLinear.apply(x, state, unit, "norm1", ("qkv", "up"), lean, block.query_key)
    else:
        (qkv,) = NormLinear.apply(x, state, unit, "norm1", ("qkv",), lean, block.query_key)
    mixed = _mix(qkv, block, lean)
    del qkv
    if not shape.shared_norm:
        (inner,) = NormLinear.apply(x, state, unit, "norm2", ("up",), lean, None)
    if shape.dropout:
        return x + F.dropout(RowLinears.apply(mixed, inner, None, state, unit, ("output", "down"), lean), shape.dropout)
    out: torch.Tensor = RowLinears.apply(mixed, inner, x, state, unit, ("output", "down"), lean)
    return out


def _block_forward(x: torch.Tensor, state: State, unit: Unit, block: Block, lean: bool) -> torch.Tensor:
    """One pre-norm transformer block, its MLP after its attention."""
    shape = block.shape
    (qkv,) = NormLinear.apply(x, state, unit, "norm1", ("qkv",), lean, block.query_key)
    mixed = _mix(qkv, block, lean)
    del qkv
    if not shape.dropout and not shape.branch_norms:
        attended = RowLinear.apply(mixed, x, state, unit, "output", False, lean)
        del mixed
        (inner,) = NormLinear.apply(attended, state, unit, "norm2", ("up",), lean, None)
        out: torch.Tensor = RowLinear.apply(inner, attended, state, unit, "down", True, lean)
        return out
    branch = RowLinear.apply(mixed, None, state, unit, "output", False, lean)
    del mixed
    attended = _add_branch(branch, x, state, unit, "norm3", shape)
    del branch
    (inner,) = NormLinear.apply(attended, state, unit, "norm2", ("up",), lean, None)
    return _add_branch(RowLinear.apply(inner, None, state, unit, "down", True, lean), attended, state, unit, "norm4", shape)


def _add_branch(branch: torch.Tensor, residual: torch.Tensor, state: State, unit: Unit, norm: str, shape: Shape) -> torch.Tensor:
    """residual + branch, the latter normed where the block has four norms, and with dropout where there is any."""
    if not shape.dropout:
        out: torch.Tensor = Norm.apply(branch, residual, state, unit, norm)
        return out
    return residual + F.dropout(Norm.apply(branch, None, state, unit, norm) if shape.branch_norms else branch, shape.dropout)


Forward = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(activations, tokens or targets) -> activations, or the loss."""


class StageModel:
    """One stage: its units in the order of its layers, and its forward pass."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.units: list[Unit] = []
        self.layers: list[tuple[tuple[Unit, ...], Forward]] = []
        self.has_embedding = False
        self.has_head = False
        self.constants: tuple[torch.Tensor, ...] = ()
        """Tables that its blocks read and no step changes; stages of one rank share them."""
        self.logits: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Activations before the final norm to this rank's logits, on the last stage."""

    def forward(self, x: torch.Tensor, tokens: torch.Tensor | None, targets: torch.Tensor | None, state: State) -> torch.Tensor:
        """Activations [rows, h] (or `tokens` [tokens] on the first stage) to activations, or on the last stage to the loss of `targets`."""
        last = len(self.layers) - 1
        for position, (units, layer) in enumerate(self.layers):
            extra = tokens if self.has_embedding and position == 0 else targets if self.has_head and position == last else None
            zero = units[0].zero_stage
            if zero >= 2:
                x = Enter.apply(x, units, state)
                for unit in units:
                    unit.gather()
            x = layer(x, extra)
            if zero >= 2:
                for unit in units:
                    unit.release()
                x = Leave.apply(x, units)
        return x


def build_stages(
    model: ModelSpec,
    decisions: Decisions,
    sequence_length: int,
    mesh: Mesh,
    state: State,
    *,
    dtype: torch.dtype,
    device: torch.device,
    dropout: float = 0.0,
    unfused_attention: bool = False,
) -> dict[int, StageModel]:
    """This rank's stages by their index, weights zero until initialised."""
    degree, rank = decisions.tensor_parallel, mesh.tp.index
    batch = decisions.micro_batch_size
    tokens = batch * sequence_length
    key_heads = max(1, model.num_key_value_heads // degree)
    heads = (model.num_attention_heads // degree, key_heads, key_heads)
    rows = tokens // degree if decisions.sequence_parallel else tokens
    shared_norm = model.num_norms_per_layer == 1
    branch_norms = model.num_norms_per_layer == 4
    shape = Shape(batch, sequence_length, rows, heads, model.head_dim, dropout, unfused_attention, model.parallel_block, shared_norm, branch_norms)
    rope = make_rope(sequence_length, heads[0] + heads[1], model, device) if model.position_embedding == "rope" else None
    query_key = QueryKey(heads[:2], model.head_dim, rope, model.norm_epsilon, model.qk_norm) if rope is not None or model.qk_norm else None
    scores_of = _make_scores(model, sequence_length, unfused_attention, rank * heads[0], (rank + 1) * heads[0], dtype, device)

    def make_unit(layout: Layout) -> Unit:
        return Unit(
            layout,
            mesh,
            dtype=dtype,
            device=device,
            zero_stage=decisions.zero_stage,
            sequence_parallel=decisions.sequence_parallel,
        )

    start = vocabulary_range(model.vocab_size, rank, degree)[0]
    stages: dict[int, StageModel] = {}
    table: Unit | None = None
    for index, stage in enumerate(decisions.stages):
        if stage.pipeline_rank != mesh.pp.index:
            continue
        built = stages[index] = StageModel(index)
        built.has_embedding, built.has_head = has_embedding(stage), has_head(stage, model)
        if built.has_embedding:
            table = make_unit(table_layout(model, "embedding.tokens", rank, degree))
            _add_embedding(built, model, table, make_unit, state, start, sequence_length, dropout)
        _add_blocks(built, model, stage, make_unit, state, lambda block: Block(shape, scores_of(block), query_key), rank, degree)
        if len(stage_blocks(stage, model)):
            built.constants = (rope.cosine, rope.sine) if rope is not None else ()
            built.constants += tuple(bias for block in stage_blocks(stage, model) if (bias := scores_of(block).bias) is not None)
        if built.has_head:
            own = table if model.tied_embeddings else None
            if own is None:
                own = make_unit(table_layout(model, "embedding.tokens" if model.tied_embeddings else "head.weight", rank, degree))
                own.tied_copy = model.tied_embeddings
                built.units.append(own)
            softcap = None if model.head_softcap is UNSET else model.head_softcap
            _add_head(built, Head(own, make_unit(head_layout(model, rank, degree)), start, softcap), state)
    return stages


def _make_scores(
    model: ModelSpec, length: int, unfused: bool, first_head: int, last_head: int, dtype: torch.dtype, device: torch.device
) -> Callable[[int], Scores]:
    """What happens to the scores of block i, as a function of i. Blocks share their tensors, which are made when they are first needed."""
    softcap = None if model.attention_softcap is UNSET else model.attention_softcap
    if softcap is not None and not unfused:
        allowed = f"unfused is expected: {model.name} has soft-capped scores, which no fused kernel has"
        raise InputError("plan: inputs.training.attention", "fused", allowed)

    @functools.cache
    def bias(window: int | None) -> torch.Tensor | None:
        if model.position_embedding == "alibi":
            return make_alibi(length, model.num_attention_heads, first_head, last_head, dtype, device)
        return None if window is None else make_window(length, window, dtype, device)

    return lambda block: Scores(model.scores_scale, softcap, bias(model.window_of(block, length)))


def _add_embedding(
    built: StageModel, model: ModelSpec, table: Unit, make_unit: Callable[[Layout], Unit], state: State, start: int, length: int, dropout: float
) -> None:
    layout = embedding_layout(model)
    unit = make_unit(layout) if layout.entries else None
    scale = float(torch.tensor(model.hidden_size**0.5, dtype=table.dtype)) if model.embedding_scaled is True else 1.0

    def forward(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = Embed.apply(x, tokens, state, table, unit, start, length, scale)
        if model.embedding_norm:
            out = Norm.apply(out, None, state, unit, "norm")
        return F.dropout(out, dropout) if dropout else out

    units = (table,) if unit is None else (table, unit)
    built.units.extend(units)
    built.layers.append((units, forward))


def _add_blocks(
    built: StageModel,
    model: ModelSpec,
    stage: Stage,
    make_unit: Callable[[Layout], Unit],
    state: State,
    block_of: Callable[[int], Block],
    rank: int,
    degree: int,
) -> None:
    for block, level in zip(stage_blocks(stage, model), block_levels(stage, model), strict=True):
        unit = make_unit(block_layout(model, block, rank, degree))
        built.units.append(unit)
        built.layers.append(((unit,), _make_block(state, unit, block_of(block), level)))


def _make_block(state: State, unit: Unit, block: Block, level: Recompute) -> Forward:
    lean = level == "selective"
    run = _parallel_block_forward if block.shape.parallel_block else _block_forward
    if level != "full":
        return lambda x, _: run(x, state, unit, block, lean)

    def forward(x: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = checkpoint(
            run,
            x,
            state,
            unit,
            block,
            False,
            use_reentrant=False,
            preserve_rng_state=block.shape.dropout > 0,
            determinism_check="none",
        )
        return out

    return forward


def _add_head(built: StageModel, head: Head, state: State) -> None:
    def forward(x: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        loss: torch.Tensor = HeadLoss.apply(x, targets, state, head)
        return loss

    built.units.append(head.unit)
    built.layers.append(((head.table, head.unit), forward))
    built.logits = lambda x: head_logits(x, state, head)
