"""Weights under Hugging Face's names, in safetensors: for models from the hub to train here, and to be used after.

    python -m executor.huggingface export CHECKPOINT FOLDER      a checkpoint as model.safetensors
    python -m executor plan.json --load FOLDER                   start from a folder's *.safetensors

GPT-2 stores its projections transposed (its Conv1D), with query, key and value side by side; BLOOM has these side by side for each head; Llama
has one tensor each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from executor.units import Piece
from planner.documents import load, write_text
from planner.errors import InputError, MeshwrightError
from planner.model import ModelSpec


def family_of(model: ModelSpec, where: str = "plan: inputs.model") -> str:
    """One of "gpt2", "bloom" and "llama": whose names fit the model. Raises InputError when none does."""
    bloom = model.position_embedding == "alibi" and model.embedding_norm
    gpt = model.norm == "layernorm" and (bloom or model.position_embedding == "learned") and not model.gated_ffn and model.tied_embeddings
    gpt = gpt and model.qkv_bias and model.mlp_bias and model.attention_output_bias and model.num_key_value_heads == model.num_attention_heads
    if gpt and model.query_size == model.hidden_size and model.activation == "gelu":
        return "bloom" if bloom else "gpt2"
    llama = model.norm == "rmsnorm" and model.position_embedding == "rope" and model.gated_ffn and model.activation == "silu"
    if llama and not model.mlp_bias and model.family in ("llama", "mistral", "qwen2"):
        return "llama"
    raise InputError(where, model.name, "only models of the GPT-2, BLOOM and Llama families have Hugging Face names here")


Place = tuple[str, bool, tuple[int, int] | None]
"""A tensor's name, whether it is transposed, and which part (index, of how many) of it."""


def hf_tensor(model: ModelSpec, name: str) -> Place:
    """Where Hugging Face keeps the parameter `name`."""
    family = family_of(model)
    return _llama(name) if family == "llama" else _gpt(name, _GPT2 if family == "gpt2" else _BLOOM)


def part_groups(model: ModelSpec) -> int:
    """In how many groups a tensor of several parts repeats them: BLOOM has query, key and value side by side for each head."""
    return model.num_attention_heads if family_of(model) == "bloom" else 1


class _GptNames(NamedTuple):
    """What the GPT-2 and BLOOM of Hugging Face call the same parts. Both hold query, key and value in one tensor."""

    ends: dict[str, str]
    norms: tuple[str, str]
    """Before the attention, before the MLP."""
    fused: str
    modules: dict[str, str]
    transposed: bool


_ENDS = {"head.norm.gain": "transformer.ln_f.weight", "head.norm.bias": "transformer.ln_f.bias"}
_GPT2 = _GptNames(
    ends={**_ENDS, "embedding.tokens": "transformer.wte.weight", "embedding.positions": "transformer.wpe.weight"},
    norms=("ln_1", "ln_2"),
    fused="attn.c_attn",
    modules={"output": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    transposed=True,
)
_BLOOM = _GptNames(
    ends={
        **_ENDS,
        "embedding.tokens": "transformer.word_embeddings.weight",
        "embedding.norm.gain": "transformer.word_embeddings_layernorm.weight",
        "embedding.norm.bias": "transformer.word_embeddings_layernorm.bias",
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    fused="self_attention.query_key_value",
    modules={"output": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    transposed=False,
)


def _gpt(name: str, names: _GptNames) -> Place:
    if name in names.ends:
        return names.ends[name], False, None
    _, index, part, *rest = name.split(".")
    prefix, last = f"transformer.h.{index}", rest[-1]
    if rest[0] == "norm":
        return f"{prefix}.{names.norms[part != 'attention']}.{'weight' if last == 'gain' else 'bias'}", False, None
    transposed = names.transposed and last == "weight"
    if rest[0] in ("query", "key", "value"):
        return f"{prefix}.{names.fused}.{last}", transposed, (("query", "key", "value").index(rest[0]), 3)
    return f"{prefix}.{names.modules[rest[0]]}.{last}", transposed, None


def _llama(name: str) -> Place:
    fixed = {"embedding.tokens": "model.embed_tokens.weight", "head.norm.gain": "model.norm.weight", "head.weight": "lm_head.weight"}
    if name in fixed:
        return fixed[name], False, None
    _, index, part, *rest = name.split(".")
    prefix, last = f"model.layers.{index}", rest[-1]
    if rest[0] == "norm":
        return f"{prefix}.{'input_layernorm' if part == 'attention' else 'post_attention_layernorm'}.weight", False, None
    modules = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return f"{prefix}.{'self_attn' if part == 'attention' else 'mlp'}.{modules[rest[0]]}.{last}", False, None


class Weights:
    """The tensors of a folder's (or a single file's) safetensors by name, read when asked for."""

    def __init__(self, path: str, field: str = "--load") -> None:
        from safetensors import SafetensorError, safe_open

        root = Path(path)
        files = sorted(root.glob("*.safetensors")) if root.is_dir() else [root]
        self._open: dict[str, object] = {}
        if not files or not all(file.is_file() for file in files):
            raise InputError(field, path, "a .safetensors file, or a folder with some, is expected")
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(field, str(file), f"a safetensors file is expected ({error})") from None
            for key in handle.keys():  # noqa: SIM118
                self._open[key] = handle
        self.path = path

    def get(self, name: str) -> torch.Tensor:
        """The tensor `name`, with or without the base model's prefix."""
        for candidate in (name, name.removeprefix("transformer."), name.removeprefix("model.")):
            if candidate in self._open:
                tensor: torch.Tensor = self._open[candidate].get_tensor(candidate)  # type: ignore[attr-defined]
                return tensor
        raise InputError("--load", self.path, f"the tensor {name} is missing there")


def reader(model: ModelSpec, path: str) -> Callable[[Piece], torch.Tensor]:
    """For `Unit.load`: the local slice of each piece from Hugging Face weights. Raises InputError for a missing or misshapen tensor."""
    weights = Weights(path)
    family_of(model)

    def value(piece: Piece) -> torch.Tensor:
        name, transposed, part = hf_tensor(model, piece.name)
        tensor = weights.get(name)
        tensor = tensor.t() if transposed else tensor
        if part is not None:
            tensor = tensor.unflatten(0, (part_groups(model), part[1], -1))[:, part[0]].flatten(0, 1)
        if tuple(tensor.shape) != piece.shape:
            raise InputError("--load", path, f"{name} has shape {tuple(tensor.shape)} where the plan's model has {piece.shape}")
        return piece.slice_of(tensor)

    return value


def global_names(model: ModelSpec) -> Iterator[Piece]:
    """Every parameter of the model, whole."""
    from executor.model import block_layout, embedding_layout, head_layout, table_layout

    layouts = [table_layout(model, "embedding.tokens", 0, 1), embedding_layout(model)]
    layouts += [block_layout(model, index, 0, 1) for index in range(model.num_layers)]
    layouts += [head_layout(model, 0, 1)] + ([] if model.tied_embeddings else [table_layout(model, "head.weight", 0, 1)])
    for layout in layouts:
        for piece, _ in layout.pieces():
            yield piece


def to_huggingface(model: ModelSpec, value: Callable[[Piece], torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights under Hugging Face's names, from `value(piece)`, the whole parameter."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    flipped: dict[str, bool] = {}
    for piece in global_names(model):
        name, transposed, part = hf_tensor(model, piece.name)
        parts.setdefault(name, {})[part[0] if part else 0] = value(piece)
        flipped[name] = transposed
    found = {}
    for name, pieces in parts.items():
        tensor = pieces[0]
        if len(pieces) > 1:
            tensor = torch.stack([pieces[index].unflatten(0, (part_groups(model), -1)) for index in sorted(pieces)], 1).flatten(0, 2)
        found[name] = (tensor.t() if flipped[name] else tensor).contiguous()
    return found


def hf_config(model: ModelSpec) -> dict[str, object]:
    """The config.json that goes with the weights."""
    if family_of(model) == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_hidden_size,
            "n_positions": model.num_position_embeddings,
            "vocab_size": model.vocab_size,
            "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        }
    if family_of(model) == "bloom":
        return {
            "model_type": "bloom",
            "architectures": ["BloomForCausalLM"],
            "n_layer": model.num_layers,
            "hidden_size": model.hidden_size,
            "n_head": model.num_attention_heads,
            "seq_length": model.max_sequence_length,
            "vocab_size": model.vocab_size,
            "layer_norm_epsilon": model.norm_epsilon,
            "tie_word_embeddings": True,
        }
    kind = "qwen2" if model.qkv_bias and not model.attention_output_bias else "llama"
    return {
        "model_type": kind,
        "architectures": ["Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"],
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": model.qkv_bias,
        "tie_word_embeddings": model.tied_embeddings,
    }


def export(checkpoint: str, folder: str) -> None:
    """Writes a checkpoint's weights to `folder` as model.safetensors, fp32, with a config.json."""
    from safetensors.torch import save_file

    from executor.checkpoint import SCHEMA, TrainingState, find_checkpoint, read_whole

    path = find_checkpoint(checkpoint, "CHECKPOINT")
    model = load(path / "training.json", TrainingState, SCHEMA, "CHECKPOINT").model
    family_of(model, f"{path}: model")
    tensors = read_whole(path, {f"model.{piece.name}": piece.shape for piece in global_names(model)})
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("FOLDER", folder, f"a folder that can be made is expected ({error.strerror})") from None
    save_file(to_huggingface(model, lambda piece: tensors[f"model.{piece.name}"]), target / "model.safetensors", {"format": "pt"})
    write_text(target / "config.json", json.dumps(hf_config(model), indent=2) + "\n")


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m executor.huggingface", description="Weights under Hugging Face's names.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="a checkpoint's weights as safetensors")
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("folder", metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        export(options.checkpoint, options.folder)
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
