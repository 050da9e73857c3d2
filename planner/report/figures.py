"""The charts. One colour per memory category and per kind of action, the same in all of them.

Colours are the Okabe-Ito palette (distinct to colour-blind readers), darkened where white text stands on them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from planner.plan import Memory
from planner.report.page import FONT, INK, LINE, MUTED
from planner.report.text import byte_unit, second_unit
from planner.timeline import Event, Timeline

CATEGORIES = {"weights": "#2f6db5", "gradients": "#e69f00", "optimizer": "#8a5aa8", "activations": "#1b9e77", "buffers": "#9aa5b1"}
ACTIONS = {
    "F": ("forward", "#2f6db5"),
    "B": ("backward", "#1b9e77"),
    "I": ("backward, inputs", "#1b9e77"),
    "W": ("backward, weights", "#7fc8a9"),
    "REDUCE": ("gradient reduction", "#cc79a7"),
    "OPTIMIZER": ("optimizer step", "#4a5563"),
    "SEND": ("send", "#e69f00"),
}
PARTS = ("#2f6db5", "#e69f00", "#56b4e9", "#c9d1da", "#cc79a7", "#4a5563", "#8a5aa8", "#1b9e77", "#d55e00")
SERIES = ("#2f6db5", "#d55e00", "#1b9e77", "#8a5aa8", "#e69f00", "#56b4e9", "#4a5563", "#cc79a7")
PREDICTED, MEASURED, DRY_RUN = "#2f6db5", "#d55e00", "#8a5aa8"
MAX_EVENTS = 6000
"""Actions drawn of one timeline at most; beyond it fewer ranks are shown."""


def plain(text: str) -> str:
    """`text` for a chart's label: shown as it is, not read as markup."""
    return html.escape(text, quote=False)


def _layout(figure: go.Figure, height: int, **changes: object) -> go.Figure:
    axis = {
        "gridcolor": "#eef1f4",
        "zerolinecolor": LINE,
        "linecolor": LINE,
        "ticks": "outside",
        "tickcolor": LINE,
        "title": {"standoff": 10, "font": {"size": 13, "color": MUTED}},
    }
    figure.update_layout(
        template=None,
        height=height,
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 70, "r": 20, "t": 20, "b": 45},
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "font": {"color": MUTED}},
        hoverlabel={"font": {"family": FONT}},
        bargap=0.25,
        **changes,
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, automargin=True)
    return figure


class MemoryBar(NamedTuple):
    """The memory of one GPU from one source: "predicted", "dry run" or "measured"."""

    label: str
    source: str
    memory: Memory


def memory_figure(bars: Sequence[MemoryBar], capacity_bytes: float | None) -> go.Figure:
    """Stacked by category, the sources side by side for each label, against the GPU's capacity."""
    labels = list(dict.fromkeys(bar.label for bar in bars))
    sources = [source for source in ("predicted", "dry run", "measured") if any(bar.source == source for bar in bars)]
    largest = max((bar.memory.total_bytes for bar in bars), default=0)
    unit = byte_unit([largest])
    figure = go.Figure()
    for source in sources:
        held = {bar.label: bar.memory for bar in bars if bar.source == source}
        base = dict.fromkeys(held, 0.0)
        for category, colour in CATEGORIES.items():
            totals = [f"{memory.total_bytes / unit.size:.1f}" for memory in held.values()]
            values = {label: getattr(memory, f"{category}_bytes") / unit.size for label, memory in held.items()}
            figure.add_bar(
                x=list(values),
                y=list(values.values()),
                base=list(base.values()),
                name=category,
                legendgroup=category,
                showlegend=source == sources[0],
                offsetgroup=source,
                text=totals if category == "buffers" and len(sources) > 1 and len(labels) * len(sources) <= 24 else None,
                textposition="outside",
                textfont={"size": 11, "color": MUTED},
                cliponaxis=False,
                marker={
                    "color": colour,
                    "line": {"color": "white", "width": 0.5},
                    "pattern": {
                        "shape": {"dry run": ".", "measured": "/"}.get(source, ""),
                        "fillmode": "overlay",
                        "fgcolor": "white",
                        "size": 6,
                        "solidity": 0.2,
                    },
                },
                hovertemplate=f"%{{x}}, {source}<br>{category}: %{{y:.2f}} {unit.name}<extra></extra>",
            )
            base = {label: base[label] + values[label] for label in base}
    near = capacity_bytes is not None and largest > 0.2 * capacity_bytes
    if capacity_bytes is not None and near:
        figure.add_hline(y=capacity_bytes / unit.size, line={"color": "#b3372f", "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=1, xref="paper", y=capacity_bytes / unit.size, text=f"capacity {capacity_bytes / unit.size:.1f} {unit.name}", showarrow=False,
            xanchor="right", yanchor="bottom", font={"color": "#b3372f"},
        )  # fmt: skip
    top = max(largest, capacity_bytes if capacity_bytes is not None and near else 0) / unit.size
    figure.update_yaxes(title_text=f"memory per GPU ({unit.name})", range=[0, top * 1.1 or 1])
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=labels)
    if len(sources) == 1 and len(labels) <= 24:  # below the bars, where no capacity line runs through the totals
        beneath = {bar.label: f"{bar.memory.total_bytes / unit.size:.1f}" for bar in bars}
        figure.update_xaxes(tickvals=labels, ticktext=[f"{plain(label)}<br>{beneath[label]}" for label in labels])
    return _layout(figure, 400, barmode="group", bargroupgap=0.08)


class Lane(NamedTuple):
    """A timeline to draw: its title, and the ranks of it to show with their labels."""

    title: str
    timeline: Timeline
    ranks: Mapping[int, str]


def gantt_figure(lanes: Sequence[Lane]) -> tuple[go.Figure, bool]:
    """The lanes above each other on one time axis, and whether all of their ranks are shown.

    One bar trace for each kind of action and lane, however many actions there are. Waiting is left white.
    """
    shown = [_thinned(lane) for lane in lanes]
    complete = all(len(after.ranks) == len(before.ranks) for after, before in zip(shown, lanes, strict=True))
    end = max((event.end for lane in shown for event in lane.timeline.events), default=0.0)
    unit = second_unit([end])
    rows = [max(1, len(lane.ranks)) for lane in shown]
    figure = make_subplots(
        rows=len(shown), cols=1, shared_xaxes=True, row_heights=rows, vertical_spacing=0.12 if len(shown) > 1 else 0.0,
        subplot_titles=[plain(lane.title) for lane in shown],
    )  # fmt: skip
    seen: set[str] = set()
    for row, lane in enumerate(shown, start=1):
        by_kind: dict[str, list[Event]] = {}
        for event in lane.timeline.events:
            kind = "SEND" if event.kind.startswith("SEND") else event.kind
            if event.rank in lane.ranks and kind in ACTIONS and event.end > event.start:
                by_kind.setdefault(kind, []).append(event)
        num_events = sum(len(events) for events in by_kind.values())
        for kind, (name, colour) in ACTIONS.items():
            events = by_kind.get(kind, [])
            if not events:
                continue
            compute = kind in "FBIW"
            figure.add_bar(
                orientation="h",
                y=[lane.ranks[event.rank] for event in events],
                base=[event.start / unit.size for event in events],
                x=[(event.end - event.start) / unit.size for event in events],
                name=name,
                legendgroup=kind,
                showlegend=kind not in seen,
                offsetgroup="all",
                marker={"color": colour, "line": {"color": "white", "width": 0.6 if num_events < 1500 else 0}},
                text=[str(event.microbatch + 1) for event in events] if compute and num_events <= 300 else None,
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "white", "size": 11},
                constraintext="inside",
                customdata=[[event.stage, event.microbatch + 1, event.end / unit.size] for event in events],
                hovertemplate=f"%{{y}}: {name}<br>stage %{{customdata[0]}}, micro-batch %{{customdata[1]}}"
                f"<br>%{{base:.3f}} to %{{customdata[2]:.3f}} {unit.name}<extra></extra>",
                row=row,
                col=1,
            )
            seen.add(kind)
        figure.update_yaxes(row=row, col=1, type="category", categoryorder="array", categoryarray=list(lane.ranks.values())[::-1])
    _layout(figure, 120 + 26 * sum(rows) + 50 * (len(shown) - 1) if sum(rows) <= 40 else 1000, barmode="overlay")
    figure.update_layout(bargap=0.15, margin={"t": 56, "l": 90}, legend={"y": 1.0, "yref": "container", "yanchor": "top"})
    figure.update_xaxes(range=[0, end / unit.size * 1.005 or 1])
    figure.update_xaxes(title_text=f"time from the first forward pass ({unit.name})", row=len(shown), col=1)
    figure.update_annotations(font={"size": 13.5, "color": INK}, x=0, xanchor="left")
    return figure, complete


def _thinned(lane: Lane) -> Lane:
    """The lane with fewer ranks where it has more than MAX_EVENTS actions: the first, the last, and some between."""
    drawn = sum(event.rank in lane.ranks and not event.kind.startswith("RECV") for event in lane.timeline.events)
    if drawn <= MAX_EVENTS or len(lane.ranks) <= 2:
        return lane
    keep = max(2, len(lane.ranks) * MAX_EVENTS // drawn)
    ranks = list(lane.ranks)
    chosen = {ranks[round(index * (len(ranks) - 1) / (keep - 1))] for index in range(keep)}
    return lane._replace(ranks={rank: label for rank, label in lane.ranks.items() if rank in chosen})


def loss_figure(steps: Sequence[int], losses: Sequence[float | None]) -> go.Figure:
    figure = go.Figure()
    figure.add_scatter(
        x=list(steps), y=list(losses), mode="lines+markers" if len(steps) <= 60 else "lines", line={"color": MEASURED}, showlegend=False
    )
    figure.update_xaxes(title_text="step", tickformat="d", dtick=1 if len(steps) <= 15 else None)
    figure.update_yaxes(title_text="loss (mean over tokens)")
    return _layout(figure, 300)


def step_seconds_figure(
    steps: Sequence[int], seconds: Sequence[float], predicted: float | None, interval: tuple[float, float] | None, source: str = "measured"
) -> go.Figure:
    """Seconds of each step of a run, with the prediction and its interval.

    A first step that takes more than three times as long as the others, as warm-up does, is cut off, and its time written on it.
    """
    unit = second_unit([*seconds[1:], predicted or 0.0])
    figure = go.Figure()
    figure.add_bar(x=list(steps), y=[value / unit.size for value in seconds], name=source, marker={"color": MEASURED, "opacity": 0.85})
    if predicted is not None:
        figure.add_hline(y=predicted / unit.size, line={"color": PREDICTED, "width": 2})
        figure.add_scatter(x=[None], y=[None], mode="lines", line={"color": PREDICTED, "width": 2}, name="predicted")
    if interval is not None:
        figure.add_hrect(y0=interval[0] / unit.size, y1=interval[1] / unit.size, fillcolor=PREDICTED, opacity=0.12, line_width=0)
    figure.update_xaxes(title_text="step", tickformat="d", dtick=1 if len(steps) <= 15 else None)
    figure.update_yaxes(title_text=f"step time ({unit.name})", rangemode="tozero")
    rest = max([*seconds[1:], predicted or 0.0, interval[1] if interval else 0.0], default=0.0)
    if len(seconds) > 1 and seconds[0] > 3 * rest > 0:
        figure.update_yaxes(range=[0, 1.25 * rest / unit.size])
        text = f"{seconds[0] / unit.size:,.0f} {unit.name}"
        figure.add_annotation(x=steps[0], y=1, yref="paper", text=text, showarrow=False, yanchor="top", font={"color": "white", "size": 11})
    return _layout(figure, 300)


def breakdown_figure(parts: Mapping[str, float]) -> go.Figure:
    """What the step's time goes to on its slowest rank, as one stacked bar."""
    kept = {name: value for name, value in parts.items() if value > 0}
    unit = second_unit([sum(kept.values())])
    figure = go.Figure()
    for index, (name, value) in enumerate(kept.items()):
        label = plain(name.removesuffix("_seconds").replace("_", " "))
        share = value / sum(kept.values())
        figure.add_bar(
            orientation="h", y=[""], x=[value / unit.size], name=label, marker={"color": PARTS[index % len(PARTS)]},
            text=[f"{share:.0%}" if share >= 0.03 else ""], textposition="inside", insidetextanchor="middle", textangle=0,
            hovertemplate=f"{label}: %{{x:.3f}} {unit.name} ({share:.1%})<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=f"time of one step ({unit.name})")
    return _layout(figure, 170, barmode="stack").update_layout(legend={"traceorder": "normal"})


class ParadigmBar(NamedTuple):
    """One way of splitting training. Predicted and measured values; None where unknown."""

    name: str
    sent_bytes: tuple[float | None, float | None]
    peak_bytes: tuple[float | None, float | None]
    bubble_fraction: tuple[float | None, float | None]
    step_seconds: tuple[float | None, float | None]


def paradigms_figure(rows: Sequence[ParadigmBar]) -> go.Figure:
    """Bytes sent, memory, bubble and step time of each paradigm, predicted beside measured."""
    quantities = (("sent_bytes", "sent per rank and step"), ("peak_bytes", "memory of the heaviest rank"), ("bubble_fraction", "bubble"))
    panels = [*quantities, ("step_seconds", "step time")]
    titles, units = [], []
    for field, title in panels:
        known = [value for row in rows for value in getattr(row, field) if value is not None]
        if field.endswith("bytes"):
            unit = byte_unit(known)
        elif field.endswith("seconds"):
            unit = second_unit(known)
        else:
            unit = byte_unit([0])._replace(name="%", size=0.01)
        units.append(unit)
        titles.append(f"{title} ({unit.name})")
    figure = make_subplots(rows=1, cols=4, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.025)
    names = [plain(row.name) for row in rows]
    for column, ((field, _), unit) in enumerate(zip(panels, units, strict=True), start=1):
        for which, (source, colour) in ((1, ("measured", MEASURED)), (0, ("predicted", PREDICTED))):
            values = [getattr(row, field)[which] for row in rows]
            if any(value is not None for value in values):
                figure.add_bar(
                    orientation="h", y=names, x=[None if value is None else value / unit.size for value in values], name=source, legendgroup=source,
                    showlegend=column == 4, marker={"color": colour}, row=1, col=column,
                    hovertemplate=f"%{{y}}, {source}: %{{x:.3g}} {unit.name}<extra></extra>",
                )  # fmt: skip
    _layout(figure, 130 + 46 * len(rows), barmode="group")
    figure.update_layout(margin={"t": 76, "l": 150}, legend={"y": 1.0, "yref": "container", "yanchor": "top", "traceorder": "reversed"})
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


class Point(NamedTuple):
    """One prediction and its measurement, both in the unit of the chart."""

    group: str
    label: str
    predicted: float
    measured: float
    counted: bool = True
    """Whether it counts in the means; drawn hollow where it does not."""


def scatter_figure(points: Sequence[Point], quantity: str) -> go.Figure:
    """Predicted against measured on logarithmic axes, coloured by group, with the line where both are equal."""
    figure = go.Figure()
    values = [value for point in points for value in (point.predicted, point.measured) if value > 0]
    low, high = (min(values) / 1.3, max(values) * 1.3) if values else (1.0, 10.0)
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", line={"color": MUTED, "width": 1}, name="predicted = measured", hoverinfo="skip")
    figure.add_scatter(
        x=[low, high, high, low], y=[low * 0.9, high * 0.9, high * 1.1, low * 1.1], fill="toself", mode="none", name="within 10 %",
        fillcolor="rgba(93,107,122,0.10)", hoverinfo="skip",
    )  # fmt: skip
    for index, group in enumerate(dict.fromkeys(point.group for point in points)):
        mine = [point for point in points if point.group == group]
        symbol = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")[index // len(SERIES) % 8]
        figure.add_scatter(
            x=[point.measured for point in mine], y=[point.predicted for point in mine], mode="markers", name=plain(group),
            marker={"color": SERIES[index % len(SERIES)], "size": 9, "line": {"color": "white", "width": 1},
                    "symbol": [symbol if point.counted else f"{symbol}-open" for point in mine]},
            text=[plain(point.label) for point in mine],
            hovertemplate="%{text}<br>measured %{x:.4g}, predicted %{y:.4g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=f"measured {quantity}", type="log", range=_log_range(low, high), tickvals=_log_ticks(low, high))
    figure.update_yaxes(title_text=f"predicted {quantity}", type="log", range=_log_range(low, high), tickvals=_log_ticks(low, high))
    _layout(figure, 520)
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})
    return figure


class SweepPoint(NamedTuple):
    """A plan for one number of GPUs."""

    num_gpus: int
    step_seconds: float | None
    tokens_per_second: float | None
    model_flops_utilization: float | None
    peak_bytes: float | None


def sweep_figure(points: Sequence[SweepPoint]) -> go.Figure:
    """Step time, tokens per second and MFU over the number of GPUs."""
    unit = second_unit([point.step_seconds or 0.0 for point in points])
    gpus = [point.num_gpus for point in points]
    figure = make_subplots(rows=1, cols=3, subplot_titles=[f"step time ({unit.name})", "tokens per second", "MFU (%)"], horizontal_spacing=0.08)
    columns = (
        ([None if point.step_seconds is None else point.step_seconds / unit.size for point in points], SERIES[0], "log"),
        ([point.tokens_per_second for point in points], SERIES[2], "log"),
        ([None if point.model_flops_utilization is None else 100 * point.model_flops_utilization for point in points], SERIES[3], "linear"),
    )
    for column, (values, colour, scale) in enumerate(columns, start=1):
        figure.add_scatter(x=gpus, y=values, mode="lines+markers", line={"color": colour}, showlegend=False, row=1, col=column)
        known = [value for value in values if value]
        ticks = _log_ticks(min(known) / 1.2, max(known) * 1.2) if scale == "log" and known else None
        figure.update_yaxes(type=scale, rangemode="tozero" if scale == "linear" else "normal", tickvals=ticks, row=1, col=column)
    _layout(figure, 320)
    figure.update_layout(margin={"t": 40})
    figure.update_xaxes(type="log", title_text="GPUs", tickvals=gpus, ticktext=[str(count) for count in gpus])
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between the two; the powers alone over more than three decades."""
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _log_range(low: float, high: float) -> list[float]:
    return [math.log10(low), math.log10(high)]
