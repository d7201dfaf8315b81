"""`report.html`: one file that loads nothing from anywhere; data as JSON, drawn in the browser by the scripts here.

`page.html` is the frame, `run.html` and `comparison.html` what stands in it, `position.html` what both have of it;
`style.css` is the look of both. Scripts are joined in the order of `_SCRIPTS`: `charts.js` draws, the others say what.
"""

import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from natsjax.policies.registry import POLICIES
from natsjax.report.results import Results, to_json
from natsjax.report.styles import css_colors

_SCRIPTS = {
    "run": ("charts.js", "curves.js", "reader.js", "run.js"),
    "comparison": ("charts.js", "curves.js", "comparison.js"),
}


def run_page(
    results: Results,
    *,
    training: Mapping[str, Any] | None = None,
    commands: Sequence[Mapping[str, str]] = (),
    changed: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """The page of one run.

    Args:
      results: what was measured.
      training: its curves (``training.read_training``); None where nothing was logged.
      commands: that trained, evaluated and so on (``commands.run_commands``).
      changed: settings that are not the defaults (``training.changed_settings``).
    """
    values = {
        **results._asdict(),
        "run": {name: value for name, value in results.run.items() if name != "settings"},
        "training": training,
        "commands": commands,
        "changed": changed,
        "metric": "accuracy" if results.run["show_accuracy"] else "perplexity",
    }
    return _page("run", str(results.run["name"]), values)


def comparison_page(values: Mapping[str, Any], title: str) -> bytes:
    """The page of several runs; ``natsjax.report.compare`` says what ``values`` are."""
    return _page("comparison", title, values)


def _page(kind: str, title: str, values: Mapping[str, Any]) -> bytes:
    methods = {name: {"label": entry.label, "marker": entry.marker} for name, entry in POLICIES.items()}
    # In ASCII JSON without these three, no HTML parser finds `</script>` or `<!--`, whatever the tokens hold.
    data = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", to_json({**values, "methods": methods}))
    parts = {
        "title": html.escape(title.encode("utf-8", "backslashreplace").decode("utf-8")),
        "style": _asset("style.css")
        .replace("{{colors}}", css_colors())
        .replace("{{dark_colors}}", css_colors(dark=True)),
        "body": _asset(f"{kind}.html").replace("{{position}}", _asset("position.html")),
        "script": "\n".join(_asset(name) for name in _SCRIPTS[kind]),
        "data": data,
    }
    parts["size"] = f"{max(1, round((len(_asset('page.html')) + sum(map(len, parts.values()))) / 1000)):,}"

    # One pass, so that a placeholder inside the data stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html")).encode()


def _asset(name: str) -> str:
    return resources.files("natsjax.report").joinpath("web", name).read_text(encoding="utf-8")
