"""The example of one tensor-parallel linear layer, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the example needs torch")


def test_tensor_parallel_linear_counts_its_bytes() -> None:
    script = Path(__file__).parent.parent / "examples" / "tensor_parallel_linear.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    gather, reduce = done.stdout.splitlines()
    assert "all-gather" in gather and "sent 1,536 bytes = (n - 1) / n x 3,072" in gather
    assert "all-reduce" in reduce and "sent 3,072 bytes = 2 (n - 1) / n x 3,072" in reduce
