"""Results of an evaluation as a table for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from natsjax.report.fields import Field, Row, columns, has_interval
from natsjax.report.styles import style_of
from natsjax.runtime.tables import percent, significant, text_table, with_interval


def format_table(rows: Sequence[Row], *, show_accuracy: bool | None = None, layers: Sequence[str] = ()) -> str:
    """Formats perplexity against KV as an aligned plain-text table that is also a GitHub Markdown table.

    Rows on the same weights stand together; otherwise they keep their order. Intervals are 95 %, by document; a row
    without one has its number alone.

    Args:
      rows: the measured settings.
      show_accuracy: add the accuracy column; None adds it when any row has an accuracy.
      layers: types of the run's layers, which name its own roles; (): as learned roles.

    Returns:
      The lines, without a newline at the end.
    """
    if show_accuracy is None:
        show_accuracy = any(row["accuracy"] is not None for row in rows)
    return format_rows(rows, columns(rows, show_accuracy=show_accuracy), layers)


def format_rows(rows: Sequence[Row], fields: Sequence[Field], layers: Sequence[str] = ()) -> str:
    """Formats columns of rows as ``format_table`` does.

    Args:
      rows: with ``method``, ``weights`` and the fields.
      fields: with a column each.
      layers: as in ``format_table``.
    """
    lines = [[field.column + " [95 %]" * has_interval(field, rows) for field in fields]]
    for weights in dict.fromkeys(row["weights"] for row in rows):
        lines += [[_cell(field, row, layers) for field in fields] for row in rows if row["weights"] == weights]
    return text_table(lines, text=[n for n, field in enumerate(fields) if field.format in ("method", *_WORDS)])


def format_slices(row: Row) -> str:
    """Formats the slices of a measured setting as an aligned plain-text table that is also a Markdown table.

    Args:
      row: with ``by_slice``.

    Returns:
      The lines, without a newline at the end. Ratios without any value have no column.
    """
    values = row["by_slice"]
    shown = [name for name in _SLICE_COLUMNS if values[name] is not None]

    def with_ends(name: str) -> list[str]:
        ends = zip(*(values[f"{name}{end}"] for end in ("", "_low", "_high")), strict=True)
        return [
            with_interval(
                significant(middle, 4), *(None if end is None else significant(end, 4) for end in (low, high))
            )
            for middle, low, high in ends
        ]

    def head(name: str) -> str:
        return _SLICE_COLUMNS[name] + " [95 %]" * any(low is not None for low in values[f"{name}_low"])

    columns = [values["slices"], [str(total) for total in values["tokens"]], *map(with_ends, shown)]
    return text_table([["slice", "tokens", *map(head, shown)], *zip(*columns, strict=True)])


_SLICE_COLUMNS = {"perplexity": "perplexity", "perplexity_ratio": "to dense", "window_ratio": "to window"}


def _cell(field: Field, row: Row, layers: Sequence[str]) -> str:
    if field.format == "method":
        return style_of(row[field.name], layers).label
    text = _formatted(field, row[field.name])
    if field.interval == "shown":
        low, high = (row[f"{field.name}_{end}"] for end in ("low", "high"))
        ends = (None if end is None else _formatted(field, end) for end in (low, high))
        text = with_interval(text, *ends)
    return f"{text} ({row[field.aside]})" if field.aside else text


def _formatted(field: Field, value: Any) -> str:
    if isinstance(field.format, int):
        return significant(value, field.format)
    return (_WORDS | _NUMBERS)[field.format](value)


def format_setting(numbers: Mapping[str, Any]) -> str:
    """Joins the numbers of a policy."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in numbers.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items()) or "-"


_WORDS: dict[Any, Callable[[Any], str]] = {
    "setting": format_setting,
    "text": str,
}
_NUMBERS: dict[Any, Callable[[Any], str]] = {
    "integer": lambda value: "-" if value is None else str(value),
    "percent": percent,
}
