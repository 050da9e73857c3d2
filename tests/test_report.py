from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from plans import make_dry_run, make_plan, make_run

from planner import cluster as clusters
from planner import model as models
from planner.cli.reporting import report as command
from planner.documents import dumps, write_text
from planner.errors import InputError
from planner.paradigms import paradigms
from planner.plan import Training, replace
from planner.published import (
    ErrorMeans,
    GroupErrors,
    MeasuredFigures,
    PredictedFigures,
    Validation,
    ValidationRow,
    ValidationSummary,
)
from planner.report import SweepPoint, figures, paradigms_report, report, sweep_report, validation_report
from planner.report.figures import Lane, gantt_figure
from planner.report.page import safe_json
from planner.timeline import Event, Timeline
from planner.timing import predict_timeline

EVIL = "<script>alert(1)</script></script><img src=x onerror=alert(2)>\u2028 \"quoted\" 'single' &amp; ${x} </title>"


class Page(HTMLParser):
    """What a browser would see: the elements with their attributes, the text outside of scripts, and the charts' data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.charts: list[dict[str, Any]] = []
        self.words = ""
        self.inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside = (tag, dict(attributes))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.words += data
        elif self.inside[1].get("type") == "application/json":
            self.charts.append(json.loads(data))

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def full_report(plan, **changes):
    run, actions = make_run(plan, **changes)
    return Page(report(plan, run, make_dry_run(plan), simulated=predict_timeline(plan.inputs, plan.decisions), measured=actions))


@pytest.fixture(scope="module")
def plan():
    return make_plan("tiny-gpt", tp=2, pp=2, dp=2, m=4, sizes=(4, 2), precision="fp32", runners_up=True)


@pytest.fixture(scope="module")
def page(plan):
    return full_report(plan, forward=1.5, memory=1.05)


def test_page_loads_nothing_and_holds_plotly_once(plan):
    text = report(plan, simulated=predict_timeline(plan.inputs, plan.decisions))
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags())
    assert all("src" not in attributes for tag, attributes in page.elements if tag == "script")
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'")
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert len(text) < 8_000_000
    assert [attributes["id"] for tag, attributes in page.elements if attributes.get("class") == "chart"] == [
        f"chart-{index}" for index in range(len(page.charts))
    ]


def bars(figure: dict[str, Any]) -> list[dict[str, Any]]:
    return [trace for trace in figure["data"] if trace["type"] == "bar"]


def test_memory_chart_stacks_what_is_predicted_traced_and_measured(plan, page):
    run, _ = make_run(plan, forward=1.5, memory=1.05)
    chart = page.charts[0]
    assert chart["layout"]["yaxis"]["title"]["text"] == "memory per GPU (MiB)"
    for source, memory in (
        ("predicted", plan.predictions.pipeline_ranks[1].memory),
        ("dry run", plan.predictions.pipeline_ranks[1].memory),
        ("measured", run.ranks[-1].memory),
    ):
        column = [trace for trace in bars(chart) if trace["offsetgroup"] == source]
        assert [trace["name"] for trace in column] == ["weights", "gradients", "optimizer", "activations", "buffers"]
        heights = [trace["y"][trace["x"].index("rank 1")] for trace in column]
        assert heights[3] == pytest.approx(memory.activations_bytes / 2**20)
        assert sum(heights) == pytest.approx(memory.total_bytes / 2**20)
        assert column[-1]["base"][1] + column[-1]["y"][1] == pytest.approx(memory.total_bytes / 2**20)


def test_capacity_is_drawn_where_it_is_near():
    near = Page(report(make_plan("llama-2-7b", "a100-40gb:8", tp=8))).charts[0]
    assert [shape for shape in near["layout"].get("shapes", [])]
    assert "capacity" in near["layout"]["annotations"][0]["text"]


def test_pipeline_chart_shows_predicted_above_measured_on_one_axis(plan, page):
    chart = page.charts[1]
    titles = [note["text"] for note in chart["layout"]["annotations"]]
    assert titles[0].startswith("predicted (bubble ") and titles[1].startswith("measured, last step (bubble ")
    assert chart["layout"]["yaxis"]["domain"][0] > chart["layout"]["yaxis2"]["domain"][1]
    assert chart["layout"]["xaxis"]["matches"] == "x2"
    forwards = [trace for trace in bars(chart) if trace["name"] == "forward"]
    assert [len(trace["x"]) for trace in forwards] == [8, 8]  # 2 pipeline ranks x 4 micro-batches, of one replica
    assert sum(forwards[1]["x"]) == pytest.approx(1.5 * sum(forwards[0]["x"]))
    assert len(bars(chart)) <= 2 * len(figures.ACTIONS)
    assert set(forwards[1]["y"]) == {"rank 0 (#0)", "rank 1 (#4)"}
    events = predict_timeline(plan.inputs, plan.decisions).events
    starts = sorted(event.start * 1e3 for event in events if event.kind == "F")
    assert sorted(forwards[0]["base"]) == pytest.approx(starts)


def test_many_actions_are_thinned_by_rank_and_said_so():
    plan = make_plan("gpt3", tp=8, pp=16, dp=1, m=512)
    simulated = predict_timeline(plan.inputs, plan.decisions)
    page = Page(report(plan, simulated=simulated))
    drawn = sum(len(trace["x"]) for trace in bars(page.charts[1]))
    assert 2000 < drawn <= figures.MAX_EVENTS * 1.2
    ranks = {label for trace in bars(page.charts[1]) for label in trace["y"]}
    assert {"rank 0", "rank 15"} <= ranks
    assert "Some of the ranks are shown" in page.words


def test_gantt_draws_no_waiting():
    events = (Event(0, "F", 0, 0, 0.0, 1.0), Event(0, "RECV_B", 0, 0, 1.0, 3.0), Event(0, "B", 0, 0, 3.0, 5.0))
    figure, complete = gantt_figure([Lane("one", Timeline(source="simulated", events=events), {0: "rank 0"})])
    assert complete and [trace.name for trace in figure.data] == ["forward", "backward"]


def test_words_of_the_page(plan, page):
    run, _ = make_run(plan, forward=1.5)
    for words in ("It fits", "tensor 2 × pipeline 2 × data 2", "Where the difference lies", "1.50 times the predicted", "Assumptions"):
        assert words in page.words
    assert "a larger bubble <b>than</b> the winner" in page.words  # as text
    assert "embedding + blocks 0–2" in page.words
    assert f"{run.summary.bubble_fraction:.1%}" in page.words
    assert re.search(r"bubble[^%]*%[^%]*%[+-]\d+\.\d points", page.words)


def test_losses_and_step_seconds(plan, page):
    run, _ = make_run(plan, forward=1.5)
    loss = next(chart for chart in page.charts if chart["layout"]["yaxis"]["title"].get("text", "").startswith("loss"))
    assert loss["data"][0]["y"] == [step.loss for step in run.steps]
    seconds = next(chart for chart in page.charts if chart["layout"]["yaxis"]["title"].get("text", "").startswith("step time"))
    assert bars(seconds)[0]["y"] == pytest.approx([step.seconds * 1e3 for step in run.steps])


def test_a_slow_first_step_does_not_flatten_the_others():
    figure = figures.step_seconds_figure([0, 1, 2], [9.0, 0.1, 0.12], 0.1, None)
    assert figure.layout.yaxis.range[1] == pytest.approx(150) and figure.layout.annotations[0].text == "9,000 ms"
    assert figures.step_seconds_figure([0, 1, 2], [0.15, 0.1, 0.12], 0.1, None).layout.yaxis.range is None


def test_measured_time_starts_at_the_first_forward_pass():
    plan = make_plan("tiny-gpt", pp=2)
    run, actions = make_run(plan)
    late = Timeline(source="measured", events=tuple(event._replace(start=event.start + 3.0, end=event.end + 3.0) for event in actions.events))
    chart = Page(report(plan, run, measured=late)).charts[1]
    assert min(start for trace in bars(chart) for start in trace["base"]) == pytest.approx(0.0, abs=1e-9)


def test_a_rehearsal_is_labelled_and_its_memory_and_losses_left_out(plan):
    page = full_report(plan, rehearsed=True)
    assert "rehearsed, with computation replaced by its predicted time" in page.words
    assert not any(trace["offsetgroup"] == "measured" for trace in bars(page.charts[0]))
    titles = [note["text"] for note in page.charts[1]["layout"]["annotations"]]
    assert titles[1].startswith("rehearsed (computation replaced")
    assert not any(chart["layout"]["yaxis"]["title"].get("text", "").startswith("loss") for chart in page.charts)


def test_a_plan_that_does_not_fit_says_so_first():
    page = Page(report(make_plan("gpt3", "a100-80gb:1")))
    assert "It does not fit" in page.words and "It fits" not in page.words
    assert ("section", {"class": "verdict bad"}) in page.elements


def test_an_empty_name_of_a_run_is_refused(plan, tmp_path):
    write_text(tmp_path / "plan.json", dumps(plan))
    for arguments, field in ((["", "-o"], "RUN"), (["--dry-run", "", "-o"], "--dry-run")):
        with pytest.raises(InputError, match=f"^{field}: ''"):
            command.main([str(tmp_path / "plan.json"), *arguments, str(tmp_path / "r.html")], standalone_mode=False)
    assert not (tmp_path / "r.html").exists()


def test_a_tight_plan_is_called_risky(plan):
    peak = plan.predictions.memory.total_bytes
    cluster = replace(plan.inputs.cluster, gpu=replace(plan.inputs.cluster.gpu, memory_bytes=round(peak / 0.98), reserved_bytes=0))
    tight = replace(plan, inputs=replace(plan.inputs, cluster=cluster))
    assert "Risky: the heaviest GPU uses 98.0% of its memory" in Page(report(tight)).words
    assert "Risky" not in Page(report(plan)).words


def test_run_of_another_plan_is_refused(plan):
    run, _ = make_run(make_plan("tiny-gpt", tp=2, pp=2, dp=2, m=4))
    with pytest.raises(InputError, match="run: plan_hash"):
        report(plan, run)
    with pytest.raises(InputError, match="dry run: plan_hash"):
        report(plan, dry_run=make_dry_run(make_plan("tiny-gpt", pp=2)))


def test_hostile_strings_stay_text():
    calm = make_plan("tiny-gpt", pp=2, runners_up=True)
    inputs = calm.inputs
    gpu = replace(inputs.cluster.gpu, name=EVIL)
    hostile = replace(
        calm,
        inputs=replace(inputs, model=replace(inputs.model, name=EVIL), cluster=replace(inputs.cluster, name=EVIL, gpu=gpu)),
        solver=replace(calm.solver, name=EVIL, status=EVIL, reasons=(EVIL,), runners_up=(replace(calm.solver.runners_up[0], why_not=EVIL),)),
    )
    time = replace(hostile.predictions.time, breakdown_seconds={EVIL: 1.0, "compute": 2.0})
    hostile = replace(hostile, predictions=replace(hostile.predictions, time=time))
    run, actions = make_run(hostile)
    run = replace(run, environment={EVIL: EVIL})
    actions = replace(actions, source=EVIL)
    page = Page(report(hostile, run, simulated=predict_timeline(inputs, calm.decisions), measured=actions, notes=[EVIL]))
    calm_run, calm_actions = make_run(calm)
    plain = Page(report(calm, calm_run, simulated=predict_timeline(inputs, calm.decisions), measured=calm_actions, notes=["note"]))
    for tag in ("script", "img", "title", "style", "section"):
        assert page.tags().count(tag) == plain.tags().count(tag)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.words.count(EVIL) >= 7
    for chart in page.charts:
        labels = [trace.get("name") or "" for trace in chart["data"]] + [note["text"] for note in chart["layout"].get("annotations", [])]
        assert not any("<" in label for label in labels)


def test_chart_data_can_not_end_its_block_nor_hold_what_json_has_not():
    figure = figures.loss_figure([1, 2, 3], [1.0, float("nan"), float("inf")])
    figure.update_layout(title="</script><!--")
    text = safe_json(figure)
    assert "<" not in text and "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["data"][0]["y"] == [1.0, None, None]
    assert json.loads(text)["layout"]["title"]["text"] == "</script><!--"


def test_paradigms_page():
    document = paradigms(models.load_model("tiny-gpt"), clusters.load_cluster("cpu"), Training(global_batch_size=16, sequence_length=64), 4, 1)
    measured = tuple(
        replace(row, name=f"{row.name} <b>", measured_step_seconds=1.0, measured_communication_bytes={"dp": 5 * 2**30}) if row.decisions else row
        for row in document.paradigms
    )
    page = Page(paradigms_report(replace(document, paradigms=measured)))
    (chart,) = page.charts
    assert [note["text"].split(" (")[0] for note in chart["layout"]["annotations"]] == [
        "sent per rank and step", "memory of the heaviest rank", "bubble", "step time",
    ]  # fmt: skip
    steps = {trace["name"]: trace for trace in bars(chart) if trace["xaxis"] == "x4"}
    shown = [row for row in document.paradigms if row.decisions]
    scale = 1e3 if "(ms)" in chart["layout"]["annotations"][3]["text"] else 1.0
    assert steps["predicted"]["x"] == pytest.approx([row.step_seconds * scale for row in shown])
    assert steps["measured"]["x"] == pytest.approx([scale] * len(shown))
    assert all("<" not in name for name in steps["predicted"]["y"])
    assert all(row.name in page.words for row in document.paradigms)


def validation_row(name: str, group: str, predicted: MeasuredFigures, measured: MeasuredFigures, **changes: Any) -> ValidationRow:
    error = None if None in (predicted.step_seconds, measured.step_seconds) else predicted.step_seconds / measured.step_seconds - 1
    figures = PredictedFigures(step_seconds=predicted.step_seconds, peak_bytes=predicted.peak_bytes)
    return ValidationRow(id=name, group=group, predicted=figures, measured=measured, step_time_error_fraction=error, **changes)


def test_validation_page():
    def figures(seconds: float | None = None, size: float | None = None) -> MeasuredFigures:
        return MeasuredFigures(step_seconds=seconds, peak_bytes=size)

    rows = (
        validation_row("a", "one", figures(11.0), figures(10.0)),
        validation_row(EVIL, EVIL, figures(4.0, 2**30), figures(5.0, 2**31), complete=False),
        validation_row("c", "one", figures(3.0, 2**30), figures()),
        validation_row("d", "one", figures(), figures(3.0), why_not="no GPU is named"),
    )
    group = GroupErrors(
        group=EVIL, calibrated=True, num_rows=1, step_time_mean_abs_error=0.2, step_time_mean_error=-0.2, step_time_worst_error=-0.21,
        interval_coverage=0.5, memory_mean_abs_error=None, rank_correlation=None,
    )  # fmt: skip
    means = ErrorMeans(
        num_groups=2, num_rows=3, step_time_mean_abs_error=0.153, step_time_mean_error=0.0, interval_coverage=None, memory_mean_abs_error=None,
        num_step_time_groups=1,
    )  # fmt: skip
    summary = ValidationSummary(
        num_rows=4, num_groups=2, step_time_mean_abs_error=0.153, memory_mean_abs_error=None, untouched=means, calibrated=means
    )
    page = Page(validation_report(Validation(rows=rows, groups=(group,), summary=summary)))
    step, memory = page.charts
    points = {trace["name"]: trace for trace in step["data"] if trace["mode"] == "markers"}
    assert (points["one"]["x"], points["one"]["y"], points["one"]["marker"]["symbol"]) == ([10.0], [11.0], ["circle"])
    assert len(points) == 2 and not any("<" in name for name in points)
    assert memory["data"][2]["marker"]["symbol"] == ["circle-open"]
    identity = step["data"][0]
    assert identity["x"] == identity["y"]
    assert [(trace["x"], trace["y"]) for trace in memory["data"] if trace["mode"] == "markers"] == [([2.0], [1.0])]
    for words in ("+10.0%", "-20.0%", "-21.0%", "15.3%", "mean absolute error, 1 groups", "no GPU is named", EVIL):
        assert words in page.words
    assert page.tags().count("img") == 0


def test_sweep_page():
    points = [SweepPoint(64, 20.0, 1e5, 0.5, 2**36), SweepPoint(128, 11.0, 1.8e5, 0.45, None), SweepPoint(256, None, None, None, None)]
    page = Page(sweep_report("A sweep & more", points, ["one note"]))
    (chart,) = page.charts
    assert [trace["x"] for trace in chart["data"]] == [[64, 128, 256]] * 3
    assert chart["data"][2]["y"] == [50.0, 45.0, None]
    assert "A sweep & more" in page.words and "one note" in page.words
