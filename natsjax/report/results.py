"""What an evaluation stores: rows, budget check, samples and the run, as plain dicts and lists, checked, written and
read.

* A *row* is one measured setting (`ROW_FIELDS`). `kv_fraction` is mean live keys per query divided by mean
  context, in (0, 1]; `kv_live_*` count keys, `[l][k]` per layer and KV head; `kv_allocated` is mean slots of a head
  that a KV buffer had, None where masks stood for it; `*_low` and `*_high` bound the 95 % bootstrap interval by
  document, None where there is none (fewer documents than `MIN_DOCUMENTS`, or all alike); `weights` says which weights
  ran. `by_position` (`POSITION_FIELDS`) has the same by how many tokens of its document a prediction could look back
  at: bucket i holds `edges[i] <= tokens < edges[i + 1]`, lists `[i]` with None where nothing was predicted.
* The *budget check* (docs/method.md 4; `BUDGET_CHECK_FIELDS`) sets the sampled, the argmax and the biased KV fraction
  against the budget. A run without roles has none.
* A *sample* is held-out text for the reader (`SAMPLE_FIELDS`): `title`, `tokens` (display text), `role_biases` (each
  one of a row), `roles` (`[role_bias][l][k]`, strings of one digit per token: "0" GLOBAL, "1" LOCAL, "2" SLIDING),
  `windows` (`[l]`, queries that read a SLIDING key) and `document_starts` (token indices).
* The *run* says where the numbers come from (`RUN_FIELDS`); `layers` is the kind of each layer, `settings` the config.

`evaluation.json` holds all four, so that a report can be drawn again without measuring; `results.jsonl` has the rows.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from natsjax.config import Config
from natsjax.errors import UserError, first_line
from natsjax.runtime.files import make_folder, try_files, unwritable, write_file

Row = Mapping[str, Any]

# fmt: off
ROW_FIELDS = (
    "method", "weights", "setting", "budget", "kv_fraction", "kv_live_mean", "kv_live_max", "kv_allocated",
    "mean_context", "kv_live_mean_per_head", "kv_live_max_per_head", "perplexity", "perplexity_low", "perplexity_high",
    "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "accuracy", "num_tokens", "num_documents",
    "by_position",
)
POSITION_FIELDS = (
    "edges", "tokens", "perplexity", "perplexity_low", "perplexity_high", "accuracy", "accuracy_low", "accuracy_high",
)
RUN_FIELDS = (
    "name", "workdir", "command", "config", "settings", "layers", "step", "num_parameters", "corpus", "context_length",
    "window", "show_accuracy", "evaluation", "versions", "device", "created",
)
BUDGET_CHECK_FIELDS = (
    "kv_budget", "sampled", "argmax", "biased", "role_bias", "tolerance", "met", "smallest_possible",
)
SAMPLE_FIELDS = ("title", "tokens", "role_biases", "roles", "windows", "document_starts")
# fmt: on

ROWS_FILE = "results.jsonl"
EVALUATION_FILE = "evaluation.json"
_FORMAT = 2

MIN_DOCUMENTS = 10
"""Fewer give no interval: resampling them says too little of the documents that were not drawn (docs/evaluate.md)."""

MIN_RESAMPLINGS = 40
"""Fewer give no interval: no resampling lies beyond its ends."""


class Results(NamedTuple):
    """What one evaluation found; the module says what the parts are.

    Attributes:
      rows: measured settings, at least one.
      budget check: None for a run without roles.
      samples: empty for a run without roles.
      run: where the numbers come from.
    """

    rows: Sequence[Row]
    budget_check: Mapping[str, Any] | None
    samples: Sequence[Mapping[str, Any]]
    run: Mapping[str, Any]

    @property
    def biased(self) -> Row | None:
        """The row that was biased to the budget."""
        if self.budget_check is None:
            return None
        return next((row for row in self.rows if is_biased(row, self.budget_check)), None)

    def check(self) -> None:
        """Looks for what the page could not draw.

        Raises:
          ValueError: a field is missing, there are no rows, or a sample's roles do not fit its tokens.
        """
        if not self.rows:
            raise ValueError("a report needs at least one row")
        parts: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [("run", self.run, RUN_FIELDS)]
        if self.budget_check is not None:
            parts.append(("budget_check", self.budget_check, BUDGET_CHECK_FIELDS))
        for index, row in enumerate(self.rows):
            parts.append((f"rows[{index}]", row, ROW_FIELDS))
            if row.get("by_position") is not None:
                parts.append((f"rows[{index}].by_position", row["by_position"], POSITION_FIELDS))
        parts += [(f"samples[{index}]", sample, SAMPLE_FIELDS) for index, sample in enumerate(self.samples)]
        for name, value, fields in parts:
            if missing := [field for field in fields if field not in value]:
                raise ValueError(f"{name} lacks {', '.join(missing)}")
        for index, sample in enumerate(self.samples):
            _check_roles(f"samples[{index}]", sample)


def is_biased(row: Row, budget_check: Mapping[str, Any]) -> bool:
    """Whether a row is the one that was biased to the budget."""
    role_bias = row["setting"].get("role_bias")
    return (
        row["method"] == "nats"
        and role_bias is not None
        and math.isclose(role_bias, budget_check["role_bias"], abs_tol=1e-9)
    )


def _check_roles(name: str, sample: Mapping[str, Any]) -> None:
    length, layers = len(sample["tokens"]), len(sample["windows"])
    heads = [roles for role_bias in sample["roles"] for layer in role_bias for roles in layer]
    if not length or not heads or any(len(roles) != length or set(roles) - set("012") for roles in heads):
        raise ValueError(f"{name} needs tokens, and {length} digits 0, 1 or 2 per role bias, layer and head")
    if len(sample["roles"]) != len(sample["role_biases"]) or any(
        len(role_bias) != layers for role_bias in sample["roles"]
    ):
        raise ValueError(f"{name} needs roles for {len(sample['role_biases'])} role biases of {layers} layers")


def stored(results: Results) -> dict[str, bytes]:
    """The files that keep the results, by name."""
    values = {"format_version": _FORMAT, **results._asdict()}
    lines = "".join(to_json(row) + "\n" for row in results.rows)
    return {ROWS_FILE: lines.encode(), EVALUATION_FILE: (to_json(values) + "\n").encode()}


def read(directory: Path) -> Results:
    """What an evaluation stored in its folder.

    Raises:
      FileNotFoundError: nothing that could be drawn is there.
      UserError: the file cannot be read, or another natsjax wrote it.
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
        results = results._replace(rows=[_without_small_intervals(_with_numbers(row)) for row in results.rows])
        results.check()
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); python -m natsjax.evaluate --workdir=… writes it again."
        ) from error
    return results


def _from_format_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """What natsjax 0.1 stored, under the names of today."""
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


def _with_numbers(row: Row) -> Row:
    """A row whose NaN and infinities are numbers again (``to_json``); words stay words."""
    return {name: _number(value) if name not in ("method", "weights") else value for name, value in row.items()}


def _without_small_intervals(row: Row) -> Row:
    """A row as it is written today: older ones had intervals of any number of documents."""
    if row["num_documents"] >= MIN_DOCUMENTS:
        return row

    def cleared(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: None if name.endswith(("_low", "_high")) else value for name, value in values.items()}

    by_position = row["by_position"]
    if by_position is not None:
        empty = [None] * len(by_position["tokens"])
        by_position = {name: empty if value is None else value for name, value in cleared(by_position).items()}
    return {**cleared(row), "by_position": by_position}


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {name: _number(item) for name, item in value.items()}
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
    """Does, before the work, what ``write_files`` will do after it, and undoes it.

    Raises:
      UserError: one cannot be written.
    """
    try:
        try_files(paths)
    except OSError as error:
        raise unwritable(f"the report file {error.filename}", error) from error


def to_json(value: Any) -> str:
    """Strict ASCII JSON on one line; NumPy scalars and arrays are accepted.

    NaN and the infinities become the strings "NaN", "Infinity" and "-Infinity", which `float` in Python and `Number` in
    JavaScript turn back into numbers.
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


def significant(value: float | None, digits: int) -> str:
    """A value with `digits` significant digits and no exponent from 0.001 up to a million; "-" for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{max(decimals, 0)}f}"


def with_interval(value: str, low: str | None, high: str | None) -> str:
    """A number for a table with its interval, where it has one."""
    return value if low is None or high is None else f"{value} [{low}, {high}]"


def percent(value: float | None) -> str:
    """A fraction as percent with three significant digits."""
    return "-" if value is None else f"{significant(100 * value, 3)} %"
