"""Picture of a report, ``pareto.png``: perplexity or accuracy against KV fraction, 1800 pixels wide."""

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from natsjax.policies.registry import FULL, NATS, POLICIES
from natsjax.report.fields import ROW_FIELDS, Row
from natsjax.report.results import Results, is_biased
from natsjax.report.styles import (
    LINE_STYLES,
    LOG_RATIO,
    MANY_RUNS,
    RUN_COLORS,
    MethodStyle,
    bounds,
    height,
    is_drawable,
    shared_label,
    style_of,
)
from natsjax.runtime.tables import percent, significant

_LEGEND_ROWS, _LEGEND_COLUMNS = 8, 3


class _Series(NamedTuple):
    """Points that are joined by a line."""

    rows: Sequence[Row]
    color: str
    marker: str
    line: str


def pareto(results: Results) -> bytes:
    """Draws the rows of one run, as a PNG.

    A thin line across marks full attention, but only on weights without a NAtS row: weights that were trained with
    roles have never seen full attention. Rows that are not finite are left out.
    """
    metric = "accuracy" if results.run["show_accuracy"] else "perplexity"
    rows = [row for row in results.rows if is_drawable(row, metric)]
    lines = dict(zip(dict.fromkeys(row["weights"] for row in results.rows), itertools.cycle(LINE_STYLES)))
    nats_weights = {row["weights"] for row in results.rows if row["method"] == NATS.name}
    series = [
        _Series(members, style_of(method).color, style_of(method).marker, lines[weights])
        for (method, weights), members in _grouped(rows).items()
    ]
    figure, axes = new_figure(results.run["name"])
    anchors = [row for row in rows if row["method"] == FULL.name and row["weights"] not in nats_weights]
    for row in anchors:
        axes.axhline(height(row, metric), color=style_of(FULL.name).color, linewidth=0.8, alpha=0.6)
    marks = [] if results.budget_check is None else _draw_budget_check(axes, rows, metric, results.budget_check)
    for one in series:
        _draw_series(axes, one, metric)
    scale_axes(axes, rows, metric)
    weights = [
        Line2D([], [], color="#333333", linestyle=lines[name], label=textwrap.fill(_encodable(name), 80))
        for name in dict.fromkeys(row["weights"] for row in rows)
    ]
    styles = [style_of(name, results.run["layers"]) for name in dict.fromkeys(row["method"] for row in rows)]
    methods = [_method_handle(style, style.color) for style in styles]
    _draw_legend(figure, methods, [*weights, *marks])
    return as_png(figure)


def comparison(runs: Sequence[tuple[str, Results | None]], metric: str, title: str) -> bytes:
    """Draws several runs, as a PNG: the color is the run, the marker the method.

    Args:
      runs: names and results, None for a run without an evaluation; ``compared_rows`` selects the rows.
      metric: "perplexity" or "accuracy".
      title: of the picture.
    """
    figure, axes = new_figure(title)
    drawn: list[Row] = []
    right: list[Artist] = []
    crowded = sum(results is not None for _, results in runs) > MANY_RUNS
    for number, (name, results) in enumerate(runs):
        if results is None:
            continue
        color = RUN_COLORS[number % len(RUN_COLORS)]
        line = LINE_STYLES[number // len(RUN_COLORS) % len(LINE_STYLES)]
        rows = [row for row in compared_rows(results) if is_drawable(row, metric)]
        drawn += rows
        width = 60 if len(runs) < _LEGEND_ROWS else 24
        right.append(Line2D([], [], color=color, linestyle=line, label=textwrap.fill(_encodable(name), width)))
        for (method, _), members in _grouped(rows).items():
            if method == FULL.name:
                axes.axhline(height(members[0], metric), color=color, linewidth=0.8, alpha=0.6)
            _draw_series(axes, _Series(members, color, style_of(method).marker, line), metric, intervals=not crowded)
        for row in rows:
            if results.budget_check is not None and is_biased(row, results.budget_check):
                if crowded:
                    axes.vlines(row["kv_fraction"], *bounds(row, metric), color=color, linewidth=1.2, alpha=0.7)
                ring = _draw_ring(axes, row, metric)
                if not any(mark.get_label() == ring.get_label() for mark in right):
                    right.append(ring)
    scale_axes(axes, drawn, metric)
    rings = [mark for mark in right if not isinstance(mark, Line2D)]
    right = [mark for mark in right if isinstance(mark, Line2D)] + rings
    layers = [results.run["layers"] for _, results in runs if results is not None]
    methods = [
        _method_handle(style_of(name)._replace(label=shared_label(name, layers)), "#333333")
        for name in dict.fromkeys(row["method"] for row in drawn)
    ]
    _draw_legend(figure, methods, right)
    return as_png(figure)


def compared_rows(results: Results) -> list[Row]:
    """Selects the rows to compare with other runs: those of what the run was trained for, or else every method.

    That is the role biases, or, of a run with "selective" layers, what these keep, and full attention.
    """
    methods = {row["method"] for row in results.rows}
    trained_in = {name for name in methods if name in POLICIES and POLICIES[name].is_trained_in}
    if not trained_in:
        return list(results.rows)
    methods = {NATS.name} if NATS.name in trained_in else {*trained_in, FULL.name}
    return [row for row in results.rows if row["method"] in methods]


def new_figure(title: str) -> tuple[Figure, Axes]:
    """Makes an empty picture."""
    figure = Figure(figsize=(9, 5.8), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(_encodable(title), fontsize=14, loc="left", fontweight="bold", parse_math=False)
    return figure, axes


def as_png(figure: Figure) -> bytes:
    """Encodes a picture as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Groups rows by method and weights, each group ascending by KV fraction."""
    series: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["kv_fraction"]):
        series.setdefault((row["method"], row["weights"]), []).append(row)
    return series


def _draw_series(axes: Axes, series: _Series, metric: str, *, intervals: bool = True) -> None:
    x = [row["kv_fraction"] for row in series.rows]
    heights = [height(row, metric) for row in series.rows]
    if intervals:
        low, high = zip(*(bounds(row, metric) for row in series.rows), strict=True)
        axes.fill_between(x, low, high, color=series.color, alpha=0.15, linewidth=0)
        axes.vlines(x, low, high, color=series.color, linewidth=1.2, alpha=0.7)
    axes.plot(x, heights, color=series.color, marker=series.marker, markersize=6.5, linestyle=series.line)


def _draw_budget_check(axes: Axes, rows: Sequence[Row], metric: str, budget_check: Mapping[str, Any]) -> list[Artist]:
    """Draws the budget, its tolerance and a ring around the biased point; returns the entries of the legend."""
    budget, tolerance = budget_check["kv_budget"], budget_check["tolerance"]
    axes.axvspan(budget * (1 - tolerance), budget * (1 + tolerance), color="#000000", alpha=0.07, linewidth=0)
    outcome = f"set to {percent(budget_check['biased'])}: {'met' if budget_check['met'] else 'missed'}"
    label = f"budget {percent(budget)} ± {significant(100 * tolerance, 2)} %, {outcome}"
    marks: list[Artist] = [axes.axvline(budget, color="#666666", linewidth=1, label=label)]
    for row in rows:
        if is_biased(row, budget_check):
            return [*marks, _draw_ring(axes, row, metric)]
    return marks


def _draw_ring(axes: Axes, row: Row, metric: str) -> Artist:
    x, y = row["kv_fraction"], height(row, metric)
    ring = axes.scatter(x, y, s=220, facecolors="none", edgecolors="#111111", linewidths=1.6, zorder=4)
    ring.set_label("the setting for the budget")
    return ring


def _method_handle(style: MethodStyle, color: str) -> Line2D:
    return Line2D([], [], color=color, marker=style.marker, linestyle="none", label=style.label)


def _draw_legend(figure: Figure, left: Sequence[Artist], right: Sequence[Artist]) -> None:
    """Draws columns under the axes, one of ``left`` and some of ``right``; the picture grows with them."""
    blank = Line2D([], [], linestyle="none", label=" ")
    rows = max(len(left), min(len(right), _LEGEND_ROWS), math.ceil(len(right) / _LEGEND_COLUMNS))
    parts = [left, *(right[begin : begin + rows] for begin in range(0, len(right), rows))]
    columns = list(zip(*itertools.zip_longest(*parts, fillvalue=blank), strict=True))
    handles = [handle for column in columns for handle in column]
    figure.set_figheight(figure.get_figheight() + 0.25 * max(0, rows - _LEGEND_ROWS))
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=len(columns), frameon=False, fontsize=11)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a path is no formula


def scale_axes(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """Sets limits, ticks and titles of the axes; rows need ``kv_fraction`` and the metric."""
    axes.set_xscale("log")
    axes.set_xlabel(f"{ROW_FIELDS['kv_fraction'].axis} (log scale)", fontsize=11)
    fractions = [100 * row["kv_fraction"] for row in rows] or [100]
    ticks, (low, high) = _log_ticks(min(fractions) / 1.2, max(fractions) * 1.2)
    axes.set_xlim(low / 100, high / 100)
    axes.set_xticks([tick / 100 for tick in ticks], labels=[f"{tick:g} %" for tick in ticks])
    heights = [value for row in rows for value in (height(row, metric), *bounds(row, metric))]
    heights = [value for value in heights if math.isfinite(value)]
    name = ROW_FIELDS[metric].axis
    if metric == "perplexity" and heights and max(heights) > LOG_RATIO * min(heights) > 0:
        name += " (log scale)"
        axes.set_yscale("log")
        ticks, limits = _log_ticks(min(heights) / 1.1, max(heights) * 1.1)
        axes.set_ylim(limits)
        axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.set_ylabel(name, fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=11)
    axes.grid(color="#000000", alpha=0.1)
    axes.spines[["top", "right"]].set_visible(False)


def _log_ticks(low: float, high: float) -> tuple[list[float], tuple[float, float]]:
    """Chooses ticks at 1, 2 and 5 times powers of ten, and limits that span at least a factor of 4."""
    widen = max(1.0, math.sqrt(4 * low / high))
    low, high = low / widen, high * widen
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high], (low, high)
