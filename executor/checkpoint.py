"""Checkpoints: saved while training goes on, whole or not at all, and readable under any plan.

`torch.distributed.checkpoint` stores rectangles of global tensors and reads any other rectangles back. A rank's shard of a flat
buffer is a run of elements of each piece, which is at most three rectangles. Stored are, by global
parameter name, the weights in the optimizer's precision (`model.*`) and its moments (`first.*`, `second.*`); of a traced module also its
buffers (`buffer.*`), those of the first data-parallel rank.

A checkpoint `step-N` is written as `step-N.partial` and renamed when every rank's part is there. Beside the tensors lies `training.json`
(step, seed, model, every file's checksum), from which the data's position follows, since data depend on seed and step alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from executor.checkpoint_reader import read
from executor.checksums import Writer
from executor.optimizer import UnitOptimizer
from executor.rank import RankTrainer
from executor.units import Piece
from planner.documents import Document, dumps, load, write_text
from planner.errors import InputError
from planner.model import ModelSpec
from planner.plan import plan_hash
from planner.traced import TracedModel

SCHEMA = "meshwright.checkpoint/1"


class TrainingState(Document, frozen=True, kw_only=True):
    """What a checkpoint says beside its tensors."""

    schema: str = SCHEMA
    step: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    """Steps done."""
    seed: int
    plan_hash: str
    model: ModelSpec | None = None
    traced: TracedModel | None = None
    """The module, where it is not a transformer of ours."""
    checksums: dict[str, int] = {}
    """CRC-32 by file; empty where the checkpoint was written without."""

    @property
    def trained(self) -> ModelSpec | TracedModel | None:
        return self.model or self.traced


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


class _Save(DefaultSavePlanner):
    """Stores chunks. Their tensors come through the state dict, which an asynchronous save has copied."""

    def __init__(self, parts: list[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = {chunk.key: chunk for chunk in parts}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(chunk.name, torch.Size(chunk.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk.storage, properties=TensorProperties.create_from_tensor(chunk.tensor), size=torch.Size(chunk.size)
                ),
            )
            for chunk in self.parts.values()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        offset = write_item.index.offset
        assert offset is not None
        tensor: torch.Tensor = self.state_dict[f"{write_item.index.fqn}@{','.join(map(str, offset))}"]
        return tensor


class _Load(DefaultLoadPlanner):
    """Fills chunks, whatever rectangles are stored."""

    def __init__(self, parts: list[Chunk], where: str) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = {(chunk.name, chunk.offsets): chunk for chunk in parts}
        self.where = where

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for chunk in self.parts.values():
            stored = self.metadata.state_dict_metadata.get(chunk.name)
            if not isinstance(stored, TensorStorageMetadata):
                raise InputError(f"{self.where}: {chunk.name}", None, "the checkpoint must hold this tensor")
            if tuple(stored.size) != chunk.size:
                raise InputError(f"{self.where}: {chunk.name}", tuple(stored.size), f"the plan's model has size {chunk.size}")
            items += create_read_items_for_chunk_list(chunk.name, stored, [chunk.storage])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.parts[index.fqn, tuple(index.offset)].tensor


class Checkpointer:
    """Saves a trainer's state to `folder`, one checkpoint at a time."""

    def __init__(self, trainer: RankTrainer, folder: str, *, keep: int = 0) -> None:
        self.trainer = trainer
        self.folder = Path(folder)
        self.keep = keep
        """How many of the newest checkpoints stay; 0 for all."""
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[Any, Writer, int] | None = None
        self._committed = -1

    def save(self) -> None:
        """Starts a save of the state after `trainer.step_index` steps; waits for the one before it."""
        self.finish()
        trainer, step = self.trainer, self.trainer.step_index
        partial = self.folder / f"step-{step}.partial"
        if trainer.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)
        parts = all_chunks(trainer, owned_only=True)
        state = {chunk.key: chunk.tensor for chunk in parts}
        writer = Writer(partial)
        future = dcp.async_save(state, storage_writer=writer, planner=_Save(parts), process_group=self._group)
        self._pending = (future, writer, step)

    def poll(self) -> None:
        """Makes the running save a checkpoint if it is done; waits for nothing. Rank 0's save is done when every rank's is."""
        if self._pending is not None and self.trainer.mesh.rank == 0:
            future, writer, step = self._pending
            if future.done() and step != self._committed:
                future.result()
                self._commit(step, writer.checksums)

    def finish(self) -> None:
        """Waits for the running save, and makes it a checkpoint."""
        if self._pending is None:
            return
        future, writer, step = self._pending
        self._pending = None
        future.result()
        if self._group is not None:
            dist.barrier(self._group)
        if self.trainer.mesh.rank == 0 and step != self._committed:
            self._commit(step, writer.checksums)

    def _commit(self, step: int, checksums: dict[str, int]) -> None:
        partial, final = self.folder / f"step-{step}.partial", self.folder / f"step-{step}"
        trainer = self.trainer
        model = trainer.plan.inputs.model
        state = TrainingState(
            step=step,
            seed=trainer.options.seed,
            plan_hash=plan_hash(trainer.plan),
            model=None if isinstance(model, TracedModel) else model,
            traced=model if isinstance(model, TracedModel) else None,
            checksums=checksums,
        )
        write_text(partial / "training.json", dumps(state))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        self._committed = step
        if self.keep:
            for _, old in sorted(steps_in(self.folder))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in `folder` with their steps."""
    found = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / "training.json").exists():
            found.append((int(match.group(1)), path))
    return found


def find_checkpoint(path: str, field: str = "--resume") -> Path:
    """`path` itself when it is a checkpoint, else the newest in it. Raises InputError when there is none."""
    folder = Path(path)
    if (folder / "training.json").exists():
        return folder
    found = sorted(steps_in(folder)) if folder.is_dir() else []
    if not found:
        raise InputError(field, path, "a checkpoint step-N, or a folder that holds one, is expected")
    return found[-1][1]


def load_state(folder: Path, field: str) -> TrainingState:
    """What the checkpoint in `folder` says beside its tensors."""
    return load(folder / "training.json", TrainingState, SCHEMA, field)


def _read(parts: list[Chunk], folder: Path, field: str) -> None:
    """Fills the chunks from the checkpoint in `folder`."""
    read({chunk.key: chunk.tensor for chunk in parts}, folder, _Load(parts, str(folder)), field, load_state(folder, field).checksums)


def read_whole(folder: Path, shapes: dict[str, tuple[int, ...]], field: str) -> dict[str, torch.Tensor]:
    """Stored tensors by name, each whole, in fp32."""
    parts = [Chunk(name, (0,) * len(shape), shape, torch.empty(shape)) for name, shape in shapes.items()]
    _read(parts, folder, field)
    return {chunk.name: chunk.tensor for chunk in parts}


def resume(trainer: RankTrainer, path: str) -> int:
    """Loads a checkpoint, written under this plan or another one of the same model. Returns the steps done."""
    folder = find_checkpoint(path)
    state = load_state(folder, "--resume")
    model = trainer.plan.inputs.model
    if state.trained != model:
        raise InputError("--resume", path, f"a checkpoint of {model.name} is expected, not of {state.trained.name if state.trained else 'nothing'}")
    if state.seed != trainer.options.seed:
        raise InputError("--seed", trainer.options.seed, f"the checkpoint's run has seed {state.seed}, on which its data depend")
    parts = all_chunks(trainer, owned_only=False)
    _read(parts, folder, "--resume")
    for optimizer in trainer.optimizers:
        optimizer.num_steps.fill_(state.step)
        if optimizer.master is not None:
            optimizer.unit.weight_shard.copy_(optimizer.master)
        optimizer.unit.gather_updated().wait()
    trainer.step_index = state.step
    return state.step
