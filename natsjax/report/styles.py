"""How a method is named and drawn, in the picture and in the page; what of a row is drawn."""

import math
from typing import NamedTuple

from natsjax.report.results import Row


class MethodStyle(NamedTuple):
    """The page's style sheet has the same colours, and others for dark."""

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

RUN_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b5bd6", "#333333")
"""Of the runs in a comparison; the ninth has the first again, with other dashes."""

LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")


def style_of(method: str) -> MethodStyle:
    """Of a method; one that nobody knows gets its own name."""
    return METHOD_STYLES.get(method, MethodStyle(method, "#7b5bd6", "v"))


def is_drawable(row: Row, metric: str) -> bool:
    """Whether a row is a point: its numbers are finite, and its KV fraction has a logarithm."""
    return row[metric] is not None and math.isfinite(row[metric]) and 0 < row["kv_fraction"] < math.inf


def height(row: Row, metric: str) -> float:
    """On the y axis: perplexity, or accuracy in percent."""
    return 100 * row[metric] if metric == "accuracy" else row[metric]


def bounds(row: Row, metric: str) -> tuple[float, float]:
    """The interval's ends on the y axis, both NaN where the row has no finite interval."""
    ends = [row.get(f"{metric}_{end}") for end in ("low", "high")]
    low, high = [math.nan if end is None else float(end) * (100 if metric == "accuracy" else 1) for end in ends]
    return (low, high) if math.isfinite(low + high) else (math.nan, math.nan)
