"""Files of an evaluation: its results checked, written and read.

The results are *rows* (one per measured setting), the *budget check*, *samples* of held-out text with their roles, and
information about the *run*: plain dicts and lists whose fields ``natsjax.report.fields`` declares. ``evaluation.json``
stores all four, so that a report can be drawn again without measuring; ``results.jsonl`` stores the rows.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from natsjax.config import Config
from natsjax.errors import UserError, first_line
from natsjax.policies.registry import FULL, NATS
from natsjax.report.fields import (
    BUDGET_CHECK_FIELDS,
    POSITION_FIELDS,
    ROW_FIELDS,
    RUN_FIELDS,
    SAMPLE_FIELDS,
    SLICE_FIELDS,
    Field,
    Row,
)
from natsjax.runtime.files import make_folder, try_files, unwritable, write_file

ROWS_FILE = "results.jsonl"
EVALUATION_FILE = "evaluation.json"
_FORMAT = 2
_NO_NAMES: Mapping[str, str] = {}


MIN_DOCUMENTS = 10
"""Fewest documents for an interval: resampling fewer tells too little about other documents (docs/evaluate.md)."""

MIN_RESAMPLINGS = 40
"""Fewest resamplings for an interval: with fewer, none is beyond its ends."""


class Results(NamedTuple):
    """Results of one evaluation.

    Attributes:
      rows: measured settings, at least one (``ROW_FIELDS``).
      budget_check: None for a run without roles (``BUDGET_CHECK_FIELDS``).
      samples: empty for a run without roles (``SAMPLE_FIELDS``).
      run: origin of the numbers (``RUN_FIELDS``).
    """

    rows: Sequence[Row]
    budget_check: Mapping[str, Any] | None
    samples: Sequence[Mapping[str, Any]]
    run: Mapping[str, Any]

    @property
    def biased(self) -> Row | None:
        """Row of the role bias that was set to the budget."""
        if self.budget_check is None:
            return None
        return next((row for row in self.rows if is_biased(row, self.budget_check)), None)

    def check(self) -> None:
        """Checks that the page can draw the results.

        Raises:
          ValueError: a field is missing, there are no rows, or a sample's roles do not fit its tokens.
        """
        if not self.rows:
            raise ValueError("a report needs at least one row")
        parts: list[tuple[str, Mapping[str, Any], Mapping[str, Field]]] = [("run", self.run, RUN_FIELDS)]
        if self.budget_check is not None:
            parts.append(("budget_check", self.budget_check, BUDGET_CHECK_FIELDS))
        for index, row in enumerate(self.rows):
            parts.append((f"rows[{index}]", row, ROW_FIELDS))
            if row.get("by_position") is not None:
                parts.append((f"rows[{index}].by_position", row["by_position"], POSITION_FIELDS))
            if row.get("by_slice") is not None:
                parts.append((f"rows[{index}].by_slice", row["by_slice"], SLICE_FIELDS))
        parts += [(f"samples[{index}]", sample, SAMPLE_FIELDS) for index, sample in enumerate(self.samples)]
        for name, value, fields in parts:
            if missing := [field for field in fields if field not in value]:
                raise ValueError(f"{name} lacks {', '.join(missing)}")
        for index, sample in enumerate(self.samples):
            _check_roles(f"samples[{index}]", sample)


def is_biased(row: Row, budget_check: Mapping[str, Any]) -> bool:
    """Checks if a row is that of the role bias that was set to the budget."""
    role_bias = row["setting"].get("role_bias")
    return (
        row["method"] == NATS.name
        and role_bias is not None
        and math.isclose(role_bias, budget_check["role_bias"], abs_tol=1e-9)
    )


def own_row(rows: Sequence[Row], budget_check: Mapping[str, Any] | None) -> Row | None:
    """Returns the row that a run is compared by: set to its budget, or that of full attention where it has no roles."""
    if budget_check is not None:
        return next((row for row in rows if is_biased(row, budget_check)), None)
    return next((row for row in rows if row["method"] == FULL.name), None)


def _check_roles(name: str, sample: Mapping[str, Any]) -> None:
    length, layers = len(sample["tokens"]), len(sample["windows"])
    heads = [roles for role_bias in sample["roles"] for layer in role_bias for roles in layer]
    # One window in files from before there could be several; the last axis is that of the SLIDING roles.
    num_windows = max(np.atleast_1d(of_layer).shape[-1] for of_layer in sample["windows"])
    known = {str(role) for role in range(2 + num_windows)}
    if not length or not heads or any(len(roles) != length or set(roles) - known for roles in heads):
        raise ValueError(f"{name} needs tokens, and {length} digits of roles per role bias, layer and head")
    if len(sample["roles"]) != len(sample["role_biases"]) or any(
        len(role_bias) != layers for role_bias in sample["roles"]
    ):
        raise ValueError(f"{name} needs roles for {len(sample['role_biases'])} role biases of {layers} layers")


def stored(results: Results) -> dict[str, bytes]:
    """Encodes the results as files, by name."""
    values = {"format_version": _FORMAT, **results._asdict()}
    lines = "".join(to_json(row) + "\n" for row in results.rows)
    return {ROWS_FILE: lines.encode(), EVALUATION_FILE: (to_json(values) + "\n").encode()}


def read(directory: Path) -> Results:
    """Reads the results that an evaluation stored in a folder.

    Raises:
      FileNotFoundError: the file is missing.
      UserError: the file cannot be read, or a newer natsjax wrote it.
    """
    path = Path(directory) / EVALUATION_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] == 1:
            values = _from_format_1(values)
        if values["format_version"] != _FORMAT:
            version = values["format_version"]
            raise UserError(f"{path} has format_version {version!r}, and this natsjax reads version {_FORMAT}.")
        results = Results(**{name: values[name] for name in Results._fields})
        results = results._replace(rows=[_without_small_intervals(_complete(row)) for row in results.rows])
        results.check()
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); python -m natsjax.evaluate --workdir=… writes it again."
        ) from error
    return results


def _from_format_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the fields that natsjax 0.1 stored."""
    names = {"contract": "budget_check", "dialled": "biased", "dial": "role_bias", "dials": "role_biases"}
    names["share"] = "fraction"  # of RandomKeys

    def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in fields.items()}

    values = renamed(values)
    check, run = values["budget_check"], values["run"]
    return {
        **values,
        "format_version": 2,
        "rows": [{**row, "setting": renamed(row["setting"])} for row in values["rows"]],
        "budget_check": None if check is None else renamed(check),
        "samples": [renamed(sample) for sample in values["samples"]],
        "run": {**run, "settings": Config.from_stored(run["settings"]).to_dict()},
    }


def _complete(row: Row) -> Row:
    """Completes a row: NaN and infinities are numbers again (``to_json``), fields newer than the file are None."""
    newer = {name: None for name, field in ROW_FIELDS.items() if field.nullable and name not in row}
    known = {name: restored(value) if name not in ("method", "weights") else value for name, value in row.items()}
    return known | newer


def _without_small_intervals(row: Row) -> Row:
    """Removes intervals of few documents, which older versions stored."""
    if row["num_documents"] >= MIN_DOCUMENTS:
        return row

    def cleared(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: None if name.endswith(("_low", "_high")) else value for name, value in values.items()}

    by_position = row["by_position"]
    if by_position is not None:
        empty = [None] * len(by_position["tokens"])
        by_position = {name: empty if value is None else value for name, value in cleared(by_position).items()}
    return {**cleared(row), "by_position": by_position}


def restored(value: Any, names: Mapping[str, str] = _NO_NAMES) -> Any:
    """Restores the numbers that ``to_json`` wrote as strings, and the present names of fields by the stored ones."""
    if isinstance(value, list):
        return [restored(item, names) for item in value]
    if isinstance(value, dict):
        return {names.get(name, name): restored(item, names) for name, item in value.items()}
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def write_files(files: Mapping[Path, bytes]) -> list[Path]:
    """Writes each file in one atomic step.

    Raises:
      UserError: one cannot be written.
    """
    for path, content in files.items():
        try:
            make_folder(path.parent)
            write_file(path, content)
        except OSError as error:
            raise unwritable(f"the report file {path}", error) from error
    return list(files)


def try_reports(paths: Iterable[Path]) -> None:
    """Tries, before the work, to write the files that ``write_files`` will write after it.

    Raises:
      UserError: one cannot be written.
    """
    try:
        try_files(paths)
    except OSError as error:
        raise unwritable(f"the report file {error.filename}", error) from error


def to_json(value: Any) -> str:
    """Encodes a value as strict ASCII JSON on one line; NumPy scalars and arrays are accepted.

    NaN and the infinities become the strings "NaN", "Infinity" and "-Infinity", which ``float`` in Python and
    ``Number`` in JavaScript turn back into numbers.
    """
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
