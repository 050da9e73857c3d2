"""planner.published and planner.rows: the published rows are predicted, and no row breaks the code."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

from planner import documents
from planner.accuracy import accuracy
from planner.errors import InputError
from planner.published import Validation, kendall, load_rows, predict_row, published_rows, spearman, validate
from planner.row_machines import GPU_PRESETS, PROGRAMS
from planner.row_machines import link_bytes_per_second as link
from planner.rows import NotExpressible, case_of, measured_of
from planner.software import presets as programs
from planner.tables.results import validation_view


@pytest.fixture(scope="module")
def validation() -> Validation:
    return validate()


@pytest.fixture
def row():
    return copy.deepcopy(next(row for row in published_rows() if row["id"] == "sc21_t1_18B"))


def group(validation, name):
    return next(group for group in validation.groups if group.group == name)


# what the record says


@pytest.mark.parametrize(("name", "limit"), [("sc21_table1", 0.07), ("korthikanti_table5", 0.036), ("zero_bubble_table4", 0.08)])
def test_groups_that_nothing_was_fitted_to_are_met(validation, name, limit):
    found = group(validation, name)
    assert not found.calibrated
    assert found.step_time_mean_abs_error <= limit


def test_the_mean_over_untouched_groups(validation):
    untouched = validation.summary.untouched
    assert untouched.step_time_mean_abs_error <= 0.10
    assert abs(untouched.step_time_mean_error) <= 0.03
    assert 0.75 <= untouched.interval_coverage <= 0.97
    shown = next(part for part in validation_view(validation) if isinstance(part, str))
    rows, groups = untouched.interval_row_coverage, untouched.interval_coverage
    assert f"held for {rows:.1%} of the counted rows, and for {groups:.1%} as a mean over the groups" in shown
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"{rows * 100:.0f} % of the rows, {groups * 100:.0f} % as a mean over the groups" in readme


def test_four_of_five_untouched_rows_lie_in_their_interval(validation):
    rows = [row for row in validation.rows if row.complete and not row.calibrated and row.step_time_error_fraction is not None]
    inside = [row.predicted.step_seconds_interval[0] <= row.measured.step_seconds <= row.predicted.step_seconds_interval[1] for row in rows]
    assert len(rows) > 150
    assert sum(inside) >= 0.8 * len(inside)


def test_bloom_tuning_is_met_and_ranked(validation):
    """72 x 14336: the order of the plans, repeated runs of one plan averaged; 64 heads, 2,048 samples a step."""
    tuning = group(validation, "bloom_tuning")
    assert tuning.step_time_mean_abs_error <= 0.075
    assert abs(tuning.step_time_worst_error) <= 0.20
    rows = {row["id"]: row for row in published_rows()}
    plans: dict[tuple, list] = {}
    for found in validation.rows:
        if found.group != "bloom_tuning" or not found.complete or found.step_time_error_fraction is None:
            continue
        facts = rows[found.id]
        shape, parallel, batch = facts["model"], facts["parallel"], facts["batch"]
        if (shape["layers"], shape["hidden"], shape["heads"], batch["global_batch"]) != (72, 14336, 64, 2048):
            continue
        key = (parallel["tp"], parallel["pp"], parallel["dp"], batch["micro_batch"])
        plans.setdefault(key, []).append((found.predicted.step_seconds, found.measured.step_seconds))
    predicted = [sum(a for a, _ in runs) / len(runs) for runs in plans.values()]
    measured = [sum(b for _, b in runs) / len(runs) for runs in plans.values()]
    assert len(plans) >= 12
    assert kendall(predicted, measured) >= 0.6
    pick = predicted.index(min(predicted))
    assert measured[pick] / min(measured) - 1 <= 0.01


def test_several_plans_of_one_model_come_in_the_right_order(validation):
    ranks = [group(validation, name).rank_correlation for name in ("sc21_table2", "zero_bubble_table4", "zero_bubble_table8", "mosaic_llm_foundry")]
    assert sorted(ranks)[len(ranks) // 2 - 1] >= 0.9


# the document


def test_every_row_has_a_prediction_or_a_reason(validation):
    assert len(validation.rows) == len(published_rows())
    for found in validation.rows:
        assert (found.predicted.step_seconds is None) == (found.why_not is not None)
    assert sum(found.why_not is None for found in validation.rows) > 600


def test_what_can_not_be_planned_says_so(validation):
    reasons = {found.id: found.why_not for found in validation.rows if found.why_not}
    assert any("mixtures of experts" in reason for reason in reasons.values())
    assert any("offload" in reason for reason in reasons.values())
    assert any("no cluster preset" in reason for reason in reasons.values())


def test_calibrated_groups_are_told_apart(validation):
    names = {found.group for found in validation.groups if found.calibrated}
    assert names == set(accuracy().groups)
    assert validation.summary.untouched.num_groups + validation.summary.calibrated.num_groups >= 20


def test_the_summary_says_over_how_many_groups_its_means_are(validation):
    summary = validation.summary
    timed = {row.group for row in validation.rows if row.complete and row.step_time_error_fraction is not None}
    remembered = {row.group for row in validation.rows if row.memory_error_fraction is not None}
    assert (summary.num_step_time_groups, summary.num_memory_groups) == (len(timed), len(remembered))
    assert 0 < len(timed) < summary.num_groups and 0 < len(remembered) < summary.num_groups
    for kind in ("step_time", "memory"):
        parts, whole = (summary.untouched, summary.calibrated), getattr(summary, f"num_{kind}_groups")
        assert sum(getattr(part, f"num_{kind}_groups") for part in parts) == whole
        total = sum(getattr(part, f"num_{kind}_groups") * (getattr(part, f"{kind}_mean_abs_error") or 0.0) for part in parts)
        assert getattr(summary, f"{kind}_mean_abs_error") == pytest.approx(total / whole)
    assert f"step time over {len(timed)} and those of memory over {len(remembered)}." in str(validation_view(validation)[-1])


def test_the_document_survives_json(validation):
    text = documents.dumps(validation)
    again = documents.convert(json.loads(text), Validation, "validation", "meshwright.validation/1")
    assert again == validation


def test_errors_are_signed_fractions(validation):
    for found in validation.rows:
        if found.step_time_error_fraction is not None:
            assert found.step_time_error_fraction == pytest.approx(found.predicted.step_seconds / found.measured.step_seconds - 1)


def test_formula_outputs_are_not_shipped():
    names = {row["group"] for row in published_rows()}
    assert not names & {"zero_table1", "deepspeed_estimator", "korthikanti_fig1_memory", "korthikanti_fig7_memory"}
    assert all(row["source"]["ref"] for row in published_rows())


# rows of others


def test_a_row_without_measurement_gets_a_prediction_only(row):
    del row["measured"]
    del row["derived_step_seconds"]
    found = validate([row]).rows[0]
    assert found.predicted.step_seconds > 0
    assert found.predicted.peak_bytes > 0
    assert found.measured.step_seconds is None
    assert found.step_time_error_fraction is None
    assert validate([row]).summary.step_time_mean_abs_error is None


def test_a_prediction_never_depends_on_what_was_measured(row):
    before = predict_row(row)
    row["measured"] = {"iter_time_s": 1e-3, "tflops_per_gpu": 1e6}
    row["derived_step_seconds"] = 123.0
    assert predict_row(row) == before


def test_rows_from_a_file(tmp_path, row):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    assert validate(load_rows(path)).summary.num_rows == 1
    path.write_text(json.dumps({"rows": [row]}))
    assert len(load_rows(path)) == 1
    path.write_text("3")
    with pytest.raises(InputError, match="array"):
        load_rows(path)


def test_strange_rows_get_a_reason():
    strange = [None, 3, "x", [], {}, {"model": 3}, {"model": {"layers": -1}}, {"model": {"layers": 1e300, "hidden": 2, "heads": 1, "seq": 1}}]
    found = validate(strange)
    assert all(item.why_not for item in found.rows)


def test_no_mutation_of_a_row_breaks_the_code():
    rng = random.Random(3)
    values = [None, -1, 0, 1, 3, 7, 1e12, 1e300, float("nan"), float("inf"), "x", [], {}, True, 2.5]
    rows = [row for row in published_rows() if row["group"] in ("sc21_table1", "simumax_b200", "torchtitan_2024_12", "zero_bubble_table7")]
    for _ in range(400):
        row = copy.deepcopy(rng.choice(rows))
        for _ in range(rng.randint(1, 3)):
            part = rng.choice(["model", "cluster", "parallel", "batch", None])
            target = row.get(part) if part else row
            if isinstance(target, dict) and target:
                target[rng.choice(sorted(target))] = rng.choice(values)
        item = validate([row]).rows[0]
        assert (item.predicted.step_seconds is None) == (item.why_not is not None)


@pytest.mark.parametrize(
    ("section", "field", "value", "reason"),
    [
        ("model", "layers", None, "model.layers"),
        ("model", "moe", {"experts": 8}, "mixtures of experts"),
        ("parallel", "offload", "optimizer to CPU", "offloading"),
        ("parallel", "tp", 7, "parallel"),
        ("cluster", "gpu", "Cerebras", "no cluster preset"),
        ("batch", "global_batch", None, "global_batch"),
    ],
)
def test_the_reason_names_the_field(row, section, field, value, reason):
    row[section][field] = value
    row["batch"].pop("num_microbatches" if field == "global_batch" else "", None)
    with pytest.raises(NotExpressible, match=reason):
        predict_row(row)


def test_a_row_becomes_the_plan_that_it_describes(row):
    case = case_of(row)
    assert (case.decisions.tensor_parallel, case.decisions.data_parallel, case.decisions.num_microbatches) == (8, 32, 4)
    assert case.decisions.stages[0].recompute == "full"
    assert case.inputs.cluster.inter_node.bandwidth_bytes_per_second == pytest.approx(25e9)
    assert case.software.name == "megatron-2021"


def test_context_parallel_ranks_share_a_sample(row):
    row["parallel"].update(cp=2, dp=16)
    case = case_of(row)
    assert case.decisions.data_parallel == 32
    assert case.decisions.micro_batch_size == 4
    assert case.inputs.training.global_batch_size == 1024


def test_link_rates_in_words():
    assert link("8x 200Gb/s HDR InfiniBand per node", 8) == pytest.approx(25e9)
    assert link("400 Gb/s RDMA per GPU", 8) == pytest.approx(50e9)
    assert link("2 Tb/s RoCE per node", 8) == pytest.approx(31.25e9)
    assert link("not stated", 8) is None


def test_measured_times_in_whatever_unit(row):
    tokens = {"batch": {"global_batch": 8}, "model": {"seq": 100}, "cluster": {"gpu_count": 4}}
    assert measured_of({**tokens, "measured": {"tokens_per_s_per_gpu": 50.0}}).step_seconds == pytest.approx(4.0)
    assert measured_of({**tokens, "measured": {"samples_per_s_per_gpu": 0.5}}).step_seconds == pytest.approx(4.0)
    assert measured_of({**tokens, "measured": {"iter_time_s": 3.0, "samples_per_s": 1.0}}).step_seconds == 3.0
    assert measured_of(row).step_seconds == row["derived_step_seconds"]


def test_the_tables_of_patterns_name_what_exists():
    from planner.cluster import presets

    assert {preset for _, preset in GPU_PRESETS} <= set(presets())
    assert {program for _, program in PROGRAMS} <= set(programs())


def test_rank_correlations():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(2 / 3)
    assert kendall([1, 1, 1], [1, 2, 3]) is None
