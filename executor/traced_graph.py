"""A module's stages: its operations, exported by torch, cut where the plan's chain of layers is cut.

`torch.export` writes the module's forward pass down as a graph of operations with static shapes. The planner's own tracer runs that graph once on
fake tensors and says which layer of the chain each operation belongs to; so the layers that run are those that were planned, or the plan is refused.
 Each stage becomes one or more *segments*, graphs that hand one tensor on: a segment for each recomputed layer, and one for the layers
between. What depends on no trained parameter (masks, positions, rotary tables), and views, are made anew in each segment that reads them.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from executor.pipeline import Message
from planner.chain_plan import recomputed
from planner.errors import InputError
from planner.plan import Stage
from planner.trace import Built, example_batch
from planner.trace.layers import chain_layers, held_by_layers, layer_name
from planner.trace.record import record, storage_of
from planner.traced import TracedModel, at


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive layers of a stage as one graph.

    Its placeholders are the tensor that the segment before hands on, if there is one, and `inputs`. It returns the tensor to hand on;
    the module's last segment returns a tuple of what the loss is made of.
    """

    graph: fx.Graph
    inputs: tuple[int, ...]
    """Indices of the module's inputs, flattened."""
    state: dict[str, str]
    """Parameters, buffers and constants by attribute; each by its name in the module."""
    changed: frozenset[str]
    """Attributes of the buffers that the module's forward pass changes."""
    modules: dict[str, Any]
    """Graphs that operations of this one run, by attribute."""
    recomputed: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A module cut into the stages of a plan."""

    stages: tuple[tuple[Segment, ...], ...]
    messages: tuple[Message, ...]
    """Behind each stage but the last."""
    layer_parameters: tuple[tuple[str, ...], ...]
    """Names of the trained parameters of each layer; a tied one has one name, and is with each layer that reads it."""
    highest: dict[int, int]
    """For inputs of whole numbers that look up a table or name a class: how many values there are."""
    constants: dict[str, torch.Tensor]


def cut_module(
    built: Built, samples: int, precision: str, model: TracedModel, stages: Sequence[Stage], reference: str, where: str = "--model"
) -> Cut:
    """The stages of a module, for micro-batches of `samples`. Raises InputError when it can't be exported, is not the one that was planned, or its
    graph can't be cut where the plan says."""
    found = _Layers(built, samples, precision, reference, where)
    found.check(model)
    segments, messages = [], []
    value: fx.Node | None = None
    for number, stage in enumerate(stages):
        again, last = recomputed(stage), stage.first_layer + stage.num_layers
        parts = []
        for layers in _runs(stage, again):
            after = found.crossing(layers.stop) if layers.stop < model.num_layers else None
            parts.append(found.segment(layers, value, after, number, recompute=layers.start in again))
            value = after
        segments.append(tuple(parts))
        if number + 1 < len(stages):
            assert value is not None
            messages.append(found.message(value, last, at(model.cost(last - 1).sent_bytes, samples)))
    return Cut(tuple(segments), tuple(messages), found.layer_parameters(), found.highest(), found.constants)


def _runs(stage: Stage, again: frozenset[int]) -> Iterable[range]:
    """The stage's layers in the segments that run them: each recomputed layer alone, the others together."""
    first = stage.first_layer
    for layer in range(stage.first_layer, stage.first_layer + stage.num_layers):
        if layer in again:
            if first < layer:
                yield range(first, layer)
            yield range(layer, layer + 1)
            first = layer + 1
    if first < stage.first_layer + stage.num_layers:
        yield range(first, stage.first_layer + stage.num_layers)


class _Replay:
    """Runs an exported graph operation by operation for `planner.trace.record`."""

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Any], parameters: list[Any], buffers: list[Any], leaves: frozenset[str]) -> None:
        self.graph, self.parameters, self.buffers = graph, parameters, buffers
        self.values = values
        """By node; at first those of the placeholders and attributes."""
        self.leaves = leaves
        self.owners: dict[fx.Node, set[int]] = {}
        """The traced nodes of an operation; none for views."""
        self._running: fx.Node | None = None

    def saw(self, node: int) -> None:
        assert self._running is not None
        self.owners.setdefault(self._running, set()).add(node)

    def run(self, place: Callable[[str, str | None], None]) -> Any:
        for node in self.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], self.values.__getitem__)
            if node.op == "call_function":
                place(*self._place(node))
                self._running = node
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
                self.values[node] = node.target(*args, **kwargs)
        raise AssertionError("a graph ends with its output")

    def _place(self, node: fx.Node) -> tuple[str, str | None]:
        """The path of the module that an operation lies in, and the call where that module has no children."""
        stack = list((node.meta.get("nn_module_stack") or {}).items())
        for key, (path, _) in stack:
            path = path.split("@")[0]
            if path in self.leaves:
                return path, key
        return (stack[-1][1][0].split("@")[0] if stack else ""), None


class _Layers:
    """An exported module with the layer of each operation."""

    def __init__(self, built: Built, samples: int, precision: str, reference: str, where: str) -> None:
        self.reference, self.where = reference, where
        module = built.module
        positional, named = example_batch(built.example, samples, precision)
        try:
            with warnings.catch_warnings(), redirect_stderr(StringIO()):  # it prints the graph of what it refuses
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, positional, named, strict=False)
                self._trace(exported, module)
        except InputError:
            raise
        except Exception as error:  # the user's code, or one of the many things that torch.export says no to
            text = " ".join(str(error).split())
            self._refuse(f"torch.export can't write its operations down: {type(error).__name__}: {text[:200]}")

    def _refuse(self, allowed: str) -> None:
        raise InputError(self.where, self.reference, allowed)

    def _trace(self, exported: torch.export.ExportedProgram, module: torch.nn.Module) -> None:
        signature = exported.graph_signature
        named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
        first_name = {id(tensor): name for name, tensor in reversed(named.items())}
        self.constants: dict[str, torch.Tensor] = {
            name: value for name, value in exported.constants.items() if isinstance(value, torch.Tensor) and name not in named
        }
        known = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        graph, self.graph_module = exported.graph, exported.graph_module
        self.state: dict[fx.Node, str] = {}
        self.inputs: list[fx.Node] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                if node.name in known:
                    name = known[node.name]
                    self.state[node] = first_name[id(named[name])] if name in named else name
                else:
                    self.inputs.append(node)
        mode = next((tensor.fake_mode for tensor in named.values() if hasattr(tensor, "fake_mode")), None)
        mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        fake: dict[int, Any] = {}

        def faked(tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor):
                return tensor
            if id(tensor) not in fake:
                fake[id(tensor)] = tensor if hasattr(tensor, "fake_mode") else mode.from_tensor(tensor)
            return fake[id(tensor)]

        values: dict[fx.Node, Any] = {node: faked(named[name] if name in named else self.constants[name]) for node, name in self.state.items()}
        given = tree_leaves(exported.example_inputs)
        with mode:
            for node, value in zip(self.inputs, given, strict=True):
                values[node] = torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        values |= {node: getattr(self.graph_module, node.target) for node in graph.nodes if node.op == "get_attr"}
        parameters = {first_name[id(p)]: faked(p) for p in module.parameters()}
        buffers = [faked(tensor) for tensor in (*module.buffers(), *self.constants.values())]
        leaves = frozenset(name for name, child in module.named_modules() if name and not list(child.children()))
        replay = _Replay(graph, values, list(parameters.values()), buffers, leaves)
        with mode:
            self.trace = record(module, ((), {}), torch, replay)
        self.graph, self.values, self.owners = graph, replay.values, replay.owners
        self.names = {storage_of(tensor): name for name, tensor in parameters.items() if tensor.requires_grad}
        self.chain = chain_layers(self.trace)
        self._assign()

    def _assign(self) -> None:
        """The layer of each operation that a trained parameter has a part in, and which of those each of them reads."""
        nodes = self.trace.nodes
        layer_of = {index: layer for layer, group in enumerate(self.chain.members) for index in group if nodes[index].trained}
        written: dict[int, int] = {}
        for index, layer in sorted(layer_of.items()):
            for key in nodes[index].made:
                written.setdefault(key, layer)
        self.layer: dict[fx.Node, int] = {}
        self.joined: dict[int, fx.Node] = {}
        """Layers that can't begin a segment, since an operation of the graph is also a part of the layer before."""
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            layers = {layer_of[index] for index in self.owners.get(node, ()) if index in layer_of}
            if layers:
                self.layer[node] = max(layers)
                self.joined |= dict.fromkeys(range(min(layers) + 1, max(layers) + 1), node)
            elif node.target is operator.getitem and node.args[0] in self.layer:
                self.layer[node] = self.layer[node.args[0]]
            elif self.owners.get(node):  # made without a parameter, and later written to in place by a layer
                mine = [written[key] for key in self._storages(node) if key in written]
                if mine:
                    self.layer[node] = min(mine)
        self.reads: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.graph.nodes:
            found = set[fx.Node]()
            for source in node.all_input_nodes:
                found |= {source} if source in self.layer else self.reads[source]
            self.reads[node] = frozenset(found)
        self.result = self._result()
        buffers = {storage_of(self.values[node]) for node in self.state}
        writes = {node: buffers & self._written(node) for node in self.graph.nodes if node.op == "call_function"}
        self.changed = frozenset[int]().union(*writes.values())
        """Storages of the buffers that a forward pass changes."""
        self.updates = [node for node, keys in writes.items() if keys and node not in self.layer]
        """Operations that no parameter has a part in and that change a buffer, such as a counter."""
        self.updated: dict[fx.Node, int] = {}
        """The last stage with a segment that does each of them."""

    def _written(self, node: fx.Node) -> set[int]:
        """Storages that an operation writes to in place: those that its schema names, and running statistics, which it doesn't."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return set()
        names = [item.name for item in schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        wrote = [given.get(item.name) for item in schema.arguments if item.alias_info is not None and item.alias_info.is_write]
        if given.get("training") is True or given.get("use_input_stats") is True:
            wrote += [given.get("running_mean"), given.get("running_var")]
        return {key for value in wrote if isinstance(value, fx.Node) for key in self._storages(value)}

    def _storages(self, node: fx.Node) -> list[int]:
        return [storage_of(value) for value in tree_leaves(self.values.get(node)) if isinstance(value, torch.Tensor)]

    def _result(self) -> list[fx.Node]:
        """What the loss is made of: the first scalar that the module returns, else all tensors that depend on a parameter, each as often as it is
        returned."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        returned = [node for node in tree_leaves(output.args) if isinstance(node, fx.Node)]
        found = [node for node in returned if isinstance(self.values[node], torch.Tensor) and self.values[node].requires_grad]
        scalars = [node for node in found if self.values[node].dim() == 0]
        return scalars[:1] or found

    def check(self, model: TracedModel) -> None:
        """Raises InputError unless this is the chain that was planned."""
        members, trace = self.chain.members, self.trace
        nested = any(isinstance(self.values[node], fx.GraphModule) for node in self.graph.nodes if node.op == "get_attr")
        hint = "; or the layers that it runs under autocast or no_grad, which are one operation of the exported graph, are to blame" if nested else ""
        if len(members) != model.num_layers:
            self._refuse(f"the plan is of another module: its chain has {model.num_layers} layers, this one's {len(members)}{hint}")
        for index, (group, held) in enumerate(zip(members, held_by_layers(trace, members), strict=True)):
            cost = model.cost(index)
            mine = (layer_name(trace, group), held.own, held.shared)
            planned = (model.layers[index].name, cost.num_parameters, cost.num_shared_parameters)
            if mine != planned:
                self._refuse(
                    f"the plan is of another module: its layer {index} is {planned[0]} with {planned[1] + planned[2]:,} parameters, "
                    f"this one's {mine[0]} with {mine[1] + mine[2]:,}{hint}"
                )

    def crossing(self, layer: int) -> fx.Node:
        """The one value that crosses the cut before `layer`."""
        name = layer_name(self.trace, self.chain.members[layer])
        if layer in self.joined:
            node = self.joined[layer]
            self._refuse(f"it can't be cut before layer {layer} ({name}): the exported operation {node.name} is a part of it and of the layer before")
        later = [node for node, place in self.layer.items() if place >= layer]
        found = {source for node in later for source in self.reads[node] if self.layer[source] < layer}
        for node in self.result:
            found |= {source for source in ({node} if node in self.layer else self.reads[node]) if self.layer[source] < layer}
        only = next(iter(found)) if len(found) == 1 else None
        if only is None or not isinstance(self.values[only], torch.Tensor) or not self.values[only].requires_grad:
            names = ", ".join(sorted(node.name for node in found))
            self._refuse(f"one tensor must cross the cut before layer {layer} ({name}); in the exported graph these do: {names}")
        assert only is not None
        return only

    def message(self, value: fx.Node, layer: int, planned_bytes: float) -> Message:
        """The value that crosses the cut before `layer` as a message of the planned size."""
        tensor = self.values[value]
        if abs(tensor.nbytes - planned_bytes) > 0.5:
            self._refuse(f"the plan is of another module: before layer {layer} it sends {planned_bytes:,.0f} bytes, this one {tensor.nbytes:,}")
        return Message(tuple(tensor.shape), tensor.dtype)

    def segment(self, layers: range, before: fx.Node | None, after: fx.Node | None, stage: int, *, recompute: bool) -> Segment:
        """The operations of `layers`, from the value `before` them to the one `after` them, or to the module's result. To be called in order."""
        wanted = [after] if after is not None else self.result
        emitted = {node for node, layer in self.layer.items() if layer in layers}
        waiting = [*emitted, *wanted, *self._made_for(emitted)]
        for node in self.updates:  # those that nothing needs: where what they read is, or at the end
            if max((self.layer[source] for source in self.reads[node]), default=len(self.chain.members) - 1) in layers and node not in self.updated:
                if any(self.layer[source] not in layers and source is not before for source in self.reads[node]):
                    self._refuse(f"its operation {node.name} updates a buffer by values of several segments: cut or recompute fewer layers")
                waiting.append(node)
                emitted.add(node)
        while waiting:
            node = waiting.pop()
            if node not in emitted and node not in self.layer and node.op == "call_function":
                emitted.add(node)
            waiting += [
                source for source in node.all_input_nodes
                if source not in emitted and source not in self.layer and source.op == "call_function"
            ]  # fmt: skip
        self._check_repeatable(emitted, layers)
        self._count_updates(emitted, stage)
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        if before is not None:
            env[before] = graph.placeholder("carried")
            if self._written_by(before, layers):
                env[before] = graph.call_function(torch.ops.aten.clone.default, (env[before],))
        sources = {*wanted, *emitted} | {source for node in emitted for source in node.all_input_nodes}
        used = [index for index, node in enumerate(self.inputs) if node in sources]
        for index in used:
            env[self.inputs[index]] = graph.placeholder(self.inputs[index].name)
        state, modules = {}, {}
        for node in self.graph.nodes:
            if node in self.state and node in sources:
                env[node] = graph.get_attr(node.name)
                state[node.name] = self.state[node]
            elif node in emitted or (node.op == "get_attr" and node in sources):
                if node.op == "get_attr":
                    modules[node.target] = self.values[node]
                env[node] = graph.node_copy(node, env.__getitem__)
                env[node].meta = {}
        graph.output(env[after] if after is not None else tuple(env[node] for node in self.result))
        changed = frozenset(node.name for node in self.state if node.name in state and storage_of(self.values[node]) in self.changed)
        return Segment(graph, tuple(used), state, changed, modules, recompute)

    def _made_for(self, emitted: set[fx.Node]) -> list[fx.Node]:
        """Operations without parameters that write what `emitted` read, in place where no argument shows it."""
        waiting = [index for node in emitted for index in self.owners.get(node, ())]
        needed = set[int]()
        while waiting:
            for source in self.trace.nodes[waiting.pop()].sources:
                if not self.trace.nodes[source].trained and source not in needed:
                    needed.add(source)
                    waiting.append(source)
        return [node for node, owners in self.owners.items() if node not in self.layer and not owners.isdisjoint(needed)]

    def _check_repeatable(self, emitted: set[fx.Node], layers: range) -> None:
        """Raises InputError for an operation that must not be done once per segment: a random one that no parameter has a part in."""
        whole = layers == range(len(self.chain.members))
        for node in emitted:
            tags = getattr(node.target, "tags", ())
            if self.owners.get(node) and node not in self.layer and torch.Tag.nondeterministic_seeded in tags and not whole:
                self._refuse(f"its operation {node.name} is random and depends on no parameter: stages can't agree on its value")

    def _count_updates(self, emitted: set[fx.Node], stage: int) -> None:
        """Raises InputError where a stage would update a buffer twice for a micro-batch. Each stage has buffers of its own."""
        for node in self.updates:
            if node in emitted:
                if self.updated.get(node) == stage:
                    name = next(name for other, name in self.state.items() if storage_of(self.values[other]) in self._storages(node))
                    self._refuse(
                        f"its buffer {name} is updated by operations that no parameter has a part in, which each segment of a stage would do again: "
                        "plan it with --recompute none"
                    )
                self.updated[node] = stage

    def _written_by(self, value: fx.Node, layers: range) -> bool:
        """Whether `layers` change a value in place."""
        keys = set(self._storages(value))
        return any(not keys.isdisjoint(self.trace.nodes[index].made) for layer in layers for index in self.chain.members[layer])

    def layer_parameters(self) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(dict.fromkeys(self.names[key] for index in group for key in self.trace.nodes[index].parameters)) for group in self.chain.members
        )

    def highest(self) -> dict[int, int]:
        """The rows of the tables and the classes of the losses that each input of whole numbers is used with, the fewest of them."""
        found: dict[int, int] = {}
        aten = torch.ops.aten
        for node in self.graph.nodes:
            if node.target is aten.embedding.default:
                number, looked_up = self.values[node.args[0]].shape[0], node.args[1]
            elif node.target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default):
                scores = self.values[node.args[0]]
                number, looked_up = scores.shape[1 if scores.dim() > 1 else 0], node.args[1]
            else:
                continue
            for index in self._inputs_of(looked_up):
                found[index] = min(found.get(index, number), number)
        return found

    def _inputs_of(self, node: fx.Node) -> set[int]:
        """The inputs of whole numbers that a value is made from."""
        seen, waiting = {node}, [node]
        while waiting:
            for source in waiting.pop().all_input_nodes:
                value = self.values.get(source)
                if source not in seen and isinstance(value, torch.Tensor) and not value.is_floating_point():
                    seen.add(source)
                    waiting.append(source)
        return {index for index, source in enumerate(self.inputs) if source in seen}


def on_device(graph: fx.Graph, device: torch.device) -> None:
    """Makes a graph's own tensors on `device`."""
    for node in graph.nodes:
        node.args, node.kwargs = tree_map(lambda value: device if isinstance(value, torch.device) else value, (node.args, node.kwargs))
