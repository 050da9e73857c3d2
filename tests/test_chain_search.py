"""Plans of traced modules: optimal against full enumeration, the document, and the commands."""

import itertools
import json
import math
import random
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from planner.candidates import Constraints
from planner.chain_bounds import ChainBound
from planner.chain_costs import LEVELS, ChainCosts, counts_of, predict_timeline, step_seconds
from planner.chain_plan import ChainInputs, chain_stage, check_chain, load_any_plan, recomputed
from planner.chain_search import _least_excess, candidates, even_split, search_chain
from planner.cli import plan as cli
from planner.cluster import compute_efficiency, load_cluster
from planner.critical_path import graph
from planner.defaults import Fixed
from planner.documents import dumps
from planner.errors import DoesNotFitError, InputError
from planner.pipeline import excess_bytes, stage_seconds
from planner.plan import Decisions, Training, load_plan, replace, stage_ranks
from planner.traced import LayerCost, Operation, TracedLayer, TracedModel

ROOT = Path(__file__).parent.parent


def operation(rng, scale):
    flops = 0.0 if rng.random() < 0.3 else scale * rng.uniform(1e9, 8e10)
    return Operation(kind="matmul", num_calls=rng.randint(1, 3), flops=(0.0, flops), moved_bytes=(rng.uniform(0, 1e7), rng.uniform(1e6, 1e8)))


def random_model(seed, layers=5):
    """Layers that all differ, with figures of the size of a small network's."""
    rng = random.Random(seed)
    costs, received = [], (0.0, 1e6)
    for _ in range(layers):
        sent = (0.0, rng.choice([1e5, 4e6, 6e7]))
        costs.append(
            LayerCost(
                num_parameters=rng.randint(10**5, 3 * 10**7),
                num_shared_parameters=rng.choice([0, 0, 10**6]),
                frozen_bytes=rng.choice([0, 10**6]),
                forward=tuple(operation(rng, 1) for _ in range(2)),
                backward=tuple(operation(rng, 2) for _ in range(2)),
                saved_bytes=(0.0, received[1] + rng.uniform(1e6, 2e9)),
                received_bytes=received,
                sent_bytes=sent,
                kept_bytes=rng.choice([(0.0, 0.0), sent]),
                forward_transient_bytes=(0.0, rng.uniform(1e5, 1e8)),
                backward_transient_bytes=(1e5, rng.uniform(1e5, 1e8)),
            )
        )
        received = sent
    named = tuple(TracedLayer(name=f"layer{index}", cost=index) for index in range(layers))
    total = sum(cost.num_parameters for cost in costs)
    return TracedModel(name="random:model", precision="bf16", num_parameters=total, num_layers=layers, layers=named, costs=tuple(costs))


def inputs_of(seed, cluster="v100-16gb:4", batch=8, memory=1.0, layers=5, **constants):
    training = Training(global_batch_size=batch, sequence_length=1, precision="bf16", memory_fraction=memory)
    found = load_cluster(cluster)
    found = replace(found, efficiency=replace(found.efficiency, **constants))
    return ChainInputs(model=random_model(seed, layers), cluster=found, training=training)


def every_plan(costs, constraints):
    """Each candidate with each cut and each choice of recomputed layers that fits, and its step time."""
    n = costs.model.num_layers
    for decisions in candidates(costs, constraints):
        p = decisions.pipeline_parallel
        pipeline, whole = costs.pipeline(decisions), graph(decisions.schedule, p, 1, decisions.num_microbatches)
        ranks = stage_ranks(decisions.schedule, p, 1)
        for cuts in itertools.combinations(range(1, n), p - 1):
            edges = (0, *cuts, n)
            for chosen in itertools.product((False, True), repeat=n):
                stages = tuple(
                    chain_stage(a, b - a, frozenset(layer for layer in range(a, b) if chosen[layer]), rank)
                    for a, b, rank in zip(edges, edges[1:], ranks, strict=False)
                )
                counts = counts_of(stages, n, LEVELS)
                if excess_bytes(pipeline, counts)[0] <= 0:
                    yield replace(decisions, stages=stages), whole.longest(stage_seconds(pipeline, counts))


@pytest.mark.parametrize(
    ("seed", "memory", "constants"), [(1, 1.0, {}), (2, 0.35, {}), (3, 0.5, {}), (1, 0.5, {"receive_seconds": 2e-3, "pipeline_scale": 1.1})]
)
def test_the_search_finds_what_full_enumeration_finds(seed, memory, constants):
    inputs = inputs_of(seed, batch=4, memory=memory, layers=4, **constants)
    costs, constraints = ChainCosts(inputs), Constraints(forbidden=(("micro_batch_size", 4),))
    every = dict(every_plan(costs, constraints))
    plan = search_chain(inputs, constraints)
    assert plan.solver.status == "optimal" and plan.solver.gap_fraction == 0.0
    assert plan.solver.objective_seconds == pytest.approx(min(every.values()), rel=3e-6)
    assert plan.decisions in every
    bounds = {}
    for other, seconds in every.items():
        bare = replace(other, stages=())
        if bare not in bounds:
            bounds[bare] = ChainBound(costs.pipeline(bare), bare.schedule, bare.num_microbatches).bound(math.inf)
        assert bounds[bare] <= seconds * (1 + 1e-6)


def test_predictions_agree_with_the_event_walk_and_stay_within_memory():
    for seed in range(6):
        constants = {"receive_seconds": 1e-3, "pipeline_scale": 1.05} if seed % 2 else {}
        inputs = inputs_of(seed, memory=random.Random(seed).uniform(0.4, 1.0), **constants)
        costs, plan = ChainCosts(inputs), search_chain(inputs)
        assert predict_timeline(costs, plan.decisions).end == pytest.approx(step_seconds(costs, plan.decisions))
        assert plan.predictions.time.step_seconds == pytest.approx(plan.solver.objective_seconds)
        for rank in plan.predictions.pipeline_ranks:
            assert rank.headroom_bytes >= 0
            memory = msgspec.to_builtins(rank.memory)
            assert memory.pop("total_bytes") == sum(memory.values())


def test_cuts_are_by_time_and_not_by_number_of_layers():
    inputs = inputs_of(11, "a100-80gb:4", batch=64, layers=12)
    plan = search_chain(inputs, Constraints(fixed=Fixed(pipeline_parallel=4, micro_batch_size=1)))
    costs = ChainCosts(inputs)
    even = even_split(costs, plan.decisions)
    assert step_seconds(costs, even) > 1.05 * plan.solver.objective_seconds
    assert len({stage.num_layers for stage in plan.decisions.stages}) > 1


def test_a_precision_that_was_calibrated_apart_takes_its_own_constants():
    inputs = inputs_of(1, cluster="cpu:2")
    own = replace(compute_efficiency(inputs.cluster), kernel_seconds=1e-2, optimizer_scale=7.0)
    apart = replace(inputs.cluster, efficiency=replace(inputs.cluster.efficiency, bf16=own))
    whole = replace(inputs.cluster, efficiency=replace(inputs.cluster.efficiency, kernel_seconds=1e-2, optimizer_scale=7.0))
    one = Decisions(data_parallel=1, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=1, num_microbatches=1, stages=())
    for precision, same in (("mixed-bf16", whole), ("fp32", inputs.cluster)):
        training = replace(inputs.training, precision=precision)
        found, expected = (ChainCosts(replace(inputs, cluster=cluster, training=training)) for cluster in (apart, same))
        assert found.times(0, 1) == expected.times(0, 1)
        assert found.optimizer(one, 1e6) == expected.optimizer(one, 1e6)


def test_shared_cores_are_walked_and_not_called_proven():
    plan = search_chain(inputs_of(4, "cpu:4", layers=4, batch=4))
    assert plan.solver.status == "not proven: cores are shared"
    assert plan.solver.bound_seconds < plan.solver.objective_seconds


def test_nothing_fits():
    with pytest.raises(DoesNotFitError) as error:
        search_chain(inputs_of(1, memory=0.01))
    assert "GiB short" in str(error.value) and error.value.repairs


@pytest.mark.parametrize("seed", range(4))
def test_the_shortage_is_that_of_the_best_cuts(seed):
    costs = ChainCosts(inputs_of(seed, memory=0.01))
    for decisions in candidates(costs, Constraints(fixed=Fixed(micro_batch_size=1))):
        p, n, pipeline = decisions.pipeline_parallel, costs.model.num_layers, costs.pipeline(decisions)
        shortest = math.inf
        for cuts in itertools.combinations(range(1, n), p - 1):
            edges = (0, *cuts, n)
            stages = tuple(chain_stage(a, b - a, frozenset(range(a, b)), rank) for rank, (a, b) in enumerate(itertools.pairwise(edges)))
            shortest = min(shortest, excess_bytes(pipeline, counts_of(stages, n, LEVELS))[0])
        assert _least_excess(pipeline)[0] == pytest.approx(shortest)


@pytest.mark.parametrize(
    ("fixed", "field"),
    [
        (Fixed(tensor_parallel=2), "--tensor-parallel"),
        (Fixed(schedule="ZBVZeroBubble"), "--schedule"),
        (Fixed(zero_stage=3), "--zero-stage"),
        (Fixed(recompute="selective"), "--recompute"),
        (Fixed(data_parallel=3), "--global-batch-size"),
    ],
)
def test_what_a_traced_module_can_not_do_is_refused_by_name(fixed, field):
    with pytest.raises(InputError) as error:
        search_chain(inputs_of(1), Constraints(fixed=fixed))
    assert error.value.field == field


def test_the_document(tmp_path):
    plan = search_chain(inputs_of(2, memory=0.35), Constraints(fixed=Fixed(pipeline_parallel=2)))
    path = tmp_path / "plan.json"
    path.write_text(dumps(plan))
    assert load_any_plan(str(path)) == plan
    with pytest.raises(InputError, match="a plan of a transformer is expected"):
        load_plan(str(path))
    data = json.loads(path.read_text())
    data["inputs"]["model"]["num_parameters"] += 1
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="the file was changed"):
        load_any_plan(str(path))
    model = data["inputs"]["model"]
    model["costs"][1]["num_parameters"] = -1
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"costs\[1\].num_parameters"):
        load_any_plan(str(path))
    model["layers"][0]["size"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"layers\[0\].size"):
        load_any_plan(str(path))


def test_every_rule_of_a_plan_is_checked():
    plan = search_chain(inputs_of(2), Constraints(fixed=Fixed(pipeline_parallel=2)))
    inputs, good = plan.inputs, plan.decisions
    check_chain(inputs, good)
    first, second = good.stages
    wrong = [
        dict(tensor_parallel=2), dict(data_parallel=1), dict(zero_stage=2), dict(schedule="Interleaved1F1B"), dict(num_microbatches=7),
        dict(rank_order=("dp", "dp", "pp")), dict(stages=(first,)), dict(stages=(first, replace(second, num_layers=second.num_layers + 1))),
        dict(stages=(first, replace(second, first_layer=0))), dict(stages=(first, replace(second, pipeline_rank=0))),
        dict(stages=(first, replace(second, recomputed_layers=(0,)))), dict(micro_batch_size=0),
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(InputError):
            check_chain(inputs, replace(good, **changes))
    some = chain_stage(0, 3, frozenset({1}), 0)
    assert recomputed(some) == {1} and some.recompute.full == 1 and LEVELS == ("none", "full")


def command(*arguments):
    return CliRunner().invoke(cli, arguments)


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = str(tmp_path / "plan.json")
    model = ("--model", "examples.cnn:build", "--precision", "fp32")
    estimate = json.loads(command("estimate", *model, "--json").stdout)
    assert estimate["schema"] == "meshwright.estimate/1" and estimate["memory"]["weights_bytes"] == 4 * 696_234
    assert "696,234 parameters in a chain of 9 layers" in command("estimate", *model).stdout
    for option in (("--explain",), ("--gpus", "2,4"), ("--num-tokens", "1e9")):
        assert isinstance(command("estimate", *model, *option).exception, InputError)
    solved = command("solve", *model, "--cluster", "cpu:2", "--global-batch-size", "8", "--pp", "2", "-o", path)
    assert solved.exit_code == 0, solved.stderr
    assert "gap 0.00%" in solved.stdout and "tensor parallel 1" in solved.stdout and "times as long" in solved.stdout
    shown = command("show", path)
    assert shown.exit_code == 0 and "Runners-up" in shown.stdout
    simulated = json.loads(command("simulate", path, "--json").stdout)
    assert simulated["step_seconds"] == pytest.approx(json.loads(Path(path).read_text())["solver"]["objective_seconds"])
    for refused in (("export", path, "--to", "megatron"), ("dry-run", path)):
        error = command(*refused).exception
        assert isinstance(error, InputError) and error.exit_status == 2 and "traced module" in str(error)
