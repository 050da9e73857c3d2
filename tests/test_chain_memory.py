"""The predicted peak of a traced module beside the bytes that a real step holds."""

import pytest
import torch

from examples import alternating, cnn, multimodal
from executor.measure import StorageTracker
from planner.chain_costs import ChainCosts, predict
from planner.chain_plan import ChainInputs, chain_stage
from planner.cluster import load_cluster
from planner.plan import Decisions, Training
from planner.trace import trace_model

BATCH = 4


def measured(module, example):
    """Bytes by category at the peak of two micro-batches' forward and backward passes, Adam's state in place."""
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)

    def step():
        for _ in range(2):
            module(*example).sum().backward()

    step()
    optimizer.step()
    tracker = StorageTracker()
    groups = {
        "weights": module.parameters(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "optimizer": [value for state in optimizer.state.values() for value in state.values()],
        "buffers": module.buffers(),
        "activations": example,
    }
    for category, tensors in groups.items():
        for tensor in tensors:
            tracker.add(tensor, category)
    tracker.reset()
    with tracker:
        step()
    return tracker.peak


@pytest.mark.parametrize(
    ("reference", "build", "example", "length", "above"),
    [
        ("examples.cnn:build", lambda: cnn.build()[0], lambda: (torch.rand(BATCH, 3, 32, 32),), None, 0.15),
        ("examples.alternating:small", alternating.small, lambda: (torch.randint(0, 512, (BATCH, 64)),), 64, 0.01),
        ("examples.multimodal:small", multimodal.small, lambda: (torch.rand(BATCH, 3, 16, 16), torch.randint(0, 128, (BATCH, 8))), None, 0.05),
    ],
)
def test_peak_is_that_of_a_real_step(reference, build, example, length, above):
    model = trace_model(reference, "fp32", length)
    training = Training(global_batch_size=2 * BATCH, sequence_length=length or 1, precision="fp32")
    decisions = Decisions(
        data_parallel=1, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=BATCH, num_microbatches=2,
        stages=(chain_stage(0, model.num_layers, frozenset(), 0),),
    )  # fmt: skip
    found = predict(ChainCosts(ChainInputs(model=model, cluster=load_cluster("cpu:1"), training=training)), decisions).memory
    real = measured(build(), example())
    assert found.weights_bytes == real["weights"] and found.gradients_bytes == real["gradients"] and found.buffers_bytes == real["buffers"]
    assert found.optimizer_bytes == pytest.approx(real["optimizer"], rel=1e-3)  # Adam counts its steps beside its moments
    assert -1e-3 <= found.activations_bytes / real["activations"] - 1 <= above
