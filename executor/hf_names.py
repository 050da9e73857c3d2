"""What Hugging Face calls a model's parameters: one table of names for each architecture, and the config.json that goes with them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from msgspec import UNSET, UnsetType

from planner.errors import InputError
from planner.model import ROPE_SCALINGS, ModelSpec

QUERY_KEY_VALUE = ("query", "key", "value")


class Names(NamedTuple):
    """The names of one architecture. `parts` are those of a block, by ours without the ending."""

    ends: dict[str, str]
    """Modules beside the blocks, by our name without the ending."""
    layers: str
    parts: dict[str, str]
    """Query, key and value have one name where they lie in one tensor."""
    transposed: bool = False
    """Whether the matrices are stored [in, out] (GPT-2's Conv1D)."""
    gains_from: float = 0.0
    """What is taken off the norms' gains before they are stored (Gemma: 1)."""


class Place(NamedTuple):
    """Where Hugging Face keeps a parameter."""

    name: str
    transposed: bool = False
    part: int | None = None
    """Which of query, key and value it is, where these lie in one tensor."""
    offset: float = 0.0
    """Our value minus the stored one."""


def _ends(tokens: str, norm: str, **more: str) -> dict[str, str]:
    return {"embedding.tokens": tokens, "head.norm": norm, "head": "lm_head", **{name.replace("__", "."): value for name, value in more.items()}}


def _fused(attention: str, fused: str, output: str, up: str, down: str, norms: tuple[str, str]) -> dict[str, str]:
    """The parts of a block that has query, key and value in one tensor."""
    found = {f"attention.{name}": f"{attention}.{fused}" for name in QUERY_KEY_VALUE}
    return found | _rest(f"{attention}.{output}", up, down, norms)


def _apart(attention: str, output: str, up: str, down: str, norms: tuple[str, str]) -> dict[str, str]:
    """The parts of a block that has a tensor for each of query, key and value."""
    found = {f"attention.{name}": f"{attention}.{name[0]}_proj" for name in QUERY_KEY_VALUE}
    return found | _rest(f"{attention}.{output}", up, down, norms)


def _rest(output: str, up: str, down: str, norms: tuple[str, str]) -> dict[str, str]:
    return {"attention.output": output, "mlp.up": up, "mlp.down": down, "attention.norm": norms[0], "mlp.norm": norms[1]}


_WIDE = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_FALCON_ENDS = _ends("transformer.word_embeddings", "transformer.ln_f")
_FALCON_NAMES = Names(_FALCON_ENDS, "transformer.h", _fused("self_attention", "query_key_value", "dense", *_WIDE, _NORMS))
_LLAMA_ENDS = _ends("model.embed_tokens", "model.norm")
_LLAMA_PARTS = _apart("self_attn", "o_proj", "mlp.up_proj", "mlp.down_proj", _NORMS) | {"mlp.gate": "mlp.gate_proj"}
NAMES: dict[str, Names] = {
    "gpt2": Names(
        _ends("transformer.wte", "transformer.ln_f", embedding__positions="transformer.wpe"),
        "transformer.h",
        _fused("attn", "c_attn", "c_proj", "mlp.c_fc", "mlp.c_proj", ("ln_1", "ln_2")),
        transposed=True,
    ),
    "bloom": Names(
        _ends("transformer.word_embeddings", "transformer.ln_f", embedding__norm="transformer.word_embeddings_layernorm"),
        "transformer.h",
        _fused("self_attention", "query_key_value", "dense", *_WIDE, _NORMS),
    ),
    "gpt_neox": Names(
        _ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
        "gpt_neox.layers",
        _fused("attention", "query_key_value", "dense", *_WIDE, _NORMS),
    ),
    "gptj": Names(
        _ends("transformer.wte", "transformer.ln_f"),
        "transformer.h",
        _apart("attn", "out_proj", "mlp.fc_in", "mlp.fc_out", ("ln_1", "")),
    ),
    "phi": Names(
        _ends("model.embed_tokens", "model.final_layernorm"),
        "model.layers",
        _apart("self_attn", "dense", "mlp.fc1", "mlp.fc2", ("input_layernorm", "")),
    ),
    "falcon": _FALCON_NAMES,
    "falcon-in-turn": _FALCON_NAMES,
    "falcon-new": Names(_FALCON_ENDS, "transformer.h", _fused("self_attention", "query_key_value", "dense", *_WIDE, ("ln_attn", "ln_mlp"))),
    "llama": Names(_LLAMA_ENDS, "model.layers", _LLAMA_PARTS),
    "mistral": Names(_LLAMA_ENDS, "model.layers", _LLAMA_PARTS),
    "gemma": Names(_LLAMA_ENDS, "model.layers", _LLAMA_PARTS, gains_from=1.0),
    "gemma2": Names(
        _LLAMA_ENDS,
        "model.layers",
        _LLAMA_PARTS
        | {"attention.output_norm": _NORMS[1], "mlp.norm": "pre_feedforward_layernorm", "mlp.output_norm": "post_feedforward_layernorm"},
        gains_from=1.0,
    ),
    "qwen3": Names(
        _LLAMA_ENDS,
        "model.layers",
        _LLAMA_PARTS | {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"},
    ),
}  # fmt: skip

HEAD = "lm_head.weight"
ALIASES = {HEAD: "embed_out.weight"}
"""What tensors are called in older files."""
_BUFFER = re.compile(r"(.*\.)?(inv_freq|masked_bias|(attn|attention)\.bias|embed_positions|position_ids)")


def is_buffer(name: str) -> bool:
    """Whether a tensor is what older files have beside the parameters: masks, positions, rotary tables."""
    return _BUFFER.fullmatch(name) is not None


Form = dict[str, tuple[object, ...]]
"""By fact (`_facts`), the values that an architecture allows; a fact that is not there has to be as in `_COMMON`."""
_COMMON: Form = {
    "norm": ("layernorm",), "gated_ffn": (False,), "activation": ("gelu",), "position_embedding": ("rope",), "rotary_neighbours": (False,),
    "whole_heads_turned": (True,), "rope_theta": (), "qk_norm": (False,), "embedding_norm": (False,), "final_norm": (True,), "head_bias": (False,),
    "parallel_block": (False,), "num_norms_per_layer": (2,), "tied_embeddings": (), "biases": ((True, True, True),), "multi_head": (True,),
    "one_or_all_key_heads": (), "square": (True,), "rope_scaling": (),
}  # fmt: skip
_FALCON: Form = {"activation": ("gelu_erf", "gelu"), "biases": ((True, True, True), (False, False, False)), "multi_head": ()}
_SWIGLU: Form = {
    "norm": ("rmsnorm",), "gated_ffn": (True,), "activation": ("silu",), "multi_head": (), "square": (),
    "biases": ((False, False, False), (True, False, False), (True, True, False)),
}  # fmt: skip
_GEMMA: Form = _SWIGLU | {"activation": ("gelu",), "biases": ((False, False, False),), "embedding_scaled": (True,), "tied_embeddings": (True,)}
_BESIDE: Form = {"parallel_block": (True,), "num_norms_per_layer": (1,)}
FORMS: dict[str, Form] = {
    "gpt2": {"position_embedding": ("learned",), "whole_heads_turned": (), "tied_embeddings": (True,)},
    "bloom": {"position_embedding": ("alibi",), "whole_heads_turned": (), "tied_embeddings": (True,), "embedding_norm": (True,)},
    "gpt_neox": {
        "whole_heads_turned": (), "parallel_block": (), "activation": (), "biases": ((True, True, True), (False, False, True)),
        "tied_embeddings": (False,),
    },
    "gptj": _BESIDE | {
        "rotary_neighbours": (True,), "whole_heads_turned": (), "rope_theta": (10000.0,), "biases": ((False, False, True),), "head_bias": (True,),
        "tied_embeddings": (False,), "rope_scaling": (UNSET,),
    },
    "phi": _BESIDE | {"whole_heads_turned": (), "head_bias": (True,), "multi_head": (), "tied_embeddings": (False,)},
    "falcon": _BESIDE | _FALCON | {"one_or_all_key_heads": (True,)},
    "falcon-in-turn": _FALCON | {"one_or_all_key_heads": (True,)},
    "falcon-new": _FALCON | {"parallel_block": (True,)},
    "llama": _SWIGLU,
    "mistral": _SWIGLU | {"biases": ((False, False, False),), "sliding_window": ()},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {
        "num_norms_per_layer": (4,), "attention_scale": (), "attention_softcap": (), "head_softcap": (), "sliding_window": (),
        "full_attention_every": (),
    },
    "qwen3": _SWIGLU | {"biases": ((False, False, False), (True, True, False)), "qk_norm": (True,)},
}  # fmt: skip
FAMILIES: dict[str, tuple[str, ...]] = {
    "gpt": ("gpt2",), "bloom": ("bloom",), "neox": ("gpt_neox",), "gptj": ("gptj",), "phi": ("phi",),
    "falcon": ("falcon", "falcon-in-turn", "falcon-new"),
    "llama": ("llama",), "mistral": ("mistral",), "qwen2": ("llama",), "qwen3": ("qwen3",),
    "gemma": ("gemma",), "gemma2": ("gemma2",),
}  # fmt: skip
"""The architectures that a model of a family can have, by `ModelSpec.family`."""


def _facts(model: ModelSpec) -> dict[str, object]:
    """What decides on an architecture: fields of the model, and what follows from them."""
    facts = {name: getattr(model, name) for name in _COMMON if name in ModelSpec.__struct_fields__}
    return facts | {
        "rotary_neighbours": model.rotary_neighbours is True,
        "embedding_scaled": model.embedding_scaled is True,
        "whole_heads_turned": model.rotary_size == model.head_dim,
        "biases": (model.qkv_bias, model.attention_output_bias, model.mlp_bias),
        "multi_head": model.num_key_value_heads == model.num_attention_heads,
        "one_or_all_key_heads": model.num_key_value_heads in (1, model.num_attention_heads),
        "square": model.query_size == model.hidden_size,
    }


def architecture_of(model: ModelSpec, where: str = "plan: inputs.model") -> str:
    """The key of `NAMES` whose blocks are the model's. Raises InputError when there is none, naming what the family's architecture has otherwise."""
    if model.family not in FAMILIES:
        raise InputError(f"{where}.family", model.family, f"only models of the families {', '.join(FAMILIES)} have Hugging Face names here")
    facts = _facts(model)
    for architecture in FAMILIES[model.family]:
        form = _COMMON | FORMS[architecture]
        wrong = [name for name, allowed in form.items() if allowed and facts[name] not in allowed]
        if not wrong:
            return architecture
    allowed = " or ".join(str(value) for value in form[wrong[0]])
    raise InputError(f"{where}.{wrong[0]}", facts[wrong[0]], f"Hugging Face's {architecture} has {allowed}")


def place_of(architecture: str, name: str) -> Place:
    """Where a model of `architecture` keeps our parameter `name`."""
    names = NAMES[architecture]
    module, _, last = name.rpartition(".")
    if name in names.ends:
        return Place(names.ends[name] + ".weight")
    ending = {"gain": "weight"}.get(last, last)
    offset = names.gains_from if last == "gain" else 0.0
    if module in names.ends:
        return Place(f"{names.ends[module]}.{ending}", offset=offset)
    _, index, part = module.split(".", 2)
    own = names.parts[part]
    fused = part.removeprefix("attention.") in QUERY_KEY_VALUE and names.parts["attention.query"] == names.parts["attention.key"]
    return Place(
        f"{names.layers}.{index}.{own}.{ending}",
        names.transposed and last == "weight",
        QUERY_KEY_VALUE.index(part.removeprefix("attention.")) if fused else None,
        offset,
    )


def fused_rows(model: ModelSpec, architecture: str) -> tuple[int, tuple[int, int, int]]:
    """How a tensor of query, key and value has them: in how many groups, and rows of each in a group. GPT-2 has one group; the others one for each
    key-value head, with the query heads that share it."""
    groups = 1 if architecture == "gpt2" else model.num_key_value_heads
    return groups, (model.query_size // groups, model.key_value_size // groups, model.key_value_size // groups)


# config.json


def hf_config(model: ModelSpec) -> dict[str, object]:
    """The config.json that goes with the weights."""
    architecture = architecture_of(model)
    return {"tie_word_embeddings": model.tied_embeddings, "vocab_size": model.vocab_size, **_CONFIGS[architecture](model)}


def _sizes(model: ModelSpec) -> dict[str, object]:
    """The keys that most architectures share."""
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_sequence_length,
    }


def _factor(model: ModelSpec) -> float:
    """The turned part of a head; transformers cuts factor · head_dim to an integer."""
    factor = model.rotary_size / model.head_dim
    return factor if int(model.head_dim * factor) == model.rotary_size else math.nextafter(factor, 1.0)


def _rope(model: ModelSpec) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": _factor(model)} | _scaling(model)


def _scaling(model: ModelSpec) -> dict[str, object]:
    scaling = model.rope_scaling
    return {} if scaling is UNSET else {"rope_type": scaling.rope_type} | {name: getattr(scaling, name) for name in ROPE_SCALINGS[scaling.rope_type]}


_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "silu": "silu", "relu": "relu"}


def _gpt2(model: ModelSpec) -> dict[str, object]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_positions": model.num_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new",
    }


def _bloom(model: ModelSpec) -> dict[str, object]:
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "n_layer": model.num_layers,
        "hidden_size": model.hidden_size,
        "n_head": model.num_attention_heads,
        "seq_length": model.max_sequence_length,
        "layer_norm_epsilon": model.norm_epsilon,
    }


def _gpt_neox(model: ModelSpec) -> dict[str, object]:
    return _sizes(model) | {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": _ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.parallel_block,
        "attention_bias": model.qkv_bias,
        "rotary_pct": _factor(model),
        "rotary_emb_base": model.rope_theta,
        "rope_parameters": _rope(model),
    }


def _gptj(model: ModelSpec) -> dict[str, object]:
    return {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "n_positions": model.max_sequence_length,
        "rotary_dim": model.rotary_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
    }


def _phi(model: ModelSpec) -> dict[str, object]:
    return _sizes(model) | {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "gelu_new",
        "layer_norm_eps": model.norm_epsilon,
        "partial_rotary_factor": _factor(model),
        "rope_theta": model.rope_theta,
        "rope_parameters": _rope(model),
    }


def _falcon(model: ModelSpec) -> dict[str, object]:
    return _sizes(model) | {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "num_kv_heads": model.num_key_value_heads,
        "multi_query": model.num_key_value_heads == 1,
        "new_decoder_architecture": architecture_of(model) == "falcon-new",
        "parallel_attn": model.parallel_block,
        "alibi": False,
        "bias": model.mlp_bias,
        "ffn_hidden_size": model.ffn_hidden_size,
        "activation": _ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_parameters": _rope(model),
    }


def _mistral(model: ModelSpec) -> dict[str, object]:
    window = None if model.sliding_window is UNSET else model.sliding_window
    return _llama(model) | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _gemma(model: ModelSpec) -> dict[str, object]:
    return _llama(model) | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}


def _gemma2(model: ModelSpec) -> dict[str, object]:
    def given(value: float | UnsetType) -> float | None:
        return None if value is UNSET else value

    every = model.full_attention_every
    kinds = [
        "sliding_attention" if model.sliding_window is not UNSET and (every is UNSET or (index + 1) % every) else "full_attention"
        for index in range(model.num_layers)
    ]
    return _llama(model) | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(model.scores_scale**-2),
        "attn_logit_softcapping": given(model.attention_softcap),
        "final_logit_softcapping": given(model.head_softcap),
        "sliding_window": given(model.sliding_window),
        "layer_types": kinds,
    }


def _llama(model: ModelSpec) -> dict[str, object]:
    kind = "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias and not model.attention_output_bias else "llama"
    return _sizes(model) | {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "intermediate_size": model.ffn_hidden_size,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": model.qkv_bias,
        "rope_scaling": _scaling(model) or None,
    }


_CONFIGS: dict[str, Callable[[ModelSpec], dict[str, object]]] = {
    "gpt2": _gpt2, "bloom": _bloom, "gpt_neox": _gpt_neox, "gptj": _gptj, "phi": _phi, "falcon": _falcon, "falcon-in-turn": _falcon,
    "falcon-new": _falcon, "llama": _llama, "qwen3": _llama, "mistral": _mistral, "gemma": _gemma, "gemma2": _gemma2,
}  # fmt: skip
