"""Any `nn.Module` into a layer graph: one step on fake tensors, with every operation written down and nothing allocated.

A callable named on the command line builds the module; its code runs, which is why only the command line can name one
and never a plan file. A forward and a backward pass then run on fake tensors. Each call of a module without children is
a node of the graph, and so is each operation that other modules do themselves; what one node computes and another uses
is an edge. Values that depend on no parameter (masks, positions, rotary tables) are made anew on every stage, so they
are no edges; the work for them is with the layer that uses them first.

FLOPs are those of `torch.utils.flop_counter`, bytes those that an operation reads and writes, saved bytes what autograd
keeps. Operations of the backward pass belong to the node whose gradient they compute. The step runs with 2 and with 4
samples: all figures are affine in their number, which is what `planner.traced` stores.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import networkx as nx

from planner.errors import InputError
from planner.graph import chain_of
from planner.traced import Affine, LayerCost, Operation, TracedLayer, TracedModel

SAMPLES = (2, 4)
"""Batch sizes of the traces; BatchNorm refuses a single sample where an image has shrunk to a point."""
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_HOW = (
    "a callable that returns an nn.Module is expected, with its inputs: return (module, example_inputs), or give the module an attribute "
    "example_inputs; a module that starts with nn.Embedding needs --sequence-length alone"
)


def is_reference(text: str) -> bool:
    """Whether `text` has the form package.module:callable."""
    return _REFERENCE.fullmatch(text) is not None


class Work(NamedTuple):
    """One operation: its kind, FLOPs, and bytes read and written."""

    kind: str
    flops: float
    moved: float


@dataclass(slots=True)
class Node:
    """A call of a module without children, or an operation that another module does itself."""

    name: str
    sources: dict[int, None] = field(default_factory=dict)
    forward: list[Work] = field(default_factory=list)
    backward: list[Work] = field(default_factory=list)
    parameters: dict[int, int] = field(default_factory=dict)
    """Elements of the trained parameters that it reads, by storage; frozen ones in `frozen`, in bytes."""
    frozen: dict[int, int] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    """Bytes of the storages that it writes."""
    trained: bool = False
    """Whether what it makes depends on a trained parameter."""
    forward_transient: float = 0.0
    backward_transient: float = 0.0


@dataclass(slots=True)
class Trace:
    """One step with a number of samples."""

    nodes: list[Node]
    saved: dict[int, tuple[int, dict[int, None]]]
    """Storages that autograd keeps: bytes, and the nodes that keep them."""
    made_by: dict[int, int]
    """The node that wrote a storage first."""
    readers: dict[int, set[int]]
    """The nodes that read a storage."""
    outputs: dict[int, None]
    """Nodes whose values the module returns."""


def trace_model(reference: str, precision: str, sequence_length: int | None = None, where: str = "--model") -> TracedModel:
    """The module that package.module:callable builds, as a chain of layers with what each needs.

    Runs the callable. Raises InputError when it can't be found, built or run on fake tensors.
    """
    build = _callable(reference, where)
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise InputError(where, reference, "tracing a module needs PyTorch: pip install torch") from None
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        with _explained(reference, where, "its callable fails"):
            module, example = _build(build, torch)
        if not isinstance(module, torch.nn.Module):
            raise InputError(where, reference, _HOW)
        example = _example(module, example, sequence_length, reference, where, torch)
        with _explained(reference, where, f"the module fails in {precision}"):
            _convert(module, dtype, torch)
            module.train()
            traces = [_run(module, _batch(example, samples, dtype, torch), torch) for samples in SAMPLES]
    return _model(reference, precision, traces, where, sum(p.numel() for p in module.parameters()))


def _callable(reference: str, where: str) -> Callable[[], Any]:
    """The callable itself; its module is looked for beside what is installed in the current folder, as `python -m` does."""
    module_name, _, name = reference.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(module_name), name, None)
    except (Exception, SystemExit) as error:
        raise InputError(where, reference, f"importing {module_name} failed: {_line(error)}") from None
    if not callable(found):
        raise InputError(where, reference, f"{module_name} has no callable named {name}")
    return found  # type: ignore[no-any-return]


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextmanager
def _explained(reference: str, where: str, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(where, reference, f"{what} on fake tensors: {_line(error)}") from None


def _build(build: Callable[[], Any], torch: Any) -> tuple[Any, Any]:
    """The module and its example inputs, None where it has none. What needs real values to be built is built for real."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily

    try:
        built = build()
    except DataDependentOutputException:
        with unset_fake_temporarily():
            built = build()
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], torch.nn.Module):
        return built
    for name in ("example_inputs", "example_input_array"):
        if hasattr(built, name):
            example = getattr(built, name)
            return built, example() if callable(example) and not isinstance(example, torch.Tensor) else example
    return built, None


def _example(module: Any, example: Any, sequence_length: int | None, reference: str, where: str, torch: Any) -> Any:
    """The example inputs, or token ids for a module whose first layer is an embedding."""
    if example is not None:
        return example
    first = next((child for child in module.modules() if not list(child.children())), None)
    if isinstance(first, torch.nn.Embedding):
        if sequence_length is None:
            raise InputError("--sequence-length", None, f"{reference} has no example inputs, so the tokens of a sample are needed")
        return (torch.zeros(2, sequence_length, dtype=torch.long),)
    raise InputError(where, reference, _HOW)


def _batch(example: Any, samples: int, dtype: Any, torch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with `samples` in place of the first tensor's first dim, floats in the training's type."""
    positional = () if isinstance(example, Mapping) else tuple(example) if isinstance(example, (tuple, list)) else (example,)
    named = dict(example) if isinstance(example, Mapping) else {}
    tensors = [value for value in (*positional, *named.values()) if isinstance(value, torch.Tensor) and value.dim()]
    given = tensors[0].shape[0] if tensors else None

    def resized(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        kind = dtype if value.is_floating_point() else value.dtype
        shape = (samples, *value.shape[1:]) if value.dim() and value.shape[0] == given else tuple(value.shape)
        return torch.zeros(shape, dtype=kind)

    return tuple(resized(value) for value in positional), {name: resized(value) for name, value in named.items()}


def _convert(module: Any, dtype: Any, torch: Any) -> None:
    """Gives all floating-point parameters and buffers this type; tied ones stay tied. (`Module.to` can't swap fake ones.)"""
    made: dict[int, Any] = {}
    for child in module.modules():
        for holder in (child._parameters, child._buffers):
            for name, old in holder.items():
                if old is None or not old.is_floating_point() or old.dtype == dtype:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=dtype)
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
                holder[name] = made[id(old)]


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


def _size(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())


def _run(module: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], torch: Any) -> Trace:
    """One forward and backward pass under a dispatch mode that writes down every operation."""
    from torch.utils._pytree import tree_leaves
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    nodes: list[Node] = []
    trained = {_storage(p): int(p.numel()) for p in module.parameters() if p.requires_grad}
    fixed = {_storage(t): _size(t) for t in (*module.parameters(), *module.buffers())}
    written: dict[int, int] = {}
    made_by: dict[int, int] = {}
    readers: dict[int, set[int]] = {}
    learned: set[int] = set()
    saved: dict[int, tuple[int, dict[int, None]]] = {}
    kept: list[tuple[int, int, int]] = []
    node_of: dict[int, int] = {}  # by autograd's sequence number
    alive: list[Any] = []  # fake tensors, so that no storage's address is used twice
    stack: list[tuple[str, int | None]] = []
    state = {"backward": False, "last": -1}

    def current(name: str) -> int:
        if stack and stack[-1][1] is not None:
            return stack[-1][1]
        nodes.append(Node(f"{stack[-1][0]}.{name}" if stack and stack[-1][0] else name))
        return len(nodes) - 1

    def work(func: Any, args: Any, kwargs: Any, out: Any, moved: float) -> Work:
        name, count = str(func), flop_registry.get(func._overloadpacket)
        if count is not None:
            return Work("attention" if "attention" in name else "matmul", float(count(*args, **kwargs, out_val=out)), moved)
        if "scaled_dot_product" not in name:
            return Work("elementwise", 0.0, moved)
        # the CPU's fused attention: two products forward; five backward, one of them the scores again
        first = 1 if "backward" in name else 0
        query, key = args[first], args[first + 1]
        product = 2.0 * query.numel() * key.shape[-2]
        return Work("attention", (5 if first else 2) * product, moved)

    def forward(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        wrote = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        known = {_storage(t) for t in read}
        if not wrote or (not func._schema.is_mutable and all(_storage(t) in known for t in wrote)):
            return  # a view
        index = current(func._overloadpacket.__name__)
        node = nodes[index]
        node_of.setdefault(torch.autograd._get_sequence_nr() - 1, index)
        for tensor in read:
            key = _storage(tensor)
            readers.setdefault(key, set()).add(index)
            if key in trained:
                node.parameters[key] = trained[key]
                node.trained = True
            elif key in fixed:
                node.frozen[key] = fixed[key]
            elif key in written and written[key] != index:
                node.sources[written[key]] = None
            node.trained = node.trained or key in learned
        moved = 0.0 if not read and func._overloadpacket.__name__ == "empty" else float(sum(map(_size, (*read, *wrote))))
        node.forward.append(work(func, args, kwargs, out, moved))
        node.forward_transient = max(node.forward_transient, float(sum(_size(t) for t in wrote if _storage(t) not in fixed)))
        for tensor in wrote:
            key = _storage(tensor)
            if key in fixed:
                continue
            alive.append(tensor)
            written[key] = index
            made_by.setdefault(key, index)
            node.made[key] = int(tensor.untyped_storage().nbytes())
            if node.trained and tensor.is_floating_point():
                learned.add(key)

    def backward(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        running = torch._C._current_autograd_node()
        if running is None or "AccumulateGrad" in running.name():
            return
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        wrote = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        known = {_storage(t) for t in read}
        if not wrote or all(_storage(t) in known for t in wrote):
            return
        alive.extend(wrote)
        index = node_of.get(running._sequence_nr(), state["last"])
        if index < 0:
            return  # of the sum that starts the pass
        state["last"] = index
        node = nodes[index]
        node.backward.append(work(func, args, kwargs, out, float(sum(map(_size, (*read, *wrote))))))
        grads = [t for t in read if _storage(t) not in fixed and _storage(t) not in saved]
        node.backward_transient = max(node.backward_transient, float(sum(map(_size, (*grads, *wrote)))))

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.namespace != "prim":
                (backward if state["backward"] else forward)(func, args, kwargs or {}, out)
            return out

    def keep(tensor: Any) -> Any:
        """Called before or after the operation itself, so that its node is looked up at the end."""
        key = _storage(tensor)
        if key not in fixed:
            alive.append(tensor)
            kept.append((key, int(tensor.untyped_storage().nbytes()), torch.autograd._get_sequence_nr() - 1))
        return tensor

    def enter(name: str, leaf: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            index = None
            if leaf and not (stack and stack[-1][1] is not None):
                nodes.append(Node(name))
                index = len(nodes) - 1
            stack.append((name, index if index is not None else stack[-1][1] if stack else None))

        return hook

    handles = []
    for name, child in module.named_modules():
        leaf = bool(name) and not list(child.children())
        handles.append(child.register_forward_pre_hook(enter(name, leaf), prepend=True))
        handles.append(child.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        with Recorder(), torch.enable_grad():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = module(*inputs[0], **inputs[1])
            for key, size, number in kept:
                if number in node_of:
                    saved.setdefault(key, (size, {}))[1][node_of[number]] = None
            leaves = [t for t in _tensors(result, torch) if t.requires_grad]
            if not leaves:
                raise ValueError("the module returns no tensor that depends on a trained parameter")
            outputs = {written[_storage(t)]: None for t in leaves if _storage(t) in written}
            state["backward"] = True
            torch.autograd.backward([t.float().sum() for t in leaves])
    finally:
        for handle in handles:
            handle.remove()
        module.zero_grad(set_to_none=True)
    return Trace(nodes, saved, made_by, readers, outputs)


def _tensors(value: Any, torch: Any) -> Iterator[Any]:
    """The tensors of an output: of tuples, dicts, and objects with fields such as those of transformers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, torch)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, torch)


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


def _model(reference: str, precision: str, traces: Sequence[Trace], where: str, num_parameters: int) -> TracedModel:
    first, second = traces
    if [node.name for node in first.nodes] != [node.name for node in second.nodes]:
        raise InputError(where, reference, f"it does other operations with {SAMPLES[1]} samples than with {SAMPLES[0]}; the batch must be the first dim")
    graph = trace_graph(first)
    groups = [[node for node in group if node != "output"] for group in chain_of(graph)]
    groups = [group for group in groups if group]
    members = [sorted(member for node in group for member in graph.nodes[node]["members"]) for group in groups]
    boundary = [_boundary(graph, a, b) for a, b in zip(groups, groups[1:], strict=False)]
    members, boundary = _with_parameters(first, members, boundary)
    raw = [[_layer(trace, members, boundary, index) for index in range(len(members))] for trace in traces]
    costs: dict[LayerCost, int] = {}
    layers, seen = [], set[int]()
    for index, group in enumerate(members):
        mine: dict[int, int] = {}
        frozen: dict[int, int] = {}
        for member in group:
            mine |= first.nodes[member].parameters
            frozen |= first.nodes[member].frozen
        own = sum(count for key, count in mine.items() if key not in seen)
        shared = sum(count for key, count in mine.items() if key in seen)
        seen |= set(mine)
        try:
            cost = _cost(raw[0][index], raw[1][index], own, shared, sum(frozen.values()))
        except ValueError:
            raise InputError(where, reference, "its operations change with the number of samples; the batch must be the first dim") from None
        layers.append(TracedLayer(name=_name(first, group), cost=costs.setdefault(cost, len(costs))))
    return TracedModel(
        name=reference, precision=precision, num_parameters=num_parameters, num_layers=len(layers), layers=tuple(layers), costs=tuple(costs)
    )


def _boundary(graph: nx.DiGraph, before: list[Any], after: list[Any]) -> int:
    """The node whose value crosses from one part of the chain to the next."""
    later = set(after)
    return next(int(node) for node in before if any(target in later for target in graph.successors(node)))


def _with_parameters(trace: Trace, members: list[list[int]], boundary: list[int]) -> tuple[list[list[int]], list[int]]:
    """Parts without parameters (activations, pooling) join the part before them: a cut lies before a layer with parameters."""
    groups, edges = [list(members[0])], list[int]()
    for group, edge in zip(members[1:], boundary, strict=True):
        started = any(trace.nodes[index].parameters for index in groups[-1])
        if started and any(trace.nodes[index].parameters for index in group):
            groups.append(list(group))
            edges.append(edge)
        else:
            groups[-1] += group
    return groups, edges


def _name(trace: Trace, group: Sequence[int]) -> str:
    """The module that all layers with parameters of a part lie in, or the first to the last of them."""
    names = [trace.nodes[index].name for index in group if trace.nodes[index].parameters] or [trace.nodes[group[0]].name]
    common = os.path.commonprefix([name.split(".") for name in names])
    if len(set(names)) == 1:
        return names[0]
    inner = names[0].split(".")[len(common)] if len(names[0].split(".")) > len(common) else ""
    last = names[-1].split(".")[len(common)] if len(names[-1].split(".")) > len(common) else ""
    prefix = ".".join(common)
    part = inner if inner == last else f"{inner}..{last}"
    return f"{prefix}.{part}".strip(".") if part else prefix


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
    found: dict[tuple[str, Affine, Affine], int] = {}
    for a, b in zip(low, high, strict=True):
        if a.kind != b.kind:
            raise ValueError(a.kind)
        if a.flops or a.moved or b.moved:
            key = (a.kind, _affine(a.flops, b.flops), _affine(a.moved, b.moved))
            found[key] = found.get(key, 0) + 1
    return tuple(Operation(kind=kind, num_calls=count, flops=flops, moved_bytes=moved) for (kind, flops, moved), count in found.items())


def _cost(low: _Layer, high: _Layer, own: int, shared: int, frozen: int) -> LayerCost:
    return LayerCost(
        num_parameters=own,
        num_shared_parameters=shared,
        frozen_bytes=frozen,
        forward=_operations(low.forward, high.forward),
        backward=_operations(low.backward, high.backward),
        saved_bytes=_affine(low.saved, high.saved),
        received_bytes=_affine(low.received, high.received),
        sent_bytes=_affine(low.sent, high.sent),
        kept_bytes=_affine(low.kept, high.kept),
        forward_transient_bytes=_affine(low.forward_transient, high.forward_transient),
        backward_transient_bytes=_affine(low.backward_transient, high.backward_transient),
    )
