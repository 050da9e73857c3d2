"""Modules traced on fake tensors: what a chain of layers is, and that its figures are those of a real step."""

import networkx as nx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from examples import alternating, cnn, multimodal
from planner.errors import InputError
from planner.graph import chain_of, layer_graph
from planner.model import load_model
from planner.trace import trace_model
from planner.traced import at

HERE = "tests.test_trace"


def plain():
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)]
    return nn.Sequential(*layers), (torch.zeros(3, 8),)


def huge():
    """800 GB of weights in fp32."""
    return nn.Sequential(nn.Linear(250_000, 200_000), nn.Linear(200_000, 750_000)), (torch.zeros(1, 250_000),)


class Masked(nn.Module):
    """Layers that share a mask and a table which no parameter has a part in."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("table", torch.ones(6))
        self.example_inputs = (torch.zeros(2, 6),)

    def forward(self, x):
        mask, table = (x > 0).float(), self.table.sin()
        for layer in self.layers:
            x = layer(x) * mask + table
        return x


class Nowhere(nn.Module):
    def forward(self, x):
        return x


class Folded(nn.Module):
    """A batch that is not the first dim of what it computes with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(x.shape[0]):
            x = self.layer(x)
        return x


def fold():
    return Folded(), torch.zeros(1, 4)


def nothing_trained():
    return Nowhere(), torch.zeros(1, 4)


def no_inputs():
    return nn.Linear(4, 4)


def ids_only():
    return alternating.small()


def broken():
    raise RuntimeError("no\nweights here")


class Separable(nn.Module):
    """A depthwise convolution, and an LSTM over its rows."""

    def __init__(self):
        super().__init__()
        self.deep, self.rnn = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LSTM(8, 5, batch_first=True)
        self.example_inputs = torch.zeros(1, 6, 8, 8)

    def forward(self, x):
        return self.rnn(self.deep(x).flatten(1, 2))[0]


def test_flops_of_grouped_convolutions_and_lstms():
    model = trace_model(f"{HERE}:Separable", "fp32")
    deep, rnn = 2 * 6 * 64 * 9, 2 * 48 * 4 * 5 * (8 + 5)
    assert [flops_of(model.cost(index)) for index in (0, 1)] == [deep, rnn]
    assert flops(model, 1, "backward") == deep + 2 * rnn  # the image needs no gradient


def real_step(module, inputs):
    """FLOPs of forward and backward, and bytes that autograd keeps beside parameters, buffers and inputs, of a real step."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive = []
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(*inputs)
    with backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops(), sum(kept.values())


def flops(model, samples, direction):
    items = [item for layer in range(model.num_layers) for item in getattr(model.cost(layer), direction)]
    return sum(item.num_calls * at(item.flops, samples) for item in items)


@pytest.mark.parametrize(
    ("reference", "build", "inputs"),
    [
        ("examples.cnn:build", lambda: cnn.build()[0], (torch.zeros(3, 3, 32, 32),)),
        (f"{HERE}:plain", lambda: plain()[0], (torch.zeros(3, 8),)),
        (f"{HERE}:Masked", Masked, (torch.zeros(3, 6),)),
    ],
)
def test_flops_parameters_and_saved_bytes_are_those_of_a_real_step(reference, build, inputs):
    model, module = trace_model(reference, "fp32"), build()
    forward, backward, kept = real_step(module, inputs)
    assert flops(model, 3, "forward") == forward
    assert flops(model, 3, "backward") == backward
    assert sum(model.cost(layer).num_parameters for layer in range(model.num_layers)) == sum(p.numel() for p in module.parameters())
    saved = sum(at(model.cost(layer).saved_bytes, 3) for layer in range(model.num_layers))
    shared = 2 * 3 * 6 * 4 if "Masked" in reference else 0  # its mask counts with each of the three layers that keep it
    assert saved - shared == kept


def test_nothing_is_allocated():
    model = trace_model(f"{HERE}:huge", "bf16")
    assert model.num_parameters > 2e11 and model.num_layers == 2
    assert model.cost(0).sent_bytes == (0.0, 2 * 200_000.0)


def test_residual_connections_lie_inside_a_layer():
    model = trace_model("examples.cnn:build", "fp32")
    assert [layer.name for layer in model.layers] == ["0", "1", "3.body.0-4", "4.body.0-4", "5.body-shortcut", "6.body.0-4", "7.body-shortcut",
                                                      "8.body.0-4", "11"]  # fmt: skip
    sent = [model.cost(index).sent_bytes[1] for index in range(model.num_layers)]
    assert sent == [131072, 131072, 131072, 131072, 65536, 65536, 32768, 4 * 128, 0]  # width x image in fp32; pooling joins what it pools
    received = [model.cost(index).received_bytes for index in range(1, model.num_layers)]
    assert received == [model.cost(index).sent_bytes for index in range(model.num_layers - 1)]


def test_alternating_layers_differ_and_a_tied_head_shares():
    model = trace_model("examples.alternating:small", "fp32", 64)
    attention = [model.cost(index) for index, layer in enumerate(model.layers) if "attention" in layer.name]
    assert attention[0] == attention[1] == attention[3] != attention[2] == attention[5]
    assert flops_of(attention[2]) > flops_of(attention[0])
    assert model.layers[-1].name == "head"
    assert model.cost(model.num_layers - 1).num_shared_parameters == 512 * 64 == model.cost(0).num_parameters
    assert model.num_parameters == sum(p.numel() for p in alternating.small().parameters())


def flops_of(cost):
    return sum(item.num_calls * at(item.flops, 1) for item in cost.forward)


def test_a_branch_is_with_the_layer_where_it_joins():
    model = trace_model("examples.multimodal:small", "fp32")
    names = [layer.name for layer in model.layers]
    assert names[0] == "patches" and names[1].startswith("tower.0") and names[-1] == "head"
    assert names.index("project") + 1 == names.index("embedding") == next(i for i, n in enumerate(names) if n.startswith("blocks")) - 1
    assert model.num_parameters == sum(p.numel() for p in multimodal.small().parameters())


def test_values_without_parameters_bind_no_layers():
    model = trace_model(f"{HERE}:Masked", "fp32")
    assert [layer.name for layer in model.layers] == ["layers.0", "layers.1", "layers.2"]
    assert model.cost(1).sent_bytes == (0.0, 24.0)


def test_16_bit_precision_halves_activations():
    wide, narrow = (trace_model(f"{HERE}:plain", precision) for precision in ("fp32", "mixed-bf16"))
    assert narrow.cost(1).sent_bytes[1] == wide.cost(1).sent_bytes[1] / 2
    assert narrow.num_parameters == wide.num_parameters


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("no_such_package.models:build", "importing no_such_package.models failed: ModuleNotFoundError"),
        (f"{HERE}:missing", "has no callable named missing"),
        (f"{HERE}:HERE", "has no callable named HERE"),
        (f"{HERE}:no_inputs", "example_inputs"),
        ("os:getcwd", "returns an nn.Module"),
        (f"{HERE}:broken", "its callable fails on fake tensors: RuntimeError: no weights here"),
        (f"{HERE}:nothing_trained", "no tensor that depends on a trained parameter"),
        (f"{HERE}:fold", "the first dim must be the batch"),
        (f"{HERE}:ids_only", "tokens of a sample are needed"),
    ],
)
def test_refusals_are_one_line(reference, said):
    with pytest.raises(InputError) as error:
        trace_model(reference, "fp32")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_chain_of_a_transformer_cuts_at_its_residual_stream():
    model = load_model("tiny-gpt")
    chain = chain_of(layer_graph(model, 128))
    assert chain[0] == ["embedding"] and chain[-1] == ["head"]
    assert ["block.0.norm1", "block.0.attention"] in chain and ["block.0.norm2", "block.0.mlp"] in chain
    assert sum(map(len, chain)) == len(layer_graph(model, 128))


def test_chain_of_a_graph_with_branches():
    graph = nx.DiGraph([("a", "b"), ("b", "c"), ("b", "d"), ("c", "e"), ("d", "e"), ("e", "f"), ("x", "e"), ("w", "x"), ("a", "f"), ("f", "g")])
    graph.nodes["a"]["forward_flops"] = 1.0
    assert chain_of(graph) == [["a"], sorted_like(graph, "bcdewxf"), ["g"]]
    alone = nx.DiGraph([("a", "b"), ("b", "c"), ("y", "c"), ("c", "d")])
    assert chain_of(alone) == [["a"], ["b"], ["y", "c"], ["d"]]
    alone.nodes["y"]["forward_flops"] = 100.0
    assert chain_of(alone) == [["y"], ["a", "b", "c"], ["d"]]
    with pytest.raises(ValueError, match="one last node"):
        chain_of(nx.DiGraph([("a", "b"), ("a", "c")]))
    with pytest.raises(ValueError, match="acyclic"):
        chain_of(nx.DiGraph([("a", "b"), ("b", "a"), ("b", "c")]))


def sorted_like(graph, nodes):
    order = list(nx.topological_sort(graph))
    return sorted(nodes, key=order.index)
