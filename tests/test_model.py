import json
from pathlib import Path

import pytest

from planner.documents import builtins
from planner.errors import InputError
from planner.graph import layer_graph
from planner.model import RopeScaling, load_model, presets, read_hf_config, replace

EXACT = json.loads((Path(__file__).parent / "data" / "exact_parameters.json").read_text())


@pytest.mark.parametrize("name", EXACT)
def test_parameter_counts_are_exact(name: str) -> None:
    assert presets()[name].num_parameters == EXACT[name]


@pytest.mark.parametrize("name", list(presets()))
def test_the_layer_graph_holds_every_parameter_once(name: str) -> None:
    model = presets()[name]
    graph = layer_graph(model, 1024)
    assert sum(data["num_parameters"] for _, data in graph.nodes(data=True)) == model.num_parameters
    assert {data["layer"] for _, data in graph.nodes(data=True)} == set(range(model.num_layers + 2))


@pytest.mark.parametrize("name", [name for name, model in presets().items() if model.params_published])
def test_published_sizes_are_met(name: str) -> None:
    model = presets()[name]
    assert model.num_parameters == pytest.approx(model.params_published, rel=0.03)


def test_gpt3_is_the_large_one() -> None:
    assert load_model("gpt3").num_layers == 96
    assert load_model("GPT3") == load_model("gpt3-175b")


HF = {
    "gpt2": ({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}, "gpt2"),
    "llama": (
        {
            "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
        "llama-3-8b",
    ),
    "bloom": ({"model_type": "bloom", "n_layer": 70, "n_embed": 14336, "n_head": 112, "vocab_size": 250880}, "bloom-176b"),
    "opt": (
        {
            "model_type": "opt", "num_hidden_layers": 12, "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12,
            "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
        },
        "opt-125m",
    ),
    "qwen2": (
        {
            "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
        },
        "qwen2-7b",
    ),
    "gptj": (
        {"model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "n_positions": 2048, "vocab_size": 50400, "tie_word_embeddings": False},
        "gpt-j-6b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HF)
def test_hf_configs_give_the_same_count_as_the_presets(kind: str, tmp_path: Path) -> None:
    config, preset = HF[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(str(tmp_path)).num_parameters == presets()[preset].num_parameters


ROTARY = {
    "gptj": ({"rotary_dim": 64}, "gpt-j-6b"),
    "gpt_neox": (
        {
            "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240, "vocab_size": 50304,
            "rotary_pct": 0.25,
        },
        "pythia-2.8b",
    ),
    "phi": (
        {
            "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240, "vocab_size": 51200,
            "partial_rotary_factor": 0.4, "hidden_act": "gelu_new",
        },
        "phi-2",
    ),
    "falcon": ({"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024, "multi_query": True}, "falcon-7b"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTARY)
def test_the_turned_part_of_a_head_and_the_activation_are_read(kind: str, tmp_path: Path) -> None:
    config, preset = ROTARY[kind]
    (tmp_path / "config.json").write_text(json.dumps((HF[kind][0] if kind in HF else {"model_type": kind}) | config))
    read, known = load_model(str(tmp_path)), presets()[preset]
    assert replace(read, name=known.name, source=known.source, num_training_tokens=known.num_training_tokens) == replace(
        known, rope_theta=read.rope_theta
    )
    newer = {key: value for key, value in config.items() if key not in ("rotary_pct", "partial_rotary_factor")}
    factor = config.get("rotary_pct", config.get("partial_rotary_factor"))
    if factor is not None:
        newer = {"model_type": kind, **newer, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": factor}}
        (tmp_path / "config.json").write_text(json.dumps(newer))
        assert load_model(str(tmp_path)).rotary_size == known.rotary_size < known.head_dim


GEMMA2 = {
    "model_type": "gemma2", "num_hidden_layers": 46, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32, "vocab_size": 256000,
    "num_key_value_heads": 16, "head_dim": 128, "max_position_embeddings": 8192, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_what_gemma_2_does_to_scores_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA2))
    known = presets()["gemma-2-27b"]
    read = replace(read_hf_config(path), name=known.name, source=known.source)
    assert read == replace(known, attention_scale=read.attention_scale)
    assert read.scores_scale == pytest.approx(known.scores_scale) == pytest.approx(144**-0.5)
    off = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None, "query_pre_attn_scalar": 128}
    path.write_text(json.dumps(GEMMA2 | off))
    assert not {"attention_softcap", "head_softcap", "sliding_window", "attention_scale"} & set(builtins(read_hf_config(path)))
    path.write_text(json.dumps(GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"]}))
    with pytest.raises(InputError, match="layer_types"):
        read_hf_config(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.01}}, "rotary_dim"),
        ({"rotary_dim": 256}, "rotary_dim"),
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"hidden_act": "snake"}, "hidden_act"),
        ({"model_type": "mixtral"}, "model_type"),
        ({"num_hidden_layers": -96}, "num_hidden_layers"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": True}, "json: num_hidden_layers: True"),
        ({"num_hidden_layers": 10**9}, "json: num_hidden_layers: 1000000000"),
        ({"num_hidden_layers": None, "n_layer": 0}, "json: n_layer: 0"),
        ({"rms_norm_eps": -1}, "json: rms_norm_eps: -1"),
    ],
)
def test_a_wrong_config_is_refused_by_the_name_of_its_key(change: dict, named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HF["llama"][0] | change))
    with pytest.raises(InputError) as caught:
        read_hf_config(path)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"add_cross_attention": True}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("phi", {"qk_layernorm": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 2}),
    ],
)
def test_a_config_of_another_computation_is_refused(kind: str, change: dict, tmp_path: Path) -> None:
    path, sizes = tmp_path / "config.json", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    usual = {key: not value if isinstance(value, bool) else value for key, value in change.items()} | {"layer_types": None, "max_window_layers": 2}
    path.write_text(json.dumps(sizes | {"model_type": kind} | usual))
    assert read_hf_config(path).num_layers == 2
    path.write_text(json.dumps(sizes | {"model_type": kind} | usual | change))
    with pytest.raises(InputError, match=f"json: {next(iter(change))}"):
        read_hf_config(path)


def test_an_unknown_model_is_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean"):
        load_model("llama-2-70bb")


def test_scaling_of_rotary_positions_is_read_from_either_key_and_planned_whatever_it_is(tmp_path: Path) -> None:
    path, config = tmp_path / "config.json", HF["llama"][0]
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    for key, theta in (("rope_scaling", {}), ("rope_parameters", {"rope_theta": 500000.0})):
        path.write_text(json.dumps(config | {"rope_theta": 500000.0, key: llama3 | theta}))
        assert read_hf_config(path).rope_scaling == load_model("llama-3.1-8b").rope_scaling
    for kind in ("yarn", "dynamic", "longrope"):
        path.write_text(json.dumps(config | {"rope_scaling": {"type": kind, "factor": 4.0, "short_factor": [1.0]}}))
        assert read_hf_config(path).rope_scaling == RopeScaling(rope_type=kind, factor=4.0)
    for scaling in (None, {"rope_type": "default", "rope_theta": 500000.0}):
        path.write_text(json.dumps(config | {"rope_scaling": scaling}))
        assert "rope_scaling" not in builtins(read_hf_config(path))


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ("linear", "rope_scaling"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "original_max_position_embeddings: None"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192},
            "high_freq_factor",
        ),
    ],
)
def test_unusable_scaling_of_rotary_positions_is_named(scaling: object, word: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HF["llama"][0] | {"rope_scaling": scaling}))
    with pytest.raises(InputError, match=word):
        read_hf_config(path)
