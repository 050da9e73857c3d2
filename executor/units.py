"""A layer's parameters in flat buffers: what is sharded, gathered, reduced and updated as one.

A *unit* is one layer of the chain (embedding, block, head) or a vocabulary table. Its weights lie one after the other in one flat
buffer, its gradients in another, so that a reduction, a gather or an optimizer step is a few calls on
long vectors. A *piece* is a rectangle of one global parameter; an *entry* is what the layer computes with: one or more pieces
in a row (query, key and value are three pieces of one entry).

Order in the buffer: sharded then replicated entries with weight decay, then replicated (the partial ones last) and sharded ones without. So
"decayed", "replicated over the tensor-parallel ranks" and "partial" are single ranges.

| ZeRO | weights | gradients | optimizer |
| --- | --- | --- | --- |
| 0 | whole | whole | whole |
| 1 | whole | whole | shard |
| 2 | whole | shard; whole for one unit while its gradients are computed | shard |
| 3 | shard; whole for one unit while it computes | as 2 | shard |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from executor.mesh import DONE, Axis, Mesh


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start:stop` along `dim` of the global parameter `name`."""

    name: str
    shape: tuple[int, ...]
    """The whole parameter's."""
    dim: int = 0
    start: int = 0
    stop: int = -1
    std: float = 0.02
    """Of its normal initialisation; 0 for zeros, 1 in a vector for ones (gains)."""
    copies: bool = False
    """Whether other tensor-parallel ranks hold the same key-value heads."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        stop = self.shape[self.dim] if self.stop < 0 else self.stop
        return (*self.shape[: self.dim], stop - self.start, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        stop = self.shape[self.dim] if self.stop < 0 else self.stop
        return whole.narrow(self.dim, self.start, stop - self.start)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that a layer computes with."""

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replicated: bool
    """Whether all tensor-parallel ranks hold it whole."""
    partial: bool = False
    """Whether each of these finds only a part of its gradient, with sequence parallelism and without (a norm that heads share)."""

    @property
    def decayed(self) -> bool:
        return len(self.shape) > 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The order and offsets of a unit's entries in its flat buffers; counts of elements."""

    name: str
    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]
    numel: int
    num_decayed: int
    replicated: tuple[int, int]
    """First and last + 1 element of the replicated range."""
    num_partial: int
    """Elements at the end of that range whose gradients are parts."""

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        """Every piece with its offset."""
        for entry, offset in zip(self.entries, self.offsets, strict=True):
            for piece in entry.pieces:
                yield piece, offset
                offset += piece.numel


def make_layout(name: str, entries: list[Entry]) -> Layout:
    """Puts the entries in the order that the module describes."""
    order = sorted(entries, key=lambda entry: (not entry.decayed, entry.replicated == entry.decayed, entry.partial))
    offsets, offset = [], 0
    for entry in order:
        offsets.append(offset)
        offset += entry.numel
    decayed = sum(entry.numel for entry in order if entry.decayed)
    first = sum(entry.numel for entry in order if entry.decayed and not entry.replicated)
    last = first + sum(entry.numel for entry in order if entry.replicated)
    partial = sum(entry.numel for entry in order if entry.partial)
    return Layout(name, tuple(order), tuple(offsets), offset, decayed, (first, last), partial)


class Unit:
    """The weights and gradients of one layer on this rank.

    `w[key]` are the weights (present while gathered); `gradient(key)` is where the gradient of an entry is added up.
    """

    def __init__(
        self,
        layout: Layout,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        device: torch.device,
        zero_stage: int,
        sequence_parallel: bool,
    ) -> None:
        self.layout = layout
        self.zero_stage = zero_stage
        self.dtype = dtype
        self.device = device
        self.axis: Axis = mesh.shard
        self.replicate: Axis = mesh.replicate
        self.dp: Axis = mesh.dp
        self.tp: Axis = mesh.tp
        self.key_value: Axis = mesh.key_value
        self.sequence_parallel = sequence_parallel
        self.tied_copy = False
        """Whether another rank holds the same table and counts it."""
        parts = self.axis.size if zero_stage else 1
        self.shard_numel = -(-layout.numel // parts)
        self.padded_numel = self.shard_numel * parts
        self.shard_start = self.shard_numel * self.axis.index if zero_stage else 0
        self.keys = frozenset(entry.key for entry in layout.entries)
        self.w: dict[str, torch.Tensor] = {}
        self.weights: torch.Tensor | None = None
        self.grads: torch.Tensor | None = None
        self._gradient_views: dict[str, torch.Tensor] = {}
        self.num_users = 0
        self.on_allocate: Callable[[torch.Tensor, str], None] = lambda tensor, category: None
        shard = self.shard_numel
        if zero_stage == 3:
            self.weight_shard = torch.zeros(shard, dtype=dtype, device=device)
        else:
            self._adopt_weights(torch.zeros(self.padded_numel, dtype=dtype, device=device))
            assert self.weights is not None
            self.weight_shard = self.weights.narrow(0, self.shard_start, shard)
        if zero_stage >= 2:
            self.grad_shard = torch.zeros(shard, dtype=dtype, device=device)
        else:
            self._adopt_grads(torch.zeros(self.padded_numel, dtype=dtype, device=device))
            assert self.grads is not None
            self.grad_shard = self.grads.narrow(0, self.shard_start, shard)

    # weights

    def _adopt_weights(self, flat: torch.Tensor) -> None:
        self.weights = flat
        self.w = self._views(flat)

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        layout = self.layout
        return {
            entry.key: flat.narrow(0, offset, entry.numel).view(entry.shape)
            for entry, offset in zip(layout.entries, layout.offsets, strict=True)
        }

    def gather(self) -> None:
        """Makes the weights whole (ZeRO-3); calls nest."""
        self.num_users += 1
        if self.zero_stage < 3 or self.num_users > 1:
            return
        flat = torch.empty(self.padded_numel, dtype=self.dtype, device=self.device)
        self.on_allocate(flat, "buffers")
        self.axis.all_gather(flat, self.weight_shard)
        self._adopt_weights(flat)

    def release(self) -> None:
        """Frees the whole weights again."""
        self.num_users -= 1
        if self.zero_stage == 3 and self.num_users == 0:
            self.weights = None
            self.w = {}

    def gather_updated(self) -> Any:
        """After the optimizer's step on the shard: starts to bring every rank's part into the whole weights. Returns a handle to wait on."""
        if self.zero_stage not in (1, 2):
            return DONE
        assert self.weights is not None
        return self.axis.all_gather(self.weights, self.weight_shard, wait=False)

    # gradients

    def _adopt_grads(self, flat: torch.Tensor) -> None:
        self.grads = flat
        self._gradient_views = self._views(flat)

    def gradient(self, key: str) -> torch.Tensor:
        """Where the gradient of an entry is added up, in the shape of the entry."""
        if self.grads is None:
            flat = torch.zeros(self.padded_numel, dtype=self.dtype, device=self.device)
            self.on_allocate(flat, "buffers")
            self._adopt_grads(flat)
        return self._gradient_views[key]

    def _sum_over_tensor_parallel(self) -> None:
        """Adds up what each tensor-parallel rank has only a part of: replicated entries under sequence parallelism, always those that are
        `partial`, and the key-value heads that several ranks hold."""
        assert self.grads is not None
        first, last = self.layout.replicated
        if not self.sequence_parallel:
            first = last - self.layout.num_partial
        if last > first:
            self.tp.all_reduce(self.grads.narrow(0, first, last - first))
        if self.key_value.size > 1:
            for piece, offset in self.layout.pieces():
                if piece.copies:
                    self.key_value.all_reduce(self.grads.narrow(0, offset, piece.numel))

    def reduce_now(self) -> None:
        """ZeRO-2 and 3: adds one micro-batch's gradients to the shard and frees the whole ones."""
        if self.zero_stage < 2 or self.grads is None:
            return
        self._sum_over_tensor_parallel()
        flat = self.grads
        part = flat.narrow(0, self.shard_start, self.shard_numel)
        self.axis.reduce_scatter(part, flat)
        self.grad_shard.add_(part)
        self.grads = None
        self._gradient_views = {}

    def reduce(self) -> Any:
        """At the end of the step's backward passes: starts to sum the gradients over the data-parallel ranks. Returns a handle to wait on."""
        if self.zero_stage >= 2:
            self.reduce_now()
            return self.replicate.all_reduce(self.grad_shard, wait=False)
        assert self.grads is not None
        self._sum_over_tensor_parallel()
        if self.zero_stage == 0:
            return self.dp.all_reduce(self.grads, wait=False)
        scattered = self.axis.reduce_scatter(self.grad_shard, self.grads, wait=False)
        if self.replicate.size == 1:
            return scattered
        scattered.wait()
        return self.replicate.all_reduce(self.grad_shard, wait=False)

    def clear_gradients(self) -> None:
        if self.zero_stage >= 2:
            self.grad_shard.zero_()
        else:
            assert self.grads is not None
            self.grads.zero_()

    def counted_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the gradient shard that this rank counts in the global norm: each element on exactly one rank of a
        tensor- and pipeline-parallel group."""
        if self.tied_copy:
            return []
        skipped = []
        if self.tp.index:
            skipped.append(self.layout.replicated)
        if self.key_value.index:
            skipped += [(offset, offset + piece.numel) for piece, offset in self.layout.pieces() if piece.copies]
        low, high = self.shard_start, min(self.shard_start + self.shard_numel, self.layout.numel)
        found, position = [], low
        for first, last in sorted(skipped):
            if first > position:
                found.append((position, min(first, high)))
            position = max(position, last)
        if position < high:
            found.append((position, high))
        return [(first - low, last - low) for first, last in found if last > first]

    # contents

    def initialise(self, seed: int) -> torch.Tensor:
        """Fills the weights: each parameter drawn whole from a generator seeded by its name, then cut, so that every plan
        starts from the same model. Returns this rank's shard in fp32."""
        return self.load(lambda piece: piece.slice_of(initial_value(piece, seed)))

    def load(self, value: Callable[[Piece], torch.Tensor]) -> torch.Tensor:
        """Fills the weights with `value(piece)` (the local slice, any float type). Returns this rank's shard in fp32."""
        shard = torch.zeros(self.shard_numel, dtype=torch.float32, device=self.device)
        whole = self.weights if self.zero_stage < 3 else None
        for piece, offset in self.layout.pieces():
            flat = value(piece).reshape(-1)
            if whole is not None:
                whole.narrow(0, offset, piece.numel).copy_(flat)
            low, high = max(offset, self.shard_start), min(offset + piece.numel, self.shard_start + self.shard_numel)
            if low < high:
                shard[low - self.shard_start : high - self.shard_start].copy_(flat[low - offset : high - offset])
        if whole is None:
            self.weight_shard.copy_(shard)
        return shard


def initial_value(piece: Piece, seed: int) -> torch.Tensor:
    """The whole initial parameter in fp32 on the CPU."""
    if piece.std == 0:
        return torch.zeros(piece.shape)
    if len(piece.shape) == 1:
        return torch.full(piece.shape, piece.std)
    digest = hashlib.sha256(f"{seed}:{piece.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(piece.shape).normal_(0.0, piece.std, generator=generator)
