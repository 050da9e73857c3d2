"""Checkpoints: saved while training goes on, whole or not at all, and readable under any plan.

`torch.distributed.checkpoint` stores rectangles of global tensors and reads any other rectangles back (`executor.chunks`). Stored are, by global
parameter name, the weights in the optimizer's precision (`model.*`) and its moments (`first.*`, `second.*`); of a traced module also its
buffers (`buffer.*`), those of the first data-parallel rank.

A checkpoint `step-N` is written as `step-N.partial` and renamed when every rank's part is there. Beside the tensors lies `training.json`
(step, seed, model, every file's checksum and its own), from which the data's position follows, since data depend on seed and step alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from executor.checkpoint_reader import read
from executor.checksums import Writer
from executor.chunks import Chunk, all_chunks
from executor.rank import RankTrainer
from planner.documents import Document, dumps, load, write_text
from planner.errors import InputError, MeshwrightError
from planner.model import ModelSpec, first_difference
from planner.plan import digest, plan_hash, replace
from planner.traced import TracedModel

SCHEMA = "meshwright.checkpoint/1"
RUN_FILE = "run.json"
"""Written beside the checkpoints when a run first begins (`executor.restart`): what is older is not its own."""


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
    digest: str = ""
    """SHA-256 of all the rest of this document; empty where it was written without."""

    @property
    def trained(self) -> ModelSpec | TracedModel | None:
        return self.model or self.traced


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
    """Saves a trainer's state to `folder`, one checkpoint at a time. A save that fails leaves nothing, is said on the first rank by `say`, and does
    not end the run: the disk may have room again at the next."""

    def __init__(self, trainer: RankTrainer, folder: str, *, keep: int = 0, say: Callable[[str], None] = lambda text: None) -> None:
        self.trainer = trainer
        self.folder = Path(folder)
        self.keep = keep
        """How many of the run's own newest checkpoints stay; 0 for all."""
        self.say = say
        self.failure: str | None = None
        """What became of the last save, on the first rank; None where it is whole."""
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[Any, Writer, int] | None = None
        self._settled = -1

    def save(self) -> None:
        """Starts a save of the state after `trainer.step_index` steps; waits for the one before it."""
        self.finish()
        trainer, step = self.trainer, self.trainer.step_index
        partial = self._partial(step)
        if trainer.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if self._group is not None:
            dist.barrier(self._group)
        parts = all_chunks(trainer, owned_only=True)
        state = {chunk.key: chunk.tensor for chunk in parts}
        writer = Writer(partial)
        future = dcp.async_save(state, storage_writer=writer, planner=_Save(parts), process_group=self._group)
        self._pending = (future, writer, step)

    def poll(self) -> None:
        """Makes the running save a checkpoint if it is done; waits for nothing. Rank 0's save is done when every rank's is."""
        if self._pending is not None and self.trainer.mesh.rank == 0 and self._pending[0].done():
            self._settle(*self._pending)

    def finish(self) -> None:
        """Waits for the running save, and makes it a checkpoint."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending[0].exception()
        if self._group is not None:
            dist.barrier(self._group)
        if self.trainer.mesh.rank == 0:
            self._settle(*pending)

    def check(self) -> None:
        """Raises MeshwrightError on the first rank when the last save failed."""
        if self.failure is not None:
            raise MeshwrightError(f"all steps are done, but the last checkpoint is missing: {self.failure}")

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step}.partial"

    def _settle(self, future: Any, writer: Writer, step: int) -> None:
        """Once for each save, on the first rank: makes what has been written a checkpoint, or says why it is none."""
        if step == self._settled:
            return
        self._settled, self.failure = step, None
        try:
            future.result()
            self._commit(step, writer.checksums)
        except (CheckpointException, InputError, OSError) as error:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            whole = sorted(steps_in(self.folder))
            last = f"the last whole one is {whole[-1][1]}" if whole else "there is no whole one there"
            self.failure = f"step {step} could not be saved in {self.folder} ({_reason(error)}); {last}"
            self.say(f"warning: checkpoint: {self.failure}")

    def _commit(self, step: int, checksums: dict[str, int]) -> None:
        partial, final = self._partial(step), self.folder / f"step-{step}"
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
        write_text(partial / "training.json", dumps(replace(state, digest=_own_digest(dumps(state)))), "--checkpoint-folder")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        if self.keep:
            for _, old in sorted(own_steps(self.folder))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """Why a save failed, in one line: the first rank's reason that has one."""
    if isinstance(error, CheckpointException):
        reasons = [reason for reason, _ in error.failures.values()]
        error = next((reason for reason in reasons if isinstance(reason, OSError)), reasons[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in `folder` with their steps."""
    found = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / "training.json").exists():
            found.append((int(match.group(1)), path))
    return found


def own_steps(folder: Path) -> list[tuple[int, Path]]:
    """Of the whole checkpoints in `folder` those that its last run has made, in whichever attempt; all where no run has said when it began."""
    run = folder / RUN_FILE
    began = run.stat().st_mtime_ns if run.exists() else 0
    return [(step, found) for step, found in steps_in(folder) if (found / "training.json").stat().st_mtime_ns >= began]


def find_checkpoint(path: str, field: str = "--resume") -> Path:
    """`path` itself when it is a checkpoint, else the newest in it. Raises InputError when there is none."""
    folder = Path(path)
    if (folder / "training.json").exists():
        return folder
    found = sorted(steps_in(folder)) if folder.is_dir() else []
    if not found:
        raise InputError(field, path, "a checkpoint step-N, or a folder that holds one, is expected")
    return found[-1][1]


def _own_digest(text: str) -> str:
    """Of a document in JSON, all but its `digest`."""
    content = json.loads(text)
    content.pop("digest", None)
    return digest(content)


def load_state(folder: Path, field: str) -> TrainingState:
    """What the checkpoint in `folder` says beside its tensors."""
    path = folder / "training.json"
    state = load(path, TrainingState, SCHEMA, field)
    if state.digest and state.digest != _own_digest(path.read_text(encoding="utf-8")):
        raise InputError(field, str(path), "a whole checkpoint is expected, and this file is damaged: it does not have its own digest")
    return state


def _read(parts: list[Chunk], folder: Path, field: str) -> None:
    """Fills the chunks from the checkpoint in `folder`."""
    read({chunk.key: chunk.tensor for chunk in parts}, folder, _Load(parts, str(folder)), field, load_state(folder, field).checksums)


def read_whole(folder: Path, shapes: dict[str, tuple[int, ...]], field: str) -> dict[str, torch.Tensor]:
    """Stored tensors by name, each whole, in fp32."""
    parts = [Chunk(name, (0,) * len(shape), shape, torch.empty(shape)) for name, shape in shapes.items()]
    _read(parts, folder, field)
    return {chunk.name: chunk.tensor for chunk in parts}


def _check_model(stored: ModelSpec | TracedModel | None, model: ModelSpec | TracedModel, path: str) -> None:
    """Raises InputError unless a checkpoint of `stored` is one of the plan's model: what a transformer computes, or the layers of a traced module."""
    if stored is None or isinstance(stored, TracedModel) != isinstance(model, TracedModel):
        raise InputError("--resume", path, f"a checkpoint of {model.name} is expected, not of {stored.name if stored else 'nothing'}")
    if isinstance(stored, TracedModel):
        assert isinstance(model, TracedModel)
        difference = next(((name, its, own) for (name, its), (_, own) in zip(_layers(stored), _layers(model), strict=False) if its != own), None)
    else:
        assert isinstance(model, ModelSpec)
        difference = first_difference(stored, model)
    if difference is not None:
        field, its, own = difference
        raise InputError("--resume", path, f"the model of the plan is expected: {field} of the checkpoint's is {its}, of the plan's {own}")


def _layers(model: TracedModel) -> list[tuple[str, object]]:
    """What two traced modules must have in common for one to go on with the other's weights."""
    found: list[tuple[str, object]] = [("num_layers", model.num_layers)]
    for index, layer in enumerate(model.layers):
        cost = model.cost(index)
        found += [(f"layer {index}", layer.name), (f"num_parameters of layer {layer.name}", cost.num_parameters + cost.num_shared_parameters)]
    return found


def resume(trainer: RankTrainer, path: str) -> int:
    """Loads a checkpoint, written under this plan or another one of the same model. Returns the steps done."""
    folder = find_checkpoint(path)
    state = load_state(folder, "--resume")
    _check_model(state.trained, trainer.plan.inputs.model, path)
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
