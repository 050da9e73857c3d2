"""Whether a file or folder can be written, asked before the work whose result goes there. Leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from planner.documents import check_name, is_stream
from planner.errors import InputError


def check_output(given: str, inputs: Iterable[str | None] = (), option: str = "--output") -> None:
    """Raises InputError unless `given` is a file that can be written in a folder that exists, or a device or a pipe, and is none of the command's
    `inputs`: each a file, a folder with a config.json, or FILE:NUM_GPUS; None and what is no file are passed over.
    """
    check_name(given, option)
    if Path(given).exists() and is_stream(Path(given)):
        return
    if Path(given).is_dir():
        raise InputError(option, given, "a file is expected, not a folder")
    try:
        _write_nothing(Path(given).absolute().parent)
    except OSError as error:
        raise InputError(option, given, f"a file in an existing, writable folder is expected ({error.strerror})") from None
    for source in inputs:
        for name in (source, source.partition(":")[0], os.path.join(source, "config.json")) if source else ():
            if os.path.exists(given) and os.path.exists(name) and os.path.samefile(name, given):
                raise InputError(option, given, f"another file is expected: it is the input {name}, which would be lost")


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
