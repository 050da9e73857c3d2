"""The layer graph: a networkx graph with a node per part of the model, and the chain of layers that a pipeline can cut.

The parts are the embedding, and for each block its norms, attention and MLP, then the final norm and the head; an edge
carries what one part sends to the next. A block's residual connections are edges around its parts. The chain of
*layers*, where a pipeline may be cut, follows from the graph: the embedding, each block, and the head with the final
norm. Plans count layers in that chain.

Per part and token: parameters, forward FLOPs, saved activation bytes (bf16, nothing recomputed, no parallelism) and the
bytes sent on. FLOPs count 2 per multiply-add of matrix products, with causal attention at its full s x s, the
convention of Narayanan et al. 2021 (arXiv 2104.04473, appendix).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Literal

from planner.model import ModelSpec

if TYPE_CHECKING:
    import networkx as nx

Kind = Literal["embedding", "norm", "attention", "mlp", "head"]
LayerKind = Literal["embedding", "block", "head"]


def attention_flops(model: ModelSpec, sequence_length: int) -> float:
    """Forward FLOPs of one block's attention per token: projections 2·h·(2·a·d + 2·k·d), scores and values 4·s·a·d."""
    projections = 2 * model.hidden_size * (2 * model.query_size + 2 * model.key_value_size)
    return projections + 4 * sequence_length * model.query_size


def mlp_flops(model: ModelSpec) -> float:
    """Forward FLOPs of one block's MLP per token: 2·h·f per projection."""
    return 2 * model.hidden_size * model.ffn_hidden_size * (3 if model.gated_ffn else 2)


def head_flops(model: ModelSpec) -> float:
    """Forward FLOPs of the output projection per token: 2·h·V."""
    return 2 * model.hidden_size * model.vocab_size


def forward_flops_per_token(model: ModelSpec, sequence_length: int) -> float:
    """Forward FLOPs of the whole model per token."""
    blocks = model.num_layers * (attention_flops(model, sequence_length) + mlp_flops(model))
    return blocks + head_flops(model)


def training_flops_per_token(model: ModelSpec, sequence_length: int) -> float:
    """Forward and backward (twice the forward) FLOPs per token, without recomputation: the *model FLOPs* of MFU."""
    return 3 * forward_flops_per_token(model, sequence_length)


def layer_kinds(model: ModelSpec) -> Iterator[LayerKind]:
    """The chain of layers as plans count them."""
    yield "embedding"
    for _ in range(model.num_layers):
        yield "block"
    yield "head"


def layer_parameters(model: ModelSpec, kind: LayerKind) -> int:
    """Parameters of one layer of the chain; a tied head has only its norm."""
    return {"embedding": model.embedding_parameters, "block": model.block_parameters, "head": model.head_parameters}[kind]


def layer_graph(model: ModelSpec, sequence_length: int) -> nx.DiGraph:
    """The parts of the model as nodes, in order, and what flows between them as edges.

    Node attributes: `kind`, `layer` (its index in the chain of layers), `num_parameters`, `forward_flops` (per token),
    `saved_bytes` (per token, bf16) and `sent_bytes` (per token, bf16, to each successor).
    """
    import networkx as nx  # takes longer to load than most commands to run

    graph = nx.DiGraph(name=model.name)
    h = model.hidden_size
    residual: str | None = None

    def add(name: str, kind: Kind, layer: int, parameters: int, flops: float, saved: float, *sources: str | None) -> str:
        graph.add_node(
            name, kind=kind, layer=layer, num_parameters=parameters, forward_flops=flops, saved_bytes=saved, sent_bytes=2 * h
        )
        graph.add_edges_from((source, name) for source in dict.fromkeys(sources) if source is not None)
        return name

    residual = add("embedding", "embedding", 0, model.embedding_parameters, 0.0, 0.0)
    norms = model.num_norms_per_layer
    attention_saved = 2 * (h + 2 * model.query_size + 2 * model.key_value_size)
    mlp_saved = 2 * (h + model.ffn_hidden_size * (4 if model.gated_ffn else 2))
    for index in range(model.num_layers):
        layer, name = index + 1, f"block.{index}"
        before = add(f"{name}.norm1", "norm", layer, model.norm_parameters, 0.0, 2 * h, residual)
        attention_sources = (before, residual)
        attended = add(
            f"{name}.attention", "attention", layer, model.attention_parameters,
            attention_flops(model, sequence_length), attention_saved, *attention_sources,
        )  # fmt: skip
        if norms == 4:
            attended = add(f"{name}.norm2", "norm", layer, model.norm_parameters, 0.0, 2 * h, attended)
        if model.parallel_block:
            middle = before if norms == 1 else add(f"{name}.norm2", "norm", layer, model.norm_parameters, 0.0, 2 * h, residual)
            mlp_sources: tuple[str, ...] = (middle, attended)
        else:
            middle = add(f"{name}.norm{3 if norms == 4 else 2}", "norm", layer, model.norm_parameters, 0.0, 2 * h, attended)
            mlp_sources = (middle, attended)
        residual = add(f"{name}.mlp", "mlp", layer, model.mlp_parameters, mlp_flops(model), mlp_saved, *mlp_sources)
        if norms == 4:
            residual = add(f"{name}.norm4", "norm", layer, model.norm_parameters, 0.0, 2 * h, residual)
    last = model.num_layers + 1
    if model.final_norm:
        residual = add("norm", "norm", last, model.norm_parameters, 0.0, 2 * h, residual)
    projection = model.head_parameters - (model.norm_parameters if model.final_norm else 0)
    add("head", "head", last, projection, head_flops(model), 2 * h, residual)
    return graph


def chain_of(graph: nx.DiGraph, weight: str = "forward_flops") -> list[list[Hashable]]:
    """The parts that a pipeline can cut a layer graph into: those between its articulation edges, in order.

    A value is an edge here, whether one node uses it or several: an articulation edge is a value that every path from the
    chain's first part to the last node passes. Residual connections therefore lie inside a part. A branch that begins on
    its own (an embedding beside a vision tower) is with the part where it joins; of several that could begin the chain,
    the path with the most `weight` does, then the longest. Raises ValueError unless the graph is acyclic with exactly one last node.

    Each node is split in two, joined by its value. Bridges of that graph (Tarjan 1974) cut it into a tree of parts.
    """
    import networkx as nx

    last = [node for node in graph if graph.out_degree(node) == 0]
    if len(last) != 1 or not nx.is_directed_acyclic_graph(graph):
        raise ValueError("an acyclic graph with one last node is expected")
    split = nx.Graph()
    for node in graph:
        split.add_edge((node, "in"), (node, "out"))
    split.add_edges_from(((a, "out"), (b, "in")) for a, b in graph.edges)
    bridges = list(nx.bridges(split))
    pieces = split.copy()
    pieces.remove_edges_from(bridges)
    part_of = {half: index for index, part in enumerate(nx.connected_components(pieces)) for half in part}
    tree = nx.Graph()
    tree.add_nodes_from(part_of.values())
    tree.add_edges_from((part_of[a], part_of[b]) for a, b in bridges)
    own: dict[int, list[Hashable]] = {part: [] for part in tree}
    for node in nx.topological_sort(graph):
        own[part_of[node, "in"]].append(node)
    heavy = {part: sum(graph.nodes[node].get(weight, 0.0) for node in nodes) for part, nodes in own.items()}
    end = part_of[last[0], "in"]
    best, reached = end, {end: (heavy[end], 1)}
    for before, part in nx.bfs_edges(tree, end):
        reached[part] = (reached[before][0] + heavy[part], reached[before][1] + 1)
        if reached[part] > reached[best]:
            best = part
    path = nx.shortest_path(tree, best, end)
    main = set(path)
    order = {node: index for index, node in enumerate(nx.topological_sort(graph))}
    chain: list[list[Hashable]] = []
    for part in path:
        joined, waiting = list(own[part]), [other for other in tree[part] if other not in main]
        seen = {part, *waiting}
        while waiting:
            branch = waiting.pop()
            joined += own[branch]
            more = [other for other in tree[branch] if other not in main and other not in seen]
            seen.update(more)
            waiting += more
        if joined:
            chain.append(sorted(joined, key=order.__getitem__))
    return chain
