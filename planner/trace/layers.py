"""Recorded steps as a layer graph, and that as a chain of layers with what each needs per sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import networkx as nx

from planner.errors import InputError
from planner.graph import chain_of
from planner.trace.record import Trace, Work
from planner.traced import Affine, LayerCost, Operation, OperationKind, TracedLayer, TracedModel


class Chain(NamedTuple):
    """A trace's layers."""

    members: list[list[int]]
    """The traced nodes of each layer."""
    boundary: list[int]
    """The node whose value crosses from each layer to the next."""


SAMPLES = (2, 4)
"""Batch sizes of the traces; BatchNorm refuses a single sample where an image has shrunk to a point."""


def trace_graph(trace: Trace) -> nx.DiGraph:
    """The nodes that depend on a trained parameter, with `num_parameters` and `forward_flops`, and "output" after them.

    Attribute `members` holds the traced nodes that a node stands for: what depends on no parameter is with the first that
    uses it, and what leads nowhere with what it came from.
    """
    graph = nx.DiGraph()
    members: dict[int, list[int]] = {}
    claimed: set[int] = set()

    def claim(index: int, owner: int) -> None:
        if index in claimed or trace.nodes[index].trained:
            return
        claimed.add(index)
        members[owner].append(index)
        for source in trace.nodes[index].sources:
            claim(source, owner)

    for index, node in enumerate(trace.nodes):
        if not node.trained or not node.forward:
            continue
        members[index] = [index]
        graph.add_node(index)
        for source in node.sources:
            if trace.nodes[source].trained:
                graph.add_edge(source, index)
            else:
                claim(source, index)
    graph.add_node("output")
    graph.add_edges_from((index, "output") for index in trace.outputs if index in members)
    useful = nx.ancestors(graph, "output") | {"output"}
    for index in reversed([node for node in graph if node not in useful]):
        sources = [source for source in graph.predecessors(index) if source in members]
        if sources:
            members[sources[0]] += members.pop(index)
        graph.remove_node(index)
    for index in graph:
        held = [trace.nodes[member] for member in members.get(index, ())]
        graph.nodes[index].update(
            members=members.get(index, []),
            num_parameters=sum(sum(node.parameters.values()) for node in held),
            forward_flops=sum(item.flops for node in held for item in node.forward) + sum(item.moved for node in held for item in node.forward),
        )
    return graph


def chain_layers(trace: Trace) -> Chain:
    """The layers that a pipeline can cut a traced module into."""
    graph = trace_graph(trace)
    groups = [[node for node in group if node != "output"] for group in chain_of(graph)]
    groups = [group for group in groups if group]
    members = [sorted(member for node in group for member in graph.nodes[node]["members"]) for group in groups]
    boundary = [_boundary(graph, a, b) for a, b in itertools.pairwise(groups)]
    return _with_parameters(trace, members, boundary)


def traced_model(reference: str, precision: str, traces: Sequence[Trace], where: str, num_parameters: int) -> TracedModel:
    first, second = traces
    if [node.name for node in first.nodes] != [node.name for node in second.nodes]:
        allowed = f"it does other operations with {SAMPLES[1]} samples than with {SAMPLES[0]}; the first dim must be the batch"
        raise InputError(where, reference, allowed)
    members, boundary = chain_layers(first)
    raw = [[_layer(trace, members, boundary, index) for index in range(len(members))] for trace in traces]
    costs: dict[LayerCost, int] = {}
    layers = []
    for index, (group, held) in enumerate(zip(members, held_by_layers(first, members), strict=True)):
        try:
            cost = _cost(raw[0][index], raw[1][index], held)
        except ValueError:
            raise InputError(where, reference, "its operations change with the number of samples; the batch must be the first dim") from None
        layers.append(TracedLayer(name=layer_name(first, group), cost=costs.setdefault(cost, len(costs))))
    return TracedModel(
        name=reference, precision=precision, num_parameters=num_parameters, num_layers=len(layers), layers=tuple(layers), costs=tuple(costs)
    )


class Held(NamedTuple):
    """What a layer holds: elements of the trained parameters that no earlier layer has, of those that one has, and bytes of what is not trained."""

    own: int
    shared: int
    frozen_bytes: int


def held_by_layers(trace: Trace, members: Sequence[Sequence[int]]) -> list[Held]:
    found, seen = [], set[int]()
    for group in members:
        mine: dict[int, int] = {}
        frozen: dict[int, int] = {}
        for member in group:
            mine |= trace.nodes[member].parameters
            frozen |= trace.nodes[member].frozen
        own = sum(count for key, count in mine.items() if key not in seen)
        found.append(Held(own, sum(mine.values()) - own, sum(frozen.values())))
        seen |= set(mine)
    return found


def _boundary(graph: nx.DiGraph, before: list[Any], after: list[Any]) -> int:
    """The node whose value crosses from one part of the chain to the next."""
    later = set(after)
    return next(int(node) for node in before if any(target in later for target in graph.successors(node)))


def _with_parameters(trace: Trace, members: list[list[int]], boundary: list[int]) -> Chain:
    """Parts without parameters (activations, pooling) join the part before them: a cut lies before a layer with parameters."""
    groups, edges = [list(members[0])], list[int]()
    for group, edge in zip(members[1:], boundary, strict=True):
        started = any(trace.nodes[index].parameters for index in groups[-1])
        if started and any(trace.nodes[index].parameters for index in group):
            groups.append(list(group))
            edges.append(edge)
        else:
            groups[-1] += group
    return Chain(groups, edges)


def layer_name(trace: Trace, group: Sequence[int]) -> str:
    """The module that all layers with parameters of a part lie in, or the first to the last of them."""
    names = [trace.nodes[index].name for index in group if trace.nodes[index].parameters] or [trace.nodes[group[0]].name]
    paths = [name.split(".") for name in names]
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    first, last = paths[0][common], paths[-1][common]
    return ".".join([*paths[0][:common], first if first == last else f"{first}-{last}"])


class _Layer(NamedTuple):
    """A part of the chain with one number of samples; bytes."""

    forward: list[Work]
    backward: list[Work]
    saved: float
    received: float
    sent: float
    kept: float
    forward_transient: float
    backward_transient: float


def _layer(trace: Trace, members: Sequence[Sequence[int]], boundary: Sequence[int], index: int) -> _Layer:
    """What a part does and saves.

    A storage that two neighbours save counts with the later one, so that the parts of a stage add up; where a stage ends,
    the earlier one keeps it as well (`kept`).
    """
    mine = set(members[index])
    nodes = [trace.nodes[member] for member in members[index]]
    incoming = _boundary_storages(trace, boundary[index - 1]) if index else {}
    outgoing = _boundary_storages(trace, boundary[index]) if index < len(boundary) else {}
    after = set(members[index + 1]) if index + 1 < len(members) else set()
    saved = kept = 0.0
    for key, (size, holders) in trace.saved.items():
        if mine.isdisjoint(holders):
            continue
        if key in outgoing and not after.isdisjoint(holders):
            kept += size
        else:
            saved += size
    return _Layer(
        [work for node in nodes for work in node.forward],
        [work for node in nodes for work in node.backward],
        saved,
        float(sum(incoming.values())),
        float(sum(outgoing.values())),
        kept,
        max(node.forward_transient for node in nodes),
        max(node.backward_transient for node in nodes),
    )


def _boundary_storages(trace: Trace, node: int) -> dict[int, int]:
    """The storages that a node wrote and later nodes read, in bytes."""
    made = trace.nodes[node].made
    return {key: size for key, size in made.items() if any(reader > node for reader in trace.readers.get(key, ()))}


def _affine(low: float, high: float) -> Affine:
    slope = (high - low) / (SAMPLES[1] - SAMPLES[0])
    return (low - SAMPLES[0] * slope, slope)


def _operations(low: Sequence[Work], high: Sequence[Work]) -> tuple[Operation, ...]:
    """Equal operations once, with how often they run. Raises ValueError when the two traces differ."""
    found: dict[tuple[OperationKind, Affine, Affine], int] = {}
    for a, b in zip(low, high, strict=True):
        if a.kind != b.kind:
            raise ValueError(a.kind)
        if a.flops or a.moved or b.moved:
            key = (a.kind, _affine(a.flops, b.flops), _affine(a.moved, b.moved))
            found[key] = found.get(key, 0) + 1
    return tuple(Operation(kind=kind, num_calls=count, flops=flops, moved_bytes=moved) for (kind, flops, moved), count in found.items())


def _cost(low: _Layer, high: _Layer, held: Held) -> LayerCost:
    return LayerCost(
        num_parameters=held.own,
        num_shared_parameters=held.shared,
        frozen_bytes=held.frozen_bytes,
        forward=_operations(low.forward, high.forward),
        backward=_operations(low.backward, high.backward),
        saved_bytes=_affine(low.saved, high.saved),
        received_bytes=_affine(low.received, high.received),
        sent_bytes=_affine(low.sent, high.sent),
        kept_bytes=_affine(low.kept, high.kept),
        forward_transient_bytes=_affine(low.forward_transient, high.forward_transient),
        backward_transient_bytes=_affine(low.backward_transient, high.backward_transient),
    )
