"""Samples depend on seed, step and index alone; token files are read as they are stored."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="the executor needs numpy")
pytest.importorskip("torch", reason="the executor needs torch")

from executor.data import Data, open_tokens  # noqa: E402
from planner.errors import InputError  # noqa: E402


def test_any_split_of_the_samples_sees_the_same_data() -> None:
    data = Data(open_tokens(None, 256), 256, 16, 8, seed=4)
    tokens, targets = data.batch(3, range(8), 1)
    halves = [data.batch(3, part, 2)[0].reshape(-1) for part in (range(4), range(4, 8))]
    assert tokens.reshape(-1).tolist() == [int(value) for half in halves for value in half]
    assert tokens.view(8, 16)[:, 1:].tolist() == targets.view(8, 16)[:, :-1].tolist()
    assert not np.array_equal(data.sample(3, 0), data.sample(4, 0))
    assert not np.array_equal(data.sample(3, 0), Data(data.tokens, 256, 16, 8, seed=5).sample(3, 0))


def test_made_up_tokens_fill_the_vocabulary() -> None:
    data = Data(open_tokens("synthetic", 50), 50, 64, 8, seed=0)
    values = np.concatenate([data.sample(0, index) for index in range(32)])
    assert (values.min(), values.max()) == (0, 49)


def test_nanogpt_and_megatron_files_are_token_maps(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(tmp_path / "plain.bin")
    assert open_tokens(str(tmp_path / "plain.bin"), 1000).tolist() == tokens.tolist()
    tokens.astype(np.int32).tofile(tmp_path / "indexed.bin")
    (tmp_path / "indexed.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 4) + struct.pack("<QQ", 1, 1))
    for name in ("indexed.bin", "indexed.idx"):
        assert open_tokens(str(tmp_path / name), 1000).tolist() == tokens.tolist()


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "plain.bin")
    with pytest.raises(InputError, match="outside the model's vocabulary of 999"):
        open_tokens(str(tmp_path / "plain.bin"), 999)
    np.array([5, -2] * 20, dtype=np.int32).tofile(tmp_path / "negative.bin")
    (tmp_path / "negative.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, 4) + struct.pack("<QQ", 1, 1))
    with pytest.raises(InputError, match="token -2 is outside the model's vocabulary of 256, 0 to 255"):
        open_tokens(str(tmp_path / "negative.bin"), 256)
    for name in ("array.npy", "array.bin"):
        with (tmp_path / name).open("wb") as stream:
            np.save(stream, np.arange(100, dtype=np.uint16))
        with pytest.raises(InputError, match=r"text, or a \.bin of tokens .*, is expected, not a NumPy file"):
            open_tokens(str(tmp_path / name), 1000)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "wrong.bin").write_bytes(b"ab")
    (tmp_path / "wrong.idx").write_bytes(b"not an index, but long enough to be read")
    for name in ("empty.txt", "wrong.idx", "missing.bin"):
        with pytest.raises(InputError, match="--data"):
            open_tokens(str(tmp_path / name), 256)
    with pytest.raises(InputError, match="at least 17 are needed"):
        Data(np.zeros(16, dtype=np.uint8), 256, 16, 8, seed=0)
