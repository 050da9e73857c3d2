"""Piper's instances: uniform degrees, free cuts and recomputation, the synchronous time per sample with fill and drain.

    python benchmarks/piper.py FOLDER [NAME ...]

FOLDER holds `*.instance.json` in the format of Piper (Tarnawski et al. 2021, arXiv 2106.08295). A plan gives every one of S
stages the same t devices per replica and d replicas. Stage i takes C_i seconds for a sample and keeps S - i samples in
flight; its layers are vanilla or recomputed, and it pays for every edge that crosses its border. Piper minimises
max C_i / d; with the pipeline's flush a batch of N samples takes, with m = N / d for each replica,

    Σ C_i + (m - 1) max C_i

which is minimised here: it is the step of `planner.solver`'s program for stages in a flow shop, that is GPipe with all
seconds in the forward pass. For each candidate (t, S, d) the planner's chain code bounds it, gives a first plan, and hands
it to the integer program, which is asked for something faster than the best known. Edges of Piper's graphs that jump over
layers (the attention mask) are edges of the program; where a branch could be cut does not follow from articulation edges.
"""

from __future__ import annotations

import functools
import heapq
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from planner.chain_bounds import ChainBound
from planner.critical_path import Key, path_seconds
from planner.critical_path import Path as LongestPath
from planner.pipeline import Counts, Edge, Moment, Option, Pipeline, Run, excess_bytes, stage_seconds
from planner.solver import TOLERANCE, solve_pipeline


class Plan(NamedTuple):
    seconds: float
    """Per sample."""
    tensor: int
    stages: int
    replicas: int
    sizes: tuple[int, ...]
    num_recomputed: int


class FlowShop:
    """The paths of m equal jobs through S machines: once through all, and m - 1 times more on one of them."""

    def __init__(self, stages: int, m: int) -> None:
        self.paths = tuple(tuple(((("F", i), m if i == j else 1)) for i in range(stages)) for j in range(stages))

    def rank_paths(self) -> tuple[LongestPath, ...]:
        return self.paths

    def critical_paths(self, seconds: Mapping[Key, float]) -> tuple[float, tuple[LongestPath, ...]]:
        longest = max(self.paths, key=lambda path: path_seconds(path, seconds))
        return path_seconds(longest, seconds), (longest,)


class Instance:
    """A Piper instance with its nodes in topological order."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        self.devices, self.samples = data["maxDevices"], data["mbsInBatch"]
        self.bandwidth, self.memory = data["bandwidth"], data["maxMemoryPerDevice"]
        self.nodes = {node["id"]: node for node in data["nodes"]}
        self.edges = [(edge["sourceId"], edge["destId"], edge["communicationCost"]) for edge in data["edges"]]
        self.order = self._topological()
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

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def kinds(self, tensor: int) -> list[dict[str, Any]]:
        return [{kind["id"]: kind for kind in self.nodes[node]["TMPCs"][str(tensor)]} for node in self.order]

    def least_seconds(self, tensor: int) -> list[float]:
        return [min(kind["timePerSample"] for kind in kinds.values()) for kinds in self.kinds(tensor)]

    def pipeline(self, tensor: int, stages: int, replicas: int) -> Pipeline:
        """The candidate as the planner's integer program takes it; seconds of one sample on one stage."""
        d, runs = replicas, []
        place = {node: index for index, node in enumerate(self.order)}
        kinds = self.kinds(tensor)
        for node, found in zip(self.order, kinds, strict=True):
            vanilla, again = found["vanilla"], found["activation recomp"]
            shared = 4 * (d - 1) * vanilla["parameterSize"] / self.samples / self.bandwidth
            options = []
            for kind in (vanilla, again) if again["memoryUsageA"] < vanilla["memoryUsageA"] else (vanilla,):
                # what does not grow with the samples in flight but differs between the two is kept once: `deferred`
                fixed = kind["memoryUsageB"] - vanilla["memoryUsageB"]
                options.append(Option(kind["id"], kind["timePerSample"] + shared, 0.0, 0.0, 0.0, kind["memoryUsageA"], deferred=fixed))
            runs.append(Run(str(node), 1, tuple(options), vanilla["memoryUsageB"]))
        edges = []
        for source, target, cost in self.edges:
            a, b = place[source], place[target]
            entering = 2 * (cost + kinds[b]["vanilla"]["syncTimeFw"][str(source)]) / self.bandwidth
            leaving = 2 * (cost + kinds[a]["vanilla"]["syncTimeBw"][str(target)]) / self.bandwidth
            edges.append(Edge(a, b, leaving=leaving, entering=entering))
        return Pipeline(
            runs=tuple(runs),
            ranks=tuple(range(stages)),
            limits=(float(self.memory),) * stages,
            moments=tuple(Moment(stage, ((stage, stages - stage, 1),), stage, "F") for stage in range(stages)),
            kinds="FB",
            edges=tuple(edges) if stages > 1 else (),
        )


class Search:
    """Candidates by their bounds, the best plan so far, and how many programs it took."""

    def __init__(self, path: Path) -> None:
        self.instance = Instance(path)
        self.best: Plan | None = None
        self.solved = self.num_candidates = 0
        self.bound = math.inf

    @property
    def goal(self) -> float:
        return self.best.seconds if self.best else math.inf

    def run(self) -> None:
        instance, count, samples = self.instance, len(self.instance.order), self.instance.samples
        queue: list[tuple[float, int, int, int, int]] = []
        for t in instance.degrees:
            least = instance.least_seconds(t)
            total, slowest = sum(least), max(least)
            for stages in range(1, count + 1):
                for d in range(1, min(instance.devices // (t * stages), samples // stages) + 1):
                    if samples % d == 0:
                        # Σ C >= total, and the largest is at least the mean, and at least the slowest layer
                        queue.append(((total + (samples // d - 1) * max(total / stages, slowest)) / samples, 0, t, stages, d))
        self.num_candidates = len(queue)
        known: dict[tuple[int, int, int], Counts | None] = {}
        heapq.heapify(queue)
        while queue:
            at, level, t, stages, d = heapq.heappop(queue)
            if at >= self.goal * (1 - TOLERANCE):
                self.bound = min(self.bound, at)
                break
            pipeline, m = instance.pipeline(t, stages, d), samples // d
            if level == 0:
                walks = ChainBound(pipeline, "GPipe", m)
                better = walks.bound(self.goal * samples) / samples
                if better < self.goal * (1 - TOLERANCE):
                    known[t, stages, d] = walks.balanced(self.goal * samples)
                    self.offer(pipeline, known[t, stages, d], t, d)
                    heapq.heappush(queue, (max(at, better), 1, t, stages, d))
                continue
            self.solved += 1
            solution = solve_pipeline(
                pipeline,
                FlowShop(stages, m),  # type: ignore[arg-type]
                cutoff=self.goal * samples,
                lower_bound=at * samples,
                start=known[t, stages, d],
            )
            self.offer(pipeline, solution.counts, t, d)
            self.bound = min(self.bound, solution.bound / samples)

    def offer(self, pipeline: Pipeline, counts: Counts | None, tensor: int, replicas: int) -> None:
        if counts is None or excess_bytes(pipeline, counts)[0] > 1e-6:
            return
        stages, samples = pipeline.num_stages, self.instance.samples
        seconds = FlowShop(stages, samples // replicas).critical_paths(stage_seconds(pipeline, counts))[0] / samples
        if seconds < self.goal:
            sizes = tuple(sum(map(sum, rows)) for rows in counts)
            again = sum(row[1] for rows in counts for row in rows if len(row) > 1)
            self.best = Plan(seconds, tensor, stages, replicas, sizes, again)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: piper.py FOLDER [NAME ...]")
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    print("| instance | s/sample, synchronous | bound | t, S, d | recomputed | candidates | programs | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(folder.glob("*.instance.json")):
        name = path.name.removesuffix(".instance.json")
        if names and name not in names:
            continue
        start = time.process_time()
        search = Search(path)
        search.run()
        took, best = time.process_time() - start, search.best
        text = " | nothing fits | | "
        if best:
            bound = min(search.bound, best.seconds)
            text = f"{best.seconds:.6f} | {bound:.6f} | {best.tensor}, {best.stages}, {best.replicas} | {best.num_recomputed}"
        print(f"| {name} | {text} | {search.num_candidates} | {search.solved} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
