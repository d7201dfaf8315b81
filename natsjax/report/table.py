"""Perplexity against KV as a table for the terminal."""

from collections.abc import Sequence

from natsjax.report.results import Row, percent, significant, with_interval
from natsjax.report.styles import style_of


def format_table(rows: Sequence[Row], *, show_accuracy: bool | None = None) -> str:
    """Return perplexity against KV as an aligned plain-text table that is also a GitHub Markdown table.

    Rows on the same weights stand together; otherwise they keep their order. Intervals are 95 %, by document; a row
    without one has its number alone.

    Args:
        rows: the measured settings.
        show_accuracy: whether to add the accuracy column; None adds it when any row has an accuracy.

    Returns:
        The lines, without a newline at the end.
    """
    if show_accuracy is None:
        show_accuracy = any(row["accuracy"] is not None for row in rows)
    show_allocated = any(row["kv_allocated"] is not None for row in rows)
    interval = " [95 %]" * any(row["perplexity_low"] is not None for row in rows)
    numbers = ["budget", "KV", "live keys (max)"] + ["slots"] * show_allocated + [f"perplexity{interval}", "bits/byte"]
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
    ends = (row[f"perplexity_{end}"] for end in ("low", "high"))
    low, high = (None if end is None else significant(end, 4) for end in ends)
    setting = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["setting"].items()]
    cells = [
        style_of(row["method"]).label,
        ", ".join(setting) or "-",
        row["weights"],
        percent(row["budget"]),
        percent(row["kv_fraction"]),
        f"{significant(row['kv_live_mean'], 3)} ({row['kv_live_max']})",
        *([significant(row["kv_allocated"], 3)] if show_allocated else []),
        with_interval(significant(row["perplexity"], 4), low, high),
        significant(row["bits_per_byte"], 4),
    ]
    return [*cells, percent(row["accuracy"])] if show_accuracy else cells
