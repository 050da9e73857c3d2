"""One training step of a module under a dispatch mode that writes down every operation: what it reads, writes and saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from planner.traced import OperationKind


class Work(NamedTuple):
    """One operation: its kind, FLOPs, and bytes read and written."""

    kind: OperationKind
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


class Replay(Protocol):
    """A module's operations run by other means than the module itself, in the module's order."""

    parameters: list[Any]
    buffers: list[Any]

    def run(self, place: Callable[[str, str | None], None]) -> Any:
        """Does all operations and returns what the module does. `place(path, call)` is called before the operations of the module at `path`;
        `call` names its call where it has no children."""

    def saw(self, node: int) -> None:
        """Called after each operation with the index of its node."""


def storage_of(tensor: Any) -> int:
    """What tells the storages of a trace apart."""
    return int(tensor.untyped_storage()._cdata)


def _size(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())


def record(module: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], torch: Any, replay: Replay | None = None) -> Trace:
    """One forward and backward pass under a dispatch mode that writes down every operation; of `replay` where one is given, not of `module`."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    nodes: list[Node] = []
    parameters = list(module.parameters()) if replay is None else replay.parameters
    buffers = list(module.buffers()) if replay is None else replay.buffers
    trained = {storage_of(p): int(p.numel()) for p in parameters if p.requires_grad}
    fixed = {storage_of(t): _size(t) for t in (*parameters, *buffers)}
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
        own = _own_count(name, args)
        if own is not None:
            return Work("attention" if "attention" in name else "matmul", own, moved)
        if count is None:
            return Work("elementwise", 0.0, moved)
        return Work("attention" if "attention" in name else "matmul", float(count(*args, **kwargs, out_val=out)), moved)

    def forward(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        wrote = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        known = {storage_of(t) for t in read}
        if not wrote or (not func._schema.is_mutable and all(storage_of(t) in known for t in wrote)):
            return  # a view
        index = current(func._overloadpacket.__name__)
        if replay is not None:
            replay.saw(index)
        node = nodes[index]
        node_of.setdefault(torch.autograd._get_sequence_nr() - 1, index)
        for tensor in read:
            key = storage_of(tensor)
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
        node.forward_transient = max(node.forward_transient, float(sum(_size(t) for t in wrote if storage_of(t) not in fixed)))
        for tensor in wrote:
            key = storage_of(tensor)
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
        known = {storage_of(t) for t in read}
        if not wrote or all(storage_of(t) in known for t in wrote):
            return
        alive.extend(wrote)
        index = node_of.get(running._sequence_nr(), state["last"])
        if index < 0:
            return  # of the sum that starts the pass
        state["last"] = index
        node = nodes[index]
        node.backward.append(work(func, args, kwargs, out, float(sum(map(_size, (*read, *wrote))))))
        grads = [t for t in read if storage_of(t) not in fixed and storage_of(t) not in saved]
        node.backward_transient = max(node.backward_transient, float(sum(map(_size, (*grads, *wrote)))))

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.namespace != "prim":
                (backward if state["backward"] else forward)(func, args, kwargs or {}, out)
            return out

    def keep(tensor: Any) -> Any:
        """Called before or after the operation itself, so that its node is looked up at the end."""
        key = storage_of(tensor)
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

    def place(path: str, call: str | None) -> None:
        if call is not None and call not in calls:
            nodes.append(Node(path))
            calls[call] = len(nodes) - 1
        stack[:] = [(path, None if call is None else calls[call])]

    calls: dict[str, int] = {}
    handles = []
    for name, child in module.named_modules() if replay is None else ():
        leaf = bool(name) and not list(child.children())
        handles.append(child.register_forward_pre_hook(enter(name, leaf), prepend=True))
        handles.append(child.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        with Recorder(), torch.enable_grad():  # type: ignore[no-untyped-call]
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = module(*inputs[0], **inputs[1]) if replay is None else replay.run(place)
            for key, size, number in kept:
                if number in node_of:
                    saved.setdefault(key, (size, {}))[1][node_of[number]] = None
            leaves = [t for t in _tensors(result, torch) if t.requires_grad]
            if not leaves:
                raise ValueError("the module returns no tensor that depends on a trained parameter")
            outputs = {written[storage_of(t)]: None for t in leaves if storage_of(t) in written}
            state["backward"] = True
            torch.autograd.backward([t.float().sum() for t in leaves])
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
    return Trace(nodes, saved, made_by, readers, outputs)


def _own_count(name: str, args: Any) -> float | None:
    """FLOPs of operations that PyTorch's counter lacks or gets wrong; None for all others."""
    if "scaled_dot_product_flash_attention_for_cpu" in name:
        # two products forward; five backward, one of them the scores again
        first = 1 if "backward" in name else 0
        query, key = args[first], args[first + 1]
        return float((5 if first else 2) * 2.0 * query.numel() * key.shape[-2])
    if "convolution_backward" in name and args[9] > 1:  # grouped: the counter takes the weights' gradient as if it were not
        gradient, read, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        rows = read.numel() if transposed else gradient.numel()
        return float(2.0 * rows * (weight.numel() / weight.shape[0]) * sum(wanted[:2]))
    if "rnn_layer" in name:
        rows = args[0].numel() / args[0].shape[-1]
        matrices = sum(item.numel() for item in args[1:5] if hasattr(item, "dim") and item.dim() == 2)
        return float(2.0 * rows * matrices * (2 if "backward" in name else 1))
    return None


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


