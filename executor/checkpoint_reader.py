"""Reading a checkpoint's files without trusting them.

`torch.distributed.checkpoint` reads tensors with `weights_only`, but its `.metadata` with pickle, which runs whatever the file says. Here only
the classes that a checkpoint's metadata are made of are unpickled, and only files inside the checkpoint are opened.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner

from executor.checksums import METADATA, check
from planner.errors import InputError, MeshwrightError

_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    [(_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata")]
    + [(_METADATA, name) for name in ("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")]
    + [("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size")]
    + [("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")]
    + [(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")]
)
"""The globals that metadata may name: data classes, data types, and paths."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"its metadata name {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Of a folder whose metadata have been read. Each rank compares its share of the checksums before any reads a tensor."""

    def __init__(self, folder: Path, metadata: Metadata, checksums: Mapping[str, int], field: str) -> None:
        super().__init__(folder)
        self._metadata, self._folder, self._checksums, self._field = metadata, folder, checksums, field

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        check(self._folder, self._checksums, self._field, rank, world)


def read_metadata(folder: Path, field: str) -> Metadata:
    """What the checkpoint in `folder`, given as `field`, holds, and where. Raises InputError."""
    try:
        with (folder / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("its metadata are none")
        for info in found.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"its metadata name the file {info.relative_path}, outside of it")
    except Exception as error:  # a damaged pickle can raise any
        raise _not_whole(field, folder, error) from None
    return found


def read(state: dict[str, Any], folder: Path, planner: LoadPlanner, field: str, checksums: Mapping[str, int] | None = None) -> None:
    """Fills `state` from the checkpoint in `folder`, given as `field`, all ranks together; its files must have the `checksums`, by their names.
    Raises InputError, on every rank, when a rank can't."""
    checksums = checksums or {}
    if METADATA in checksums:
        check(folder, {METADATA: checksums[METADATA]}, field)
    reader = _Reader(folder, read_metadata(folder, field), checksums, field)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise (reason if isinstance(reason, MeshwrightError) else _not_whole(field, folder, reason)) from None


def _not_whole(field: str, folder: Path, reason: BaseException) -> InputError:
    line = (str(reason).splitlines() or [""])[0].partition(". ")[0]
    return InputError(field, str(folder), f"a whole checkpoint is expected ({type(reason).__name__}: {line})")
