"""Piper's instances: uniform degrees, free cuts and recomputation, the synchronous time per sample with fill and drain.

    python benchmarks/piper.py FOLDER [NAME ...]

FOLDER holds `*.instance.json` in the format of Piper (Tarnawski et al. 2021, arXiv 2106.08295). A plan gives every one of S
stages the same t devices per replica and d replicas. Stage i takes c_i seconds per sample and keeps y_i = S - i samples in
flight, its layers are vanilla or recomputed. Piper minimises max c_i; with the pipeline's flush a sample takes

    max c_i + (Σ d c_i - d max c_i) / N        with N samples in the batch,

which is minimised here. For a ceiling b on max c_i, the least Σ c_i is a shortest path over the cuts, with the least
recomputation that fits each segment. Lowering b below the best max found, step by step, visits every trade of the two;
a candidate (t, S, d) is left out when its least compute alone, evenly cut, takes longer than the best plan.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


class Layer(NamedTuple):
    """One node, in the order of the chain. Seconds per sample, bytes; (vanilla, recomputed)."""

    seconds: tuple[float, float]
    per_sample: tuple[float, float]
    fixed: tuple[float, float]
    parameters: float


class Plan(NamedTuple):
    seconds: float
    tensor: int
    stages: int
    replicas: int
    cuts: tuple[int, ...]


class Instance:
    """A Piper instance with its nodes in topological order, and prefix sums of what a segment needs."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        self.devices, self.samples = data["maxDevices"], data["mbsInBatch"]
        self.bandwidth, self.memory = data["bandwidth"], data["maxMemoryPerDevice"]
        self.nodes = {node["id"]: node for node in data["nodes"]}
        self.edges = [(edge["sourceId"], edge["destId"], edge["communicationCost"]) for edge in data["edges"]]
        self.order = self._topological()
        self.place = {node: index for index, node in enumerate(self.order)}
        self.degrees = sorted(int(t) for t in self.nodes[self.order[0]]["TMPCs"])

    def _topological(self) -> list[int]:
        waiting = dict.fromkeys(self.nodes, 0)
        for _, target, _ in self.edges:
            waiting[target] += 1
        ready, order = sorted(node for node, count in waiting.items() if not count), []
        while ready:
            node = ready.pop(0)
            order.append(node)
            for source, target, _ in self.edges:
                if source == node:
                    waiting[target] -= 1
                    if not waiting[target]:
                        ready.append(target)
        return order

    def layers(self, tensor: int) -> list[Layer]:
        found = []
        for node in self.order:
            kinds: dict[str, Any] = {kind["id"]: kind for kind in self.nodes[node]["TMPCs"][str(tensor)]}
            a, b = kinds["vanilla"], kinds["activation recomp"]
            found.append(
                Layer(
                    (a["timePerSample"], b["timePerSample"]),
                    (a["memoryUsageA"], b["memoryUsageA"]),
                    (a["memoryUsageB"], b["memoryUsageB"]),
                    a["parameterSize"],
                )
            )
        return found

    def messages(self, tensor: int) -> list[list[float]]:
        """Bytes per sample that the segment [i, j) exchanges with the rest: every edge over its border, both ways."""
        count = len(self.order)
        found = [[0.0] * (count + 1) for _ in range(count + 1)]
        kinds = {node: self.nodes[node]["TMPCs"][str(tensor)][0] for node in self.order}
        crossing = []
        for source, target, cost in self.edges:
            entering = 2 * (cost + kinds[target]["syncTimeFw"][str(source)])
            leaving = 2 * (cost + kinds[source]["syncTimeBw"][str(target)])
            crossing.append((self.place[source], self.place[target], entering, leaving))
        for i, j in itertools.combinations(range(count + 1), 2):
            found[i][j] = sum(
                (entering if not i <= a < j else 0.0) * (i <= b < j) + (leaving if not i <= b < j else 0.0) * (i <= a < j)
                for a, b, entering, leaving in crossing
            )
        return found


def segment_seconds(instance: Instance, layers: list[Layer], messages: list[list[float]], y: int, replicas: int) -> list[list[float]]:
    """Seconds per sample of each segment [i, j) with y samples in flight and the least recomputation; infinite where it can't fit.

    Which layers to recompute is a knapsack; taken by seconds per byte, as Piper does, it is optimal up to one layer.
    """
    count, d = len(layers), replicas
    found = [[math.inf] * (count + 1) for _ in range(count)]
    for i in range(count):
        seconds = need = parameters = saved_all = 0.0
        choices: list[tuple[float, float, float]] = []
        for j in range(i + 1, count + 1):
            layer = layers[j - 1]
            seconds += layer.seconds[0]
            need += layer.per_sample[0] * y + layer.fixed[0]
            parameters += layer.parameters
            saved = (layer.per_sample[0] - layer.per_sample[1]) * y + layer.fixed[0] - layer.fixed[1]
            if saved > 1:
                choices.append(((layer.seconds[1] - layer.seconds[0]) / saved, saved, layer.seconds[1] - layer.seconds[0]))
                saved_all += saved
            if need - saved_all > instance.memory:
                break
            extra, over = 0.0, need - instance.memory
            for _, freed, slower in sorted(choices):
                if over <= 0:
                    break
                extra, over = extra + slower, over - freed
            shared = 4 * (d - 1) * parameters / d / instance.samples
            found[i][j] = (seconds + extra) / d + (messages[i][j] / d + shared) / instance.bandwidth
    return found


def cut(tables: list[list[list[float]]], count: int, ceiling: float) -> tuple[float, float, tuple[int, ...]] | None:
    """The least Σ c over cuts into stages whose c stay below the ceiling: sum, largest, cuts."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
    for number, table in enumerate(tables):
        left = len(tables) - number - 1
        row: dict[int, tuple[float, int]] = {}
        for i, (total, _) in best[-1].items():
            for j in range(i + 1, count - left + 1):
                value = table[i][j]
                if value < ceiling and (j not in row or total + value < row[j][0]):
                    row[j] = (total + value, i)
        best.append(row)
    if count not in best[-1]:
        return None
    cuts = [count]
    for row in reversed(best[1:]):
        cuts.append(row[cuts[-1]][1])
    edges = tuple(reversed(cuts))
    largest = max(table[i][j] for table, (i, j) in zip(tables, itertools.pairwise(edges), strict=True))
    return best[-1][count][0], largest, edges


def solve(path: Path) -> tuple[Plan | None, int, int]:
    """The best plan of an instance, the candidates and how many of them were solved."""
    instance = Instance(path)
    count, samples = len(instance.order), instance.samples
    layers = {t: instance.layers(t) for t in instance.degrees}
    compute = {t: sum(min(layer.seconds) for layer in layers[t]) for t in instance.degrees}
    candidates = []
    for t in instance.degrees:
        slowest = max(min(layer.seconds) for layer in layers[t])
        for stages in range(1, count + 1):
            for d in range(1, min(instance.devices // (t * stages), samples // stages) + 1):
                if samples % d == 0:
                    # Σ c >= compute/d, and the largest is at least the mean, and at least the slowest layer
                    largest = max(compute[t] / d / stages, slowest / d)
                    candidates.append((largest * (1 - d / samples) + compute[t] / samples, t, stages, d))
    candidates.sort()
    best: Plan | None = None
    solved = 0
    messages: dict[int, list[list[float]]] = {}
    for bound, t, stages, d in candidates:
        if best is not None and bound >= best.seconds:
            break
        solved += 1
        if t not in messages:
            messages[t] = instance.messages(t)
        tables = [segment_seconds(instance, layers[t], messages[t], stages - number, d) for number in range(stages)]
        ceiling = math.inf if best is None or d == samples else (best.seconds - compute[t] / samples) / (1 - d / samples)
        while (found := cut(tables, count, ceiling)) is not None:
            total, largest, edges = found
            seconds = largest + d * (total - largest) / samples
            if best is None or seconds < best.seconds:
                best = Plan(seconds, t, stages, d, edges)
            ceiling = largest
    return best, len(candidates), solved


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: piper.py FOLDER [NAME ...]")
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    print("| instance | s/sample, synchronous | t, S, d | candidates | solved | CPU s |\n| --- | --- | --- | --- | --- | --- |")
    for path in sorted(folder.glob("*.instance.json")):
        name = path.name.removesuffix(".instance.json")
        if names and name not in names:
            continue
        start = time.process_time()
        best, candidates, solved = solve(path)
        took = time.process_time() - start
        text = f"{best.seconds:.6f} | {best.tensor}, {best.stages}, {best.replicas}" if best else "nothing fits | "
        print(f"| {name} | {text} | {candidates} | {solved} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
