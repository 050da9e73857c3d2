"""What a rank holds of a model's tensors, as rectangles of the global ones: a shard of a flat buffer is a run of elements of each piece, which is at
most three rectangles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from executor.optimizer import UnitOptimizer
from executor.rank import RankTrainer
from executor.units import Piece


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a global tensor that this rank holds."""

    name: str
    offsets: tuple[int, ...]
    size: tuple[int, ...]
    """The global tensor's."""
    tensor: torch.Tensor

    @property
    def key(self) -> str:
        return f"{self.name}@{','.join(map(str, self.offsets))}"

    @property
    def storage(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)


def rectangles(piece: Piece, first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Elements `first:last` of a piece, row by row, as (offsets in the whole parameter, shape, elements before it)."""
    if len(piece.shape) == 1:
        yield (piece.start + first,), (last - first,), 0
        return
    columns = piece.local_shape[1]
    row_start, column_start = (piece.start, 0) if piece.dim == 0 else (0, piece.start)
    position = first
    while position < last:
        row, column = divmod(position, columns)
        rows = (last - position) // columns if column == 0 else 0
        width = columns if rows else min(columns - column, last - position)
        yield (row_start + row, column_start + column), (max(rows, 1), width), position - first
        position += max(rows, 1) * width


def chunks(optimizer: UnitOptimizer, *, owned_only: bool) -> Iterator[Chunk]:
    """The unit's part of every stored tensor. With `owned_only`, without what another rank stores."""
    unit = optimizer.unit
    if owned_only and (unit.tied_copy or unit.replicate.index or (unit.zero_stage == 0 and unit.dp.index)):
        return
    tensors = {"model": optimizer.master if optimizer.master is not None else unit.weight_shard}
    tensors |= {name: tensor for name, tensor in optimizer.tensors.items() if name != "master"}
    low, high = unit.shard_start, unit.shard_start + unit.shard_numel
    for entry, offset in zip(unit.layout.entries, unit.layout.offsets, strict=True):
        for piece in entry.pieces:
            elsewhere = (entry.replicated and unit.tp.index > 0) or (piece.copies and unit.key_value.index > 0)
            first, last = max(offset, low), min(offset + piece.numel, high)
            if first < last and not (owned_only and elsewhere):
                for offsets, shape, before in rectangles(piece, first - offset, last - offset):
                    start = first - low + before
                    for kind, flat in tensors.items():
                        part = flat[start : start + torch.Size(shape).numel()].view(shape)
                        yield Chunk(f"{kind}.{piece.name}", offsets, piece.shape, part)
            offset += piece.numel


def all_chunks(trainer: RankTrainer, *, owned_only: bool) -> list[Chunk]:
    """All that a rank stores or, without `owned_only`, reads."""
    found = [chunk for optimizer in trainer.optimizers for chunk in chunks(optimizer, owned_only=owned_only)]
    if not (owned_only and trainer.mesh.dp.index):
        for name, tensor in trainer.buffers.items():
            found.append(Chunk(f"buffer.{name}", (0,), (tensor.numel(),), tensor.view(-1)))
    return found
