"""Training data: sample i of step k depends on the seed, k and i alone, never on the plan.

A source is a long row of tokens, of which a sample is a random stretch of sequence length + 1. Sources: text by bytes, files of tokens as memory maps
(nanoGPT's `.bin`: uint16 without a header; Megatron's `.bin` with its `.idx`), or made-up tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from planner.errors import InputError

SYNTHETIC = "synthetic"
_CHECKED = 1 << 20
"""How many tokens at either end of a file are looked at when it is opened."""
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_NUMPY_MAGIC = b"\x93NUMPY"
_MEGATRON_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def open_tokens(path: str | None, vocab_size: int) -> np.ndarray[Any, Any] | None:
    """The tokens of `path`: None for the text that ships with the package, "synthetic" (gives None) for made-up ones.

    Raises InputError when the file can't be used with `vocab_size`.
    """
    if path == SYNTHETIC:
        return None
    if path is None:
        text = (resources.files("executor") / "data" / "tales.txt").read_bytes()
        tokens: np.ndarray[Any, Any] = np.frombuffer(text, dtype=np.uint8)
    else:
        try:
            tokens = _open(Path(path))
        except (OSError, ValueError, struct.error) as error:
            raise InputError("--data", path, f"a readable text or token file is expected ({error})") from None
    if len(tokens) == 0:
        raise InputError("--data", path, "the file is empty")
    # A whole pass over a large map would be slow: the beginning and the end show a wrong vocabulary, and batches are looked at as they come.
    for part in (tokens[:_CHECKED], tokens[-_CHECKED:]):
        _check(part, vocab_size, path or "the built-in text")
    return tokens


def _check(tokens: np.ndarray[Any, Any], vocab_size: int, path: str, place: str = "") -> None:
    """Raises InputError for a token that the model does not have."""
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab_size:
            raise InputError("--data", path, f"{place}token {token} is outside the model's vocabulary of {vocab_size}, 0 to {vocab_size - 1}")


def _open(path: Path) -> np.ndarray[Any, Any]:
    if path.suffix == ".idx":
        path = path.with_suffix(".bin")
    with path.open("rb") as stream:
        if stream.read(len(_NUMPY_MAGIC)) == _NUMPY_MAGIC:
            raise InputError("--data", str(path), "text, or a .bin of tokens (`array.astype('uint16').tofile`), is expected, not a NumPy file")
    if path.suffix != ".bin":
        return np.memmap(path, dtype=np.uint8, mode="r")
    index = path.with_suffix(".idx")
    if not index.exists():
        return np.memmap(path, dtype=np.uint16, mode="r")
    with index.open("rb") as stream:
        magic = stream.read(len(_MEGATRON_MAGIC))
        if magic != _MEGATRON_MAGIC:
            raise ValueError(f"{index.name} is not a Megatron index")
        _version, code = struct.unpack("<QB", stream.read(9))
    if code not in _MEGATRON_TYPES:
        raise ValueError(f"{index.name} says token type {code}, which is not an integer type")
    return np.memmap(path, dtype=_MEGATRON_TYPES[code], mode="r")


class Source(Protocol):
    """Where a run's samples come from."""

    seed: int


class Data:
    """Samples of token sequences."""

    def __init__(self, tokens: np.ndarray[Any, Any] | None, vocab_size: int, sequence_length: int, global_batch_size: int, seed: int) -> None:
        if tokens is not None and len(tokens) < sequence_length + 1:
            raise InputError("--data", f"{len(tokens)} tokens", f"at least {sequence_length + 1} are needed, the sequence length and one more")
        self.tokens = tokens
        self.vocab_size = vocab_size
        self.length = sequence_length
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.unchecked = tokens is not None and len(tokens) > 2 * _CHECKED
        """Whether a batch may have tokens that nothing has looked at yet."""

    def sample(self, step: int, index: int) -> np.ndarray[Any, Any]:
        """Sample `index` (of the global batch) of `step`: sequence length + 1 tokens, int64."""
        generator = np.random.default_rng((self.seed, step, index))
        if self.tokens is None:
            return generator.integers(0, self.vocab_size, self.length + 1)
        start = int(generator.integers(0, len(self.tokens) - self.length))
        return np.asarray(self.tokens[start : start + self.length + 1]).astype(np.int64)

    def batch(self, step: int, samples: Iterable[int], num_microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, each [micro-batches, tokens of a micro-batch], of the samples in their order. Raises InputError for a token
        outside the vocabulary."""
        stacked = np.stack([self.sample(step, index) for index in samples])
        if self.unchecked:
            _check(stacked, self.vocab_size, str(getattr(self.tokens, "filename", "")), f"in step {step + 1}, ")
        rows = torch.from_numpy(stacked)
        shape = (num_microbatches, -1)
        return rows[:, :-1].reshape(shape), rows[:, 1:].reshape(shape)
