"""The model to train: its shape, its exact parameter counts, and its presets (`planner.hf_config` reads HF `config.json` files).

Symbols used throughout the planner: L layers, h hidden size, f feed-forward size, a attention heads, k key-value
heads, d head size, V vocabulary, s sequence length, b micro-batch size, t tensor-parallel degree.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from planner.documents import Document, convert
from planner.errors import InputError
from planner.hf_config import ROPE_SCALINGS as ROPE_SCALINGS
from planner.hf_config import by_its_key, config_fields, read_config
from planner.traced import is_reference
from planner.values import COUNT, POSITIVE, check_values, count_up_to

PositionEmbedding = Literal["learned", "rope", "alibi"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_erf", "silu", "relu"]
"""gelu is its approximation by tanh (GPT-2), gelu_erf the exact one (GPT-NeoX, Falcon)."""


class RopeScaling(Document, frozen=True, kw_only=True):
    """How rotary positions are stretched beyond the length of pre-training, in Hugging Face's words. Planning does not depend on it."""

    RULES = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), POSITIVE)

    rope_type: str
    """linear: all angles divided by `factor`; llama3: those of slow elements (Llama 3.1). Of others only the name and the factor are kept."""
    factor: float = 1.0
    low_freq_factor: float | msgspec.UnsetType = msgspec.UNSET
    """llama3: elements that turn fewer times than this in the original length are divided by the whole factor."""
    high_freq_factor: float | msgspec.UnsetType = msgspec.UNSET
    """llama3: those that turn more often than this are left; in between, in proportion."""
    original_max_position_embeddings: int | msgspec.UnsetType = msgspec.UNSET


class ModelSpec(Document, frozen=True, kw_only=True):
    """A decoder-only transformer by its shape. Sizes are counts of elements; nothing here depends on a cluster."""

    RULES = {
        "num_layers": count_up_to(10_000), "hidden_size": COUNT, "ffn_hidden_size": COUNT, "num_attention_heads": COUNT,
        "num_key_value_heads": COUNT, "head_dim": COUNT, "vocab_size": COUNT, "max_sequence_length": COUNT, "rope_theta": POSITIVE,
        "params_published": POSITIVE, "num_training_tokens": POSITIVE, "attention_scale": POSITIVE, "attention_softcap": POSITIVE,
        "head_softcap": POSITIVE, "sliding_window": COUNT, "full_attention_every": COUNT,
    }  # fmt: skip

    name: str
    num_layers: int
    """Transformer blocks, embedding and head not counted."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_sequence_length: int
    position_embedding: PositionEmbedding = "learned"
    num_position_embeddings: int = 0
    """Rows of the learned position table; 0 unless `position_embedding` is learned."""
    norm: Norm = "layernorm"
    num_norms_per_layer: int = 2
    activation: Activation = "gelu"
    gated_ffn: bool = False
    """Whether the MLP has a gate projection beside the up projection (SwiGLU, GeGLU)."""
    qkv_bias: bool = True
    attention_output_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    qk_norm: bool = False
    embedding_norm: bool = False
    final_norm: bool = True
    parallel_block: bool = False
    """Whether attention and MLP read the same input and are added together (GPT-J, GPT-NeoX, Falcon)."""
    tied_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    family: str = "gpt"
    params_published: float | None = None
    num_training_tokens: float | None = None
    """Tokens that the published model was trained on, where its paper says so."""
    source: str = ""

    # Fields that came later. Unset, they are in no document, so that plans made before keep their hash.
    rotary_dim: int | msgspec.UnsetType = msgspec.UNSET
    """Elements of each query and key head that rotary positions turn, the first ones; unset, all."""
    rotary_neighbours: bool | msgspec.UnsetType = msgspec.UNSET
    """Whether rotary positions turn elements 2i and 2i + 1 against each other (GPT-J), instead of i and i + rotary size / 2."""
    embedding_scaled: bool | msgspec.UnsetType = msgspec.UNSET
    """Whether token rows are multiplied by sqrt(h) (Gemma)."""
    attention_scale: float | msgspec.UnsetType = msgspec.UNSET
    """What scores are multiplied by; unset, 1 / sqrt(D)."""
    attention_softcap: float | msgspec.UnsetType = msgspec.UNSET
    """c of c·tanh(score / c), which attention's scores go through before their softmax (Gemma 2); unset, they do not."""
    head_softcap: float | msgspec.UnsetType = msgspec.UNSET
    """The same for the logits."""
    sliding_window: int | msgspec.UnsetType = msgspec.UNSET
    """Tokens that each one attends to, itself included; unset, all before it."""
    full_attention_every: int | msgspec.UnsetType = msgspec.UNSET
    """n where blocks n, 2n, ... (counted from 1) have no window (Gemma 2: 2); unset, all have it."""
    rope_scaling: RopeScaling | msgspec.UnsetType = msgspec.UNSET
    """Unset, rotary positions are not scaled."""

    @property
    def scores_scale(self) -> float:
        """What scores are multiplied by."""
        return 1.0 / math.sqrt(self.head_dim) if self.attention_scale is msgspec.UNSET else self.attention_scale

    def window_of(self, block: int, sequence_length: int) -> int | None:
        """Tokens that each one of block `block` (from 0) attends to; None where a window of a sequence of this length shuts nothing out."""
        window, every = self.sliding_window, self.full_attention_every
        if window is msgspec.UNSET or window >= sequence_length or (every is not msgspec.UNSET and (block + 1) % every == 0):
            return None
        return window

    @property
    def rotary_size(self) -> int:
        """Elements of each query and key head that rotary positions turn; 0 with other positions."""
        if self.position_embedding != "rope":
            return 0
        return self.head_dim if self.rotary_dim is msgspec.UNSET else self.rotary_dim

    @property
    def query_size(self) -> int:
        """a·d: elements of all query heads of one token."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """k·d: elements of all key heads of one token."""
        return self.num_key_value_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm: gain, and bias for LayerNorm."""
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    @property
    def attention_parameters(self) -> int:
        """Parameters of one block's attention: h·(a·d + 2·k·d) + a·d·h, with biases and query/key norms where used."""
        qkv = self.query_size + 2 * self.key_value_size
        count = self.hidden_size * qkv + self.query_size * self.hidden_size
        count += qkv if self.qkv_bias else 0
        count += self.hidden_size if self.attention_output_bias else 0
        return count + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one block's MLP: (2 or 3)·h·f, with biases where used."""
        ups = 2 if self.gated_ffn else 1
        count = (ups + 1) * self.hidden_size * self.ffn_hidden_size
        return count + (ups * self.ffn_hidden_size + self.hidden_size if self.mlp_bias else 0)

    @property
    def block_parameters(self) -> int:
        """Parameters of one transformer block with its norms."""
        return self.attention_parameters + self.mlp_parameters + self.num_norms_per_layer * self.norm_parameters

    @property
    def token_embedding_parameters(self) -> int:
        """V·h."""
        return self.vocab_size * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the first layer: token table, position table, embedding norm."""
        count = self.token_embedding_parameters + self.num_position_embeddings * self.hidden_size
        return count + (self.norm_parameters if self.embedding_norm else 0)

    @property
    def head_parameters(self) -> int:
        """Parameters of the last layer: final norm, and the output projection unless it is the token table itself."""
        count = self.norm_parameters if self.final_norm else 0
        count += 0 if self.tied_embeddings else self.token_embedding_parameters
        return count + (self.vocab_size if self.head_bias else 0)

    @property
    def num_parameters(self) -> int:
        """Exact count of trained parameters, a tied table counted once."""
        return self.embedding_parameters + self.num_layers * self.block_parameters + self.head_parameters


def validate(model: ModelSpec, where: str = "--model") -> ModelSpec:
    """`model` itself, when its numbers can be those of a transformer. Raises InputError that names the field."""
    check_values(model, where)
    if model.num_attention_heads % model.num_key_value_heads:
        raise InputError(
            f"{where}: num_key_value_heads",
            model.num_key_value_heads,
            f"a divisor of num_attention_heads ({model.num_attention_heads}) is expected",
        )
    if (model.position_embedding == "learned") != (model.num_position_embeddings > 0):
        raise InputError(
            f"{where}: num_position_embeddings",
            model.num_position_embeddings,
            "more than 0 with learned positions, 0 with any other",
        )
    if model.rotary_dim is not msgspec.UNSET and (model.position_embedding != "rope" or not 0 < model.rotary_dim <= model.head_dim):
        raise InputError(f"{where}: rotary_dim", model.rotary_dim, f"1 to head_dim ({model.head_dim}), and that with rotary positions only")
    if model.rope_scaling is not msgspec.UNSET:
        _validate_scaling(model, model.rope_scaling, f"{where}: rope_scaling")
    if model.sliding_window is not msgspec.UNSET and model.position_embedding == "alibi":
        raise InputError(f"{where}: sliding_window", model.sliding_window, "a window is for other positions than alibi")
    if model.rotary_size % 2:
        field = "head_dim" if model.rotary_dim is msgspec.UNSET else "rotary_dim"
        raise InputError(f"{where}: {field}", model.rotary_size, "rotary positions need an even number")
    return model


def _validate_scaling(model: ModelSpec, scaling: RopeScaling, where: str) -> None:
    if model.position_embedding != "rope":
        raise InputError(where, scaling.rope_type, f"scaling is for rotary positions, not {model.position_embedding}")
    for name in ROPE_SCALINGS.get(scaling.rope_type, ()):
        value = getattr(scaling, name)
        if value is msgspec.UNSET:
            raise InputError(f"{where}.{name}", None, f"a number above 0 is expected with {scaling.rope_type}")
    if scaling.rope_type == "llama3" and not scaling.low_freq_factor < scaling.high_freq_factor:  # type: ignore[operator]
        raise InputError(f"{where}.high_freq_factor", scaling.high_freq_factor, f"more than low_freq_factor ({scaling.low_freq_factor}) is expected")


@functools.cache
def presets() -> dict[str, ModelSpec]:
    """All presets by name, in the order of their files."""
    found: dict[str, ModelSpec] = {}
    folder = resources.files("planner") / "presets" / "models"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            for item in json.loads(entry.read_text(encoding="utf-8")):
                spec = convert(item, ModelSpec, entry.name)
                found[spec.name] = spec
    return found


ALIASES = {"gpt3": "gpt3-175b", "bloom": "bloom-176b", "llama2-7b": "llama-2-7b", "llama3-8b": "llama-3-8b"}


def load_model(text: str, where: str = "--model") -> ModelSpec:
    """The model that `text` names: a preset, or an HF `config.json` file, or a folder that holds one.

    Raises InputError when there is no such model, or when its architecture can't be planned.
    """
    if is_reference(text):
        raise InputError(where, text, "a traced module can be estimated and solved; here a preset or an HF config.json is expected")
    path = Path(text)
    if os.path.isdir(path):
        return read_hf_config(path / "config.json", where)
    if path.suffix == ".json" or os.path.isfile(path):
        return read_hf_config(path, where)
    name = text.lower()
    name = ALIASES.get(name, name)
    known = presets()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, [*known, *ALIASES], n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise InputError(where, text, f"{hint}`plan models` lists the presets; an HF config.json or a folder with one works too")


def read_hf_config(path: Path, where: str = "--model") -> ModelSpec:
    """The model that an HF `config.json` describes. Raises InputError naming the key that is missing or unusable."""
    config = read_config(path, where)
    try:
        return validate(convert(config_fields(config, path), ModelSpec, str(path)), str(path))
    except InputError as error:
        raise by_its_key(error, config, path) from None


_SAID_OF_IT = frozenset({"name", "family", "source", "params_published", "num_training_tokens", "max_sequence_length"})
"""Fields that no computation depends on."""


def _computed(model: ModelSpec) -> dict[str, object]:
    """What a model computes, by field; the same for an unset field and for the value that it stands for."""
    values = {name: getattr(model, name) for name in model.__struct_fields__ if name not in _SAID_OF_IT}
    values |= {"rotary_dim": model.rotary_size, "attention_scale": round(model.scores_scale, 9)}
    values |= {name: values[name] is True for name in ("rotary_neighbours", "embedding_scaled")}
    if model.position_embedding != "rope":
        del values["rope_theta"]
    if model.sliding_window is msgspec.UNSET:
        del values["full_attention_every"]
    return {name: None if value is msgspec.UNSET else value for name, value in values.items()}


def first_difference(model: ModelSpec, other: ModelSpec) -> tuple[str, object, object] | None:
    """The first field in which two models compute something else, with both values; None where they compute the same. What is only said of a model
    (its name, family, source, longest sequence) does not count."""
    mine, its = _computed(model), _computed(other)
    return next(((name, mine[name], its.get(name)) for name in mine if mine[name] != its.get(name)), None)


def replace(model: ModelSpec, **changes: Any) -> ModelSpec:
    """A copy of `model` with some fields changed."""
    return msgspec.structs.replace(model, **changes)
