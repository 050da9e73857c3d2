"""The benchmark on Piper's instances: on small ones of the same format its optimum equals full enumeration's."""

import importlib.util
import itertools
import json
import math
import random
from pathlib import Path

import pytest


def benchmark():
    spec = importlib.util.spec_from_file_location("piper", Path(__file__).parent.parent / "benchmarks" / "piper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def instance(rng, nodes=5):
    """A chain with a mask-like node that several others read."""
    edges = {(i, i + 1): rng.uniform(1e5, 3e6) for i in range(nodes - 1)}
    edges |= {(0, b): rng.uniform(1e5, 3e6) for b in range(2, nodes) if rng.random() < 0.6}
    found = []
    for node in range(nodes):
        kinds = {}
        for t in (1, 2):
            seconds, saved, fixed = rng.uniform(0.01, 0.05) / t, rng.uniform(1e8, 6e8), rng.uniform(1e8, 4e8)
            sync = {
                "syncTimeFw": {str(a): rng.choice([0.0, 1e5]) for a, b in edges if b == node},
                "syncTimeBw": {str(b): rng.choice([0.0, 1e5]) for a, b in edges if a == node},
            }
            size = {"parameterSize": rng.uniform(1e6, 1e8)} | sync
            kinds[str(t)] = [
                {"id": "vanilla", "timePerSample": seconds, "memoryUsageA": saved, "memoryUsageB": fixed} | size,
                {"id": "activation recomp", "timePerSample": 1.33 * seconds, "memoryUsageA": saved / 9, "memoryUsageB": fixed + saved / 3} | size,
            ]
        found.append({"id": node, "TMPCs": kinds})
    listed = [{"sourceId": a, "destId": b, "communicationCost": cost} for (a, b), cost in edges.items()]
    memory = rng.uniform(1.0, 4.0) * 1e9
    return {"maxDevices": 4, "mbsInBatch": 8, "bandwidth": 1e9, "maxMemoryPerDevice": memory, "nodes": found, "edges": listed}


def enumerated(data):
    """The best seconds per sample, from Piper's own formulas."""
    count, samples, best = len(data["nodes"]), data["mbsInBatch"], math.inf
    for t, stages, d in itertools.product((1, 2), range(1, count + 1), range(1, 5)):
        if t * stages * d > data["maxDevices"] or samples % d or d > samples // stages:
            continue
        for cuts in itertools.combinations(range(1, count), stages - 1):
            edges = (0, *cuts, count)
            for chosen in itertools.product((0, 1), repeat=count):
                each = []
                for number, (a, b) in enumerate(itertools.pairwise(edges)):
                    kinds = [data["nodes"][node]["TMPCs"][str(t)][chosen[node]] for node in range(a, b)]
                    if sum(kind["memoryUsageA"] * (stages - number) + kind["memoryUsageB"] for kind in kinds) > data["maxMemoryPerDevice"]:
                        break
                    sent = 0.0
                    for edge in data["edges"]:
                        u, v, cost = edge["sourceId"], edge["destId"], edge["communicationCost"]
                        if a <= v < b and not a <= u < b:
                            sent += 2 * (cost + kinds[v - a]["syncTimeFw"][str(u)])
                        if a <= u < b and not a <= v < b:
                            sent += 2 * (cost + kinds[u - a]["syncTimeBw"][str(v)])
                    shared = sum(4 * (d - 1) * kind["parameterSize"] / d / samples for kind in kinds)
                    each.append(sum(kind["timePerSample"] for kind in kinds) / d + (sent / d + shared) / data["bandwidth"])
                else:
                    best = min(best, max(each) + d * (sum(each) - max(each)) / samples)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_optimum_equals_enumeration(seed, tmp_path):
    data, piper = instance(random.Random(seed)), benchmark()
    path = tmp_path / "some.instance.json"
    path.write_text(json.dumps(data))
    search = piper.Search(path)
    search.run()
    best = enumerated(data)
    assert (search.best.seconds if search.best else math.inf) == pytest.approx(best, rel=3e-6)
    if search.best:
        assert search.bound >= search.best.seconds * (1 - 3e-6)
