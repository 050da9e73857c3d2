"""scripts/two-hosts: two network namespaces, and a run across them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from planner.cluster import load_cluster

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "two-hosts"
OWN = {"TWO_HOSTS_NAME": "mwtest", "TWO_HOSTS_PORT": "29641"}
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **OWN}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def hosts():
    allowed = call("check")
    if allowed.returncode:
        pytest.skip(allowed.stderr.strip())
    made = call("up", "--rate", "100mbit")
    assert made.returncode == 0, made.stderr
    yield
    assert call("down").returncode == 0


@pytest.mark.network_namespaces
def test_calibrating_two_hosts_sees_the_slow_link(hosts, tmp_path: Path) -> None:
    done = call("exec", "--nproc-per-node", "1", "-m", "executor.calibrate", "--output", str(tmp_path / "cluster.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    cluster = load_cluster(str(tmp_path / "cluster.json"))
    assert (cluster.num_gpus, cluster.gpus_per_node, cluster.num_nodes) == (2, 1, 2)
    assert cluster.inter_node.bandwidth_bytes_per_second < 3 * 100e6 / 8
    assert {curve.num_nodes for curve in cluster.collectives} == {2}


def test_unknown_commands_show_the_usage() -> None:
    done = call("sideways")
    assert done.returncode == 2
    assert "torchrun --nnodes 2" in done.stdout
