"""Reading and writing the JSON documents: checked against a schema, and written whole or not at all.

Every document type is a frozen `msgspec.Struct` that forbids unknown fields; its class line says `frozen=True, kw_only=True`, the latter
because it is not inherited. What a file holds is parsed by that
schema and never evaluated.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec
import msgspec.inspect

from planner.errors import InputError
from planner.values import Rule, check_texts, check_values

T = TypeVar("T")


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that is stored as JSON: typed, frozen, and strict about its fields."""

    RULES: ClassVar[Mapping[str, Rule]] = {}
    """The numbers that fields may hold, where that is not any that is finite and not negative (`planner.values`)."""


def read_text(path: str | os.PathLike[str], field: str) -> str:
    """The text of the file at `path`. Raises InputError naming `field` when it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(field, str(path), f"a readable file is expected ({reason})") from None


def check_name(path: str | os.PathLike[str], field: str = "--output") -> None:
    """Raises InputError naming `field` where no file or folder can have the name `path`, such as one that is too long."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        if not os.fspath(path):
            raise InputError(field, "", "a path is expected") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(field, str(path), f"a name that a file can have is expected ({reason})") from None


def parse_json(text: str, where: str) -> Any:
    """The JSON value in `text`. Raises InputError saying at which line it is broken."""
    try:
        value = json.loads(text, parse_constant=float)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(where, text[:40], f"valid JSON is expected{place}") from None
    if "\\ud" in text or "\\uD" in text:
        check_texts(value, where)
    return value


def convert(value: Any, document: type[T], where: str, schema: str | None = None) -> T:
    """`value` (plain JSON data) as a `document`. Raises InputError that names the wrong field by its path.

    With `schema`, the value must be an object whose field "schema" is exactly that. Numbers are checked by the document's `RULES`.
    """
    if schema is not None:
        if not isinstance(value, dict):
            raise InputError(where, value, f'a JSON object with "schema": "{schema}" is expected')
        if value.get("schema") != schema:
            raise InputError(f"{where}: schema", value.get("schema"), f'"{schema}" is expected')
    try:
        result = msgspec.convert(value, document)
    except msgspec.ValidationError as error:
        message = str(error)
        reason, _, path = message.partition(" - at `")
        path = path.rstrip("`").removeprefix("$").removeprefix(".")
        unknown = re.match(r"Object contains unknown field `(.*)`$", reason)
        missing = re.match(r"Object missing required field `(.*)`$", reason)
        if unknown or missing:
            name = (unknown or missing).group(1)  # type: ignore[union-attr]
            parent = _at(value, path)
            path = f"{path}.{name}" if path else name
            allowed = "no such field exists" if unknown else "this field is required"
            found = parent.get(name) if isinstance(parent, dict) else None
            raise InputError(f"{where}: {path}", found, allowed) from None
        if reason.startswith("Invalid enum value"):
            reason = f"one of {', '.join(map(str, _choices(msgspec.inspect.type_info(document), path)))} is expected"
        raise InputError(f"{where}: {path or 'document'}", _at(value, path), reason) from None
    check_values(result, where)
    return result


def load(path: str | os.PathLike[str], document: type[T], schema: str, field: str = "file") -> T:
    """The document stored at `path`."""
    return convert(parse_json(read_text(path, field), str(path)), document, str(path), schema)


def builtins(document: Any) -> Any:
    """A document as plain dicts, lists, strings and numbers."""
    return msgspec.to_builtins(document)


def dumps(document: Any) -> str:
    """A document as indented JSON text."""
    return json.dumps(builtins(document), indent=2, allow_nan=False) + "\n"


def write_text(path: str | os.PathLike[str], text: str, field: str = "--output") -> None:
    """Writes `text` to `path` whole or not at all: a temporary file beside it, then a rename, which keeps the permissions of a file
    that is there. A link is followed; a device or a pipe is written to as it is.
    """
    try:
        if is_stream(Path(path)):
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(text)
        else:
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise InputError(field, str(path), f"a writable place is expected ({error.strerror})") from None


def is_stream(path: Path) -> bool:
    """Whether it is a device, a pipe or an open file of a process, which nothing may take the place of."""
    return (path.exists() and not path.is_file() and not path.is_dir()) or path.absolute().parts[1:2] in (("dev",), ("proc",))


def _replace(target: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, _permissions(target))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _permissions(target: Path) -> int:
    """Of a file that is there, or of one newly made."""
    if target.is_file():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _choices(kind: msgspec.inspect.Type, path: str) -> list[object]:
    """The values of the literal at msgspec's error path in a type; with several kinds of value there, those of all."""
    if isinstance(kind, msgspec.inspect.UnionType):
        return [choice for one in kind.types for choice in _choices(one, path)]
    if isinstance(kind, msgspec.inspect.LiteralType):
        return list(kind.values)
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return _choices(kind.item_type, path.partition("]")[2].removeprefix("."))
    if isinstance(kind, msgspec.inspect.StructType):
        name, rest = re.match(r"([^.\[]*)\.?(.*)", path).groups()  # type: ignore[union-attr]
        return [choice for field in kind.fields if field.name == name for choice in _choices(field.type, rest)]
    return []


def _at(value: Any, path: str) -> Any:
    """The part of `value` that msgspec's error path (`a.b[3].c`, `[...]` for map values) points to."""
    for key, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return value
