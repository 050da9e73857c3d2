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
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from planner.errors import InputError
from planner.trace.layers import SAMPLES, traced_model
from planner.trace.record import record
from planner.traced import TracedModel

_HOW = (
    "a callable that returns an nn.Module is expected, with its inputs: return (module, example_inputs), or give the module an attribute "
    "example_inputs; a module that starts with nn.Embedding needs --sequence-length alone"
)


class Built(NamedTuple):
    """A module in the training's type, each part in the mode in which its callable has left it, with the inputs of one call: a tensor, a tuple, or
    a mapping of arguments."""

    module: Any
    example: Any


def build_module(
    build: Callable[[], Any], reference: str, precision: str, sequence_length: int | None = None, where: str = "--model", *, convert: bool = True
) -> Built:
    """Runs a callable that `find_callable` has found. Under a fake tensor mode nothing is allocated. Raises InputError when it fails or returns no
    module, or a module without inputs."""
    import torch

    with _explained(reference, where, "its callable fails"):
        module, example = _build(build, torch)
    if not isinstance(module, torch.nn.Module):
        raise InputError(where, reference, _HOW)
    example = _example(module, example, sequence_length, reference, where, torch)
    with _explained(reference, where, f"the module fails in {precision}"):
        if convert:
            convert_module(module, precision)
    return Built(module, example)


def trace_model(reference: str, precision: str, sequence_length: int | None = None, where: str = "--model") -> TracedModel:
    """The module that package.module:callable builds, as a chain of layers with what each needs.

    Runs the callable. Raises InputError when it can't be found, built or run on fake tensors.
    """
    build = find_callable(reference, where)
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise InputError(where, reference, "tracing a module needs PyTorch: pip install torch") from None
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        module, example = build_module(build, reference, precision, sequence_length, where)
        with _explained(reference, where, f"the module fails in {precision}"):
            traces = [record(module, example_batch(example, samples, precision), torch) for samples in SAMPLES]
    return traced_model(reference, precision, traces, where, sum(p.numel() for p in module.parameters()))


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said of what fails on fake tensors but by the error itself: no warnings, nor torch's own log of it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def find_callable(reference: str, where: str = "--model") -> Callable[[], Any]:
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
        with _unconverted(torch):
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


@contextmanager
def _unconverted(torch: Any) -> Iterator[None]:
    """Under a fake tensor mode `Module.to`, `.half()` and the like change nothing: they can't swap fake parameters, and what they would choose,
    `convert_module` and the plan choose afterwards."""
    from torch._guards import active_fake_mode

    convert = torch.nn.Module._apply
    if active_fake_mode() is not None:
        torch.nn.Module._apply = lambda module, fn, recurse=True: module
    try:
        yield
    finally:
        torch.nn.Module._apply = convert


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


class Arguments(NamedTuple):
    """The example inputs as a call's arguments. Tensors whose first dim is `num_samples`, that of the first tensor, have a row per sample."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    num_samples: int | None


def example_arguments(example: Any) -> Arguments:
    import torch

    positional = () if isinstance(example, Mapping) else tuple(example) if isinstance(example, (tuple, list)) else (example,)
    named = dict(example) if isinstance(example, Mapping) else {}
    tensors = [value for value in (*positional, *named.values()) if isinstance(value, torch.Tensor) and value.dim()]
    return Arguments(positional, named, tensors[0].shape[0] if tensors else None)


def example_batch(example: Any, samples: int, precision: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of zeros, with `samples` rows where the example has one per sample, floats in the training's type."""
    import torch

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    positional, named, given = example_arguments(example)

    def resized(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        kind = dtype if value.is_floating_point() else value.dtype
        shape = (samples, *value.shape[1:]) if value.dim() and value.shape[0] == given else tuple(value.shape)
        return torch.zeros(shape, dtype=kind)

    return tuple(resized(value) for value in positional), {name: resized(value) for name, value in named.items()}


def convert_module(module: Any, precision: str) -> None:
    """Gives all floating-point parameters and buffers the training's type; tied ones stay tied. (`Module.to` can't swap fake ones.)

    Fake tensors that `copy.deepcopy` has made (nn.TransformerEncoder's layers) don't share their storage with their own views; they are made again.
    """
    import torch

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    made: dict[int, Any] = {}
    for child in module.modules():
        for holder in (child._parameters, child._buffers):
            for name, old in holder.items():
                if old is None:
                    continue
                kind = dtype if old.is_floating_point() else old.dtype
                whole = old.detach().untyped_storage()._cdata == old.untyped_storage()._cdata
                if old.dtype == kind and whole:
                    continue
                if id(old) not in made:
                    new = old.detach().to(kind, copy=True)
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
                holder[name] = made[id(old)]
