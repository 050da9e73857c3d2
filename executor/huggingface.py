"""Weights under Hugging Face's names, in safetensors: for models from the hub to train here, and to be used after.

    python -m executor.huggingface export CHECKPOINT FOLDER      a checkpoint as model.safetensors
    python -m executor plan.json --load FOLDER                   start from a folder's *.safetensors

Which families and what they call their tensors: `executor.hf_names`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from executor.hf_names import ALIASES, HEAD, architecture_of, fused_rows, hf_config, is_buffer, place_of
from executor.units import Piece
from planner.documents import write_text
from planner.errors import InputError, MeshwrightError
from planner.model import ModelSpec, first_difference, read_hf_config
from planner.places import check_folder, check_output


class Weights:
    """The tensors of a folder's (or a single file's) safetensors by name, read when asked for."""

    def __init__(self, path: str, field: str = "--load") -> None:
        from safetensors import SafetensorError, safe_open

        root = Path(path)
        files = sorted(root.glob("*.safetensors")) if root.is_dir() else [root]
        self._open: dict[str, object] = {}
        if not files or not all(file.is_file() for file in files):
            raise InputError(field, path, "a .safetensors file, or a folder with some, is expected")
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(field, str(file), f"a safetensors file is expected ({error})") from None
            for key in handle.keys():  # noqa: SIM118
                self._open[key] = handle
        self.path = path

    def _find(self, name: str) -> str | None:
        """What the files call the tensor `name`: that, without the base model's prefix, or as older files do."""
        return next((found for found in (name, name.partition(".")[2], ALIASES.get(name)) if found in self._open), None)

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name`. Raises InputError when there is none."""
        found = self._find(name)
        if found is None:
            raise InputError("--load", self.path, f"the tensor {name} is missing there")
        tensor: torch.Tensor = self._open[found].get_tensor(found)  # type: ignore[attr-defined]
        return tensor

    def check_read(self, names: set[str], table: str | None) -> None:
        """Raises InputError for a tensor that no parameter comes from, none of `names`. The head's is the token `table` again where that is given."""
        read = {self._find(name) for name in names}
        head = self._find(HEAD)
        if table is not None and head is not None:
            if not torch.equal(self.get(HEAD), self.get(table)):
                raise InputError("--load", self.path, f"{head} is not {table}, and the plan's model has one table for both")
            read.add(head)
        left = sorted(name for name in self._open if name not in read and not is_buffer(name))
        if left:
            more = f" (nor {len(left) - 1} more)" if len(left) > 1 else ""
            raise InputError("--load", self.path, f"the plan's model has no parameter for the tensor {left[0]} there{more}")


def _check_config(model: ModelSpec, path: str) -> None:
    """Raises InputError where a config.json lies with the weights and is of a model that computes something else."""
    config = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json"
    if not config.exists():
        return
    difference = first_difference(read_hf_config(config, "--load"), model)
    if difference is not None:
        field, theirs, ours = difference
        raise InputError(f"--load: {config}: {field}", theirs, f"the plan's model has {ours}; `--model {config.parent}` plans this one")


def reader(model: ModelSpec, path: str) -> Callable[[Piece], torch.Tensor]:
    """For `Unit.load`: the local slice of each piece from Hugging Face weights. Raises InputError for weights of another model: by its config, or
    for a tensor that is missing, misshapen or left over."""
    weights = Weights(path)
    architecture = architecture_of(model)
    _check_config(model, path)
    table = place_of(architecture, "embedding.tokens").name
    weights.check_read({place_of(architecture, piece.name).name for piece in global_names(model)}, table if model.tied_embeddings else None)

    def value(piece: Piece) -> torch.Tensor:
        name, transposed, part, offset = place_of(architecture, piece.name)
        tensor = weights.get(name)
        tensor = tensor.t() if transposed else tensor
        if part is not None:
            groups, rows = fused_rows(model, architecture)
            if tensor.shape[0] != groups * sum(rows):
                raise InputError("--load", path, f"{name} has shape {tuple(tensor.shape)} where the plan's model has {groups * sum(rows)} rows")
            tensor = tensor.unflatten(0, (groups, -1)).split(rows, 1)[part].flatten(0, 1)
        if tuple(tensor.shape) != piece.shape:
            raise InputError("--load", path, f"{name} has shape {tuple(tensor.shape)} where the plan's model has {piece.shape}")
        return piece.slice_of(tensor + offset if offset else tensor)

    return value


def global_names(model: ModelSpec) -> Iterator[Piece]:
    """Every parameter of the model, whole."""
    from executor.model import block_layout, embedding_layout, head_layout, table_layout

    layouts = [table_layout(model, "embedding.tokens", 0, 1), embedding_layout(model)]
    layouts += [block_layout(model, index, 0, 1) for index in range(model.num_layers)]
    layouts += [head_layout(model, 0, 1)] + ([] if model.tied_embeddings else [table_layout(model, "head.weight", 0, 1)])
    for layout in layouts:
        for piece, _ in layout.pieces():
            yield piece


def to_huggingface(model: ModelSpec, value: Callable[[Piece], torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights under Hugging Face's names, from `value(piece)`, the whole parameter."""
    architecture = architecture_of(model)
    groups, _ = fused_rows(model, architecture)
    parts: dict[str, list[torch.Tensor]] = {}
    flipped: dict[str, bool] = {}
    for piece in global_names(model):  # query, key and value in this order
        name, transposed, _, offset = place_of(architecture, piece.name)
        parts.setdefault(name, []).append(value(piece) - offset if offset else value(piece))
        flipped[name] = transposed
    found = {}
    for name, tensors in parts.items():
        tensor = tensors[0]
        if len(tensors) > 1:
            tensor = torch.cat([part.unflatten(0, (groups, -1)) for part in tensors], 1).flatten(0, 1)
        found[name] = (tensor.t() if flipped[name] else tensor).contiguous()
    return found


def export(checkpoint: str, folder: str) -> None:
    """Writes a checkpoint's weights to `folder` as model.safetensors, fp32, with a config.json. Raises InputError, before anything is read, where
    that is not possible."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from executor.checkpoint import find_checkpoint, load_state, read_whole

    path = find_checkpoint(checkpoint, "CHECKPOINT")
    model = load_state(path, "CHECKPOINT").model
    if model is None:
        raise InputError("CHECKPOINT", str(path), "a checkpoint of a transformer is expected, not of a traced module")
    architecture_of(model, f"{path}: model")
    weights, config = Path(folder) / "model.safetensors", Path(folder) / "config.json"
    check_folder("FOLDER", folder)
    if Path(folder).exists():
        for target in (weights, config):
            check_output(str(target), option="FOLDER")
    tensors = read_whole(path, {f"model.{piece.name}": piece.shape for piece in global_names(model)}, "CHECKPOINT")
    partial = weights.with_name(f".{weights.name}.partial")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(to_huggingface(model, lambda piece: tensors[f"model.{piece.name}"]), partial, {"format": "pt"})
        os.replace(partial, weights)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise InputError("FOLDER", folder, f"a folder that can be made and written in is expected ({error})") from None
    write_text(config, json.dumps(hf_config(model), indent=2) + "\n", "FOLDER")


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m executor.huggingface", description="Weights under Hugging Face's names.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="a checkpoint's weights as safetensors")
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("folder", metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        export(options.checkpoint, options.folder)
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
