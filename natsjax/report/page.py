"""Page of a report, ``report.html``: one file that loads nothing; scripts in it draw the data, which is JSON.

``web/page.html`` is the frame of the pages, ``run.html`` and ``comparison.html`` are their bodies, with parts that both
have in ``position.html``, ``slices.html`` and ``figure.html``; ``style.css`` styles them. The scripts are joined in the
order of ``_SCRIPTS``.
"""

import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from natsjax.policies.registry import FULL, NATS, POLICIES
from natsjax.report.fields import ROW_FIELDS, Row, page_columns
from natsjax.report.results import Results, to_json
from natsjax.report.styles import LOG_RATIO, MANY_RUNS, RUN_COLORS, css_colors, shared_label

_SCRIPTS = {
    "run": ("charts.js", "curves.js", "slices.js", "reader.js", "tasks.js", "run.js"),
    "comparison": ("charts.js", "curves.js", "slices.js", "comparison.js"),
}


def run_page(
    results: Results,
    *,
    tasks: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    commands: Sequence[Mapping[str, str]] = (),
    changed: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """Renders the page of one run.

    Args:
      results: what was measured.
      tasks: retrieval tasks (``tasks.for_page``); None if none were asked for.
      training: its curves (``training.read_training``); None if nothing was logged.
      commands: that trained, evaluated and so on (``commands.run_commands``).
      changed: settings that are not the defaults (``training.changed_settings``).
    """
    show_accuracy = bool(results.run["show_accuracy"])
    values = {
        **results._asdict(),
        "rows": [slim(row) for row in results.rows],
        "columns": page_columns(results.rows, show_accuracy=show_accuracy),
        "run": {name: value for name, value in results.run.items() if name != "settings"},
        "tasks": tasks,
        "training": training,
        "commands": commands,
        "changed": changed,
        "metric": "accuracy" if show_accuracy else "perplexity",
    }
    return _page("run", str(results.run["name"]), values, [results.run["layers"]])


def slim(row: Row) -> dict[str, Any]:
    """Drops what no page draws: sums by document, and the marks of slices."""
    kept = {name: value for name, value in row.items() if name != "by_document"}
    if row["by_slice"] is not None:
        dropped = ("marks", "nll_by_document", "tokens_by_document")
        kept["by_slice"] = {name: value for name, value in row["by_slice"].items() if name not in dropped}
    return kept


def comparison_page(values: Mapping[str, Any], title: str) -> bytes:
    """Renders the page of several runs from the values of ``natsjax.report.compare``."""
    evaluated = [run["layers"] for run in values["runs"] if run["rows"]]
    return _page("comparison", title, values, evaluated or [run["layers"] for run in values["runs"]])


def _page(kind: str, title: str, values: Mapping[str, Any], layers: Sequence[Sequence[str]]) -> bytes:
    methods = {name: {"label": shared_label(name, layers), "marker": entry.marker} for name, entry in POLICIES.items()}
    values = {
        **values,
        "methods": methods,
        "own_roles": NATS.name,
        "full_attention": FULL.name,
        "trained_in": [name for name, entry in POLICIES.items() if entry.is_trained_in],
        "num_run_colors": len(RUN_COLORS),
        "many_runs": MANY_RUNS,
        "log_ratio": LOG_RATIO,
        "axes": {field.name: field.axis for field in ROW_FIELDS.values() if field.axis},
    }
    position = _filled("figure.html", part="position", chart="position-chart")
    parts = {
        "title": html.escape(title.encode("utf-8", "backslashreplace").decode("utf-8")),
        "style": _filled("style.css", colors=css_colors(), dark_colors=css_colors(dark=True)),
        "body": _filled(
            f"{kind}.html",
            curve=_filled("figure.html", part="curve", chart="curve"),
            position=_filled("position.html", figure=position),
            slices=_asset("slices.html"),
        ),
        "script": "\n".join(_asset(name) for name in _SCRIPTS[kind]),
        # In ASCII JSON without these three, no HTML parser finds `</script>` or `<!--`, whatever the tokens hold.
        "data": re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", to_json(values)),
    }
    size = len(_asset("page.html")) + sum(map(len, parts.values()))
    return _filled("page.html", **parts, size=f"{max(1, round(size / 1000)):,}").encode()


def _filled(name: str, **parts: str) -> str:
    """Fills the placeholders of a template, in one pass: one inside the data stays what it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset(name))


def _asset(name: str) -> str:
    return resources.files("natsjax.report").joinpath("web", name).read_text(encoding="utf-8")
