"""Short measurements of one device: matrix products, memory traffic, attention, the executor's own layers, the optimizer.

Each returns the seconds of one call, the median of many, as a run's figures are medians of its steps.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from executor.functions import State
from executor.mesh import Axis, Mesh
from executor.model import build_stages
from executor.optimizer import OptimizerOptions, UnitOptimizer
from executor.pipeline import StageCompute
from planner.measurements import LayerPoint, MatmulPoint, MemoryPoint, OptimizerPoint
from planner.model import ModelSpec, presets
from planner.plan import Decisions, Precision, make_stages, replace

MATMULS = ((64, 64, 64), (256, 192, 64), (256, 64, 256), (512, 512, 512), (256, 1024, 256), (1024, 1024, 1024), (1024, 256, 64), (64, 256, 1024))
CUDA_MATMULS = (
    (512, 512, 512), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (8192, 2048, 512), (8192, 12288, 4096), (8192, 1024, 8192),
)  # fmt: skip
CPU_PRECISIONS: tuple[Precision, ...] = ("fp32", "mixed-bf16")
"""CPUs compute otherwise in bf16 than in fp32, not at another peak only."""
MEMORY_BYTES = (1 << 14, 1 << 18, 1 << 21, 1 << 24)


@dataclass(frozen=True)
class Shape:
    """A model's layers at one micro-batch."""

    model: ModelSpec
    micro_batch_size: int
    sequence_length: int
    precision: Precision


def variant(name: str, hidden: int, heads: int, num_layers: int = 4) -> ModelSpec:
    """A tiny preset at another width and depth."""
    base = presets()[name]
    scale = hidden / base.hidden_size
    keys = max(1, round(heads * base.num_key_value_heads / base.num_attention_heads))
    return replace(
        base, name=f"{name}-{hidden}", num_layers=num_layers, hidden_size=hidden, ffn_hidden_size=round(base.ffn_hidden_size * scale),
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=hidden // heads, vocab_size=max(256, 4 * hidden),
    )  # fmt: skip


def layer_shapes(device: str) -> list[Shape]:
    """From launch-bound to compute-bound, both families, the precisions that the device is used with."""
    if device == "cuda":
        sizes = [("tiny-gpt", 1024, 16, 1, 256), ("tiny-gpt", 2048, 16, 2, 256), ("tiny-llama", 2048, 16, 4, 256), ("tiny-llama", 4096, 32, 4, 256),
                 ("tiny-gpt", 4096, 32, 8, 256)]  # fmt: skip
        return [Shape(variant(name, h, a), b, s, "mixed-bf16") for name, h, a, b, s in sizes]
    sizes = [("tiny-gpt", 64, 4, 1, 64), ("tiny-gpt", 64, 4, 4, 128), ("tiny-llama", 64, 4, 1, 64), ("tiny-llama", 64, 4, 4, 128),
             ("tiny-gpt", 128, 4, 4, 128), ("tiny-llama", 128, 4, 2, 256), ("tiny-gpt", 256, 8, 2, 128), ("tiny-llama", 256, 8, 4, 128),
             ("tiny-gpt", 256, 4, 1, 256), ("tiny-llama", 128, 4, 2, 512)]  # fmt: skip
    return [Shape(variant(name, h, a), b, s, precision) for precision in CPU_PRECISIONS for name, h, a, b, s in sizes]


def seconds_of(call: Callable[[], object], device: torch.device, budget_seconds: float = 0.06, least: int = 5) -> float:
    """The median time of `call`, from at least `least` calls and about `budget_seconds` in all."""
    first = min(one_call_seconds(call, device) for _ in range(2))
    count = max(least, min(400, int(budget_seconds / max(first, 1e-7))))
    found = sorted(one_call_seconds(call, device) for _ in range(count))
    return found[count // 2]


def one_call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """What `call` takes until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_points(device: torch.device) -> Iterator[MatmulPoint]:
    """Square and slender products in fp32 and bf16."""
    types: tuple[tuple[Precision, torch.dtype], ...] = (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for precision, dtype in types:
        for rows, columns, depth in CUDA_MATMULS if device.type == "cuda" else MATMULS:
            left = torch.randn(rows, depth, device=device).to(dtype)
            right = torch.randn(columns, depth, device=device).to(dtype)
            seconds = seconds_of(lambda left=left, right=right: left @ right.t(), device)  # type: ignore[misc]
            yield MatmulPoint(precision, rows, columns, depth, seconds)


def memory_points(device: torch.device) -> Iterator[MemoryPoint]:
    """z = x + y: reads two, writes one."""
    for size in MEMORY_BYTES:
        count = size * (64 if device.type == "cuda" else 1) // 4
        x, y = torch.ones(count, device=device), torch.ones(count, device=device)
        out = torch.empty_like(x)
        yield MemoryPoint(12 * count, seconds_of(lambda x=x, y=y, out=out: torch.add(x, y, out=out), device))  # type: ignore[misc]


def _lonely_mesh(pipeline_rank: int) -> Mesh:
    """A mesh of one rank that takes itself for `pipeline_rank`."""
    sent: Counter[str] = Counter()

    def axis(name: str, index: int = 0) -> Axis:
        return Axis(name, (0,), index, None, sent)

    return Mesh(
        rank=0, world_size=1, coordinates={"pp": pipeline_rank, "dp": 0, "tp": 0}, tp=axis("tp"), dp=axis("dp"), pp=axis("pp", pipeline_rank),
        shard=axis("dp"), replicate=axis("dp"), tied=axis("pp"), key_value=axis("tp"), sent_bytes=sent,
    )  # fmt: skip


def _stage_compute(shape: Shape, sizes: tuple[int, ...], rank: int, device: torch.device) -> tuple[StageCompute, State]:
    """The compute of one stage of a model cut into `sizes` layers."""
    decisions = Decisions(
        data_parallel=1, tensor_parallel=1, pipeline_parallel=len(sizes), micro_batch_size=shape.micro_batch_size, num_microbatches=1,
        stages=make_stages(sizes, ["none"] * len(sizes), range(len(sizes))),
    )  # fmt: skip
    model = replace(shape.model, num_layers=sum(sizes) - 2)
    mesh = _lonely_mesh(rank)
    state = State(
        tp=mesh.tp, sequence_parallel=False, norm=model.norm, epsilon=model.norm_epsilon, activation=model.activation, gated=model.gated_ffn
    )
    dtype = torch.float32 if shape.precision == "fp32" else torch.bfloat16
    stages = build_stages(model, decisions, shape.sequence_length, mesh, state, dtype=dtype, device=device)
    for stage in stages.values():
        for unit in stage.units:
            unit.initialise(0)
    compute = StageCompute(stages, len(sizes) - 1, state, device, lambda: None)
    tokens = torch.randint(0, model.vocab_size, (1, shape.micro_batch_size * shape.sequence_length), device=device)
    compute.tokens = compute.targets = tokens
    return compute, state


def layer_points(shape: Shape, device: torch.device, budget_seconds: float = 0.05) -> Iterator[LayerPoint]:
    """Forward and backward pass of the executor's stages: the embedding, one block, four blocks, the head."""
    tokens = shape.micro_batch_size * shape.sequence_length
    dtype = torch.float32 if shape.precision == "fp32" else torch.bfloat16
    cuts: tuple[tuple[Literal["embedding", "block", "head"], int, tuple[int, ...]], ...] = (
        ("embedding", 0, (1, 1, 1)), ("block", 1, (1, 1, 1)), ("block", 1, (1, 4, 1)), ("head", 2, (1, 1, 1)),
    )  # fmt: skip
    for kind, rank, sizes in cuts:
        compute, state = _stage_compute(shape, sizes, rank, device)
        activations = torch.randn(tokens, shape.model.hidden_size, device=device, dtype=dtype)
        gradient = torch.randn_like(activations) if rank < 2 else None
        forward: list[float] = []
        backward: list[float] = []
        until = time.perf_counter() + budget_seconds
        while len(forward) < 6 or (time.perf_counter() < until and len(forward) < 200):
            x = None if rank == 0 else activations.detach()
            _sync(device)
            start = time.perf_counter()
            compute.forward(rank, 0, x)
            _sync(device)
            middle = time.perf_counter()
            compute.backward(rank, 0, gradient, False)
            _sync(device)
            backward.append(time.perf_counter() - middle)
            forward.append(middle - start)
        place = len(forward) // 2
        yield LayerPoint(
            shape.model, kind, sizes[1] if rank == 1 else 1, shape.micro_batch_size, shape.sequence_length, shape.precision,
            sorted(forward)[place], sorted(backward)[place],
        )  # fmt: skip
        del compute, state


def optimizer_points(device: torch.device) -> Iterator[OptimizerPoint]:
    """The executor's AdamW on the units of a model."""
    shapes = [shape for shape in layer_shapes(device.type) if shape.micro_batch_size > 1]
    for shape in (shape for precision in dict.fromkeys(shape.precision for shape in shapes)
                  for shape in [shape for shape in shapes if shape.precision == precision][:4]):  # fmt: skip
        compute, _ = _stage_compute(shape, (2, 3, 1), 0, device)
        units = compute.stages[0].units
        optimizers = [UnitOptimizer(unit, OptimizerOptions(), shape.precision == "mixed-bf16") for unit in units]
        scale = torch.ones((), device=device)

        def step(optimizers: list[UnitOptimizer] = optimizers, scale: torch.Tensor = scale) -> None:
            for optimizer in optimizers:
                optimizer.step(1e-4, scale)
                optimizer.unit.clear_gradients()

        count = sum(unit.layout.numel for unit in units)
        yield OptimizerPoint(shape.precision, count, seconds_of(step, device))


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
