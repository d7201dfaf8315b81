"""Pareto frontier of a sweep as a table and as a picture: quality against KV, over settings and their seeds.

A point is one setting (a budget, a KV penalty, or the dense baseline) over its seeds. Means of perplexities are
geometric: means of the loss. The bar around a mean is the range of its seeds, from the smallest to the largest, and no
confidence interval: a few seeds do not give one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from natsjax.policies.registry import FULL, NATS
from natsjax.report import picture
from natsjax.report.styles import style_of
from natsjax.runtime.tables import percent, significant, text_table, with_interval
from natsjax.sweep.runs import SweepRun, SweptSetting

_PARETO = style_of(NATS.name)
_DENSE = style_of(FULL.name)


@dataclasses.dataclass(frozen=True)
class ParetoPoint(SweptSetting):
    """Setting over its seeds.

    Attributes:
      kv_budget, kv_penalty: the setting.
      seeds: of the runs that finished.
      kv_fraction: mean over the runs, in (0, 1].
      kv_range: the smallest and the largest of them.
      quality: mean perplexity (geometric), or mean accuracy if that is the metric.
      quality_range: the smallest and the largest of them.
      over_dense: cost against the dense baseline, mean over the seeds that have one: perplexity over the baseline's,
        less 1 (geometric); or accuracy less the baseline's. None if there is no pair.
      over_dense_range: the smallest and the largest of them.
      num_pairs: seeds that have a dense baseline.
    """

    kv_budget: float | None
    kv_penalty: float | None
    seeds: tuple[int, ...]
    kv_fraction: float
    kv_range: tuple[float, float]
    quality: float
    quality_range: tuple[float, float]
    over_dense: float | None
    over_dense_range: tuple[float, float] | None
    num_pairs: int


def pareto_of(runs: Sequence[SweepRun]) -> list[ParetoPoint]:
    """Groups the finished runs by setting, in the order of the runs, the dense baseline last."""
    groups: dict[tuple[float | None, float | None], list[SweepRun]] = {}
    for run in drawable(runs):
        groups.setdefault((run.kv_budget, run.kv_penalty), []).append(run)
    baselines = {run.seed: run for members in groups.values() for run in members if run.is_dense}
    points = [_point(members, baselines) for members in groups.values()]
    return sorted(points, key=lambda point: point.is_dense)


def drawable(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Selects the finished runs with a finite result."""
    return [run for run in runs if run.status == "finished" and math.isfinite(quality(run))]


def quality(run: SweepRun) -> float:
    """Returns the result of a finished run: its perplexity, or its accuracy."""
    value = run.accuracy if run.show_accuracy else run.perplexity
    return math.nan if value is None else value


def _point(runs: Sequence[SweepRun], baselines: dict[int, SweepRun]) -> ParetoPoint:
    fractions = [run.kv_fraction or math.nan for run in runs]
    values = [quality(run) for run in runs]
    is_accuracy = runs[0].show_accuracy
    costs = [_cost(run, baselines[run.seed]) for run in runs if run.seed in baselines and not run.is_dense]
    over = None
    if costs:
        over = float(np.mean(costs) if is_accuracy else np.expm1(np.mean(np.log1p(costs))))
    return ParetoPoint(
        runs[0].kv_budget,
        runs[0].kv_penalty,
        tuple(run.seed for run in runs),
        float(np.mean(fractions)),
        (min(fractions), max(fractions)),
        float(np.mean(values) if is_accuracy else np.exp(np.mean(np.log(values)))),
        (min(values), max(values)),
        over,
        (min(costs), max(costs)) if costs else None,
        len(costs),
    )


def _cost(run: SweepRun, baseline: SweepRun) -> float:
    """Computes perplexity over the dense baseline's, less 1; or accuracy less the dense baseline's."""
    return quality(run) - quality(baseline) if run.show_accuracy else quality(run) / quality(baseline) - 1


# --------------------------------------------------------------------------------------------------------------- table


def format_runs(runs: Sequence[SweepRun]) -> str:
    """Formats a table with a line per run, plain text that is GitHub Markdown too."""
    accuracy = any(run.show_accuracy for run in runs)
    metric = "accuracy" if accuracy else "perplexity"
    interval = " [95 %]" * any(getattr(run, f"{metric}_low") is not None for run in runs)
    header = ["run", "seed", "KV", "sampled", "without role bias", f"{metric}{interval}"] + ["bits/byte"] * (
        not accuracy
    )
    lines = [[*header, "step", "state"]]
    for run in runs:
        shown = _formatter(accuracy)
        ends = (getattr(run, f"{metric}_{end}") for end in ("low", "high"))
        low, high = (None if end is None else shown(end) for end in ends)
        value = "-" if run.status == "failed" else with_interval(shown(quality(run)), low, high)
        state = run.status if run.met in (None, True) else "finished, budget missed"
        lines.append(
            [
                run.setting_text,
                str(run.seed),
                *(percent(x) for x in (run.kv_fraction, run.sampled, run.argmax)),
                value,
                *([] if accuracy else [significant(run.bits_per_byte, 4)]),
                "-" if run.step is None else str(run.step),
                state,
            ]
        )
    return text_table(lines, text=(0, len(lines[0]) - 1))


def format_pareto(points: Sequence[ParetoPoint], is_accuracy: bool) -> str:
    """Formats a table with a line per setting: mean over its seeds and their range; one seed has none."""
    shown = _formatter(is_accuracy)
    has_baseline = any(point.over_dense is not None for point in points)
    metric = "accuracy" if is_accuracy else "perplexity"
    lines = [
        ["setting", "seeds", "KV", f"mean {metric}", "smallest", "largest"]
        + ["to the dense baseline [range]"] * has_baseline
    ]
    for point in points:
        cells = [point.setting_text, str(len(point.seeds)), percent(point.kv_fraction)]
        ends = point.quality_range if len(point.seeds) > 1 else (None, None)
        cells += [shown(value) for value in (point.quality, *ends)]
        lines.append(cells + [_difference(point, is_accuracy)] * has_baseline)
    return text_table(lines, text=(0,))


def _formatter(is_accuracy: bool) -> Callable[[float | None], str]:
    return percent if is_accuracy else lambda value: significant(value, 4)


def _difference(point: ParetoPoint, is_accuracy: bool) -> str:
    if point.over_dense is None or point.over_dense_range is None:
        return "-"
    low, high = (f"{100 * value:+.1f}" if point.num_pairs > 1 else None for value in point.over_dense_range)
    return with_interval(f"{100 * point.over_dense:+.1f} {'points' if is_accuracy else '%'}", low, high)


# ------------------------------------------------------------------------------------------------------------- picture


def draw_pareto(runs: Sequence[SweepRun], title: str) -> bytes:
    """Draws the Pareto frontier, a PNG 1800 pixels wide.

    Each setting is a point at the means of its seeds, with their range. The runs are dots, crosses if they missed
    their budget. Faint lines are single runs under other role biases. The line across is the dense baseline, the band
    the range of its seeds.

    Args:
      runs: those that ended; those that failed are left out.
      title: of the picture.
    """
    known = drawable(runs)
    figure, axes = picture.new_figure(title)
    metric = "accuracy" if any(run.show_accuracy for run in known) else "perplexity"
    scale = 100 if metric == "accuracy" else 1
    points = pareto_of(known)
    handles = [*_draw_baseline(axes, points, scale), *_draw_points(axes, points, scale)]
    handles += _draw_runs(axes, [run for run in known if not run.is_dense], metric, scale)
    picture.scale_axes(axes, _extent(known, metric), metric)
    if not known:
        axes.text(0.5, 0.5, "no run has finished", transform=axes.transAxes, ha="center", fontsize=12)
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=11)
    return picture.as_png(figure)


def _draw_baseline(axes: Axes, points: Sequence[ParetoPoint], scale: float) -> list[Artist]:
    handles: list[Artist] = []
    for point in points:
        if point.is_dense:
            low, high = (scale * value for value in point.quality_range)
            axes.axhspan(low, high, color=_DENSE.color, alpha=0.1, linewidth=0)
            label = f"dense baseline, full attention: mean{_range_words([point])}"
            handles.append(
                axes.axhline(scale * point.quality, color=_DENSE.color, linewidth=1.2, linestyle="dashed", label=label)
            )
    return handles


def _draw_points(axes: Axes, points: Sequence[ParetoPoint], scale: float) -> list[Artist]:
    """Draws the means, joined in the order of their KV."""
    ours = sorted((point for point in points if not point.is_dense), key=lambda point: point.kv_fraction)
    if not ours:
        return []
    x, y = [point.kv_fraction for point in ours], [scale * point.quality for point in ours]
    y_low, y_high = (list(ends) for ends in zip(*(point.quality_range for point in ours), strict=True))
    x_low, x_high = (list(ends) for ends in zip(*(point.kv_range for point in ours), strict=True))
    axes.vlines(x, np.multiply(scale, y_low), np.multiply(scale, y_high), color=_PARETO.color, linewidth=1.6, zorder=3)
    axes.hlines(y, x_low, x_high, color=_PARETO.color, linewidth=1.6, zorder=3)
    with_budget = ours[0].kv_budget is not None
    label = "trained to each budget" if with_budget else "trained with the KV penalty beside it"
    style = {"color": _PARETO.color, "marker": _PARETO.marker, "markersize": 8, "linewidth": 2}
    axes.plot(x, y, **style, zorder=4)  # type: ignore[arg-type]
    if not with_budget:  # a budget is read from the axis
        for point, height in zip(ours, y, strict=True):
            at, beside = (point.kv_fraction, height), (11, -18)
            text = axes.annotate(f"{point.kv_penalty:g}", at, beside, textcoords="offset points", zorder=4.5)
            text.set(fontsize=11, color=_PARETO.color)
            text.set_path_effects([withStroke(linewidth=3, foreground="#ffffff")])
    return [Line2D([], [], **style, label=f"{label}: mean{_range_words(ours)}")]  # type: ignore[arg-type]


def _range_words(points: Sequence[ParetoPoint]) -> str:
    counts = [len(point.seeds) for point in points]
    if max(counts) == 1:
        return " (one seed)"
    return f" and range of {'up to ' if min(counts) < max(counts) else ''}{max(counts)} seeds"


def _draw_runs(axes: Axes, runs: Sequence[SweepRun], metric: str, scale: float) -> list[Artist]:
    """Draws single runs, and their curves over role biases."""
    handles: list[Artist] = []
    for run in runs:
        kept = [point for point in run.curve if math.isfinite(point[metric])]
        x, y = [point["kv_fraction"] for point in kept], [scale * point[metric] for point in kept]
        axes.plot(x, y, color=_PARETO.color, linewidth=0.8, alpha=0.3, zorder=1)
    if runs:
        handles.append(
            Line2D([], [], color=_PARETO.color, linewidth=0.8, alpha=0.5, label="one run under other role biases")
        )
    for met, label in ((True, "single runs"), (False, "single runs that missed their budget")):
        members = [run for run in runs if (run.met is not False) == met]
        if not members:
            continue
        style: dict[str, Any] = {"facecolors": "#ffffff", "edgecolors": _PARETO.color, "linewidths": 1.0, "s": 22}
        if not met:
            style |= {"edgecolors": "#000000", "marker": "X", "s": 40}
        x, y = [run.kv_fraction for run in members], [scale * quality(run) for run in members]
        handles.append(axes.scatter(x, y, **style, zorder=5, label=label))
    return handles


def _extent(runs: Sequence[SweepRun], metric: str) -> list[dict[str, Any]]:
    """Lists what must be visible, as rows for ``scale_axes``; of a dense baseline its height alone."""
    rows = [{"kv_fraction": run.kv_fraction, metric: getattr(run, metric)} for run in runs if not run.is_dense]
    rows += [{"kv_fraction": point["kv_fraction"], metric: point[metric]} for run in runs for point in run.curve]
    anywhere = rows[0]["kv_fraction"] if rows else 1.0
    rows += [{"kv_fraction": anywhere, metric: getattr(run, metric)} for run in runs if run.is_dense]
    return [row for row in rows if math.isfinite(row[metric])]
