"""What starts this package's own executor: torchrun, Slurm and Kubernetes. Each comes with the plan file itself."""

from __future__ import annotations

from typing import Any

from planner.documents import dumps
from planner.export.common import header, nodes, script, slug, torchrun, yaml_text
from planner.plan import Plan

PLAN_FILE = "plan.json"
EXECUTOR = f'-m executor {PLAN_FILE} --steps "${{STEPS:-100}}" -o run.json'


def export_torchrun(plan: Plan) -> dict[str, str]:
    """`torchrun.sh`, to be started once on every node."""
    head = header(plan, "torchrun", [])
    return {"torchrun.sh": script(head, [*torchrun(plan, "torchrun"), EXECUTOR, '"$@"']), PLAN_FILE: dumps(plan)}


def export_slurm(plan: Plan) -> dict[str, str]:
    """`job.sbatch`: one torchrun a node, all meeting at the job's first node."""
    count, processes = nodes(plan, "slurm")
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={slug('meshwright-' + plan.inputs.model.name)}",
        f"#SBATCH --nodes={count}",
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gpus-per-node={processes}"] if plan.inputs.cluster.device == "cuda" else []),
        "#SBATCH --exclusive",
        header(plan, "Slurm", ["add your site's --partition, --account and --time."]).rstrip("\n"),
        "set -euo pipefail",
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        'export MASTER_PORT="${MASTER_PORT:-29500}"',
        'export STEPS="${STEPS:-100}"',
        "srun bash -c 'exec torchrun \\",
        f'    --nnodes {count} --nproc-per-node {processes} --node-rank "$SLURM_NODEID" \\',
        '    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \\',
        f'    -m executor {PLAN_FILE} --steps "$STEPS" -o run.json\'',
    ]
    return {"job.sbatch": "\n".join(lines) + "\n", PLAN_FILE: dumps(plan)}


def export_kubernetes(plan: Plan) -> dict[str, str]:
    """`job.yaml`: a ConfigMap with the plan, a headless Service and an Indexed Job with one pod a node.

    Plain Kubernetes (1.24 or newer), no operator.
    """
    count, processes = nodes(plan, "kubernetes")
    name = slug("meshwright-" + plan.inputs.model.name, 40)
    labels = {"app.kubernetes.io/name": name}
    documents = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}, "data": {PLAN_FILE: dumps(plan)}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels, "ports": [{"name": "torchrun", "port": 29500}]},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "completionMode": "Indexed",
                "completions": count,
                "parallelism": count,
                "backoffLimit": 0,
                "template": {"metadata": {"labels": labels}, "spec": _pod(plan, name, count, processes)},
            },
        },
    ]
    notes = ["set `image` to one with meshwright[executor] in it; run.json is written to the pod with index 0 (mount a volume at /out to keep it)."]
    text = header(plan, "Kubernetes", notes) + "---\n".join(yaml_text(document) for document in documents)
    return {"job.yaml": text, PLAN_FILE: dumps(plan)}


def _pod(plan: Plan, name: str, count: int, processes: int) -> dict[str, Any]:
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    command = [
        "torchrun", "--nnodes", str(count), "--nproc-per-node", str(processes), "--node-rank", "$(NODE_RANK)",
        "--master-addr", f"{name}-0.{name}", "--master-port", "29500",
        "-m", "executor", f"/plan/{PLAN_FILE}", "--steps", "100", "-o", "/out/run.json",
    ]  # fmt: skip
    container: dict[str, Any] = {
        "name": "executor",
        "image": "meshwright:latest",
        "command": command,
        "env": [{"name": "NODE_RANK", "valueFrom": index}],
        "volumeMounts": [
            {"name": "plan", "mountPath": "/plan"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "out", "mountPath": "/out"},
        ],
    }
    if plan.inputs.cluster.device == "cuda":
        container["resources"] = {"limits": {"nvidia.com/gpu": processes}}
    return {
        "restartPolicy": "Never",
        "subdomain": name,
        "containers": [container],
        "volumes": [
            {"name": "plan", "configMap": {"name": name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            {"name": "out", "emptyDir": {}},
        ],
    }
