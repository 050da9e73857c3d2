"""Logits of transformers' models equal ours after loading their weights, and exported weights load into transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from plans import make_plan

from planner.model import RopeScaling, load_model, read_hf_config, replace

torch = pytest.importorskip("torch", reason="the executor needs torch")
transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")

from safetensors.torch import save_file  # noqa: E402

from executor.hf_names import architecture_of, hf_config, place_of  # noqa: E402
from executor.huggingface import reader, to_huggingface  # noqa: E402
from executor.mesh import make_mesh  # noqa: E402
from executor.model import check_model  # noqa: E402
from executor.train import RunOptions, Trainer  # noqa: E402
from planner.errors import InputError  # noqa: E402

LENGTH = 24


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=131, n_positions=32, n_embd=48, n_layer=3, n_head=4, initializer_range=0.1)
    return transformers.GPT2LMHeadModel(config)


def llama(**changes: Any) -> Any:
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=131, max_position_embeddings=32, initializer_range=0.1, **sizes, **changes)
    return transformers.LlamaForCausalLM(config)


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=131, seq_length=32, hidden_size=48, n_layer=3, n_head=6, initializer_range=0.1)
    return transformers.BloomForCausalLM(config)


SIZES = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.1}


def neox(**changes: Any) -> Any:
    """Pythia's blocks."""
    config = transformers.GPTNeoXConfig(vocab_size=131, intermediate_size=96, **SIZES | {"num_attention_heads": 3} | changes)
    return transformers.GPTNeoXForCausalLM(config)


def gptj() -> Any:
    config = transformers.GPTJConfig(
        vocab_size=131, n_positions=32, n_embd=48, n_layer=3, n_head=4, rotary_dim=8, initializer_range=0.1, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPTJForCausalLM(config)


def phi() -> Any:
    return transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=131, intermediate_size=96, num_key_value_heads=2, **SIZES))


def falcon(**changes: Any) -> Any:
    """Falcon 7B's blocks: one key-value head, one norm."""
    return transformers.FalconForCausalLM(transformers.FalconConfig(vocab_size=131, **SIZES | changes))


def qwen3() -> Any:
    config = transformers.Qwen3Config(vocab_size=131, intermediate_size=80, num_key_value_heads=2, head_dim=16, **SIZES)
    return transformers.Qwen3ForCausalLM(config)


def mistral() -> Any:
    """With a window shorter than the sequence."""
    config = transformers.MistralConfig(vocab_size=131, intermediate_size=80, num_key_value_heads=2, sliding_window=7, **SIZES)
    return transformers.MistralForCausalLM(config)


def gemma() -> Any:
    config = transformers.GemmaConfig(vocab_size=131, intermediate_size=80, num_key_value_heads=1, head_dim=16, **SIZES)
    return transformers.GemmaForCausalLM(config)


def gemma2(**changes: Any) -> Any:
    """Caps so low that they matter, and a window shorter than the sequence on blocks 1 and 3."""
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 0.8}
    config = transformers.Gemma2Config(vocab_size=131, intermediate_size=80, final_logit_softcapping=3.0, **SIZES | sizes | changes)
    return transformers.Gemma2ForCausalLM(config)


# of the six frequencies the first stays, the second becomes a mean, and the others are divided
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "gpt2": gpt2,
    "bloom": bloom,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-scaled-llama3": lambda: llama(rope_parameters=LLAMA3),
    "llama-scaled-linear": lambda: llama(rope_parameters=LINEAR),
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma2-fused": lambda: gemma2(attn_logit_softcapping=None, sliding_window=64),
    "gpt_neox": neox,
    "gpt_neox-in-turn": lambda: neox(use_parallel_residual=False, rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    "gpt_neox-scaled-linear": lambda: neox(rope_parameters=LINEAR | {"partial_rotary_factor": 0.25}),
    "gptj": gptj,
    "phi": phi,
    "falcon-7b": falcon,
    "falcon-40b": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-biases": lambda: falcon(bias=True, multi_query=False, parallel_attn=False),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Trainer, Path]:
    """A randomly initialised transformers model, and ours with its weights."""
    torch.manual_seed(5)
    theirs = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # so that biases and gains count too
    theirs.save_pretrained(tmp_path)
    spec = read_hf_config(tmp_path / "config.json")
    attention = "fused" if spec.attention_softcap is msgspec.UNSET else "unfused"
    plan = make_plan(spec, "cpu:1", micro=2, m=1, sequence_length=LENGTH, precision="fp32", attention=attention)
    mesh = make_mesh(plan.decisions, 0)
    return theirs, Trainer(plan, mesh, RunOptions(), torch.device("cpu"), load_from=str(tmp_path)), tmp_path


def test_logits_equal_those_of_transformers(pair: tuple[Any, Trainer, Path]) -> None:
    theirs, ours, _ = pair
    tokens = torch.randint(0, 131, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = ours.logits(tokens.reshape(-1)).view(2, LENGTH, -1)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_gradients_equal_those_of_transformers(pair: tuple[Any, Trainer, Path], split: bool) -> None:
    theirs, ours, _ = pair
    # token 0 is padding for Gemma, whose row transformers gives no gradient
    tokens, targets = torch.randint(1, 131, (2, 2, LENGTH), generator=torch.Generator().manual_seed(3))
    torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    ours.compute.tokens, ours.compute.targets = tokens.view(1, -1), targets.view(1, -1)
    ours.compute.forward(0, 0, None)
    ours.compute.backward(0, 0, None, split)
    if split:
        ours.compute.weights(0, 0)
    model = ours.plan.inputs.model
    architecture, values = architecture_of(model), {}
    for unit in ours.units:
        for piece, offset in unit.layout.pieces():
            gradient = unit.grads[offset : offset + piece.numel].view(piece.shape)
            values[piece.name] = gradient + place_of(architecture, piece.name).offset
    found, expected = to_huggingface(model, lambda piece: values[piece.name]), dict(theirs.named_parameters())
    assert set(found) == set(expected)
    for name, gradient in found.items():
        wanted = expected[name].grad
        assert (gradient - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6, name


def test_exported_weights_are_the_loaded_ones_and_load_into_transformers(pair: tuple[Any, Trainer, Path], tmp_path: Path) -> None:
    theirs, ours, _ = pair
    values = {}
    for unit in ours.units:
        for piece, offset in unit.layout.pieces():
            values[piece.name] = unit.weights[offset : offset + piece.numel].view(piece.shape)
    model = ours.plan.inputs.model
    exported = to_huggingface(model, lambda piece: values[piece.name])
    state = theirs.state_dict()
    assert set(exported) | {"lm_head.weight"} == set(state)
    for name, tensor in exported.items():
        # Gemma's gains are stored less 1
        assert (tensor - state[name]).abs().max() <= (2e-7 if model.family.startswith("gemma") else 0), name
    save_file(exported, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 131, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = (again(tokens).logits - theirs(tokens).logits).abs().max()
    assert difference <= (1e-5 if model.family.startswith("gemma") else 0)


def test_weights_of_another_model_are_refused(pair: tuple[Any, Trainer, Path]) -> None:
    _, ours, folder = pair
    other = replace(ours.plan.inputs.model, hidden_size=64, num_attention_heads=4, head_dim=16, num_key_value_heads=4)
    attention = ours.plan.inputs.training.attention
    plan = make_plan(other, "cpu:1", micro=2, m=1, sequence_length=LENGTH, precision="fp32", attention=attention)
    for said in (rf"--load: {folder}/config\.json: hidden_size: 48 is not valid; the plan's model has 64", "has shape"):
        with pytest.raises(InputError, match=said):
            Trainer(plan, make_mesh(plan.decisions, 0), RunOptions(), torch.device("cpu"), load_from=str(folder))
        (folder / "config.json").unlink(missing_ok=True)


def test_weights_that_fit_by_their_shapes_alone_are_refused(tmp_path: Path) -> None:
    """More layers, as many heads of half the size, or a head of its own."""
    spec = replace(load_model("tiny-llama"), tied_embeddings=True)
    weights = to_huggingface(spec, lambda piece: torch.zeros(piece.shape))
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file(weights, path)
    config.write_text(json.dumps(hf_config(spec)))
    reader(spec, str(tmp_path))
    heads = {"num_attention_heads": 2 * spec.num_attention_heads, "num_key_value_heads": 2 * spec.num_key_value_heads}
    config.write_text(json.dumps(hf_config(replace(spec, head_dim=spec.head_dim // 2, **heads))))
    for name in (tmp_path, path):
        with pytest.raises(InputError, match=f"num_attention_heads: {heads['num_attention_heads']} is not valid; the plan's model has"):
            reader(spec, str(name))
    config.unlink()
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, path)
    with pytest.raises(InputError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        reader(spec, str(tmp_path))
    deeper = replace(spec, num_layers=spec.num_layers + 2)
    save_file(to_huggingface(deeper, lambda piece: torch.zeros(piece.shape)), path)
    with pytest.raises(InputError, match=rf"no parameter for the tensor model\.layers\.{spec.num_layers}\.\S+ there \(nor 17 more\)"):
        reader(spec, str(tmp_path))


def test_weights_of_a_model_that_has_no_names_there_are_refused_by_what_differs() -> None:
    spec = replace(load_model("pythia-70m"), head_bias=True)
    with pytest.raises(InputError, match=r"head_bias: True is not valid; Hugging Face's gpt_neox has False"):
        architecture_of(spec)
    with pytest.raises(InputError, match="family"):
        architecture_of(load_model("opt-125m"))


def test_scaling_of_positions_that_the_executor_does_not_know_is_refused_by_name() -> None:
    spec = replace(load_model("llama-3.2-1b"), num_layers=1, vocab_size=64, rope_scaling=RopeScaling(rope_type="yarn"))
    with pytest.raises(InputError, match=r"rope_scaling.rope_type: 'yarn' is not valid; the executor scales rotary positions by linear or llama3"):
        check_model(spec, 1)
    with pytest.raises(InputError, match="rope_scaling"):
        architecture_of(replace(load_model("gpt-j-6b"), rope_scaling=RopeScaling(rope_type="linear", factor=2.0)))


def test_soft_capped_scores_need_unfused_attention() -> None:
    plan = make_plan(replace(load_model("gemma-2-2b"), num_layers=1, vocab_size=64), "cpu:1", sequence_length=LENGTH)
    with pytest.raises(InputError, match=r"training.attention.*unfused is expected"):
        Trainer(plan, make_mesh(plan.decisions, 0), RunOptions(), torch.device("meta"), initialise=False)
