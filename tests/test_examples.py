"""The examples run as their readers would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_example(name: str, *arguments: str) -> str:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_estimate_gpt3_shows_the_memory_wall():
    shown = run_example("estimate_gpt3.py")
    assert "174,604,259,328 parameters" in shown
    assert "= 2,794 GB before any activation" in shown and "3.14e+23 FLOPs, 356 V100-years" in shown
    assert shown.count("pipeline rank ") == 8


def test_solve_and_compare_runs_the_whole_loop(tmp_path: Path):
    shown = run_example("solve_and_compare.py", str(tmp_path))
    assert "optimal: " in shown and "step_seconds: predicted" in shown
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["steps"]) == 3 and len(run["ranks"]) == 2 and run["rehearsed"] is False
    assert "measured, last step" in (tmp_path / "report.html").read_text()
