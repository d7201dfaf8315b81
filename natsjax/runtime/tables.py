"""Tables as plain text, and numbers in them."""

import math
from collections.abc import Collection, Sequence


def text_table(lines: Sequence[Sequence[str]], *, text: Collection[int] = (0,)) -> str:
    """Formats an aligned plain-text table that is also a GitHub Markdown table.

    Args:
      lines: cells; the first line is the head.
      text: numbers of the columns that are aligned to the left; the others, of numbers, are aligned to the right.

    Returns:
      The lines, without a newline at the end.

    Example:
      >>> print(text_table([["run", "KV"], ["a", "15.0 %"]]))
      | run |     KV |
      | --- | -----: |
      | a   | 15.0 % |
    """
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if number in text else ">" for number in range(len(widths))]
    layout = list(zip(sides, widths, strict=True))
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in layout]
    rows = [[f"{cell:{side}{width}}" for cell, (side, width) in zip(line, layout, strict=True)] for line in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def significant(value: float | None, digits: int) -> str:
    """Formats with so many significant digits, and no exponent from 0.001 up to a million; "-" for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{max(decimals, 0)}f}"


def percent(value: float | None) -> str:
    """Formats a fraction as percent with three significant digits; "-" for None."""
    return "-" if value is None else f"{significant(100 * value, 3)} %"


def with_interval(value: str, low: str | None, high: str | None) -> str:
    """Appends an interval to a formatted number, if there is one."""
    return value if low is None or high is None else f"{value} [{low}, {high}]"
