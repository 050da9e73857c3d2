"""The user's module, from the command line's package.module:callable to its cut, its tensors and its data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from executor.rank import compute_dtype
from executor.traced_data import ExampleData
from executor.traced_graph import Cut, cut_module
from executor.traced_stage import ModuleState
from planner.chain_plan import ChainPlan
from planner.trace import Built, build_module, convert_module, find_callable, quiet


class Prepared(NamedTuple):
    """A module that a rank can take its part of."""

    cut: Cut
    state: ModuleState
    data: ExampleData


def fake_cut(plan: ChainPlan, reference: str) -> Cut:
    """The module's cut, nothing allocated. Raises InputError where there is none."""
    build, training = find_callable(reference), plan.inputs.training
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        return _cut(plan, build_module(build, reference, training.precision, training.sequence_length), reference)


def prepare(plan: ChainPlan, reference: str, seed: int) -> Prepared:
    """Builds the module with its own initial values, which depend on `seed` alone, and cuts it. Raises InputError where that fails."""
    build, training = find_callable(reference), plan.inputs.training
    torch.manual_seed(seed)
    with quiet():
        built = build_module(build, reference, training.precision, training.sequence_length, convert=False)
        trained = {name: value.detach().float() for name, value in built.module.named_parameters() if value.requires_grad}
        convert_module(built.module, training.precision)
        cut = _cut(plan, built, reference)
    tensors = (*built.module.named_parameters(), *built.module.named_buffers(), *cut.constants.items())
    fixed = {name: value.detach() for name, value in tensors if name not in trained}
    data = ExampleData(built.example, compute_dtype(training.precision), cut.highest, seed)
    return Prepared(cut, ModuleState(trained, fixed, frozenset(name for name, _ in built.module.named_buffers())), data)


def _cut(plan: ChainPlan, built: Built, reference: str) -> Cut:
    decisions = plan.decisions
    return cut_module(built, decisions.micro_batch_size, plan.inputs.training.precision, plan.inputs.model, decisions.stages, reference)
