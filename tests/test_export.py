"""Each target's output is parsed back, and every decision of the plan is looked for in it."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from plans import make_plan

import planner.model as models
from planner.documents import convert
from planner.errors import InputError
from planner.export import TARGETS, export
from planner.export.common import yaml_text
from planner.export.megatron import pipeline_layout
from planner.export.nanotron import nanotron_blocks
from planner.model import load_model
from planner.plan import SCHEMA, Plan

EVIL = "evil\"; touch $(HOME)/x; `id` 'quote' </script>\n#SBATCH --exclusive\n- key: !!python/object {brace} é\u2028"


def llama(**changes: Any) -> models.ModelSpec:
    return models.replace(load_model("llama-2-7b"), **changes)


def words(script: str) -> list[str]:
    """The words of a script's torchrun or accelerate command, as a shell splits them."""
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    start = re.search(r"^(torchrun|accelerate) ", script, re.M)
    assert start
    return shlex.split(script[start.start() :].replace("\\\n", " "))


def options(script: str) -> dict[str, str | None]:
    """The options of that command with their values (None for a flag that stands alone)."""
    found: dict[str, str | None] = {}
    parts = words(script)
    for index, word in enumerate(parts):
        if word.startswith("--"):
            following = parts[index + 1] if index + 1 < len(parts) else "--"
            found[word] = None if following.startswith("--") or following == "$@" else following
    return found


def unrolled(layout: str) -> list[str]:
    """Megatron's layout notation, its multiplications written out, as stages."""
    return re.sub(r"(.)\*(\d+)", lambda match: match[1] * int(match[2]), layout).split("|")


def notes(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("# NOTE:"))


def test_unknown_target_is_an_input_error_that_lists_the_targets():
    with pytest.raises(InputError, match="megatron, torchtitan, deepspeed, nanotron, accelerate, torchrun, slurm, kubernetes"):
        export(make_plan(), "tensorflow")


def test_megatron_has_every_decision():
    plan = make_plan(
        "gpt3", tp=8, pp=4, dp=4, micro=2, m=8, zero_stage=1, sequence_parallel=True, recompute="selective", sizes=(22, 26, 26, 24),
    )  # fmt: skip
    found = options(export(plan, "megatron")["megatron.sh"])
    expected = {
        "--tensor-model-parallel-size": "8", "--pipeline-model-parallel-size": "4", "--micro-batch-size": "2", "--global-batch-size": "64",
        "--seq-length": "2048", "--num-layers": "96", "--hidden-size": "12288", "--ffn-hidden-size": "49152", "--num-attention-heads": "96",
        "--recompute-granularity": "selective", "--recompute-modules": "layernorm", "--position-embedding-type": "learned_absolute",
        "--normalization": "LayerNorm", "--vocab-size": "50257", "--nnodes": "16", "--nproc-per-node": "8", "--optimizer": "adam",
    }  # fmt: skip
    assert expected.items() <= found.items()
    for alone in ("--sequence-parallel", "--use-distributed-optimizer", "--bf16", "--grad-reduce-in-bf16"):
        assert found[alone] is None
    for absent in ("--untie-embeddings-and-output-weights", "--swiglu", "--disable-bias-linear", "--use-megatron-fsdp", "--use-tp-pp-dp-mapping"):
        assert absent not in found
    layout = found["--pipeline-model-parallel-layout"]
    assert layout and [len(stage) for stage in unrolled(layout)] == [22, 26, 26, 24]


def test_megatron_layout_has_every_layer_once_in_stage_order():
    plan = make_plan("gpt3", tp=8, pp=2, dp=1, m=4, schedule="Interleaved1F1B", virtual=2, sizes=(1, 50, 46, 1))
    stages = unrolled(pipeline_layout(plan))
    assert stages == ["E", "t" * 50, "t" * 46, "L"]
    assert pipeline_layout(make_plan("tiny-gpt", pp=3, sizes=(2, 1, 3))) == "Et|t|t*2L"


def test_megatron_llama_and_other_rank_order():
    plan = make_plan(
        models.replace(load_model("llama-3-8b"), tied_embeddings=False), tp=2, pp=2, dp=4, rank_order=("tp", "pp", "dp"), zero_stage=3,
        data_parallel_replicate=2,
    )  # fmt: skip
    text = export(plan, "megatron")["megatron.sh"]
    found = options(text)
    expected = {
        "--num-query-groups": "8", "--normalization": "RMSNorm", "--position-embedding-type": "rope", "--rotary-base": "500000",
        "--data-parallel-sharding-strategy": "optim_grads_params", "--ckpt-format": "fsdp_dtensor", "--num-distributed-optimizer-instances": "2",
    }  # fmt: skip
    assert expected.items() <= found.items()
    flags = {"--group-query-attention", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"}
    assert flags | {"--use-tp-pp-dp-mapping", "--use-megatron-fsdp"} <= set(found)
    assert "export CUDA_DEVICE_MAX_CONNECTIONS" not in text  # Megatron-FSDP refuses it


@pytest.mark.parametrize(
    ("recompute", "expected", "noted"),
    [
        (({"full": 2}, {"full": 2}), ("full", "uniform", "1"), False),
        (({"full": 1, "none": 1}, {"full": 1, "none": 1}), ("full", "block", "1"), False),
        (({"full": 1, "none": 1}, {"none": 2}), ("full", "block", "1"), True),
        (({"full": 1, "selective": 1}, {"full": 1, "none": 1}), ("full", "block", "2"), True),
        (("selective", "none"), ("selective", None, None), True),
        (("none", "none"), (None, None, None), False),
    ],
)
def test_megatron_never_recomputes_less_than_planned(recompute, expected, noted):
    text = export(make_plan("tiny-gpt", pp=2, sizes=(3, 3), recompute=recompute), "megatron")["megatron.sh"]
    found = options(text)
    assert tuple(found.get(f"--recompute-{name}") for name in ("granularity", "method", "num-layers")) == expected
    assert ("the plan recomputes" in notes(text)) == noted


@pytest.mark.parametrize(
    ("changes", "expected", "word"),
    [
        ({}, "--recompute-modules layernorm mlp ", "the whole MLP is recomputed"),
        ({"attention": "unfused"}, "--recompute-modules core_attn layernorm mlp ", "the whole MLP is recomputed"),
        ({"tp": 8, "sequence_parallel": True}, "--recompute-modules layernorm mlp ", "the whole MLP is recomputed"),
        ({"tp": 8}, "--recompute-granularity full", "in full"),
    ],
)
def test_selective_recomputation_keeps_no_more_in_megatron_than_planned(changes, expected, word):
    text = export(make_plan("gpt3", recompute="selective", **changes), "megatron")["megatron.sh"]
    assert expected in text and word in notes(text)


def test_selective_recomputation_of_megatrons_profile_is_its_own():
    plan = make_plan("gpt3", recompute="selective")
    inputs = models.replace(plan.inputs, training=models.replace(plan.inputs.training, profile="megatron"))
    text = export(models.replace(plan, inputs=inputs), "megatron")["megatron.sh"]
    assert "--recompute-modules core_attn " in text and "norms" not in notes(text)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"pp": 2, "schedule": "GPipe"}, "schedule"),
        ({"pp": 2, "schedule": "ZBVZeroBubble", "virtual": 2}, "schedule"),
        ({"pp": 2, "dp": 2, "rank_order": ("dp", "tp", "pp"), "tp": 2}, "rank_order"),
        ({"precision": "bf16"}, "precision"),
        ({"model": "bloom"}, "embedding_norm"),
        ({"model": "opt-1.3b"}, "activation"),
        ({"optimizer": "sgd", "dp": 2, "zero_stage": 1}, "optimizer: 'sgd' is not valid; .* zero_stage 1 needs"),
        ({"optimizer": "sgd", "dp": 2, "zero_stage": 3}, "optimizer: 'sgd' is not valid; .* zero_stage 3 needs"),
    ],
)
def test_megatron_refuses_by_name(changes, word):
    with pytest.raises(InputError, match=word):
        export(make_plan(**changes), "megatron")


@pytest.mark.parametrize("changes", [{"dp": 2}, {"zero_stage": 1}], ids=["no-zero", "one-rank"])
def test_megatron_keeps_no_momentum_that_the_plan_does_not_count(changes):
    found = options(export(make_plan(optimizer="sgd", **changes), "megatron")["megatron.sh"])
    assert found["--optimizer"] == "sgd" and found["--sgd-momentum"] == "0.0" and "--use-distributed-optimizer" not in found
    assert "--sgd-momentum" not in options(export(make_plan(**changes), "megatron")["megatron.sh"])


def titan(plan: Plan) -> tuple[dict[str, Any], str]:
    text = export(plan, "torchtitan")["meshwright_plan.py"]
    tree = ast.parse(text)
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    return values, text


def test_a_window_is_exported_where_it_shuts_nothing_out():
    for target in ("megatron", "torchtitan", "nanotron"):
        assert export(make_plan("mistral-7b-v0.1", sequence_length=4096), target)
        with pytest.raises(InputError, match=r"model\.sliding_window: 4096"):
            export(make_plan("mistral-7b-v0.1", sequence_length=4097), target)


def test_torchtitan_has_every_decision():
    plan = make_plan(
        llama(num_layers=6), tp=2, pp=2, dp=4, micro=2, m=8, schedule="Interleaved1F1B", virtual=2, zero_stage=3, sequence_parallel=True,
        recompute="full", sizes=(2, 1, 3, 2),
    )  # fmt: skip
    values, text = titan(plan)
    parallelism = values["PARALLELISM"]
    assert parallelism.pop("module_fqns_per_model_part") == [
        ["tok_embeddings", "layers.0"],
        ["layers.1"],
        ["layers.2", "layers.3", "layers.4"],
        ["layers.5", "norm", "lm_head"],
    ]
    assert parallelism == {
        "data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 4, "fsdp_reshard_after_forward": "always", "tensor_parallel_degree": 2,
        "enable_sequence_parallel": True, "pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B", "num_pp_microbatches": 8,
    }  # fmt: skip
    assert values["TRAINING"]["num_tokens_per_microbatch_per_dp_rank"] == 2 * 2048
    assert values["TRAINING"]["num_tokens_per_train_step"] == 4 * 2 * 8 * 2048
    assert values["TRAINING"]["disable_cuda_graphs"] is True
    assert values["ACTIVATION_CHECKPOINT"] == "full"
    assert values["MODEL"]["n_layers"] == 6 and values["MODEL"]["hidden_dim"] == 11008
    assert "NOTE: torchtitan has no ZeRO-1" not in text
    assert options(export(plan, "torchtitan")["torchtitan.sh"])["--module"] == "meshwright_plan"


@pytest.mark.parametrize(
    ("changes", "level"), [({}, "selective"), ({"tp": 4}, "selective"), ({"tp": 4, "sequence_parallel": True}, "full")]
)
def test_selective_recomputation_keeps_no_more_in_torchtitan_than_planned(changes, level):
    values, text = titan(make_plan(llama(), recompute="selective", **changes))
    assert values["ACTIVATION_CHECKPOINT"] == level and "every second matrix product" in notes(text)


def test_torchtitan_notes_and_refusals():
    _, text = titan(make_plan(llama(num_layers=4), pp=2, dp=2, zero_stage=1, sizes=(3, 3), recompute=({"full": 1, "none": 1}, "none")))
    assert "no ZeRO-1" in notes(text) and "the plan recomputes full 1, none 1 on stage 0; none 2 on stage 1" in notes(text)
    for plan, word in (
        (make_plan("tiny-gpt"), "norm"),
        (make_plan(llama(tied_embeddings=True), pp=2), "tied_embeddings"),
        (make_plan(llama(), pp=2, schedule="Naive"), "schedule"),
        (make_plan(llama(qkv_bias=True)), "qkv_bias"),
    ):
        with pytest.raises(InputError, match=word):
            export(plan, "torchtitan")


def test_scaled_rotary_positions_are_scaled_there_or_said_not_to_be():
    plan = make_plan("llama-3.2-3b")
    found = options(export(plan, "megatron")["megatron.sh"])
    assert "--use-rope-scaling" in found and found["--rope-scaling-factor"] == "32.0"
    values, _ = titan(plan)
    assert values["MODEL"]["rope_scaling"] == {
        "scaling": "llama", "scaling_factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert titan(make_plan(llama()))[0]["MODEL"]["rope_scaling"] == {"scaling": "none"}
    assert "rope_scaling" in notes(export(make_plan("llama-3.1-8b"), "nanotron")["nanotron.yaml"])
    linear = make_plan(llama(rope_scaling=models.RopeScaling(rope_type="linear", factor=2.0)))
    for target in ("megatron", "torchtitan"):
        with pytest.raises(InputError, match="rope_scaling"):
            export(linear, target)


def test_deepspeed_pipeline_has_the_cuts():
    plan = make_plan("gpt3", pp=4, dp=2, m=8, micro=2, zero_stage=1, recompute="full", sizes=(20, 26, 26, 26))
    files = export(plan, "deepspeed")
    config = json.loads(files["ds_config.json"])
    assert config["train_batch_size"] == 32 == config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2
    assert config["zero_optimization"] == {"stage": 1} and config["bf16"] == {"enabled": True}
    assert config["pipeline"] == {"activation_checkpoint_interval": 1}
    namespace = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(files["planned_pipeline.py"]).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert namespace["PARTS"] == [0, 20, 46, 72, 98]
    assert namespace["TOPOLOGY"] == {"num_pp": 4, "num_mp": 1, "num_dp": 2}


def test_deepspeed_without_a_pipeline_takes_any_zero_stage_and_tensor_parallelism():
    config = json.loads(export(make_plan("gpt3", tp=4, dp=2, zero_stage=3), "deepspeed")["ds_config.json"])
    assert config["zero_optimization"] == {"stage": 3} and config["tensor_parallel"] == {"autotp_size": 4}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"pp": 2, "dp": 2, "zero_stage": 2}, "ZeRO-2 and ZeRO-3 with pipeline parallelism"),
        ({"pp": 2, "dp": 2, "zero_stage": 3}, "ZeRO-2 and ZeRO-3 with pipeline parallelism"),
        ({"pp": 2, "schedule": "GPipe"}, "schedule"),
        ({"tp": 2, "sequence_parallel": True}, "sequence_parallel"),
        ({"dp": 4, "zero_stage": 3, "data_parallel_replicate": 2}, "data_parallel_replicate"),
    ],
)
def test_deepspeed_refuses_by_name(changes, word):
    with pytest.raises(InputError, match=word):
        export(make_plan(**changes), "deepspeed")


def test_nanotron_yaml_has_every_decision():
    plan = make_plan(llama(), tp=2, pp=4, dp=2, micro=2, m=8, zero_stage=1, sequence_parallel=True, recompute="full", schedule="GPipe")
    files = export(plan, "nanotron")
    config = yaml.safe_load(files["nanotron.yaml"])
    expected = {"dp": 2, "pp": 4, "tp": 2, "pp_engine": "afab", "tp_mode": "REDUCE_SCATTER", "recompute_layer": True}
    assert expected.items() <= config["parallelism"].items()
    assert config["tokens"] == {"sequence_length": 2048, "micro_batch_size": 2, "batch_accumulation_per_replica": 8, "train_steps": 100}
    assert config["optimizer"]["zero_stage"] == 1 and config["optimizer"]["optimizer_factory"]["adam_eps"] == 1e-8
    shape = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False}
    assert shape.items() <= config["model"]["model_config"].items()
    assert options(files["nanotron.sh"])["--config-file"] == "nanotron.yaml"


def test_nanotron_says_when_its_own_cuts_differ():
    assert sum(nanotron_blocks(llama(), 4)) == 32
    own = nanotron_blocks(llama(), 4)
    sizes = tuple(count + (index in (0, 3)) for index, count in enumerate(own))
    assert "cuts the pipeline itself" not in export(make_plan(llama(), pp=4, sizes=sizes), "nanotron")["nanotron.yaml"]
    assert "cuts the pipeline itself" in export(make_plan(llama(), pp=4, sizes=(5, 10, 10, 9)), "nanotron")["nanotron.yaml"]


@pytest.mark.parametrize(
    "changes",
    [{"model": "tiny-gpt"}, {"pp": 2, "schedule": "Naive"}, {"dp": 2, "zero_stage": 2}, {"dp": 4, "zero_stage": 1, "data_parallel_replicate": 2}],
)
def test_nanotron_refuses(changes):
    with pytest.raises(InputError, match="--to nanotron"):
        export(make_plan(**{"model": llama(), **changes}), "nanotron")


def test_accelerate_yaml_has_every_decision():
    plan = make_plan(llama(), "a100-80gb:16", tp=2, dp=8, micro=2, m=4, zero_stage=3, data_parallel_replicate=2, recompute="full")
    files = export(plan, "accelerate")
    config = yaml.safe_load(files["accelerate.yaml"])
    assert config["distributed_type"] == "FSDP" and config["mixed_precision"] == "bf16"
    assert (config["num_machines"], config["num_processes"]) == (2, 16)
    assert config["fsdp_config"]["fsdp_reshard_after_forward"] is True and config["fsdp_config"]["fsdp_activation_checkpointing"] is True
    assert config["parallelism_config"] == {
        "parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 4, "parallelism_config_tp_size": 2,
        "parallelism_config_cp_size": 1,
    }  # fmt: skip
    assert "export ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in files["accelerate.sh"]
    assert options(files["accelerate.sh"])["--config_file"] == "accelerate.yaml"
    plain = yaml.safe_load(export(make_plan("tiny-gpt", dp=2), "accelerate")["accelerate.yaml"])
    assert plain["distributed_type"] == "MULTI_GPU" and "parallelism_config" not in plain


@pytest.mark.parametrize("changes", [{"pp": 2}, {"tp": 2, "sequence_parallel": True}, {"tp": 2, "dp": 2, "zero_stage": 0}, {"precision": "bf16"}])
def test_accelerate_refuses(changes):
    with pytest.raises(InputError, match="--to accelerate"):
        export(make_plan(**changes), "accelerate")


@pytest.mark.parametrize("target", ["torchrun", "slurm", "kubernetes"])
def test_launchers_carry_the_plan_itself(target):
    plan = make_plan("tiny-gpt", tp=2, pp=2, dp=4, zero_stage=1)
    assert convert(json.loads(export(plan, target)["plan.json"]), Plan, "plan.json", SCHEMA) == plan


def test_torchrun_starts_all_processes():
    found = words(export(make_plan("tiny-gpt", tp=2, pp=2, dp=4), "torchrun")["torchrun.sh"])
    assert found[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
    assert found[-7:-1] == ["executor", "plan.json", "--steps", "${STEPS:-100}", "-o", "run.json"]
    assert words(export(make_plan("tiny-gpt", pp=2), "torchrun")["torchrun.sh"])[1:4] == ["--standalone", "--nproc-per-node", "2"]


def test_slurm_asks_for_the_nodes():
    text = export(make_plan("tiny-gpt", tp=2, pp=2, dp=4), "slurm")["job.sbatch"]
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.M))
    assert directives == {"job-name": "meshwright-tiny-gpt", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8"}
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    inner = shlex.split(text[text.index("srun ") :])
    assert inner[:3] == ["srun", "bash", "-c"]
    assert shlex.split(inner[3].replace("\\\n", " "))[:6] == ["exec", "torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
    assert "--gpus-per-node" not in export(make_plan("tiny-gpt", "cpu:2", pp=2), "slurm")["job.sbatch"]


def test_kubernetes_documents_parse_and_agree():
    plan = make_plan("tiny-gpt", tp=2, pp=2, dp=4)
    config, service, job = yaml.safe_load_all(export(plan, "kubernetes")["job.yaml"])
    name = config["metadata"]["name"]
    assert convert(json.loads(config["data"]["plan.json"]), Plan, "plan.json", SCHEMA) == plan
    pod = job["spec"]["template"]["spec"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    assert service["metadata"]["name"] == pod["subdomain"] == pod["volumes"][0]["configMap"]["name"] == name
    command = pod["containers"][0]["command"]
    assert command[command.index("--nnodes") + 1] == "2" and f"{name}-0.{name}" in command
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}


def test_gpus_that_leave_a_node_half_empty_are_refused():
    with pytest.raises(InputError, match="whole nodes of 8"):
        export(make_plan("tiny-gpt", pp=3, dp=4), "torchrun")


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_names_stay_inside_comments_and_strings(target):
    model = llama(name=EVIL, num_layers=4)
    files = export(make_plan(model, dp=2, zero_stage=2 if target not in ("nanotron",) else 1), target)
    for name, text in files.items():
        if name.endswith(".json"):
            json.loads(text)
        elif name.endswith(".py"):
            compile(text, name, "exec")
        elif name.endswith(".yaml"):
            assert all(isinstance(document, dict) for document in yaml.safe_load_all(text))
        else:
            assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
        code = [line for line in text.splitlines() if not line.lstrip().startswith(("#", '"name"')) and "touch $" in line]
        assert code == [], name
        assert text.count("#SBATCH --exclusive\n") == text.startswith("#!") * (name == "job.sbatch"), name


def test_yaml_writer_round_trips():
    value = {
        "a": [1, 2.5, 1e-8, -3e20, None, True, "x: y #", "", "line\u2028break"],
        "b": {"empty": [], "none": {}, "deep": [{"k": [[1], [2, 3]], "t": "two\nlines\n"}, {"z": "$(A)"}]},
        "odd key: [": "yes",
    }
    expected = json.loads(json.dumps(value))
    expected["a"][-1] = "line break"
    assert yaml.safe_load(yaml_text(value)) == expected
