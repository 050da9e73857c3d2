"""A traced module as data: a chain of layers that need not be alike, with what each of them needs per sample.

It is what a plan of such a module holds in place of a transformer's shape, so that the plan can be read, shown and
simulated anywhere, without the module's code and without torch. `planner.trace` makes it.
"""

from __future__ import annotations

import re
from typing import Literal

from planner.documents import Document
from planner.values import SIGNED

Affine = tuple[float, float]
"""A quantity of a micro-batch of b samples: the first plus b times the second."""
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
OperationKind = Literal["matmul", "attention", "elementwise"]


def is_reference(text: str) -> bool:
    """Whether `text` has the form package.module:callable."""
    return _REFERENCE.fullmatch(text) is not None


class Operation(Document, frozen=True, kw_only=True):
    """Equal operations of a layer: `num_calls` of them, each with these FLOPs and bytes read and written."""

    RULES = {"flops": SIGNED, "moved_bytes": SIGNED}

    kind: OperationKind
    """matmul: what runs at the peak of matrix products, convolutions included; elementwise: what moves bytes only."""
    num_calls: int
    flops: Affine
    moved_bytes: Affine


class LayerCost(Document, frozen=True, kw_only=True):
    """What one layer of the chain needs, nothing recomputed."""

    RULES = dict.fromkeys(
        ("saved_bytes", "received_bytes", "sent_bytes", "kept_bytes", "forward_transient_bytes", "backward_transient_bytes"), SIGNED
    )

    num_parameters: int
    """Trained parameters that no earlier layer has."""
    num_shared_parameters: int
    """Trained parameters that an earlier layer has too (tied embeddings): on another stage they need a copy."""
    frozen_bytes: int
    """Buffers and parameters that are not trained."""
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    saved_bytes: Affine
    """What autograd keeps from the forward to the backward pass, its input included where that is kept."""
    received_bytes: Affine
    """What the layer gets from the one before it: all that is kept of it when it is recomputed."""
    sent_bytes: Affine
    """What it hands on: the message where a pipeline is cut behind it."""
    kept_bytes: Affine
    """Of what it hands on, what its own operations keep for the backward pass; counted where a stage ends with it."""
    forward_transient_bytes: Affine
    """The largest outputs of one of its parts."""
    backward_transient_bytes: Affine
    """The largest gradients that one of its operations reads and writes."""


class TracedLayer(Document, frozen=True, kw_only=True):
    """A layer of the chain; `cost` is an index into the model's `costs`, which equal layers share."""

    name: str
    cost: int


class TracedModel(Document, frozen=True, kw_only=True):
    """A module as a chain of layers, in the precision that it was traced in."""

    name: str
    """The callable that built it, package.module:callable."""
    precision: str
    num_parameters: int
    num_layers: int
    layers: tuple[TracedLayer, ...]
    costs: tuple[LayerCost, ...]

    def cost(self, layer: int) -> LayerCost:
        return self.costs[self.layers[layer].cost]


def at(quantity: Affine, samples: int) -> float:
    """The quantity of a micro-batch of so many samples; never negative."""
    return max(0.0, quantity[0] + quantity[1] * samples)
