"""What the export targets share: safe text, notes, nodes, recompute levels, and a small YAML writer.

A plan file is untrusted: names from it reach shell scripts, YAML and Python only through the functions here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from planner.errors import InputError
from planner.plan import Decisions, Plan, block_levels, has_embedding, has_head, plan_hash, stage_blocks

Notes = list[str]


def refuse(target: str, field: str, value: object, allowed: str) -> InputError:
    """The error for a decision that the target can't express."""
    return InputError(f"--to {target}: {field}", value, allowed)


def one_line(text: str) -> str:
    """`text` without line breaks and other characters that could end a comment."""
    return "".join(character if character.isprintable() else " " for character in text)


def slug(text: str, limit: int = 50) -> str:
    """A name of lower-case letters, digits and hyphens, as job names and DNS labels allow."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].strip("-") or "plan"


def header(plan: Plan, target: str, notes: Iterable[str]) -> str:
    """Comment lines that say what the file was made from, and what the target does otherwise than the plan."""
    decisions, training = plan.decisions, plan.inputs.training
    lines = [
        f"Made by Meshwright for {target}. Plan {plan_hash(plan)[:16]}.",
        f"Model {plan.inputs.model.name}; {decisions.world_size} x {plan.inputs.cluster.gpu.name};"
        f" tensor {decisions.tensor_parallel} x pipeline {decisions.pipeline_parallel} x data {decisions.data_parallel};"
        f" global batch {training.global_batch_size} = {decisions.data_parallel} x {decisions.micro_batch_size} x"
        f" {decisions.num_microbatches}.",
        *(f"NOTE: {note}" for note in notes),
    ]
    return "".join(f"# {one_line(line)}\n" for line in lines)


def nodes(plan: Plan, target: str) -> tuple[int, int]:
    """(number of nodes, processes on each). Raises InputError when the GPUs don't fill whole nodes."""
    cluster = plan.inputs.cluster
    if cluster.num_gpus <= cluster.gpus_per_node:
        return 1, cluster.num_gpus
    if cluster.num_gpus % cluster.gpus_per_node:
        raise refuse(target, "cluster.num_gpus", cluster.num_gpus, f"whole nodes of {cluster.gpus_per_node} are needed to start it")
    return cluster.num_gpus // cluster.gpus_per_node, cluster.gpus_per_node


def torchrun(plan: Plan, target: str) -> list[str]:
    """The start of a torchrun command line, already safe for a shell. Several nodes meet at $MASTER_ADDR."""
    count, processes = nodes(plan, target)
    if count == 1:
        return ["torchrun --standalone", f"--nproc-per-node {processes}"]
    return [
        f"torchrun --nnodes {count} --nproc-per-node {processes}",
        '--node-rank "${NODE_RANK:?set NODE_RANK to 0 .. ' + str(count - 1) + '}"',
        '--master-addr "${MASTER_ADDR:?set MASTER_ADDR to the first node}" --master-port "${MASTER_PORT:-29500}"',
    ]


def flag(name: str, value: object | None = None) -> str:
    """One command-line flag, its value quoted for a shell."""
    return name if value is None else f"{name} {shlex.quote(str(value))}"


def script(head: str, command: Sequence[str], before: Sequence[str] = ()) -> str:
    """A bash script that runs one command; each part of it (safe text) stands on a line of its own."""
    lines = ["#!/usr/bin/env bash", head.rstrip("\n"), "set -euo pipefail", *before, " \\\n    ".join(command)]
    return "\n".join(lines) + "\n"


def stage_levels(plan: Plan) -> list[list[str]]:
    """The recompute level of each block of each stage."""
    return [list(block_levels(stage, plan.inputs.model)) for stage in plan.decisions.stages]


def strongest_level(plan: Plan, target: str, notes: Notes) -> str:
    """One recompute level for all blocks: the strongest that the plan asks of any. Notes when blocks differ."""
    levels = {level for stage in stage_levels(plan) for level in stage}
    strongest = next((level for level in ("full", "selective") if level in levels), "none")
    if len(levels) > 1:
        notes.append(
            f"the plan recomputes {recompute_words(plan)}; {target} has one setting for all blocks, so all of them are at"
            f" '{strongest}': less memory than planned, and slower."
        )
    return strongest


def recompute_words(plan: Plan) -> str:
    """The blocks at each recompute level: `full 2, none 4 on stages 0-1; none 6 on stage 2`."""
    runs: list[tuple[str, int, int]] = []
    for index, levels in enumerate(stage_levels(plan)):
        words = ", ".join(f"{level} {levels.count(level)}" for level in ("full", "selective", "none") if level in levels)
        if runs and runs[-1][0] == words:
            runs[-1] = (words, runs[-1][1], index)
        else:
            runs.append((words, index, index))
    return "; ".join(f"{words} on {f'stage {first}' if first == last else f'stages {first}-{last}'}" for words, first, last in runs if words)


def note_rank_order(plan: Plan, target: str, notes: Notes, order: tuple[str, ...] = ("tp", "dp", "pp")) -> None:
    """Notes when the target places the mesh axes in another order; axes of degree 1 don't count."""
    ours, theirs = (effective_order(plan.decisions, axes) for axes in (plan.decisions.rank_order, order))
    if ours != theirs:
        notes.append(
            f"the plan places ranks as {' < '.join(ours)} (neighbouring ranks first), {target} as {' < '.join(theirs)}:"
            " the same groups, on other links. Order the hosts to match, or expect another speed."
        )


def effective_order(decisions: Decisions, order: Iterable[str]) -> tuple[str, ...]:
    """The axes of `order` that have more than one rank."""
    degrees = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    return tuple(axis for axis in order if degrees[axis] > 1)


def stage_modules(plan: Plan, embedding: str, block: str, head: Sequence[str]) -> list[list[str]]:
    """The names of each stage's layers; `block` holds `{}` for the block's index."""
    out = []
    for stage in plan.decisions.stages:
        names = [embedding] if has_embedding(stage) else []
        names += [block.format(index) for index in stage_blocks(stage, plan.inputs.model)]
        out.append(names + (list(head) if has_head(stage, plan.inputs.model) else []))
    return out


def without_option(plan: Plan) -> list[tuple[str, object]]:
    """Fields of a model that no target here has an option for, with what is given of them; no window that shuts nothing out at the plan's length."""
    model, length = plan.inputs.model, plan.inputs.training.sequence_length
    found: list[tuple[str, object]] = [(name, getattr(model, name)) for name in ("attention_scale", "attention_softcap", "head_softcap")]
    if any(model.window_of(block, length) is not None for block in range(model.num_layers)):
        found.append(("sliding_window", model.sliding_window))
    return [(name, value) for name, value in found if value]


def require_llama(plan: Plan, target: str) -> None:
    """Raises InputError unless the model is of the Llama family: RMSNorm, RoPE, SwiGLU, no biases."""
    model = plan.inputs.model
    wanted: tuple[tuple[str, object, object], ...] = (
        ("norm", model.norm, "rmsnorm"),
        ("position_embedding", model.position_embedding, "rope"),
        ("activation", model.activation, "silu"),
        ("gated_ffn", model.gated_ffn, True),
        ("parallel_block", model.parallel_block, False),
        ("num_norms_per_layer", model.num_norms_per_layer, 2),
        ("qkv_bias", model.qkv_bias, False),
        ("attention_output_bias", model.attention_output_bias, False),
        ("mlp_bias", model.mlp_bias, False),
        ("head_bias", model.head_bias, False),
        ("qk_norm", model.qk_norm, False),
        ("embedding_norm", model.embedding_norm, False),
        ("final_norm", model.final_norm, True),
        ("rotary_size", model.rotary_size, model.head_dim),
        ("rotary_neighbours", model.rotary_neighbours is True, False),
        ("embedding_scaled", model.embedding_scaled is True, False),
        *((name, value, None) for name, value in without_option(plan)),
        ("head_dim", model.head_dim, model.hidden_size // model.num_attention_heads),
    )
    for name, value, allowed in wanted:
        if value != allowed:
            raise refuse(target, f"model.{name}", value, f"its Llama model, the one this export configures, has {allowed!r}")


def yaml_text(value: Any, indent: int = 0) -> str:
    """Plain data as block-style YAML. Every string is quoted as in JSON; a string of several lines is a literal block."""
    pad = " " * indent
    if isinstance(value, dict) and value:
        return "".join(f"{pad}{_key(key)}:{_yaml_item(item, indent + 2)}" for key, item in value.items())
    if isinstance(value, list) and value:
        rows = []
        for item in value:
            text = yaml_text(item, indent + 2) if isinstance(item, (dict, list)) and item else _scalar(item) + "\n"
            rows.append(f"{pad}- {text.lstrip(' ')}")
        return "".join(rows)
    return f"{pad}{_scalar(value)}\n"


def _yaml_item(value: Any, indent: int) -> str:
    if isinstance(value, (dict, list)) and value:
        return "\n" + yaml_text(value, indent)
    if isinstance(value, str) and "\n" in value and all(line.isprintable() for line in value.splitlines()):
        lines = "".join(f"{' ' * indent}{line}\n" for line in value.splitlines())
        return f" |\n{lines}"
    return f" {_scalar(value)}\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", key) else json.dumps(key)


def _scalar(value: Any) -> str:
    """A scalar, or an empty list or object, as JSON, which is YAML too (floats with a point, as YAML 1.1 asks)."""
    if isinstance(value, float):
        mantissa, exponent, power = repr(value).partition("e")
        return mantissa + ("" if "." in mantissa else ".0") + exponent + power
    return json.dumps(one_line(value) if isinstance(value, str) else value, ensure_ascii=False)
