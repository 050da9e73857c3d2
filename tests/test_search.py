"""The search: its numbers against the memory and time models, its optimum against every candidate, its words."""

import dataclasses
import itertools
import math
import random
import re

import pytest

from planner import bounds, greedy, reasons
from planner import explore as explore_module
from planner.candidates import LEVELS, Constraints, Degrees, all_degrees, decisions_of, degrees_of, rank_orders, schedules, shardings
from planner.chain import Costs, counts_of, stages_of
from planner.cluster import load_cluster, with_num_gpus
from planner.critical_path import graph
from planner.defaults import Fixed
from planner.errors import DoesNotFitError, InputError
from planner.estimate import fits, predict
from planner.explore import explore
from planner.memory import predict_memory
from planner.model import load_model
from planner.moments import least_in_flight
from planner.pipeline import excess_bytes, moment_bytes, stage_loads, stage_seconds
from planner.plan import Inputs, Training, check, digest, even_stages, replace
from planner.repairs import closest
from planner.search import search
from planner.timing import predict_time


def inputs_of(model, cluster, batch, sequence=2048, **training):
    return Inputs(
        model=load_model(model),
        cluster=load_cluster(cluster),
        training=Training(global_batch_size=batch, sequence_length=sequence, **training),
    )


CASES = [
    ("1F1B", 1, 1, True, ("tp", "dp", "pp"), 96),
    ("1F1B", 1, 0, False, ("tp", "pp", "dp"), 24),
    ("GPipe", 1, 3, False, ("tp", "dp", "pp"), 12),
    ("Interleaved1F1B", 3, 2, True, ("tp", "pp", "dp"), 32),
    ("InterleavedZeroBubble", 2, 1, True, ("tp", "dp", "pp"), 24),
    ("ZBVZeroBubble", 2, 0, False, ("dp", "tp", "pp"), 24),
    ("InterleavedZeroBubble", 3, 3, True, ("tp", "dp", "pp"), 16),
]


def random_cut(rng, candidate, num_blocks):
    """Counts of a candidate's stages with random cuts and recomputation."""
    edges = [0, *sorted(rng.sample(range(1, num_blocks + 1), candidate.num_stages - 1)), num_blocks + 2]
    counts = []
    for stage, (first, last) in enumerate(itertools.pairwise(edges)):
        blocks = last - first - (stage == 0) - (stage == candidate.num_stages - 1)
        none = rng.randint(0, blocks)
        selective = rng.randint(0, blocks - none)
        ends = int(stage == 0), int(stage == candidate.num_stages - 1)
        counts.append(((ends[0],), (none, selective, blocks - none - selective), (ends[1],)))
    return tuple(counts)


@pytest.mark.parametrize(("profile", "receive"), [("meshwright", 0.0), ("meshwright", 2e-3), ("megatron", 0.0)])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ilps_numbers_are_those_of_the_memory_and_time_models(case, replicas, profile, receive):
    schedule, v, zero, sequence_parallel, order, m = case
    # where gathers and reductions share the network, the reduction is not convex, and tangents are only close to it
    tolerance = 1e-2 if zero == 3 and profile == "megatron" else 1e-6
    rng = random.Random(str(case))
    degrees = Degrees(8, 4, 4, 2, m)
    inputs = inputs_of("gpt3", "a100-80gb:128", 4 * 2 * m, profile=profile)
    efficiency = replace(inputs.cluster.efficiency, receive_seconds=receive)
    inputs = replace(inputs, cluster=replace(inputs.cluster, efficiency=efficiency))
    candidate = decisions_of(
        degrees, schedule=schedule, num_virtual_stages=v, zero_stage=zero, sequence_parallel=sequence_parallel, rank_order=order,
        data_parallel_replicate=replicas if zero else 1,
    )  # fmt: skip
    costs = Costs(inputs)
    pipeline = costs.pipeline(candidate, LEVELS)
    for _ in range(3):
        counts = random_cut(rng, candidate, inputs.model.num_layers)
        plan = replace(candidate, stages=stages_of(candidate, counts, LEVELS))
        check(inputs, plan)
        assert counts_of(plan, inputs.model, LEVELS) == counts
        walked = graph(schedule, 4, v, m).longest(stage_seconds(pipeline, counts)) + costs.step_seconds
        assert walked == pytest.approx(predict_time(inputs, plan).time.step_seconds, rel=tolerance)
        loads = stage_loads(pipeline, counts)
        for rank, need in enumerate(predict_memory(inputs, plan)):
            peak = max(moment_bytes(moment, loads) for moment in pipeline.moments if moment.rank == rank)
            known = peak - pipeline.limits[rank] + costs.capacity
            assert need.total_bytes <= known <= 1.02 * need.total_bytes, "the ILP bounds the memory from above, and closely"


@pytest.mark.parametrize("profile", ["meshwright", "megatron"])
@pytest.mark.parametrize(("model", "precision", "attention"), [
    ("llama-3-8b", "mixed-bf16", "fused"), ("gpt3", "fp32", "unfused"), ("bloom-176b", "bf16", "fused"), ("tiny-gpt", "mixed-bf16", "fused"),
])  # fmt: skip
def test_without_a_pipeline_the_ilps_memory_is_the_memory_models(model, precision, attention, profile):
    rng = random.Random(f"{model} {profile}")
    for dp, zero, tp in ((1, 0, 1), (2, 1, 2), (4, 2, 4), (2, 3, 2)):
        inputs = inputs_of(model, f"h100-80gb:{tp * dp}", 4 * dp, 64, precision=precision, attention=attention, profile=profile)
        candidate = decisions_of(Degrees(tp, 1, dp, 2, 2), zero_stage=zero, sequence_parallel=tp == 4)
        costs = Costs(inputs)
        pipeline = costs.pipeline(candidate, LEVELS)
        for _ in range(3):
            counts = random_cut(rng, candidate, inputs.model.num_layers)
            over, moment = excess_bytes(pipeline, counts)
            assert moment.rank == 0
            plan = replace(candidate, stages=stages_of(candidate, counts, LEVELS))
            assert over == predict_memory(inputs, plan)[0].total_bytes - costs.capacity


def test_what_fits_by_a_hairs_breadth_is_found():
    """7 of 24,000 MiB are left; 1.9 GiB of 78; and nothing recomputed is the fastest of what fits."""
    tight = search(inputs_of("llama-2-7b", "rtx4090-24gb:5", 64, 4096), Constraints(fixed=Fixed(pipeline_parallel=5)))
    assert 0 <= min(rank.headroom_bytes for rank in tight.predictions.pipeline_ranks) < 8 * 2**20
    fixed = {"data_parallel": 8, "zero_stage": 1}
    large = inputs_of("llama-3-8b", "h100-80gb:8", 64, 8192)
    assert fits(search(large, Constraints(fixed=Fixed(**fixed, micro_batch_size=8))).predictions)
    plain = search(large, Constraints(fixed=Fixed(**fixed, micro_batch_size=1, recompute="none")))
    assert search(large).solver.objective_seconds <= plain.solver.objective_seconds


def test_a_plan_that_fits_is_not_refused_for_the_ilps_bound():
    """The bound on a split backward pass lies above what the plan needs, which has just room."""
    constraints = Constraints(fixed=Fixed(schedule="ZBVZeroBubble", pipeline_parallel=4, tensor_parallel=1, micro_batch_size=2, recompute="full"))
    inputs = inputs_of("llama-2-7b", "h100-80gb:4", 16)
    _, _, _, need = closest(inputs, constraints)
    gpu = inputs.cluster.gpu
    inputs = replace(inputs, training=replace(inputs.training, memory_fraction=(need + gpu.reserved_bytes + 2**20) / gpu.memory_bytes))
    assert explore(Costs(inputs), constraints).best is None
    plan = search(inputs, constraints)
    assert fits(plan.predictions) and plan.solver.status == "not proven: the plan that needs least memory"
    assert plan.solver.bound_seconds < plan.solver.objective_seconds


def test_gpus_that_would_do_are_named_with_the_share_that_may_be_used():
    inputs = inputs_of("llama-2-13b", "a100-80gb:4", 64, memory_fraction=0.6)
    with pytest.raises(DoesNotFitError) as error:
        search(inputs)
    gib = float(re.match(r"GPUs with ([\d.]+) GiB", error.value.repairs[-1]).group(1))
    gpu = replace(inputs.cluster.gpu, memory_bytes=int(gib * 2**30))
    assert fits(search(replace(inputs, cluster=replace(inputs.cluster, gpu=gpu))).predictions)


def every_candidate(inputs, constraints):
    """All candidates without stages, bounds and dominance left aside."""
    for degrees in all_degrees(inputs, constraints):
        for order in rank_orders(degrees, constraints):
            for choice in (True, False) if degrees.tensor_parallel > 1 else (False,):
                for schedule, v in schedules(inputs, degrees, constraints):
                    for zero, replicas in shardings(inputs, degrees, order, constraints):
                        yield decisions_of(
                            degrees, schedule=schedule, num_virtual_stages=v, zero_stage=zero, sequence_parallel=choice, rank_order=order,
                            data_parallel_replicate=replicas,
                        )  # fmt: skip


INSTANCES = [
    ("a100-40gb:8", 8, 1.0, 1.0, 0.0),
    ("a100-40gb:8", 16, 0.2, 1.2, 0.0),
    ("a100-40gb:16", 8, 0.11, 1.0, 5e-3),
    ("rtx4090-24gb:16", 32, 0.6, 1.05, 0.05),
]
"""Cluster, batch, fraction of the memory, what passes take longer on pipelines, and seconds of a late receive."""


@pytest.mark.parametrize("cluster, batch, fraction, pipeline_scale, receive", INSTANCES)
def test_no_plan_of_simple_rules_beats_the_search_and_bounds_hold(cluster, batch, fraction, pipeline_scale, receive):
    inputs = inputs_of("gpt3-1.3b", cluster, batch, memory_fraction=fraction)
    efficiency = replace(inputs.cluster.efficiency, pipeline_scale=pipeline_scale, receive_seconds=receive)
    inputs = replace(inputs, cluster=replace(inputs.cluster, efficiency=efficiency))
    constraints = Constraints(fixed=Fixed(micro_batch_size=1))
    outcome = explore(Costs(inputs), constraints)
    assert outcome.best is not None and outcome.proven
    assert outcome.bound == pytest.approx(outcome.best.seconds, rel=2e-6)
    costs = Costs(inputs)
    fastest, count, fitting = math.inf, 0, 0
    for candidate in every_candidate(inputs, constraints):
        count += 1
        pipeline = costs.pipeline(candidate, LEVELS)
        whole = graph(candidate.schedule, candidate.pipeline_parallel, candidate.num_virtual_stages, candidate.num_microbatches)
        rooms = bounds.rank_rooms(
            costs,
            candidate,
            least_in_flight(candidate.schedule, candidate.pipeline_parallel, candidate.num_virtual_stages, candidate.num_microbatches),
            LEVELS,
        )
        sizes = [list(pipeline.patterns[0])] if pipeline.patterns else [greedy.balanced_sizes(pipeline), greedy.even_sizes(pipeline)]
        for size in sizes:
            counts = greedy.fit(pipeline, size)
            if counts is None:
                continue
            fitting += 1
            seconds = whole.longest(stage_seconds(pipeline, counts))
            fastest = min(fastest, seconds)
            assert rooms is not None
            work = bounds.least_work(rooms, inputs.model.num_layers)
            least = bounds.least_stages(costs, candidate, LEVELS)
            if candidate.num_virtual_stages == 1:
                assert bounds.schedule_bound(candidate, work, least) <= seconds * (1 + 1e-9)
            else:
                assert bounds.regular_bound(costs, candidate, LEVELS) <= seconds * (1 + 1e-9)
    assert count == outcome.num_candidates
    assert fitting > 20
    assert outcome.best.seconds <= fastest * (1 + 1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_replicas_of_the_shard_group_are_found_where_they_win_and_equal_enumeration(fraction):
    inputs = inputs_of("gpt3-1.3b", "rtx4090-24gb:16", 64, memory_fraction=fraction)
    fixed = Fixed(tensor_parallel=1, pipeline_parallel=1, micro_batch_size=2)
    costs, best = Costs(inputs), (math.inf, None)
    for candidate in every_candidate(inputs, Constraints(fixed=fixed)):
        pipeline = costs.pipeline(candidate, LEVELS)
        for none in range(25):
            for selective in range(25 - none):
                counts = (((1,), (none, selective, 24 - none - selective), (1,)),)
                if excess_bytes(pipeline, counts)[0] <= 0:
                    seconds = graph("1F1B", 1, 1, candidate.num_microbatches).longest(stage_seconds(pipeline, counts)) + costs.step_seconds
                    best = min(best, (seconds, replace(candidate, stages=stages_of(candidate, counts, LEVELS))), key=lambda item: item[0])
    plan = search(inputs, Constraints(fixed=fixed))
    assert plan.solver.status == "optimal"
    assert plan.solver.objective_seconds == pytest.approx(best[0], rel=2e-6)
    assert plan.solver.objective_seconds == pytest.approx(predict_time(inputs, plan.decisions).time.step_seconds, rel=1e-6)
    assert plan.decisions.data_parallel_replicate == best[1].data_parallel_replicate == 2
    assert plan.decisions.zero_stage > 0 and fits(plan.predictions)
    assert any("states sharded over 8 ranks, 2 replicas" in reason for reason in plan.solver.reasons)
    assert any(runner.decisions.data_parallel_replicate == 1 and "data-parallel communication" in runner.why_not for runner in plan.solver.runners_up)
    whole = search(inputs, Constraints(fixed=fixed, forbidden=(("data_parallel_replicate", 2),)))
    assert whole.decisions.data_parallel_replicate == 1
    assert whole.solver.objective_seconds > plan.solver.objective_seconds * 1.01
    four = search(inputs, Constraints(fixed=dataclasses.replace(fixed, data_parallel_replicate=4)))
    assert four.decisions.data_parallel_replicate == 4 and four.decisions.zero_stage > 0
    for wrong in ({"data_parallel_replicate": 3}, {"data_parallel_replicate": 2, "zero_stage": 0}):
        with pytest.raises(InputError):
            search(inputs, Constraints(fixed=dataclasses.replace(fixed, **wrong)))


def test_runners_up_have_their_best_stages_and_say_their_order(monkeypatch):
    inputs = inputs_of("gpt3-1.3b", "a100-40gb:16", 32, memory_fraction=0.2)
    monkeypatch.setattr(reasons, "SETTLING_SECONDS", 0.0)
    unsettled = search(inputs, Constraints(fixed=Fixed(micro_batch_size=1))).solver.runners_up
    assert all("at most" in other.why_not or "as fast" in other.why_not for other in unsettled if other.step_seconds is not None)
    monkeypatch.setattr(reasons, "SETTLING_SECONDS", 60.0)
    monkeypatch.setattr(explore_module, "SETTLE_SECONDS", 10.0)
    plan = search(inputs, Constraints(fixed=Fixed(micro_batch_size=1)))
    others = [other for other in plan.solver.runners_up if other.step_seconds is not None]
    assert sum("at most" not in other.why_not for other in others) >= 3
    assert [other.step_seconds for other in others] == sorted(other.step_seconds for other in others)
    for other in others:
        decided = other.decisions
        names = [field.name for field in dataclasses.fields(Fixed) if field.name != "recompute"]
        constraints = Constraints(fixed=Fixed(**{name: getattr(decided, name) for name in names}), rank_order=decided.rank_order, num_runners_up=0)
        best = search(inputs, constraints).solver.objective_seconds
        assert plan.solver.objective_seconds * (1 - 1e-9) <= best <= other.step_seconds * (1 + 1e-9)
        assert "at most" in other.why_not or other.step_seconds <= best * 1.0102
        assert other.step_seconds == pytest.approx(predict_time(inputs, decided).time.step_seconds, rel=1e-6)
        assert ("in the order" in other.why_not) == (
            decided.rank_order != plan.decisions.rank_order and degrees_of(decided)[:3] == degrees_of(plan.decisions)[:3]
        )


def test_too_few_gpus_are_told_the_least_that_would_do():
    inputs, constraints = inputs_of("gpt3", "a100-80gb:32", 96), Constraints(fixed=Fixed(tensor_parallel=8, micro_batch_size=1))
    with pytest.raises(DoesNotFitError) as error:
        search(inputs, constraints)
    (more,) = [repair for repair in error.value.repairs if " GPUs (" in repair]
    count = int(more.split()[0])
    assert 32 < count < 64
    search(replace(inputs, cluster=with_num_gpus(inputs.cluster, count)), dataclasses.replace(constraints, time_limit_seconds=20))
    for fewer in range(40, count, 8):
        with pytest.raises(DoesNotFitError):
            search(replace(inputs, cluster=with_num_gpus(inputs.cluster, fewer)), constraints)


def test_a_number_of_gpus_that_divides_badly_is_told_a_smaller_one_that_is_faster():
    inputs = inputs_of("llama-7b", "a100-80gb:13", 64)
    constraints = Constraints(fixed=Fixed(micro_batch_size=1))
    plan = search(inputs, constraints)
    (line,) = [reason for reason in plan.solver.reasons if "of these GPUs are faster" in reason]
    count = int(line.split()[0])
    assert 8 <= count < 13
    fewer = search(replace(inputs, cluster=with_num_gpus(inputs.cluster, count)), constraints)
    assert fewer.solver.objective_seconds < plan.solver.objective_seconds
    assert not any("of these GPUs" in reason for reason in fewer.solver.reasons)


def test_a_micro_batch_size_that_is_open_is_chosen_for_the_schedule():
    fixed = Fixed(pipeline_parallel=4, data_parallel=4, tensor_parallel=1, schedule="Interleaved1F1B", num_virtual_stages=2)
    found = search(inputs_of("llama-7b", "a100-80gb:16", 44), Constraints(fixed=fixed)).decisions
    assert (found.micro_batch_size, found.num_microbatches) == (11, 1)  # 11 micro-batches of 1 don't make whole rounds


@pytest.mark.parametrize(("fraction", "options", "said"), [
    (1.0, {}, "memory does not bind"),
    (0.55, {}, "memory decides how much is recomputed"),
    (1.0, {"fixed": "full"}, "recomputation was given by --recompute full; memory does not bind"),
    (0.55, {"fixed": "full"}, "recomputation was given by --recompute full; without any the plan would not fit"),
    (1.0, {"fixed": "none"}, "that nothing is recomputed was given by --recompute none"),
    (1.0, {"forbidden": "none"}, "recomputation was given by --forbid recompute=none; memory does not bind"),
])  # fmt: skip
def test_what_decides_how_much_is_recomputed_is_said(fraction, options, said):
    inputs = inputs_of("llama-7b", "a100-80gb:8", 64, memory_fraction=fraction)
    fixed = Fixed(tensor_parallel=1, pipeline_parallel=1, micro_batch_size=1, zero_stage=1, recompute=options.get("fixed"))
    forbidden = (("recompute", options["forbidden"]),) if "forbidden" in options else ()
    (line,) = [reason for reason in search(inputs, Constraints(fixed=fixed, forbidden=forbidden)).solver.reasons if reason.startswith("memory:")]
    assert line.endswith(f"to spare; {said}")


def test_too_little_of_the_memory_is_told_the_least_share_that_would_do():
    inputs, constraints = inputs_of("llama-7b", "a100-80gb:8", 64, memory_fraction=0.1), Constraints(fixed=Fixed(micro_batch_size=1))
    with pytest.raises(DoesNotFitError) as error:
        search(inputs, constraints)
    (more,) = [repair for repair in error.value.repairs if repair.startswith("--memory-fraction")]
    share = float(more.split()[1])
    assert 0.1 < share < 0.4
    search(replace(inputs, training=replace(inputs.training, memory_fraction=share)), constraints)


def test_the_plan_is_checked_hashed_and_the_same_each_time():
    inputs = inputs_of("bloom-176b", "a100-80gb:384", 2048)
    constraints = Constraints(fixed=Fixed(tensor_parallel=4, pipeline_parallel=12, data_parallel=8))
    plan = search(inputs, constraints)
    check(plan.inputs, plan.decisions)
    assert plan.inputs_hash == digest(inputs)
    assert plan.solver.status == "optimal" and plan.solver.gap_fraction == 0
    assert plan.solver.objective_seconds == pytest.approx(plan.predictions.time.step_seconds, rel=1e-6)
    assert fits(plan.predictions)
    assert plan.solver.num_candidates > plan.solver.num_pruned > 0
    assert any("slower" in runner.why_not for runner in plan.solver.runners_up)
    assert any("over on pipeline rank" in runner.why_not for runner in plan.solver.runners_up)
    assert any("stays inside a node" in reason for reason in plan.solver.reasons)
    assert search(inputs, constraints).decisions == plan.decisions


PUBLISHED = [
    ("bloom-176b", "a100-80gb:384", 2048, 2048, (4, 12, 8), 2, 1, "1F1B", 1, "full"),
    ("megatron-145b", "a100-80gb:1536", 2304, 2048, (8, 8, 24), 1, 0, "Interleaved1F1B", 2, "full"),
    ("megatron-310b", "a100-80gb:1920", 2160, 2048, (8, 16, 15), 1, 0, "Interleaved1F1B", 3, "full"),
    ("megatron-530b", "a100-80gb:2520", 2520, 2048, (8, 35, 9), 1, 0, "Interleaved1F1B", 3, "full"),
    ("megatron-1t", "a100-80gb:3072", 3072, 2048, (8, 64, 6), 1, 0, "1F1B", 1, "full"),
    ("llama-3.1-405b", "h100-80gb:8192", 2048, 8192, (8, 16, 64), 1, 1, "1F1B", 1, "none"),
]
SLOW = ("megatron-310b", "megatron-530b", "megatron-1t", "llama-3.1-405b")


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row[0] in SLOW else ()) for row in PUBLISHED], ids=lambda row: row[0])
def test_given_published_degrees_the_plan_is_no_slower_than_the_published_one(row):
    """Degrees: Scao et al. 2022; Narayanan et al. 2021, Table 1; Llama team 2024, Table 4 (without context parallelism)."""
    name, cluster, batch, sequence, (tp, pp, dp), micro, zero, schedule, v, recompute = row
    inputs = inputs_of(name, cluster, batch, sequence)
    published = decisions_of(Degrees(tp, pp, dp, micro, batch // dp // micro), schedule=schedule, num_virtual_stages=v, zero_stage=zero)
    published = replace(published, stages=even_stages(inputs.model, schedule, pp, v, recompute))
    check(inputs, published)
    fixed = Fixed(tensor_parallel=tp, pipeline_parallel=pp, data_parallel=dp, micro_batch_size=micro)
    outcome = explore(Costs(inputs), Constraints(fixed=fixed, time_limit_seconds=60.0), cutoff=math.inf)
    if fits(predict(inputs, published)):
        assert outcome.best is not None
    if outcome.best is not None:
        assert outcome.best.seconds <= predict_time(inputs, published).time.step_seconds * (1 + 1e-9)


def test_constraints_are_kept():
    inputs = inputs_of("gpt3-1.3b", "a100-80gb:8", 16)
    fixed = Fixed(tensor_parallel=2, zero_stage=1, recompute="full", schedule="GPipe", pipeline_parallel=2)
    plan = search(inputs, Constraints(fixed=fixed)).decisions
    assert (plan.tensor_parallel, plan.zero_stage, plan.schedule, plan.pipeline_parallel) == (2, 1, "GPipe", 2)
    assert {stage.recompute for stage in plan.stages} == {"full"}
    free = search(inputs, Constraints(forbidden=(("tensor_parallel", 1), ("zero_stage", 0)))).decisions
    assert free.tensor_parallel > 1 and free.zero_stage > 0
    with pytest.raises(InputError, match="tensor"):
        search(inputs, Constraints(fixed=Fixed(tensor_parallel=3)))
    with pytest.raises(InputError, match=r"it must be|must be the 8 GPUs|must divide"):
        search(inputs, Constraints(fixed=Fixed(tensor_parallel=2, pipeline_parallel=2, data_parallel=4)))
    with pytest.raises(InputError, match="forbidden"):
        search(inputs, Constraints(forbidden=(("colour", 1),)))


def test_nothing_fits_says_what_is_short_and_what_would_help():
    with pytest.raises(DoesNotFitError, match=r"does not fit 1 x .* short") as raised:
        search(inputs_of("gpt3", "a100-80gb:1", 8))
    assert any(re.match(r"\d+ GPUs \((tp|pp|dp) \d+.*\): a step of ", repair) for repair in raised.value.repairs)
    inputs = inputs_of("gpt3-6.7b", "a100-40gb:8", 8)
    with pytest.raises(DoesNotFitError) as raised:
        search(inputs, Constraints(fixed=Fixed(zero_stage=0, tensor_parallel=1, pipeline_parallel=1)))
    assert any(repair.startswith("--zero-stage ") and "a step of" in repair for repair in raised.value.repairs)


def test_time_limit_gives_the_best_found_with_its_gap():
    inputs = inputs_of("gpt3", "a100-80gb:1024", 1536)
    plan = search(inputs, Constraints(time_limit_seconds=0.5))
    assert plan.solver.status == "time limit"
    assert 0 < plan.solver.gap_fraction < 1
    assert plan.solver.bound_seconds < plan.solver.objective_seconds
    assert fits(plan.predictions)


def test_shared_cores_are_walked_and_the_gap_is_said():
    inputs = inputs_of("tiny-gpt", "cpu:4", 8, 128, precision="fp32")
    plan = search(inputs)
    assert plan.solver.objective_seconds == pytest.approx(plan.predictions.time.step_seconds)
    assert plan.solver.status.startswith("not proven") and plan.solver.bound_seconds <= plan.solver.objective_seconds


@pytest.mark.parametrize(("schedule", "v"), [("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("Interleaved1F1B", 3)])
def test_free_cuts_with_several_stages_a_rank_equal_enumeration(schedule, v):
    model = replace(load_model("gpt2"), name="a-large-vocabulary", num_layers=8, vocab_size=150_000)
    inputs = Inputs(model=model, cluster=load_cluster("a100-80gb:2"), training=Training(global_batch_size=8, sequence_length=512))
    fixed = Fixed(pipeline_parallel=2, tensor_parallel=1, micro_batch_size=1, schedule=schedule, num_virtual_stages=v, recompute="none")
    constraints = Constraints(fixed=fixed, accepted_gap=0.0)
    regular, free = search(inputs, constraints), search(inputs, dataclasses.replace(constraints, free_cuts=True))
    candidate, best = replace(free.decisions, stages=()), math.inf
    for cuts in itertools.combinations(range(1, 10), 2 * v - 1):
        sizes = [b - a for a, b in itertools.pairwise((0, *cuts, 10))]
        ends = [(int(stage == 0), int(stage == 2 * v - 1)) for stage in range(2 * v)]
        counts = tuple(((first,), (size - first - last, 0, 0), (last,)) for size, (first, last) in zip(sizes, ends, strict=True))
        plan = replace(candidate, stages=stages_of(candidate, counts, LEVELS))
        best = min(best, predict_time(inputs, plan).time.step_seconds)
    assert free.solver.status == "optimal"
    assert free.solver.objective_seconds == pytest.approx(best, rel=2e-6)
    assert free.solver.objective_seconds <= regular.solver.objective_seconds * (1 + 1e-9)
    assert free.predictions.time.step_seconds == pytest.approx(best, rel=2e-6)
