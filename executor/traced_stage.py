"""A stage of any module on this rank: its segments with real parameters, and what their forward and backward passes do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from executor.mesh import Mesh
from executor.pipeline import reduce_units
from executor.traced_graph import Cut, Segment, on_device
from executor.units import Entry, Layout, Piece, Unit, make_layout
from planner.plan import Stage

BUCKET_ELEMENTS = 1 << 24
"""Layers are put into one unit until it holds as many parameters: a collective on a long vector costs less than many on short ones."""


@dataclass(frozen=True, slots=True)
class ModuleState:
    """A whole module's tensors by name: trained parameters in fp32, and what is not trained, in the training's type."""

    trained: dict[str, torch.Tensor]
    fixed: dict[str, torch.Tensor]
    buffers: frozenset[str]
    """Which of `fixed` a forward pass may change."""


def stage_parameters(cut: Cut, stages: Iterable[Stage]) -> list[dict[str, int]]:
    """For each stage its trained parameters by name, with the first of its layers that reads each."""
    found = []
    for stage in stages:
        mine: dict[str, int] = {}
        for layer in range(stage.first_layer, stage.first_layer + stage.num_layers):
            for name in cut.layer_parameters[layer]:
                mine.setdefault(name, layer)
        found.append(mine)
    return found


def holders(parameters: list[dict[str, int]], name: str) -> tuple[int, ...]:
    """The stages that hold a parameter."""
    return tuple(index for index, mine in enumerate(parameters) if name in mine)


def pipeline_sets(cut: Cut, stages: Iterable[Stage]) -> set[tuple[int, ...]]:
    """The sets of stages that share parameters."""
    parameters = stage_parameters(cut, stages)
    return {found for mine in parameters for name in mine if len(found := holders(parameters, name)) > 1}


def stage_layouts(parameters: list[dict[str, int]], stage: int, shapes: dict[str, tuple[int, ...]]) -> list[tuple[Layout, tuple[int, ...]]]:
    """The units of a stage, and the stages that hold each: its own parameters in the order of its layers, then those it shares."""
    groups: dict[tuple[int, ...], list[list[str]]] = {(stage,): [[]]}
    for name in parameters[stage]:
        buckets = groups.setdefault(holders(parameters, name), [[]])
        if sum(torch.Size(shapes[other]).numel() for other in buckets[-1]) >= BUCKET_ELEMENTS:
            buckets.append([])
        buckets[-1].append(name)
    made = []
    for chosen, buckets in sorted(groups.items(), key=lambda item: (len(item[0]) > 1, item[0])):
        for names in filter(None, buckets):
            made.append((make_layout(names[0], [_entry(name, shapes[name]) for name in names]), chosen))
    return made


def _entry(name: str, shape: tuple[int, ...]) -> Entry:
    """A whole parameter, stored as a row: its dims mean nothing here."""
    return Entry(name, shape, (Piece(name, (torch.Size(shape).numel(),)),), replicated=True)


def make_units(
    parameters: list[dict[str, int]], shapes: dict[str, tuple[int, ...]], mesh: Mesh, dtype: torch.dtype, device: torch.device, zero_stage: int
) -> list[tuple[Unit, tuple[int, ...]]]:
    """This rank's units with the stages that hold each."""
    made = []
    for layout, chosen in stage_layouts(parameters, mesh.pp.index, shapes):
        unit = Unit(layout, mesh, dtype=dtype, device=device, zero_stage=zero_stage, sequence_parallel=False)
        unit.tied_copy = mesh.pp.index != chosen[0]
        made.append((unit, chosen))
    return made


class RunningSegment:
    """A segment with its tensors."""

    def __init__(self, segment: Segment, parameters: dict[str, nn.Parameter], fixed: dict[str, torch.Tensor], device: torch.device) -> None:
        self.inputs, self.recomputed = segment.inputs, segment.recomputed
        root = nn.Module()
        for attribute, name in segment.state.items():
            if name in parameters:
                root.register_parameter(attribute, parameters[name])
            else:
                root.register_buffer(attribute, fixed[name])
        for node in segment.graph.nodes:
            if node.op == "get_attr" and node.target not in segment.state:
                setattr(root, node.target, segment.modules[node.target])
        on_device(segment.graph, device)
        self.module = fx.GraphModule(root, segment.graph)
        self.changed = {name: self.module.get_buffer(name) for name in segment.changed if segment.state[name] in fixed}

    def __call__(self, *arguments: Any) -> Any:
        if self.recomputed:
            return checkpoint(self.module, *arguments, use_reentrant=False, context_fn=self._contexts)
        with self._on_copies(self.changed, keep=True):
            return self.module(*arguments)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The second forward pass finds the buffers as the first did, and leaves them alone."""
        before = {name: buffer.clone() for name, buffer in self.changed.items()}
        return self._on_copies(before, keep=True), self._on_copies(before, keep=False)

    @contextmanager
    def _on_copies(self, values: dict[str, torch.Tensor], *, keep: bool) -> Iterator[None]:
        """A forward pass that changes buffers works on copies, which a backward pass may need after other micro-batches have changed the buffers.
        With `keep` the buffers get what it has made of the copies."""
        copies = {name: value.clone() for name, value in values.items()}
        for name, copy in copies.items():
            setattr(self.module, name, copy)
        try:
            yield
        finally:
            for name, copy in copies.items():
                setattr(self.module, name, self.changed[name])
                if keep:
                    self.changed[name].copy_(copy.detach())


class ModuleCompute:
    """What the actions of a module's stage do."""

    def __init__(
        self,
        segments: list[RunningSegment],
        units: list[Unit],
        *,
        last: bool,
        num_parts: int,
        device: torch.device,
        optimizer: Callable[[], None],
    ) -> None:
        self.segments, self.units, self.last, self.device = segments, units, last, device
        self.weight = 1.0 / num_parts
        """Of a micro-batch's loss in the global batch's."""
        self.run_optimizer = optimizer
        self.batches: dict[int, torch.Tensor] = {}
        """[micro-batches, samples, ...] of this step by input, where the data are."""
        self.fixed: dict[int, Any] = {}
        """Inputs that are the same for all samples."""
        self.loss: torch.Tensor | None = None
        """This rank's part of the global batch's mean loss so far."""
        self._saved: dict[int, tuple[torch.Tensor | None, Any]] = {}

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        inputs = {index: batch[microbatch].to(self.device, copy=True) for index, batch in self.batches.items()} | self.fixed
        value: Any = None if x is None else x.requires_grad_()
        for segment in self.segments:
            carried = () if value is None else (value,)
            value = segment(*carried, *(inputs[index] for index in segment.inputs))
        if self.last:
            value = mean_loss(value)
            part = value.detach() * self.weight
            self.loss = part if self.loss is None else self.loss + part
        self._saved[microbatch] = (x, torch.autograd.graph.get_gradient_edge(value))
        return None if self.last else value.detach()

    def backward(self, stage: int, microbatch: int, gradient: torch.Tensor | None, split: bool) -> torch.Tensor | None:
        received, edge = self._saved.pop(microbatch)
        if gradient is None:
            gradient = torch.full((), self.weight, device=self.device)
        torch.autograd.backward((edge,), (gradient,))
        return None if received is None else received.grad

    def weights(self, stage: int, microbatch: int) -> None:
        raise AssertionError("the schedules of traced modules have whole backward passes")

    def reduce(self, stage: int) -> None:
        reduce_units(self.units)

    def optimizer(self) -> None:
        self.run_optimizer()


def mean_loss(result: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The loss of a micro-batch in fp32: the module's own where it returns a scalar, else the mean square of each tensor, added up."""
    if result[0].dim() == 0:
        return result[0].float()
    return torch.stack([value.float().square().mean() for value in result]).sum()
