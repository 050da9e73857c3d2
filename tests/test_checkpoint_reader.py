"""Checkpoints that are damaged, or made to harm, are refused by name, and nothing of what they say is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the executor needs torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner  # noqa: E402

from executor.checkpoint_reader import read, read_metadata  # noqa: E402
from planner.errors import InputError  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one tensor."""
    found = tmp_path / "step-1"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"w": torch.arange(6.0)}, checkpoint_id=found, no_dist=True)
    return found


def filled(folder: Path) -> Any:
    state = {"w": torch.zeros(6)}
    read(state, folder, DefaultLoadPlanner(), "--resume")
    return state["w"]


def test_a_whole_one_is_read(folder: Path) -> None:
    assert torch.equal(filled(folder), torch.arange(6.0))


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_code_in_metadata_is_not_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(Harm(proof)))
    with pytest.raises(InputError, match=r"--resume: .*step-1.* is not valid; a whole checkpoint is expected \(UnpicklingError: .*system"):
        filled(folder)
    assert not proof.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert proof.exists()  # it would have run


def test_files_outside_are_not_opened(folder: Path) -> None:
    metadata = read_metadata(folder, "--resume")
    for info in metadata.storage_data.values():
        info.relative_path = "../secret.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="outside of it"):
        filled(folder)


def lose_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def cut_metadata(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:100])


def other_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"w": 1}))


def lose_tensors(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def cut_tensors(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [lose_metadata, cut_metadata, other_metadata, lose_tensors, cut_tensors])
def test_a_damaged_one_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(InputError, match=r"--resume: .*step-1.* a whole checkpoint is expected") as error:
        filled(folder)
    assert "\n" not in str(error.value)
