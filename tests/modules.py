"""Small modules of all kinds for the tests of running them, and plans of them."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from examples import cnn
from planner.chain_costs import ChainCosts, predict
from planner.chain_plan import ChainInputs, ChainPlan, chain_stage, check_chain
from planner.cluster import load_cluster
from planner.plan import Decisions, SolverReport, Training, digest
from planner.trace import trace_model


def residual():
    """A small residual network with batch norms."""
    return cnn.resnet(8, (1, 1, 1), 8, 4)


def frozen_norms():
    """A network whose first batch norm keeps its statistics, far from those of any batch, and whose dropout is off."""
    norm, dropout = nn.BatchNorm2d(8), nn.Dropout(0.5)
    with torch.no_grad():
        norm.running_var.fill_(9.0)
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    parts = (nn.Conv2d(3, 8, 3), norm.eval(), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), dropout.eval(), *tail)
    return nn.Sequential(*parts), torch.zeros(2, 3, 9, 9)


def wider():
    """The same chain of layers with other sizes."""
    return cnn.resnet(12, (1, 1, 1), 8, 4)


def small_image():
    return cnn.resnet(4, (1, 1), 8, 2)


def large_image():
    return cnn.resnet(4, (1, 1), 16, 2)


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(2, 4)


def wide():
    """Layers of the same names as `plain`, with more parameters."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.zeros(2, 4)


def tied():
    """A table that is the head too, an LSTM and a batch norm."""
    table, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    head.weight = table.weight
    return nn.Sequential(table, Recurrent(8, 8, batch_first=True), nn.Flatten(), nn.BatchNorm1d(48), nn.Unflatten(1, (6, 8)), head)


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def doubled():
    return tied().double(), torch.zeros(2, 6, dtype=torch.long)


def moved():
    return tied().bfloat16().to("cpu"), torch.zeros(2, 6, dtype=torch.long)


def misfit():
    """`plain` with an example that does not go into it."""
    return plain()[0], torch.zeros(2, 9)


class Branching(nn.Sequential):
    """Asks what a number is, which an exported graph can't."""

    def forward(self, x):
        return super().forward(x) * (2 if x.sum().item() > 0 else 1)


def unexportable():
    return Branching(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(2, 4)


def copied():
    """Layers that are deep copies of one."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Embedding(12, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 4)), torch.zeros(2, 6, dtype=torch.long)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0)
    ids = torch.zeros(2, 8, dtype=torch.long)
    return GPT2LMHeadModel(shape), {"input_ids": ids, "labels": ids}


class Several(nn.Module):
    """Returns what crosses the cut behind its first layer too, and its last tensor twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.example_inputs = torch.zeros(2, 4)

    def forward(self, x):
        crossing = self.first(x)
        last = self.third(self.second(crossing))
        return crossing, {"last": last, "none": None}, last


class Remembering(nn.Module):
    """Buffers that it reads before it changes them, changes before it reads them, and only counts with."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("center", torch.zeros(16))
        self.register_buffer("level", torch.ones(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("positive", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.steps.add_(1)
        x = self.first(x)
        y = torch.tanh(x - self.center)
        self.center.mul_(0.5).add_(0.5 * x.detach().mean(0))
        y = self.second(y)
        self.positive.add_((y.detach() > 0).sum())
        self.level.mul_(0.5).add_(y.detach().abs().mean(0))
        return self.last(torch.tanh(self.third(torch.tanh(y * self.level)))).square().mean()


def remembering():
    return Remembering(), (torch.randn(1, 16),)


class Counting(nn.Module):
    """A counter that two layers read, and a buffer that takes what both of them give."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        x = self.first(x) * (1 + 1 / self.steps)
        return self.last(self.second(x) * (1 + 1 / self.steps)).square().mean()


class Adding(Counting):
    def forward(self, x):
        y = self.first(x)
        z = self.second(torch.tanh(y))
        self.steps.add_((y.detach() > 0).sum() + (z.detach() > 0).sum())
        return self.last(torch.tanh(z)).square().mean()


def counting():
    return Counting(), (torch.randn(1, 16),)


def adding():
    return Adding(), (torch.randn(1, 16),)


class Autocast(nn.Module):
    """Chooses the type of its second layer itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.example_inputs = torch.zeros(2, 4)

    def forward(self, x):
        x = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.second(x)
        return x.float()


class Attending(nn.Module):
    """The input projection of its attention is one operation to torch, and two layers to the tracer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.example_inputs = torch.zeros(2, 3, 8)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Noisy(nn.Module):
    """Both layers add the same noise."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.example_inputs = torch.zeros(2, 4)

    def forward(self, x):
        noise = torch.rand(4)
        return self.second(self.first(x) + noise) + noise


class Awkward(nn.Module):
    """What is hard to cut: an LSTM, a table that three layers share, a mask and positions that every layer reads, truth values and labels as inputs,
    a frozen parameter, a constant made in the forward pass, and a change in place right behind a cut."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(24, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 8), requires_grad=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.example_inputs = {
            "ids": torch.zeros(2, 6, dtype=torch.long),
            "keep": torch.tensor([[True, True, True, True, False, True]]).repeat(2, 1),
            "label": torch.zeros(2, dtype=torch.long),
        }

    def forward(self, ids, keep, label):
        positions = torch.arange(ids.shape[1]) * torch.tensor(0.1)
        positions[0] = 1.0
        mask = keep[..., None].float()
        x = self.table(ids) + positions[:, None]
        x = self.rnn(x)[0] * mask
        x = x + self.first(torch.relu_(x)) * self.frozen
        x = x + self.second(x + nn.functional.embedding(ids, self.table.weight)) * mask
        x = self.norm(x + positions[:, None]) @ self.table.weight.T @ self.table.weight
        logits = self.head(x.mean(1))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, label)}


def module_plan(
    reference, *, length=None, dp=1, pp=1, micro=2, m=2, cuts=(), again=(), schedule="1F1B", zero=0, precision="fp32", order=("tp", "dp", "pp"),
    optimizer="adam",
):  # fmt: skip
    """A checked plan of a module: `cuts` are first layers of the stages but the first, `again` the layers that are recomputed."""
    model = trace_model(reference, precision, length)
    training = Training(global_batch_size=dp * micro * m, sequence_length=length or 1, precision=precision, optimizer=optimizer)
    inputs = ChainInputs(model=model, cluster=load_cluster(f"cpu:{dp * pp}"), training=training)
    edges = (0, *(cuts or [round(index * model.num_layers / pp) for index in range(1, pp)]), model.num_layers)
    stages = tuple(
        chain_stage(first, last - first, frozenset(again) & frozenset(range(first, last)), rank)
        for rank, (first, last) in enumerate(itertools.pairwise(edges))
    )
    decisions = Decisions(
        data_parallel=dp, tensor_parallel=1, pipeline_parallel=pp, zero_stage=zero, micro_batch_size=micro, num_microbatches=m,
        schedule=schedule, rank_order=order, stages=stages,
    )  # fmt: skip
    check_chain(inputs, decisions)
    solver = SolverReport(
        name="none", status="given", objective_seconds=None, bound_seconds=None, gap_fraction=None, num_candidates=1, num_pruned=0, wall_seconds=0.0
    )
    predictions = predict(ChainCosts(inputs), decisions)
    return ChainPlan(inputs=inputs, inputs_hash=digest(inputs), decisions=decisions, predictions=predictions, solver=solver)
