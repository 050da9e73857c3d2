"""planner.framework_memory and planner.published_memory: memory of other programs against what was published."""

from __future__ import annotations

import copy
import functools

import pytest

from planner.framework_memory import Run, facts, framework_memory, memory_program, needed_bytes, reported_bytes
from planner.megatron_memory import block_terms
from planner.memory import in_flight
from planner.model import load_model
from planner.plan import replace
from planner.published import published_rows, validate
from planner.published_memory import RowMemory, memory_reader, ran_out_of_memory, row_memory
from planner.rows import NotExpressible, case_of, measured_of
from planner.software import presets as programs

GIB = 2**30


@functools.cache
def predicted(group: str) -> tuple[tuple[dict, RowMemory], ...]:
    found = []
    for row in published_rows():
        if row["group"] == group and (measured_of(row).peak_bytes or ran_out_of_memory(row)):
            try:
                found.append((row, row_memory(row, case_of(row))))
            except NotExpressible:
                continue
    return tuple(found)


def row_of(group: str, part: str = "") -> dict:
    return copy.deepcopy(next(row for row in published_rows() if row["group"] == group and part in row["id"]))


# what the record says


@pytest.mark.parametrize(
    ("group", "least", "limit"),
    [
        ("simumax_b200", 29, 0.007),
        ("zero_bubble_table4", 41, 0.026),
        ("zero_bubble_table8", 24, 0.024),
        ("bloom_tuning", 90, 0.053),
        ("bigscience_v100_1B3", 20, 0.070),
        ("torchtitan_2024_12", 13, 0.049),
        ("torchtitan_h200_2025_06", 2, 0.052),
        ("nanotron_ultrascale", 24, 0.058),
        ("internevo_memory", 11, 0.064),
    ],
)
def test_mean_error_of_each_group(group, least, limit):
    errors = [abs(memory.reported / peak - 1) for row, memory in predicted(group) if (peak := measured_of(row).peak_bytes)]
    assert len(errors) >= least
    assert sum(errors) / len(errors) <= limit


@pytest.mark.parametrize(
    ("part", "first", "last"),
    [("llama3_70b_l12_tp1_pp2_dp4_mbc4", 68149.2, 64479.5), ("llama3_405b_l4_tp1_pp2_dp4_mbc4", 88688.8, 89173.1)],
)
def test_simumax_is_met_on_both_ranks_of_a_pipeline(part, first, last):
    """MiB allocated on the first GPU of each stage (b200_release_v1.2_summary.json): embedding with two micro-batches, head with one."""
    case = case_of(row_of("simumax_b200", part))
    memories = framework_memory(case.inputs, case.decisions, Run(memory_program("megatron-te")))
    assert [memory.total_bytes / 2**20 for memory in memories] == pytest.approx([first, last], rel=0.003)


def test_bloom_runs_out_of_memory_where_it_did():
    """The tuning of the fp16 runs. Of the two later bf16 ones the second is an outlier: a plan with more layers on each GPU ran in 67 GB."""
    failed = {row["id"]: memory.fits for row, memory in predicted("bloom_tuning") if ran_out_of_memory(row)}
    assert [fits for name, fits in failed.items() if "GBS_Variations" in name] == [False] * 3
    assert sorted(failed.values()) == [False] * 4 + [True]
    ran = [memory for row, memory in predicted("bloom_tuning") if not ran_out_of_memory(row)]
    assert len(ran) == 90
    assert all(memory.fits for memory in ran)


def test_the_v100_runs_too():
    fates = [(ran_out_of_memory(row), memory.fits) for row, memory in predicted("bigscience_v100_1B3")]
    assert fates.count((True, False)) == 4
    assert fates.count((False, True)) == 20


# the formulas


def test_block_terms_are_korthikantis_formula():
    """Equation 1: s·b·h·(34 + 5·a·s/h) without parallelism, equation 4: all of it over t with sequence parallelism."""
    model, length = load_model("gpt3"), 2048
    whole = model.hidden_size * (34 + 5 * model.num_attention_heads * length / model.hidden_size)
    for t, sequence_parallel, divisor in ((1, False, 1), (8, True, 8)):
        terms = block_terms(model, length, t, sequence_parallel)
        assert terms.rows + terms.masks + terms.split + terms.scores == pytest.approx(whole / divisor)


def test_block_terms_with_tensor_parallelism_alone():
    """Equation 2: s·b·h·(10 + 24/t + 5·a·s/(h·t))."""
    model, length, t = load_model("gpt3"), 2048, 8
    terms = block_terms(model, length, t, False)
    expected = model.hidden_size * (10 + 24 / t) + 5 * model.num_attention_heads * length / t
    assert terms.rows + terms.masks + terms.split + terms.scores == pytest.approx(expected)


@pytest.mark.parametrize(
    ("program", "whole", "sharded"),
    [("megatron", 6, 12), ("megatron-2021", 4, 12), ("megatron-deepspeed", 4, 16), ("deepspeed-bf16", 8, 12), ("nanotron", 6, 12)],
)
def test_states_with_zero_1(program, whole, sharded):
    """Bytes a parameter: what every rank holds, and what ZeRO-1 shards."""
    case = case_of(row_of("bloom_tuning", "tp8pp12"))
    totals = []
    for zero in (0, 1):
        decisions = replace(case.decisions, zero_stage=zero)
        memory = framework_memory(case.inputs, decisions, Run(memory_program(program)))[5]
        totals.append(memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes)
    parameters = totals[0] / (whole + sharded)
    assert totals[1] == pytest.approx(parameters * (whole + sharded / case.decisions.data_parallel), rel=1e-6)
    assert parameters == pytest.approx(6 * 12 * case.inputs.model.hidden_size**2 / 8, rel=0.01)


def test_fsdp_shards_every_state():
    case = case_of(row_of("torchtitan_2024_12", "titan_8B_8_fsdp"))
    (memory,) = framework_memory(case.inputs, case.decisions, Run(memory_program("torchtitan"), selective="op"))
    states = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    assert states == pytest.approx(16 * case.inputs.model.num_parameters / 8)
    assert case.inputs.model.num_parameters == 8_030_261_248


def test_context_parallelism_keeps_attentions_output_twice():
    row = row_of("simumax_b200", "llama3_70b_l12_tp1_cp8")
    case = case_of(row)
    one, eight = (
        framework_memory(case.inputs, case.decisions, Run(memory_program("megatron-te"), context_parallel=degree))[0].activations_bytes
        for degree in (1, 8)
    )
    assert eight - one == 12 * 4096 * 8192 * 2


def test_zero_bubble_schedules_hold_what_their_names_say():
    """ZB-1p keeps p micro-batches on each rank, ZB-2p 2p - 1; 1F1B p less the rank."""
    kept = {}
    for name in ("1F1B", "ZB-1p", "ZB-2p"):
        row = row_of("zero_bubble_table4", f"6.2B_m32_{name}")
        kept[name] = row_memory(row, case_of(row)).needed
    assert kept["1F1B"] < kept["ZB-1p"] < kept["ZB-2p"]
    case = case_of(row_of("zero_bubble_table4", "6.2B_m32_1F1B"))
    assert in_flight(case.decisions) == (8, 7, 6, 5, 4, 3, 2, 1)
    terms = block_terms(case.inputs.model, 1024, 1, False)
    block = (terms.rows + terms.masks + terms.split + terms.scores) * 3 * 1024
    assert kept["ZB-2p"] - kept["ZB-1p"] == pytest.approx(7 * 4 * block, rel=0.01)


def test_recomputation_keeps_less_and_needs_more_for_a_moment():
    case = case_of(row_of("nanotron_ultrascale", "8.86B_2nodes"))
    totals = []
    for level in ("none", "selective", "full"):
        stages = tuple(replace(stage, recompute=level) for stage in case.decisions.stages)
        run = Run(memory_program("megatron"), fused_attention=False)
        totals.append(framework_memory(case.inputs, replace(case.decisions, stages=stages), run)[0].activations_bytes)
    assert totals[0] > totals[1] > totals[2] > 0


def test_nanotron_cuts_by_multiplications():
    """A head of 4 blocks' worth leaves 10 of 16 blocks to the first of two ranks."""
    case = case_of(row_of("nanotron_ultrascale", "1.34B_2nodes"))
    plain = framework_memory(case.inputs, case.decisions, Run(replace(memory_program("nanotron"), stages="blocks")))
    cut = framework_memory(case.inputs, case.decisions, Run(memory_program("nanotron")))
    block = case.inputs.model.block_parameters
    assert cut[0].weights_bytes - plain[0].weights_bytes == pytest.approx(2 * 3 * block, rel=0.001)
    assert sum(memory.weights_bytes for memory in cut) == sum(memory.weights_bytes for memory in plain)


def test_the_optimizers_step_may_be_the_peak():
    case = case_of(row_of("internevo_memory", "7B_4_tp1pp1_fsdp1"))
    (memory,) = framework_memory(case.inputs, case.decisions, Run(memory_program("internevo")))
    assert memory.activations_bytes == 0
    assert memory.buffers_bytes == pytest.approx(11 * case.inputs.model.num_parameters / 4, rel=1e-6)


# what is read from a row


@pytest.mark.parametrize(
    ("text", "kind", "ranks"),
    [
        ("kind: torch max_allocated, max over ranks | any", "allocated", "all"),
        ("kind: nvidia-smi | some run", "device", "first_node"),
        ("kind: nvidia-smi", "device", "first_node"),
        ("kind: nvidia-smi, max over nodes incl. first/last stage | bloom", "device", "all"),
        ("kind: max over first/last nodes | bloom_tuning", "device", "all"),
        ("kind: torch peak reserved, max over ranks | torchtitan", "reserved", "all"),
        ("simumax_b200 | no kind since nothing is measured", "allocated", "all"),
        ("nothing known", "reserved", "all"),
        ("", "reserved", "all"),
    ],
)
def test_readers(text, kind, ranks):
    reader = memory_reader(text)
    assert (reader.kind, reader.ranks) == (kind, ranks)


def test_a_tool_reports_at_least_what_is_allocated():
    assert reported_bytes(50 * GIB, "allocated") == 50 * GIB
    assert 50 * GIB < reported_bytes(50 * GIB, "reserved") < reported_bytes(50 * GIB, "device")
    assert needed_bytes(50 * GIB) < reported_bytes(50 * GIB, "device")


def test_every_program_of_the_time_model_has_a_memory():
    for name in programs():
        assert memory_program(name).source
    assert memory_program("never heard of").name == "megatron"
    names = {program.name for program in facts().programs}
    assert set(facts().aliases.values()) <= names
    assert not set(facts().aliases) & names


@pytest.mark.parametrize("group", ["simumax_b200", "bloom_tuning", "torchtitan_2024_12", "nanotron_ultrascale"])
def test_the_prediction_does_not_need_what_was_measured(group):
    row = row_of(group)
    if row["measured"].get("memory_by_rank"):
        assert row["parallel"]["pp"] == 2
    with_figures = row_memory(row, case_of(row))
    del row["measured"]
    assert row_memory(row, case_of(row)) == with_figures


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": None},
        {"measured": {"oom": "yes", "memory_kind": 7}},
        {"source": None},
        {"source": {"year": "soon"}},
        {"precision": None},
        {"notes": 5},
        {"group": None},
    ],
)
def test_odd_rows_are_predicted_all_the_same(changes):
    row = {**row_of("torchtitan_2024_12"), **changes}
    memory = row_memory(row, case_of(row))
    assert 0 < memory.reported < 1e15
    assert ran_out_of_memory(row) is False


def test_internevo_gives_the_last_ranks_one_more():
    """32 blocks over 5 ranks: 6, 6, 6, 7, 7."""
    case = case_of(row_of("internevo_memory", "7B_5_tp1pp5_fsdp0"))
    memories = framework_memory(case.inputs, case.decisions, Run(memory_program("internevo")))
    model = case.inputs.model
    ends = [model.embedding_parameters, 0, 0, 0, model.head_parameters]
    blocks = [(memory.weights_bytes / 2 - end) / model.block_parameters for memory, end in zip(memories, ends, strict=True)]
    assert blocks == pytest.approx([6, 6, 6, 7, 7])


def test_every_run_with_measured_memory_is_accepted():
    groups = {row["group"] for row in published_rows() if measured_of(row).peak_bytes}
    ran = [(row["id"], memory) for name in groups for row, memory in predicted(name) if not ran_out_of_memory(row)]
    assert len(ran) >= 254
    assert [name for name, memory in ran if not memory.fits] == []


# the document


def test_validation_counts_runs_by_their_fate():
    parts = [("bloom_tuning", "GBS_Variations_181B_h14336_L72_a64_dp48tp8pp1"), ("bloom_tuning", "best_fp16_80gpu"), ("simumax_b200", "tp8")]
    document = validate([row_of(group, part) for group, part in parts])
    fit = document.summary.memory_fit
    assert (fit.out_of_memory_runs, fit.out_of_memory_caught, fit.fitting_runs, fit.fitting_refused) == (1, 1, 2, 0)
    assert document.rows[0].predicted.fits is False
    assert document.rows[0].measured.ran_out_of_memory
    by_name = {group.group: group for group in document.groups}
    assert by_name["bloom_tuning"].memory_fit.out_of_memory_caught == 1
    assert by_name["simumax_b200"].memory_fit.out_of_memory_runs == 0


def test_memory_has_calibrated_groups_of_its_own():
    names = set(facts().calibrated)
    assert names <= {row["group"] for row in published_rows()}
    document = validate([row_of("zero_bubble_table8"), row_of("nanotron_ultrascale"), row_of("torchtitan_2024_12")])
    assert {group.group for group in document.groups if group.memory_calibrated} == {"nanotron_ultrascale"}
    assert document.summary.untouched.num_memory_groups == 2
    assert document.summary.calibrated.num_memory_groups == 1
    assert document.summary.untouched.memory_mean_abs_error < 0.08
