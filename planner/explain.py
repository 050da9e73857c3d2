"""The memory of a plan's heaviest GPU, term by term: how many bytes, per what, and why."""

from __future__ import annotations

from typing import NamedTuple

from planner.graph import LayerKind
from planner.memory import batch_bytes, in_flight, layer_needs, predict_memory
from planner.plan import Decisions, Inputs, Recompute, block_levels, has_embedding, has_head
from planner.shapes import Shape, shape_of
from planner.states import local_parameters, state_bytes


class Term(NamedTuple):
    """One term. `size` is in bytes; `unit` says what it is counted per."""

    name: str
    formula: str
    size: float
    unit: str
    why: str


def kept_terms(shape: Shape, level: Recompute) -> list[Term]:
    """What one block keeps of one micro-batch for its backward pass, tensor by tensor; they add up to `LayerActivations.kept`."""
    return [term._replace(formula=f"{term.formula}, {term.size / shape.tokens:,.6g} B a token") for term in _kept_terms(shape, level)]


def _kept_terms(shape: Shape, level: Recompute) -> list[Term]:
    rows, per = "R·h·e", "block and micro-batch"
    terms = [Term("block input", rows, shape.row, per, "the first norm's input, needed for its gradient, and all that full recomputation keeps")]
    if level == "full":
        return terms
    stats = "mean and deviation of each row (LayerNorm), or deviation only (RMSNorm)"
    terms.append(Term("attention norm's statistics", "R·2·e or R·4", shape.stats, per, stats))
    if level == "none":
        terms.append(Term("attention norm's output", rows, shape.row, per, "input of the query, key and value projections; selective recomputes it"))
    if shape.qk_norm:
        why = "inputs of the query/key norms, and one fp32 per token and head"
        terms.append(Term("query and key before their norms", "T·(a + k)·(D·e + 4) / t", shape.head_norms, per, why))
    scores = "are gone once their softmax is there" if level == "none" else "are made from them again"
    scores = scores if shape.scores else "are never stored"
    terms.append(Term("query, key, value", "T·(a + 2k)·D·e / t", shape.qkv, per, f"inputs of the attention; its scores {scores}"))
    terms.append(Term("attention output", "T·a·D·e / t", shape.query, per, "input of the output projection"))
    if not shape.scores:
        why = "one fp32 per token and head: the scores again, in the backward pass"
        terms.append(Term("attention's log-sum-exp", "T·a·4 / t", shape.head_stats, per, why))
    elif level == "none":
        why = "softmax of the scores, one for each pair of tokens; fused attention and selective recomputation do without"
        terms.append(Term("attention's probabilities", "T·a·s·e / t", shape.scores, per, why))
    branch = Term("attention branch before its second norm, and statistics", "R·(h·e + 2·e or 4)", shape.row + shape.stats, per, "that norm's input")
    if shape.branch_norms:
        terms += [branch, branch._replace(name="MLP branch before its second norm, and statistics")]
    terms += [
        Term("MLP input", rows, shape.row, per, "the second norm's input"),
        Term("MLP norm's statistics", "R·2·e or R·4", shape.stats, per, "as above"),
    ]
    if level == "none":
        terms.append(Term("MLP norm's output", rows, shape.row, per, "input of the first projection; selective recomputes it"))
    gate = "2·" if shape.gated else ""
    terms.append(Term("first projection's output", f"{gate}T·f·e / t", shape.up, per, "input of the activation function"))
    if level == "none":
        terms.append(Term("activation's output", "T·f·e / t", shape.inner, per, "input of the second projection; selective recomputes it"))
    return terms


def symbols(inputs: Inputs, decisions: Decisions) -> str:
    """What the letters of the formulas stand for, with their values in this plan."""
    model, shape = inputs.model, shape_of(inputs, decisions)
    return (
        f"T = {shape.tokens:,} tokens of a micro-batch; R = {shape.rows:,} rows of an activation (T / t with sequence parallelism); "
        f"t = {decisions.tensor_parallel} tensor-parallel ranks; h = {model.hidden_size:,}; f = {model.ffn_hidden_size:,}; "
        f"s = {inputs.training.sequence_length:,}; a = {model.num_attention_heads} heads; "
        f"k = {model.num_key_value_heads} key-value heads; D = {model.head_dim} a head; e = {shape.e} bytes"
    )


def explain_memory(inputs: Inputs, decisions: Decisions) -> list[Term]:
    """The terms of the heaviest pipeline rank, from the largest group to the smallest, and the total last."""
    memory = predict_memory(inputs, decisions)
    rank = max(range(len(memory)), key=lambda index: memory[index].total_bytes)
    need = memory[rank]
    per_parameter = state_bytes(inputs.training.precision, inputs.training.optimizer)
    stages = [(index, stage) for index, stage in enumerate(decisions.stages) if stage.pipeline_rank == rank]
    t, model = decisions.tensor_parallel, inputs.model
    apart = decisions.stages[0].pipeline_rank != decisions.stages[-1].pipeline_rank
    count = 0
    for _, stage in stages:
        count += len(block_levels(stage, model)) * local_parameters(model, "block", t)
        count += local_parameters(model, "embedding", t) if has_embedding(stage) else 0
        count += local_parameters(model, "head", t, tied_copy=apart) if has_head(stage, model) else 0
    shards = decisions.data_parallel // decisions.data_parallel_replicate

    def sharded(from_stage: int) -> str:
        return f" / {shards} (ZeRO-{decisions.zero_stage})" if decisions.zero_stage >= from_stage and shards > 1 else ""

    each = "parameter on this GPU"
    copies = {"mixed-bf16": "fp32 weights, first and second moment", "fp32": "first and second moment", "bf16": "first and second moment, in bf16"}
    terms = [
        Term("weights", f"{per_parameter.weights} B x {count:,}{sharded(3)}", need.weights_bytes, each, inputs.training.precision),
        Term("gradients", f"{per_parameter.gradients} B x {count:,}{sharded(2)}", need.gradients_bytes, each, "as wide as the weights"),
        Term(
            "optimizer",
            f"{per_parameter.optimizer} B x {count:,}{sharded(1)}",
            need.optimizer_bytes,
            each,
            copies[inputs.training.precision] if inputs.training.optimizer == "adam" else "fp32 weights",
        ),
    ]
    terms += _activation_terms(inputs, decisions, rank, need.activations_bytes)
    terms.append(
        Term(
            "buffers",
            "tokens and targets, and what is gathered or reduced at the peak",
            need.buffers_bytes,
            "GPU",
            f"of it {batch_bytes(inputs, decisions, rank):,} B for the step's tokens and targets",
        )
    )
    return [*terms, Term(f"peak of pipeline rank {rank}", "sum", need.total_bytes, "GPU", "the heaviest GPU governs")]


def _activation_terms(inputs: Inputs, decisions: Decisions, rank: int, total: int) -> list[Term]:
    """Kept activations of each stage of the rank, and what the running action needs on top."""
    held = in_flight(decisions)
    terms: list[Term] = []
    kept = 0
    for index, stage in enumerate(decisions.stages):
        if stage.pipeline_rank != rank:
            continue
        levels = block_levels(stage, inputs.model)
        for level in dict.fromkeys(levels):
            number = levels.count(level)
            one = layer_needs(inputs, decisions, "block", level).kept
            size = one * number * held[index]
            kept += size
            terms.append(
                Term(
                    f"kept by {number} block{'s' if number > 1 else ''} of stage {index}, recompute {level}",
                    f"{one:,} B x {number} x {held[index]} in flight",
                    size,
                    "block and micro-batch",
                    f"{decisions.schedule} holds {held[index]} micro-batches on this stage at its fullest",
                )
            )
            if inputs.training.profile == "meshwright":
                terms += [term._replace(name=f"  {term.name}") for term in kept_terms(shape_of(inputs, decisions), level)]
        ends: list[tuple[LayerKind, bool]] = [("embedding", has_embedding(stage)), ("head", has_head(stage, inputs.model))]
        for kind, there in ends:
            size = layer_needs(inputs, decisions, kind).kept * held[index] if there else 0
            if size:
                kept += size
                why = "logits in the compute type, the final norm's input, two fp32 a token" if kind == "head" else "masked tokens"
                terms.append(Term(f"kept by the {kind}", f"x {held[index]} in flight", size, "micro-batch", why))
    rest = "the layer that is running at the peak: its temporaries and gradients"
    terms.append(Term("at the peak beside them", "peak - kept", total - kept, "GPU", rest if total >= kept else "the peak is not where most is kept"))
    return terms
