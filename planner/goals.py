"""Searches over the number of GPUs too: the fewest that meet a deadline, the fastest within a budget."""

from __future__ import annotations

import dataclasses
import time

from planner.candidates import Constraints
from planner.chain import Costs
from planner.cluster import with_num_gpus
from planner.errors import DoesNotFitError, InputError
from planner.estimate import predict
from planner.explore import explore
from planner.plan import Inputs, Plan, replace
from planner.search import search
from planner.words import rounded_up

BETWEEN_SECONDS = 10.0
"""How long numbers of GPUs between those of `gpu_counts` are searched through."""


def gpu_counts(inputs: Inputs) -> list[int]:
    """Numbers of GPUs worth asking about, up to the cluster's: powers of 2 and 3 times those, in a node or in whole nodes."""
    most, node = inputs.cluster.num_gpus, inputs.cluster.gpus_per_node
    found = {most}
    for base in (1, 3):
        count = base
        while count <= most:
            if count <= node or count % node == 0:
                found.add(count)
            count *= 2
    return sorted(found)


def num_steps(inputs: Inputs, num_tokens: float) -> float:
    """Steps of training on so many tokens."""
    return num_tokens / (inputs.training.global_batch_size * inputs.training.sequence_length)


def counts_between(inputs: Inputs, low: int, high: int) -> list[int]:
    """The numbers of GPUs between two, within a node or in whole nodes: all where there are at most 16, else every n-th."""
    node = inputs.cluster.gpus_per_node
    counts = [*range(low + 1, min(high, node + 1)), *range(max(low // node + 1, 2) * node, high, node)]
    return counts[:: -(-len(counts) // 16)] if counts else []


def _in_days(step: str, days: str, num_tokens: float | None) -> str:
    """A step time, and the days of the whole run where the number of tokens is known."""
    return f"{step} s a step" if num_tokens is None else f"{days} days for {num_tokens:.4g} tokens ({step} s a step)"


def _days(inputs: Inputs, step_seconds: float, num_tokens: float | None) -> float:
    return step_seconds * num_steps(inputs, num_tokens or 0.0) / 86400


def _meets(inputs: Inputs, constraints: Constraints, step_seconds: float) -> bool:
    """Whether a plan on all GPUs of the inputs has steps of at most `step_seconds`."""
    try:
        found = explore(Costs(inputs), constraints, cutoff=step_seconds * (1 + 1e-9)).best
    except InputError:
        return False  # the degrees or the batch don't divide
    return found is not None and (predict(inputs, found.decisions).time.step_seconds or 0.0) <= step_seconds * (1 + 1e-6)


def fewest_gpus(inputs: Inputs, constraints: Constraints, step_seconds: float, num_tokens: float | None = None) -> Plan:
    """The plan on the fewest GPUs of the cluster, in a node or in whole nodes, whose step takes at most `step_seconds`; `num_tokens` are those
    of the whole run.

    After the first of `gpu_counts` that is fast enough those between it and the one before are tried, for `BETWEEN_SECONDS`. Raises
    DoesNotFitError when not even all GPUs are fast enough, with the step time that they reach.
    """
    before = 0
    for count in gpu_counts(inputs):
        whole = replace(inputs, cluster=with_num_gpus(inputs.cluster, count))
        if not _meets(whole, constraints, step_seconds):
            before = count
            continue
        until = time.monotonic() + BETWEEN_SECONDS
        for fewer in counts_between(inputs, before, count):
            left = until - time.monotonic()
            if left <= 0:
                break
            smaller = replace(inputs, cluster=with_num_gpus(inputs.cluster, fewer))
            limit = left if constraints.time_limit_seconds is None else min(left, constraints.time_limit_seconds)
            if _meets(smaller, dataclasses.replace(constraints, time_limit_seconds=limit), step_seconds):
                return search(smaller, constraints)
        return search(whole, constraints)
    reached = search(inputs, constraints).predictions.time.step_seconds or 0.0
    asked = _in_days(f"{step_seconds:.4g}", f"{_days(inputs, step_seconds, num_tokens):.4g}", num_tokens)
    enough = _in_days(rounded_up(reached), rounded_up(_days(inputs, reached, num_tokens)), num_tokens)
    raise DoesNotFitError(
        f"no plan on {inputs.cluster.num_gpus} GPUs or fewer takes at most {asked}",
        (f"a deadline of {enough}, which {inputs.cluster.num_gpus} GPUs reach",),
    )


def fastest_within(inputs: Inputs, constraints: Constraints, gpu_seconds: float, num_tokens: float | None = None) -> Plan:
    """The fastest plan whose step costs at most `gpu_seconds` (GPUs times seconds), on one of `gpu_counts`; `num_tokens` are those of the whole run.

    Raises DoesNotFitError when none is that cheap, with the cheapest found.
    """
    best: tuple[float, int] | None = None
    cheapest: tuple[float, int, float] | None = None
    for count in gpu_counts(inputs):
        smaller = replace(inputs, cluster=with_num_gpus(inputs.cluster, count))
        try:
            found = explore(Costs(smaller), constraints).best
        except InputError:
            continue
        if found is None:
            continue
        cost = (found.seconds * count, count, found.seconds)
        cheapest = min(cheapest or cost, cost)
        if cost[0] <= gpu_seconds * (1 + 1e-9) and (best is None or found.seconds < best[0]):
            best = (found.seconds, count)
    if best is not None:
        return search(replace(inputs, cluster=with_num_gpus(inputs.cluster, best[1])), dataclasses.replace(constraints))
    if cheapest is None:
        return search(inputs, constraints)  # raises what is short
    if num_tokens is None:
        asked, enough = f"{gpu_seconds:.4g} GPU-seconds a step", f"{rounded_up(cheapest[0])} GPU-seconds a step"
    else:
        hours = num_steps(inputs, num_tokens) / 3600
        asked = f"{gpu_seconds * hours:.4g} GPU-hours for {num_tokens:.4g} tokens"
        enough = f"{rounded_up(cheapest[0] * hours)} GPU-hours for {num_tokens:.4g} tokens"
    gpus = f"{cheapest[1]} GPUs" if cheapest[1] > 1 else "1 GPU"
    raise DoesNotFitError(f"no plan costs at most {asked}", (f"a budget of {enough}: {gpus}, a step of {cheapest[2]:.4g} s",))
