"""Draws the attention mask of a few tokens with their roles, as docs/method.md shows it.

    python -m benchmarks.method_figure --output=docs/method_roles.png [--roles=GSLSLSGSLLSSGLSL] [--window=2]

The left panel is the mask: a cell has the color of its key's role where the query in that row reads the key in that
column, so that the height of a column is the lifetime of its key. The right panel counts the keys that each query
reads. The lifetimes come from ``key_end_from_roles``, the function that training uses.
"""

import argparse
import pathlib

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pallas_kernels.nats_attention import GLOBAL, LOCAL, NO_END, SLIDING, key_end_from_roles

ROLES = {"G": GLOBAL, "L": LOCAL, "S": SLIDING}
COLORS = {GLOBAL: "#d55e00", LOCAL: "#56b4e9", SLIDING: "#c4c4c4"}  # told apart by color-blind readers and in grayscale
LABELS = {
    GLOBAL: "GLOBAL (G): every later query reads it",
    LOCAL: "LOCAL (L): up to the next GLOBAL token",
    SLIDING: "SLIDING (S): up to query s + {window}",
}
DROPPED = "#8a8a8a"


def parse_roles(text: str) -> np.ndarray:
    """Returns the role ids of a string of the letters G, L and S, int ``[s]``."""
    unknown = sorted(set(text) - set(ROLES))
    if unknown or not text:
        raise argparse.ArgumentTypeError(f"{text!r}: letters G, L and S were expected, one for each token")
    return np.array([ROLES[letter] for letter in text])


def parse_window(text: str) -> int:
    """Returns a window, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, 0 or more, was expected")
    return int(text)


def draw_mask(axes: Axes, role_ids: np.ndarray, key_end: np.ndarray) -> np.ndarray:
    """Draws the mask with a row for each query.

    Args:
      axes: to draw on.
      role_ids: int ``[s]``.
      key_end: int ``[s]``, exclusive.

    Returns:
      bool ``[t, s]``, the pairs of query and key that are visible.
    """
    length = len(role_ids)
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    visible = (key <= query) & (query < key_end)
    cells = np.where(visible, role_ids, np.nan)
    axes.imshow(cells, cmap=ListedColormap([COLORS[role] for role in range(len(COLORS))]), vmin=0, vmax=len(COLORS) - 1)
    rows, columns = np.nonzero((key <= query) & ~visible)
    axes.scatter(columns, rows, s=5, color=DROPPED)
    letters = {role: letter for letter, role in ROLES.items()}
    for token, role in enumerate(role_ids):
        axes.text(token, token, letters[int(role)], ha="center", va="center_baseline", fontsize=9, fontweight="bold")
    ends = ["∞" if end == NO_END else str(end) for end in key_end]
    axes.set_xticks(range(length), [f"{token}\n{end}" for token, end in enumerate(ends)])
    axes.set_yticks(range(length))
    axes.set_xticks(np.arange(-0.5, length), minor=True)
    axes.set_yticks(np.arange(-0.5, length), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("key s, and below it its key_end")
    axes.set_ylabel("query t")
    return visible


def draw_counts(axes: Axes, role_ids: np.ndarray, visible: np.ndarray) -> None:
    """Draws a bar for each query: the keys that it reads, by role, within those of full attention."""
    query = np.arange(len(role_ids))
    axes.barh(query, query + 1, height=0.82, color="none", edgecolor=DROPPED, linewidth=0.8)
    left = np.zeros(len(role_ids))
    for role, color in COLORS.items():
        count = visible[:, role_ids == role].sum(1)
        axes.barh(query, count, left=left, height=0.82, color=color)
        left += count
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", which="both", left=False, labelleft=False)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xticks(range(0, len(role_ids) + 1, max(1, len(role_ids) // 4)))
    axes.set_xlabel("keys that the query reads\n(outline: full attention)")


def draw(role_ids: np.ndarray, window: int) -> Figure:
    """Draws both panels.

    Args:
      role_ids: int ``[s]``.
      window: queries after its own that read a SLIDING key.
    """
    key_end = np.asarray(key_end_from_roles(jnp.asarray(role_ids)[None, None], window=window))[0, 0]
    figure = Figure(figsize=(7, 4.8), layout="constrained", facecolor="white")
    mask, counts = figure.subplots(1, 2, sharey=True, width_ratios=(2.5, 1))
    visible = draw_mask(mask, role_ids, key_end)
    draw_counts(counts, role_ids, visible)
    entries = [("s", 10, COLORS[role], label.format(window=window)) for role, label in LABELS.items()]
    entries.append((".", 4, DROPPED, "dropped from the KV cache"))
    legend = [
        Line2D([], [], linestyle="", marker=marker, markersize=size, color=color, label=label)
        for marker, size, color, label in entries
    ]
    mask.legend(handles=legend, loc="upper right", fontsize=9, frameon=False, borderaxespad=0, handletextpad=0.2)
    kv_fraction = visible.sum() / (len(role_ids) * (len(role_ids) + 1) / 2)
    counts.set_title(f"KV fraction {100 * kv_fraction:.0f} %", fontsize=10)
    return figure


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="FILE", help="the picture, a PNG file")
    parser.add_argument(
        "--roles", type=parse_roles, default="GSLSLSGSLLSSGLSL", help="a letter for each token (default: %(default)s)"
    )
    parser.add_argument("--window", type=parse_window, default=2, help="of SLIDING keys (default: %(default)s)")
    flags = parser.parse_args()
    draw(flags.roles, flags.window).savefig(flags.output, dpi=175)


if __name__ == "__main__":
    main()
