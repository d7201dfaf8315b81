"""The evaluation's report: `results.jsonl`, `pareto.png`, `report.html` and the table for the terminal.

This module only draws. `natsjax.evaluate` measures, and hands over plain dicts and lists:

* a *row* is one measured setting (`ROW_FIELDS`). `kv_fraction` is mean live keys per query divided by mean
  context, in (0, 1]; `kv_live_*` count keys, `[l][k]` per layer and KV head; `kv_allocated` is mean slots of a head
  that a KV buffer had, None where masks stood for it; `*_low` and `*_high` bound the
  95 % bootstrap interval by document; `weights` says which weights ran.
* the *contract* (METHOD.md 4; `CONTRACT_FIELDS`) sets the sampled, the argmax and the dialled KV fraction
  against the budget. A dense run has none.
* a *sample* is held-out text for the reader: `title`, `tokens` (display text), `roles` (`[l][k]`, strings
  of one digit per token: "0" GLOBAL, "1" LOCAL, "2" SLIDING), `window` and `document_starts` (token indices).
* the *run* says where the numbers come from (`RUN_FIELDS`).

The page embeds the data as JSON and draws it in the browser; it loads nothing from anywhere.
"""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from natsjax.errors import UserError

Row = Mapping[str, Any]

# fmt: off
ROW_FIELDS = (
    "method", "weights", "setting", "budget", "kv_fraction", "kv_live_mean", "kv_live_max", "kv_allocated",
    "mean_context", "kv_live_mean_per_head", "kv_live_max_per_head", "perplexity", "perplexity_low", "perplexity_high",
    "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "accuracy", "num_tokens", "num_documents",
)
RUN_FIELDS = (
    "name", "command", "config", "step", "num_parameters", "corpus", "context_length", "window",
    "show_accuracy", "evaluation", "natsjax_version", "created",
)
CONTRACT_FIELDS = (
    "kv_budget", "sampled", "argmax", "dialled", "dial", "tolerance", "met", "smallest_possible",
)
SAMPLE_FIELDS = ("title", "tokens", "roles", "window", "document_starts")
# fmt: on


class MethodStyle(NamedTuple):
    """How a method is named and drawn; the page's style sheet has the same colours, and others for dark."""

    label: str
    color: str
    marker: str


# Okabe and Ito's palette, which stays apart under the common colour-vision deficiencies.
METHOD_STYLES = {
    "nats": MethodStyle("NAtS", "#d55e00", "o"),
    "full": MethodStyle("full attention", "#333333", "D"),
    "sliding_window": MethodStyle("sliding window", "#0072b2", "s"),
    "streaming_llm": MethodStyle("StreamingLLM", "#009e73", "^"),
    "random": MethodStyle("random keys", "#777777", ">"),
    "h2o": MethodStyle("H2O", "#cc79a7", "P"),
    "snapkv": MethodStyle("SnapKV", "#e69f00", "<"),
}
_LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")
_LOG_PERPLEXITY_RATIO = 8.0  # a perplexity axis that spans more than this factor is logarithmic


def write_report(
    directory: Path,
    *,
    rows: Sequence[Row],
    contract: Mapping[str, Any] | None,
    sample: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    run: Mapping[str, Any],
    rows_path: Path | None = None,
) -> list[Path]:
    """Write the rows, the picture and the page, each in one atomic step.

    Everything is rendered before the first file is replaced, so a failure in drawing leaves the previous
    report whole. In the JSON, NaN and the infinities are the strings "NaN", "Infinity" and "-Infinity", which
    `float` in Python and `Number` in JavaScript turn back into numbers.

    Args:
        directory: where the files go; created when it is not there.
        rows: the measured settings, at least one (fields: `ROW_FIELDS`).
        contract: the budget contract, or None for a dense run (fields: `CONTRACT_FIELDS`).
        sample: one sample for the role reader, several, or None (fields: `SAMPLE_FIELDS`).
        run: where the numbers come from (fields: `RUN_FIELDS`).
        rows_path: where the rows go instead of `directory / "results.jsonl"`.

    Returns:
        The paths of the rows, the picture and the page, in this order.

    Raises:
        ValueError: a field is missing, there are no rows, or a sample's roles do not fit its tokens.
        UserError: a file cannot be written.
    """
    samples = [sample] if isinstance(sample, Mapping) else list(sample or ())
    _check(rows, contract, samples, run)
    directory = Path(directory)
    lines = "".join(_to_json(row) + "\n" for row in rows)
    files = {
        Path(rows_path or directory / "results.jsonl"): lines.encode(),
        directory / "pareto.png": _draw_pareto(rows, contract, run),
        directory / "report.html": _render_page(rows, contract, samples, run).encode(),
    }
    for path, content in files.items():
        _write_atomically(path, content)
    return list(files)


def format_table(rows: Sequence[Row], *, show_accuracy: bool | None = None) -> str:
    """Return perplexity against KV as an aligned plain-text table that is also a GitHub Markdown table.

    Rows on the same weights stand together; otherwise they keep their order. Intervals are 95 %, by document.

    Args:
        rows: the measured settings.
        show_accuracy: whether to add the accuracy column; None adds it when any row has an accuracy.

    Returns:
        The lines, without a newline at the end.
    """
    if show_accuracy is None:
        show_accuracy = any(row["accuracy"] is not None for row in rows)
    show_allocated = any(row["kv_allocated"] is not None for row in rows)
    numbers = ["budget", "KV", "live keys (max)"] + ["slots"] * show_allocated + ["perplexity [95 %]", "bits/byte"]
    header = ["method", "setting", "weights", *numbers]
    lines = [header + ["accuracy"] * show_accuracy]
    for weights in dict.fromkeys(row["weights"] for row in rows):
        lines += [_table_cells(row, show_accuracy, show_allocated) for row in rows if row["weights"] == weights]
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = "<<<" + ">" * (len(widths) - 3)  # text to the left, numbers to the right
    layout = list(zip(sides, widths, strict=True))
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in layout]
    aligned = [[f"{cell:{side}{width}}" for cell, (side, width) in zip(line, layout, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [aligned[0], rule, *aligned[1:]])


def _table_cells(row: Row, show_accuracy: bool, show_allocated: bool) -> list[str]:
    low, high = (_significant(row[f"perplexity_{end}"], 4) for end in ("low", "high"))
    setting = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["setting"].items()]
    cells = [
        _style(row["method"]).label,
        ", ".join(setting) or "-",
        row["weights"],
        _percent(row["budget"]),
        _percent(row["kv_fraction"]),
        f"{_significant(row['kv_live_mean'], 3)} ({row['kv_live_max']})",
        *([_significant(row["kv_allocated"], 3)] if show_allocated else []),
        f"{_significant(row['perplexity'], 4)} [{low}, {high}]",
        _significant(row["bits_per_byte"], 4),
    ]
    return [*cells, _percent(row["accuracy"])] if show_accuracy else cells


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{_significant(100 * value, 3)} %"


def _significant(value: float | None, digits: int) -> str:
    """Return a value with `digits` significant digits and no exponent from 0.001 up to a million."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{max(decimals, 0)}f}"


def _check(
    rows: Sequence[Row],
    contract: Mapping[str, Any] | None,
    samples: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
) -> None:
    if not rows:
        raise ValueError("a report needs at least one row")
    parts: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [("run", run, RUN_FIELDS)]
    if contract is not None:
        parts.append(("contract", contract, CONTRACT_FIELDS))
    parts += [(f"rows[{index}]", row, ROW_FIELDS) for index, row in enumerate(rows)]
    parts += [(f"sample[{index}]", sample, SAMPLE_FIELDS) for index, sample in enumerate(samples)]
    for name, value, fields in parts:
        if missing := [field for field in fields if field not in value]:
            raise ValueError(f"{name} lacks {', '.join(missing)}")
    for index, sample in enumerate(samples):
        length = len(sample["tokens"])
        heads = [roles for layer in sample["roles"] for roles in layer]
        if not length or not heads or any(len(roles) != length or set(roles) - set("012") for roles in heads):
            raise ValueError(f"sample[{index}] needs tokens, and {length} digits 0, 1 or 2 per layer and head")


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the report file {path} cannot be written: {error.strerror}.") from error


def _to_json(value: Any) -> str:
    """Return strict ASCII JSON on one line; NumPy scalars and arrays are accepted."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _render_page(
    rows: Sequence[Row],
    contract: Mapping[str, Any] | None,
    samples: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
) -> str:
    """Return the template with the run's name and the data in it."""
    labels = {method: style.label for method, style in METHOD_STYLES.items()}
    data = {"run": run, "rows": rows, "contract": contract, "samples": samples, "labels": labels}
    # In ASCII JSON without these three, no HTML parser finds `</script>` or `<!--`, whatever the tokens hold.
    embedded = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", _to_json(data))
    values = {"title": html.escape(_encodable(run["name"])), "data": embedded}
    template = resources.files("natsjax").joinpath("report_template.html").read_text(encoding="utf-8")
    # One pass, so that a placeholder inside the data stays what it is.
    return re.sub(r"\{\{(title|data)\}\}", lambda match: values[match[1]], template)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _draw_pareto(rows: Sequence[Row], contract: Mapping[str, Any] | None, run: Mapping[str, Any]) -> bytes:
    """Return the PNG of perplexity (or accuracy) against KV fraction, 1800 pixels wide.

    A thin line across marks full attention on weights that no row reads with NAtS: on NAtS weights, full
    attention is off their distribution and no anchor. Rows that are not finite are left out.
    """
    figure = Figure(figsize=(9, 5.8), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    metric = "accuracy" if run["show_accuracy"] else "perplexity"
    drawn = [row for row in rows if _is_drawable(row, metric)]
    line_styles = dict(zip(dict.fromkeys(row["weights"] for row in rows), itertools.cycle(_LINE_STYLES)))
    nats_weights = {row["weights"] for row in rows if row["method"] == "nats"}
    for row in drawn:
        if row["method"] == "full" and row["weights"] not in nats_weights:
            axes.axhline(_height(row, metric), color=METHOD_STYLES["full"].color, linewidth=0.8, alpha=0.6)
    marks = [] if contract is None else _draw_contract(axes, drawn, metric, contract)
    _draw_series(axes, drawn, metric, line_styles)
    _scale_axes(axes, drawn, metric)
    axes.set_title(_encodable(run["name"]), fontsize=14, loc="left", fontweight="bold", parse_math=False)
    _draw_legend(figure, drawn, line_styles, marks)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_series(axes: Axes, rows: Sequence[Row], metric: str, line_styles: Mapping[str, str]) -> None:
    series: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["kv_fraction"]):
        series.setdefault((row["method"], row["weights"]), []).append(row)
    for (method, weights), members in series.items():
        _, color, marker = _style(method)
        x = [row["kv_fraction"] for row in members]
        heights = [_height(row, metric) for row in members]
        low, high = zip(*(_bounds(row, metric) for row in members), strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.vlines(x, low, high, color=color, linewidth=1.2, alpha=0.7)
        axes.plot(x, heights, color=color, marker=marker, markersize=6.5, linestyle=line_styles[weights])


def _draw_contract(axes: Axes, rows: Sequence[Row], metric: str, contract: Mapping[str, Any]) -> list[Artist]:
    """Draw the budget, its tolerance and a ring around the dialled point; return what the legend names."""
    budget, tolerance = contract["kv_budget"], contract["tolerance"]
    axes.axvspan(budget * (1 - tolerance), budget * (1 + tolerance), color="#000000", alpha=0.07, linewidth=0)
    outcome = f"dialled to {_percent(contract['dialled'])}: {'met' if contract['met'] else 'missed'}"
    label = f"budget {_percent(budget)} ± {_significant(100 * tolerance, 2)} %, {outcome}"
    marks: list[Artist] = [axes.axvline(budget, color="#666666", linewidth=1, label=label)]
    for row in rows:
        dial = row["setting"].get("dial")
        if row["method"] == "nats" and dial is not None and math.isclose(dial, contract["dial"], abs_tol=1e-9):
            x, y = row["kv_fraction"], _height(row, metric)
            ring = axes.scatter(x, y, s=220, facecolors="none", edgecolors="#111111", linewidths=1.6, zorder=4)
            ring.set_label("the setting dialled to the budget")
            return [*marks, ring]
    return marks


def _draw_legend(figure: Figure, rows: Sequence[Row], line_styles: Mapping[str, str], marks: Sequence[Artist]) -> None:
    """Name the methods in a first column, the weights and the marks in a second one, under the axes."""
    left, right = [], []
    for method in dict.fromkeys(row["method"] for row in rows):
        label, color, marker = _style(method)
        left.append(Line2D([], [], color=color, marker=marker, linestyle="none", label=label))
    for weights in dict.fromkeys(row["weights"] for row in rows):
        label = textwrap.fill(_encodable(weights), 80)
        right.append(Line2D([], [], color="#333333", linestyle=line_styles[weights], label=label))
    blank = Line2D([], [], linestyle="none", label=" ")
    columns = zip(*itertools.zip_longest(left, [*right, *marks], fillvalue=blank), strict=True)
    handles = [handle for column in columns for handle in column]
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=11)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a path is no formula


def _scale_axes(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("KV fraction: live keys per query / context (log scale)", fontsize=11)
    fractions = [100 * row["kv_fraction"] for row in rows] or [100]
    ticks, (low, high) = _log_ticks(min(fractions) / 1.2, max(fractions) * 1.2)
    axes.set_xlim(low / 100, high / 100)
    axes.set_xticks([tick / 100 for tick in ticks], labels=[f"{tick:g} %" for tick in ticks])
    heights = [height for row in rows for height in (_height(row, metric), *_bounds(row, metric))]
    heights = [height for height in heights if math.isfinite(height)]
    name = "accuracy, %" if metric == "accuracy" else "held-out perplexity"
    if metric == "perplexity" and heights and max(heights) > _LOG_PERPLEXITY_RATIO * min(heights) > 0:
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
    """Return ticks at 1, 2 and 5 times powers of ten, and the limits, widened to a factor of at least 4."""
    widen = max(1.0, math.sqrt(4 * low / high))
    low, high = low / widen, high * widen
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high], (low, high)


def _style(method: str) -> MethodStyle:
    return METHOD_STYLES.get(method, MethodStyle(method, "#7b5bd6", "v"))


def _is_drawable(row: Row, metric: str) -> bool:
    return row[metric] is not None and math.isfinite(row[metric]) and 0 < row["kv_fraction"] < math.inf


def _height(row: Row, metric: str) -> float:
    return 100 * row[metric] if metric == "accuracy" else row[metric]


def _bounds(row: Row, metric: str) -> tuple[float, float]:
    """Return the interval's ends on the y axis, both NaN where the row has no finite interval."""
    ends = [row.get(f"{metric}_{end}") for end in ("low", "high")]
    low, high = [math.nan if end is None else float(end) * (100 if metric == "accuracy" else 1) for end in ends]
    return (low, high) if math.isfinite(low + high) else (math.nan, math.nan)
