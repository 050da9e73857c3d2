"""Whether a file or folder can be written, asked before the work whose result goes there. Leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

from planner.documents import check_name, is_stream
from planner.errors import InputError


def check_file(option: str, given: str) -> None:
    """Raises InputError unless `given` is a file that can be written in a folder that exists, or a device or a pipe."""
    check_name(given, option)
    if Path(given).exists() and is_stream(Path(given)):
        return
    if Path(given).is_dir():
        raise InputError(option, given, "a file is expected, not a folder")
    try:
        _write_nothing(Path(given).absolute().parent)
    except OSError as error:
        raise InputError(option, given, f"a file in an existing, writable folder is expected ({error.strerror})") from None


def check_folder(option: str, given: str) -> None:
    """Raises InputError unless `given` is a folder that can be written in, or be made."""
    check_name(given, option)
    nearest = Path(given).absolute()
    try:
        while not nearest.exists():
            nearest = nearest.parent
        _write_nothing(nearest)
    except OSError as error:
        raise InputError(option, given, f"a folder that can be made and written in is expected ({nearest}: {error.strerror})") from None


def _write_nothing(folder: Path) -> None:
    """Raises OSError where a file can't be made in `folder`. Its access rights would not tell: root has all of them, in /proc too."""
    with tempfile.TemporaryFile(dir=folder):
        pass
