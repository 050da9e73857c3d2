"""A checksum of every file of a checkpoint: taken by the rank that writes the file, compared before a tensor is read.

CRC-32 finds damage, not intent. A file is read in pieces, and zlib lets other threads run meanwhile.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from planner.errors import InputError

METADATA = ".metadata"
_PIECE_BYTES = 1 << 22


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            found = zlib.crc32(piece, found)
    return found


def check(folder: Path, checksums: Mapping[str, int], field: str, part: int = 0, num_parts: int = 1) -> None:
    """Raises InputError for the first file of `folder` that is not as it was written; looks at every `num_parts`-th one, from `part` on."""
    for name in sorted(checksums)[part::num_parts]:
        path = folder / name
        try:
            found = checksum(path)
        except OSError as error:
            raise InputError(field, str(path), f"a whole checkpoint is expected, and it lacks this file ({error.strerror})") from None
        if found != checksums[name]:
            raise InputError(field, str(path), f"a whole checkpoint is expected, and this file is damaged: its CRC-32 is not {checksums[name]:08x}")


class Writer(dcp.FileSystemWriter):
    """Takes the checksums of a checkpoint's files. Those of each rank go to the first one among the results of its writing, and are in its
    `checksums` at the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True)
        self.folder = folder
        self.checksums: dict[str, int] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner).value()
        names = {result.storage_data.relative_path for result in written}
        sums = [WriteResult(MetadataIndex(name), 0, checksum(self.folder / name)) for name in sorted(names)]
        done: Future[list[WriteResult]] = Future()
        done.set_result(written + sums)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, [[result for result in of_rank if not isinstance(result.storage_data, int)] for of_rank in results])
        sums = {result.index.fqn: result.storage_data for of_rank in results for result in of_rank if isinstance(result.storage_data, int)}
        self.checksums = {**sums, METADATA: checksum(self.folder / METADATA)}
