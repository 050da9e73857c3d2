"""Searches over the number of GPUs too: the fewest that meet a deadline, the fastest within a budget."""

from __future__ import annotations

import dataclasses

from planner.candidates import Constraints
from planner.chain import Costs
from planner.cluster import with_num_gpus
from planner.errors import DoesNotFitError, InputError
from planner.estimate import predict
from planner.explore import explore
from planner.plan import Inputs, Plan, replace
from planner.search import search


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


def _in_days(inputs: Inputs, step_seconds: float, num_tokens: float | None) -> str:
    """A step time, and the days of the whole run where the number of tokens is known."""
    if num_tokens is None:
        return f"{step_seconds:.4g} s a step"
    return f"{step_seconds * num_steps(inputs, num_tokens) / 86400:.4g} days for {num_tokens:.4g} tokens ({step_seconds:.4g} s a step)"


def fewest_gpus(inputs: Inputs, constraints: Constraints, step_seconds: float, num_tokens: float | None = None) -> Plan:
    """The plan on the fewest GPUs of the cluster whose step takes at most `step_seconds`; `num_tokens` are those of the whole run.

    Raises DoesNotFitError when not even all GPUs are fast enough, with the step time that they reach.
    """
    for count in gpu_counts(inputs):
        smaller = replace(inputs, cluster=with_num_gpus(inputs.cluster, count))
        try:
            found = explore(Costs(smaller), constraints, cutoff=step_seconds * (1 + 1e-9)).best
        except InputError:
            continue  # the degrees or the batch don't divide
        if found is not None and (predict(smaller, found.decisions).time.step_seconds or 0.0) <= step_seconds * (1 + 1e-6):
            return search(smaller, constraints)
    reached = search(inputs, constraints).predictions.time.step_seconds or 0.0
    raise DoesNotFitError(
        f"no plan on {inputs.cluster.num_gpus} GPUs or fewer takes at most {_in_days(inputs, step_seconds, num_tokens)}",
        (f"a deadline of {_in_days(inputs, reached, num_tokens)}, which {inputs.cluster.num_gpus} GPUs reach",),
    )


def fastest_within(inputs: Inputs, constraints: Constraints, gpu_seconds: float) -> Plan:
    """The fastest plan whose step costs at most `gpu_seconds` (GPUs times seconds), on any number of the cluster's GPUs.

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
    raise DoesNotFitError(
        f"no plan costs at most {gpu_seconds:g} GPU-seconds a step",
        (f"a budget of {cheapest[0]:.4g} GPU-seconds a step: {cheapest[1]} GPUs, a step of {cheapest[2]:.4g} s",),
    )
