"""The rules of the house that the import statements must keep."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    {"errors"}, {"values"}, {"documents"}, {"model", "cluster"}, {"plan"}, {"graph", "trace", "schedule"}, {"timeline"}, {"run"},
    {"memory", "timing"}, {"estimate"}, {"program"}, {"solver"}, {"regular", "dive"}, {"explore"}, {"search"},
    {"export", "compare", "published", "paradigms"}, {"tables", "report"}, {"cli"},
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
HOMES = {"pulp": {"program"}, "highspy": {"program"}, "plotly": {"report"}, "rich": {"tables"}, "networkx": {"graph", "trace"}, "torch": {"trace"}}
EXECUTOR_MAY = {
    "errors", "documents", "model", "cluster", "plan", "schedule", "timeline", "run", "timing", "calibration", "calibration_rounds", "correction",
    "measurements", "either", "chain_plan", "traced", "trace", "places", "lifeline",
}  # fmt: skip


def modules(package: str):
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path.relative_to(ROOT / package).with_suffix("").parts[0], path


def imported(path: Path):
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield (f"{node.module}.{alias.name}" if node.module in ("planner", "executor") else node.module), node in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top


def test_planner_imports_have_no_circle() -> None:
    needs: dict[str, set[str]] = {}
    for name, path in modules("planner"):
        found = needs.setdefault(name, set())
        found |= {module.split(".")[1] for module, _ in imported(path) if module.startswith("planner.")} - {name}
    sorter = graphlib.TopologicalSorter({name: {need for need in found if need in needs} for name, found in needs.items() if name != "__init__"})
    sorter.prepare()


@pytest.mark.parametrize(("name", "path"), list(modules("planner")), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_planner_imports_go_one_way_and_heavy_libraries_stay_home(name: str, path: Path) -> None:
    for module, top in imported(path):
        parts = module.split(".")
        if parts[0] == "planner" and len(parts) > 1 and name in LEVEL and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[name], f"{path.name} imports {module}"
        assert parts[0] != "executor", f"{path.name} imports {module}"
        if parts[0] in HOMES:
            assert name in HOMES[parts[0]], f"{path.name} imports {module}"
            assert not (parts[0] == "torch" and top), f"{path.name} imports torch at its top"


@pytest.mark.parametrize(("name", "path"), list(modules("executor")), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_executor_imports_only_what_a_plan_is(name: str, path: Path) -> None:
    for module, _ in imported(path):
        parts = module.split(".")
        if parts[0] == "planner" and len(parts) > 1:
            assert parts[1] in EXECUTOR_MAY, f"{path.name} imports {module}"


def test_estimate_imports_no_heavy_library() -> None:
    code = (
        "import sys\nfrom planner.cli import plan\n"
        "plan.main(['estimate', '--model', 'gpt3', '--tp', '8', '--pp', '8', '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'pulp', 'plotly', 'highspy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_only_the_cli_prints_or_exits() -> None:
    for name, path in modules("planner"):
        if name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit"), f"{path.name}: {node.func.id}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("sys", "exit"), path.name
