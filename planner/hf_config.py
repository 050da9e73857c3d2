"""HF `config.json` files: which fields of `planner.model.ModelSpec` their keys and their architecture give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from planner.documents import parse_json, read_text
from planner.errors import InputError

ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What the executor can do, and the numbers that each takes."""

# One row per field: the HF names that may hold it, in order of preference.
HF_KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embed", "n_embd", "d_model"),
    "ffn_hidden_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_sequence_length": ("max_position_embeddings", "n_positions", "seq_length", "n_ctx", "max_seq_len"),
    "tied_embeddings": ("tie_word_embeddings",),
    "norm_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "rotary_dim": ("rotary_dim",),
    "rotary_factor": ("rotary_pct", "partial_rotary_factor"),
}
# What Hugging Face calls an activation function, and what it is called here.
HF_ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu_erf", "gelu_python": "gelu_erf", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu",
    "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip

_LLAMA: dict[str, Any] = {
    "family": "llama", "position_embedding": "rope", "norm": "rmsnorm", "activation": "silu", "gated_ffn": True,
    "qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "tied_embeddings": False,
}  # fmt: skip
_GEMMA: dict[str, Any] = _LLAMA | {
    "family": "gemma", "activation": "gelu", "tied_embeddings": True, "embedding_scaled": True, "norm_epsilon": 1e-6,
}  # fmt: skip
_NEOX: dict[str, Any] = {
    "family": "neox", "position_embedding": "rope", "tied_embeddings": False, "parallel_block": True, "activation": "gelu_erf",
    "rotary_factor": 0.25,
}  # fmt: skip
# What an architecture fixes, by HF `model_type`. A key of the config, where it has one, wins over this table.
HF_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt", "position_embedding": "learned"},
    "opt": {"family": "opt", "position_embedding": "learned", "activation": "relu"},
    "bloom": {"family": "bloom", "position_embedding": "alibi", "embedding_norm": True, "max_sequence_length": 2048},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"family": "mistral"},
    "qwen2": _LLAMA | {"family": "qwen2", "qkv_bias": True},
    "qwen3": _LLAMA | {"family": "qwen3", "qk_norm": True},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"family": "gemma2", "num_norms_per_layer": 4, "attention_softcap": 50.0, "head_softcap": 30.0, "sliding_window": 4096},
    "gpt_neox": _NEOX,
    "gptj": _NEOX | {
        "family": "gptj", "num_norms_per_layer": 1, "qkv_bias": False, "attention_output_bias": False, "head_bias": True, "activation": "gelu",
        "rotary_dim": 64, "rotary_neighbours": True, "max_sequence_length": 2048,
    },
    "phi": _NEOX | {"family": "phi", "num_norms_per_layer": 1, "head_bias": True, "activation": "gelu", "rotary_factor": 0.5},
    "falcon": _NEOX | {
        "family": "falcon", "tied_embeddings": True, "qkv_bias": False, "attention_output_bias": False, "mlp_bias": False, "rotary_factor": 1.0,
    },
}  # fmt: skip
# Keys by `model_type` that only do with one value: another one would be another computation.
HF_ONLY: dict[str, dict[str, bool]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "opt": {"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    "bloom": {"apply_residual_connection_post_layernorm": False},
    "phi": {"qk_layernorm": False},
}


def _activation(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The activation function that a config names, as a field. Raises InputError for one that is not known here."""
    for key in ("hidden_activation", "activation_function", "hidden_act", "activation"):
        if (name := config.get(key)) is not None:
            if not isinstance(name, str) or name not in HF_ACTIVATIONS:
                raise InputError(f"{path}: {key}", name, f"one of {', '.join(HF_ACTIVATIONS)} is expected")
            return {"activation": HF_ACTIVATIONS[name]}
    return {}


def _falcon_block(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What a Falcon config says about its blocks. 40B and 180B have the new architecture; 7B shares one key-value head and one norm."""
    found: dict[str, Any] = {"position_embedding": "alibi"} if config.get("alibi") else {}
    if config.get("bias"):
        found |= {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
    if config.get("new_decoder_architecture"):
        return found | {"num_norms_per_layer": config.get("num_ln_in_parallel_attn") or 2}
    parallel = config.get("parallel_attn", True)
    heads = 1 if config.get("multi_query", True) else values["num_attention_heads"]
    return found | {"num_key_value_heads": heads, "parallel_block": parallel, "num_norms_per_layer": 1 if parallel else 2}


def _gemma2_attention(config: dict[str, Any], values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Scale, soft-capping and windows of a Gemma 2 config. A key that is null switches its feature off. Raises InputError."""
    found: dict[str, Any] = {}
    for key, field in (("attn_logit_softcapping", "attention_softcap"), ("final_logit_softcapping", "head_softcap"), ("sliding_window",) * 2):
        found[field] = config.get(key, values[field])
        if found[field] is None:
            found[field] = msgspec.UNSET
    scalar = config.get("query_pre_attn_scalar", 256)
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or not 0 < scalar < math.inf:
        raise InputError(f"{path}: query_pre_attn_scalar", scalar, "a number above 0 is expected")
    if scalar != values["head_dim"]:
        found["attention_scale"] = scalar**-0.5
    if found["sliding_window"] is msgspec.UNSET:
        return found
    kinds = config.get("layer_types") or ["sliding_attention", "full_attention"]
    if not isinstance(kinds, list):
        raise InputError(f"{path}: layer_types", kinds, "a list is expected")
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    if any((kind == "full_attention") != bool(every and (index + 1) % every == 0) for index, kind in enumerate(kinds)):
        raise InputError(f"{path}: layer_types", kinds, "full_attention at every n-th layer is expected, sliding_attention at the others")
    return found | ({"full_attention_every": every} if every else {})


def _check_no_windows(config: dict[str, Any], num_layers: int, path: Path) -> None:
    """Raises InputError for a Qwen config with layers that attend to a window: all from `max_window_layers` on, unless `layer_types` says which."""
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28)
    if "sliding_attention" in kinds if isinstance(kinds, list) else not isinstance(first, int) or first < num_layers:
        raise InputError(f"{path}: use_sliding_window", config["use_sliding_window"], "only Qwen models without windows are supported")


def _rotary_fields(config: dict[str, Any], values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Base, part and scaling of rotary positions; older configs have the first two at their top, newer ones all in `rope_parameters`. Raises
    InputError."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: {key}", rope, "an object or null is expected")
    found = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if values["position_embedding"] != "rope":
        return found
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise InputError(f"{path}: {key}.rope_type", kind, "a name is expected")
    if kind != "default":
        if kind == "linear" and rope.get("factor") is None:
            raise InputError(f"{path}: {key}.factor", None, "a number above 0 is expected with linear")
        numbers = ROPE_SCALINGS.get(kind, ("factor",))
        found["rope_scaling"] = {"rope_type": kind} | {name: rope[name] for name in numbers if rope.get(name) is not None}
    factor = rope.get("partial_rotary_factor", values.get("rotary_factor", 1.0))
    if not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise InputError(f"{path}: partial_rotary_factor", factor, "a number above 0 and at most 1 is expected")
    whole = values["head_dim"]
    size = values.get("rotary_dim") or (int(whole * factor) if isinstance(whole, int) else whole)
    return found if size == whole else found | {"rotary_dim": size}


def read_config(path: Path, where: str) -> dict[str, Any]:
    """The config as it stands. Raises InputError where it is none."""
    config = parse_json(read_text(path, where), str(path))
    if not isinstance(config, dict):
        raise InputError(str(path), config, "a JSON object is expected")
    return config


def by_its_key(error: InputError, config: dict[str, Any], path: Path) -> InputError:
    """The error with the config's own key in place of the field that it gave."""
    prefix = f"{path}: "
    field = error.field.removeprefix(prefix)
    key = next((key for key in HF_KEYS.get(field, ()) if config.get(key) is not None), field)
    return InputError(prefix + key, error.value, error.allowed) if error.field.startswith(prefix) else error


def config_fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of `planner.model.ModelSpec` that a config gives. Raises InputError naming the key that is missing or unusable."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in HF_ARCHITECTURES:
        raise InputError(f"{path}: model_type", kind, f"one of {', '.join(sorted(HF_ARCHITECTURES))} is expected")
    values = dict(HF_ARCHITECTURES[kind])
    for field, keys in HF_KEYS.items():
        for key in keys:
            if config.get(key) is not None:
                values[field] = config[key]
                break
    for required in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if required not in values:
            raise InputError(f"{path}: {HF_KEYS[required][0]}", None, f"the config of a {kind} model needs it")
        if not isinstance(values[required], int) or values[required] < 1:
            raise InputError(f"{path}: {required}", values[required], "a positive integer is expected")
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if "head_dim" not in values:
        if values["hidden_size"] % values["num_attention_heads"]:
            raise InputError(
                f"{path}: num_attention_heads",
                values["num_attention_heads"],
                f"a divisor of hidden_size ({values['hidden_size']}) is expected where head_dim is not given",
            )
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    values.setdefault("ffn_hidden_size", 4 * values["hidden_size"])
    values.setdefault("max_sequence_length", 2048)
    if not isinstance(values["max_sequence_length"], int):
        key = next(key for key in HF_KEYS["max_sequence_length"] if config.get(key) is not None)
        raise InputError(f"{path}: {key}", values["max_sequence_length"], "a positive integer is expected")
    if kind in ("llama", "qwen3") and config.get("attention_bias"):
        values |= {"qkv_bias": True, "attention_output_bias": True}
    if kind == "llama" and config.get("mlp_bias"):
        values["mlp_bias"] = True
    if kind == "falcon":
        values |= _falcon_block(config, values)
    if kind == "gpt_neox":
        if config.get("use_parallel_residual") is False:
            values["parallel_block"] = False
        if config.get("attention_bias") is False:
            values |= {"qkv_bias": False, "attention_output_bias": False}
    for key, only in HF_ONLY.get(kind, {}).items():
        if config.get(key) not in (None, only):
            raise InputError(f"{path}: {key}", config[key], f"only {kind} models where it is {str(only).lower()} are supported")
    if kind in ("qwen2", "qwen3"):
        _check_no_windows(config, values["num_layers"], path)
    if kind == "mistral" and config.get("sliding_window") is not None:
        values["sliding_window"] = config["sliding_window"]
    if kind == "gemma2":
        values |= _gemma2_attention(config, values, path)
    if kind != "gemma":  # its first configs say gelu and mean the approximation
        values |= _activation(config, path)
    rotary = _rotary_fields(config, values, path)
    values = {name: value for name, value in values.items() if name not in ("rotary_factor", "rotary_dim")} | rotary
    if kind == "opt" and config.get("word_embed_proj_dim") not in (None, values["hidden_size"]):
        raise InputError(f"{path}: word_embed_proj_dim", config["word_embed_proj_dim"], "only the hidden size is supported")
    if values["position_embedding"] == "learned":
        # OPT keeps two rows before position 0 (transformers, OPTLearnedPositionalEmbedding).
        values["num_position_embeddings"] = values["max_sequence_length"] + (2 if kind == "opt" else 0)
    name = config.get("_name_or_path") or path.resolve().parent.name
    values = {field: value for field, value in values.items() if value is not msgspec.UNSET}
    return values | {"name": str(name), "source": "HF config.json"}
