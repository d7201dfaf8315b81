"""Names, colors and markers of methods and runs in picture and page, and the numbers of a row that are drawn."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from natsjax.policies.registry import NATS, POLICIES, ROLE_LABELS, label_of
from natsjax.report.results import Row


class MethodStyle(NamedTuple):
    """A method's name for people, its color on white, and its marker as Matplotlib names it."""

    label: str
    color: str
    marker: str


# On white and on black: of a method that the registry does not have, and of what stands beside NAtS.
_OTHER, _CONTRAST = ("#7b5bd6", "#b39cff"), ("#0072b2", "#56b4e9")

RUN_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b5bd6", "#333333")
"""Colors of the runs in a comparison; the ninth has the first again, with other dashes."""

_DARK_RUN_COLORS = ("#ff8b3e", "#4aa3e0", "#2cc79b", "#e59cc6", "#e0b040", "#9fd8ff", "#b39cff", "#d5dae0")

MANY_RUNS = 4
"""With more runs in a comparison, only the settings that were set to their budgets get intervals."""

LOG_RATIO = 8.0
"""A perplexity axis that spans more than this factor is logarithmic."""

LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")


def style_of(method: str, layers: Iterable[str] = ()) -> MethodStyle:
    """Returns the style of a method; one that the registry does not have gets its own name.

    Args:
      method: as in rows.
      layers: types of the layers of the run, for the label of its own roles.
    """
    if (entry := POLICIES.get(method)) is None:
        return MethodStyle(method, _OTHER[0], "v")
    return MethodStyle(label_of(method, layers), entry.color, entry.marker)


def shared_label(method: str, runs: Iterable[Sequence[str]]) -> str:
    """Returns the label of a method in a comparison: all that it has in the runs, given as types of layers.

    Learned roles have none of runs without roles.
    """
    named = [layers for layers in runs if method != NATS.name or not ROLE_LABELS.keys().isdisjoint(layers)]
    return " / ".join(dict.fromkeys(label_of(method, layers) for layers in named or [()]))


def css_colors(*, dark: bool = False) -> str:
    """Returns colors as CSS variables: ``--NAME`` of each method, ``--other``, ``--accent``, ``--run-0`` and so on."""
    colors = {name: entry.dark_color if dark else entry.color for name, entry in POLICIES.items()}
    colors |= {"other": _OTHER[dark], "accent": f"var(--{NATS.name})", "contrast": _CONTRAST[dark]}
    runs = _DARK_RUN_COLORS if dark else RUN_COLORS
    colors |= {f"run-{number}": color for number, color in enumerate(runs)}
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def is_drawable(row: Row, metric: str) -> bool:
    """Checks if a row is a point: its numbers are finite, and its KV fraction has a logarithm."""
    return row[metric] is not None and math.isfinite(row[metric]) and 0 < row["kv_fraction"] < math.inf


def height(row: Row, metric: str) -> float:
    """Returns a row's place on the y axis: perplexity, or accuracy in percent."""
    return 100 * row[metric] if metric == "accuracy" else row[metric]


def bounds(row: Row, metric: str) -> tuple[float, float]:
    """Returns the interval's ends on the y axis, both NaN where the row has no finite interval."""
    ends = [row.get(f"{metric}_{end}") for end in ("low", "high")]
    low, high = [math.nan if end is None else float(end) * (100 if metric == "accuracy" else 1) for end in ends]
    return (low, high) if math.isfinite(low + high) else (math.nan, math.nan)
