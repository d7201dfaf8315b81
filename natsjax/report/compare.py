"""Comparison of several runs in one page and one picture (``python -m natsjax.report --workdir=A,B,C``)."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from natsjax.config import Config
from natsjax.errors import UserError
from natsjax.policies.registry import label_of
from natsjax.report import page, picture, training
from natsjax.report.commands import evaluate_command, report_command, training_commands
from natsjax.report.fields import Row, page_columns
from natsjax.report.intervals import NO_RATIO, ratio_fields, slice_ratio_fields
from natsjax.report.results import Results, own_row, read, write_files
from natsjax.runs.workdir import Workdir
from natsjax.runtime.tables import percent, significant, text_table, with_interval


class _Run(NamedTuple):
    """One of the runs."""

    name: str
    workdir: Workdir
    config: Config
    results: Results | None


def compare(
    workdirs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    title: str = "",
    reference: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Compares runs: perplexity against KV, different settings, training curves, perplexity by position.

    A run that was not evaluated yet appears with its settings and training curves, and with the command that
    evaluates it.

    Args:
      workdirs: of the runs, or exports; two or more, each once.
      output: folder for the files; created if it is missing.
      title: of the page; empty: the names of the runs.
      reference: the run whose perplexity the others' are divided by, document by document; None: the first with dense
        layers alone.

    Returns:
      The paths of ``report.html`` and, if any run was evaluated, ``pareto.png``.

    Raises:
      UserError: there is no run in a folder, a folder is named twice, or a file cannot be read or written.

    Example:
      >>> natsjax.report.compare.compare(["runs/nats", "runs/dense"], "runs/report")
    """
    output = Path(os.path.expanduser(output))
    runs, compared_with = _read(workdirs, reference, output)
    title = title or _title([run.name for run in runs])
    values = _page_values(runs, compared_with)
    files = {output / "report.html": page.comparison_page(values, title)}
    if any(run.results is not None for run in runs):
        named = [(run.name, run.results) for run in runs]
        files[output / "pareto.png"] = picture.comparison(named, values["metric"], title)
    return write_files(files)


def comparison_table(
    workdirs: Sequence[str | os.PathLike[str]], *, reference: str | os.PathLike[str] | None = None
) -> str:
    """Formats a row of each evaluated run, which is also a GitHub Markdown table: what it was trained to be.

    That is learned roles at the budget of the run, or the layers as they are (full attention, trained windows).

    Args:
      workdirs, reference: as in ``compare``.

    Returns:
      The table, and below it what its ratios are; empty if no run was evaluated.

    Raises:
      UserError: as ``compare``.
    """
    runs, compared_with = _read(workdirs, reference)
    shown = [(run, row) for run in runs if (row := _own(run)) is not None]
    if not shown:
        return ""
    with_accuracy = any(run.results is not None and run.results.run["show_accuracy"] for run, _ in shown)
    head = ["run", "layers", "KV", "perplexity", *(["accuracy"] if with_accuracy else [])]
    cells = [head + ([] if compared_with is None else [f"{_ratio_column(compared_with)} [95 %]"])]
    for run, row in shown:
        cell = [
            run.name,
            run.config.model.layer_pattern,
            percent(row["kv_fraction"]),
            significant(row["perplexity"], 4),
        ]
        if with_accuracy:
            cell.append(percent(row["accuracy"]))
        if compared_with is not None:
            ratio, low, high = (row.get(name) for name in NO_RATIO)
            ends = (None if end is None else significant(end, 4) for end in (low, high))
            cell.append("1" if run is compared_with else with_interval(significant(ratio, 4), *ends))
        cells.append(cell)
    note = "" if compared_with is None else f"\n\n    {_ratio_note(compared_with)}"
    return text_table(cells, text=(0, 1)) + note


def _read(
    workdirs: Sequence[str | os.PathLike[str]], reference: str | os.PathLike[str] | None, output: Path | None = None
) -> tuple[list[_Run], _Run | None]:
    """Reads the runs, compared with one of them; returns the runs, and this one (None without any)."""
    places = [Workdir(path) for path in workdirs]
    _check(places, output)
    runs = [
        _Run(name, place, place.read_config(), _results(place))
        for name, place in zip(_unique_names(places), places, strict=True)
    ]
    number = _dense_reference(runs) if reference is None else _named_reference(runs, reference)
    runs = [_sliced(run, None if number is None else runs[number], _window(runs)) for run in runs]
    if number is None:
        return runs, None
    runs = [_compared(run, runs[number]) for run in runs]
    return runs, runs[number]


def _check(places: Sequence[Workdir], output: Path | None) -> None:
    """Checks that each run is given once, and that none loses its own report."""
    if len(places) < 2:
        raise UserError(f"{len(places)} run was given to compare; two or more were expected.")
    seen: dict[Path, Workdir] = {}
    for place in places:
        if place.path.resolve() in seen:
            raise UserError(f"--workdir names {place.path} twice; each run can be compared once.")
        seen[place.path.resolve()] = place
        if output is not None and output.resolve() == place.report.resolve():
            raise UserError(f"--output={output} holds the report of the run {place.path}; choose another folder.")


def _results(place: Workdir) -> Results | None:
    try:
        return read(place.report)
    except FileNotFoundError:
        return None


def _dense_reference(runs: Sequence[_Run]) -> int | None:
    """Finds the first evaluated run of dense layers alone, which the others are compared with; None without one."""
    return next((number for number, run in enumerate(runs) if _is_dense(run) and _own(run) is not None), None)


def _named_reference(runs: Sequence[_Run], reference: str | os.PathLike[str]) -> int:
    """Finds the run that the user named."""
    where = Path(os.path.expanduser(reference)).resolve()
    number = next((number for number, run in enumerate(runs) if run.workdir.path.resolve() == where), None)
    if number is None:
        raise UserError(f"--reference={os.fspath(reference)} is none of the runs in --workdir; name one of them.")
    if _own(runs[number]) is None:
        command = evaluate_command(runs[number].workdir.path)
        raise UserError(f"--reference={os.fspath(reference)} has no sums by document to compare with; run {command}.")
    return number


def _is_dense(run: _Run) -> bool:
    return set(run.config.model.layer_types) == {"dense"}


def _window(runs: Sequence[_Run]) -> _Run | None:
    """Returns the first evaluated run with trained windows, which slices are compared with; None without one."""
    for run in runs:
        model = run.config.model
        if "sliding" in model.layer_types and not (model.has_roles or model.has_masks) and _own(run) is not None:
            return run
    return None


def _own(run: _Run) -> Row | None:
    """Returns the row, with its sums by document, of what the run was trained to be; None if it was not evaluated."""
    if (results := run.results) is None:
        return None
    row = own_row(results.rows, results.budget_check)
    return None if row is None or row["by_document"] is None else row


def _ratio_column(reference: _Run) -> str:
    return "to dense" if _is_dense(reference) else f"to {reference.name}"


def _ratio_note(reference: _Run) -> str:
    of_what = "of full attention in" if _is_dense(reference) else "of"
    return (
        f'"{_ratio_column(reference)}" is the perplexity over that {of_what} {reference.name}, with a 95 % interval '
        "over documents; runs are compared on each document."
    )


def _compared(run: _Run, reference: _Run) -> _Run:
    """Fills in the ratio to the reference of rows that were measured on the very same documents; others have none."""
    base = _own(reference)
    if run.results is None or base is None:
        return run
    is_same_text = _text_of(run) == _text_of(reference)

    def compared(row: Row) -> Row:
        own, other = row["by_document"], base["by_document"]
        if not is_same_text or own is None or any(own[name] != other[name] for name in ("ids", "tokens")):
            return {**row, **NO_RATIO}
        samples, seed = reference.config.eval.bootstrap_samples, reference.config.train.seed
        ratio = ratio_fields(own["nll"], other["nll"], own["tokens"], num_samples=samples, seed=seed)
        return {**row, **ratio}

    return run._replace(results=run.results._replace(rows=[compared(row) for row in run.results.rows]))


def _sliced(run: _Run, reference: _Run | None, window: _Run | None) -> _Run:
    """Fills in the ratios of slices that are the same tokens in the reference, or in the run with trained windows."""
    if run.results is None:
        return run

    def compared(row: Row) -> Row:
        if row["by_slice"] is None or row["by_document"] is None:
            return row
        values = dict(row["by_slice"])
        for name, other in (("perplexity_ratio", reference), ("window_ratio", window)):
            values |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
            if other is not None and _text_of(run) == _text_of(other):
                values |= _slice_ratios(name, row, other)
        return {**row, "by_slice": values}

    return run._replace(results=run.results._replace(rows=[compared(row) for row in run.results.rows]))


def _slice_ratios(name: str, row: Row, other: _Run) -> dict[str, Any]:
    """Returns the ratio of the slices of a row to those of equal marks of another run, and its interval."""
    base = _own(other)
    if base is None or base["by_slice"] is None or row["by_document"]["ids"] != base["by_document"]["ids"]:
        return {}
    own, theirs = row["by_slice"], base["by_slice"]
    places = {mark: place for place, mark in enumerate(theirs["marks"])}
    nothing = [math.nan] * len(row["by_document"]["ids"])
    nll = [theirs["nll_by_document"][places[mark]] if mark in places else nothing for mark in own["marks"]]
    samples, seed = other.config.eval.bootstrap_samples, other.config.train.seed
    sides = own["nll_by_document"], nll, own["tokens_by_document"]
    return slice_ratio_fields(name, *sides, num_samples=samples, seed=seed)


def _text_of(run: _Run) -> tuple[Any, ...]:
    """Returns what is the same of runs that were measured on the same held-out tokens."""
    assert run.results is not None
    num_tokens = run.results.rows[0]["num_tokens"]
    return run.workdir.read_data_fingerprint(), run.config.data.context_length, num_tokens


def _unique_names(places: Sequence[Workdir]) -> list[str]:
    """Names the folders, with as many folders above them as needed to tell them apart."""
    paths = [place.path.resolve().parts[1:] for place in places]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(place.path.resolve()) for place in places]


def _title(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _page_values(runs: Sequence[_Run], reference: _Run | None) -> dict[str, Any]:
    """Collects the data of ``comparison.js``."""
    evaluated = [run.results for run in runs if run.results is not None]
    show_accuracy = bool(evaluated) and all(results.run["show_accuracy"] for results in evaluated)
    starts = {run.name: training.read_starts(run.workdir) for run in runs}
    commands = [line for run in runs for line in training_commands(starts[run.name], run.name)]
    named = None if reference is None or _is_dense(reference) else reference.workdir.path
    drawn = {
        "title": "Drawn again with",
        "command": report_command([run.workdir.path for run in runs], named),
        "note": "",
    }
    count = len(runs) - len(evaluated)
    columns = page_columns(
        [row for results in evaluated for row in results.rows], show_accuracy=show_accuracy, compared=True
    )
    for column in columns:
        if column["name"] == "perplexity_ratio" and reference is not None:
            column["column"] = _ratio_column(reference)
    left = f" {count} of them {'was' if count == 1 else 'were'} not evaluated yet." if count else ""
    return {
        "runs": [_run_values(run) for run in runs],
        "settings": _different_settings(runs),
        "notes": _notes(runs) + ([] if reference is None else [_ratio_note(reference)]),
        "evaluation": f"A comparison of {len(runs)} runs.{left}",
        "metric": "accuracy" if show_accuracy else "perplexity",
        "columns": columns,
        "commands": [*commands, drawn],
    }


def _run_values(run: _Run) -> dict[str, Any]:
    results = run.results
    return {
        "name": run.name,
        "layers": list(run.config.model.all_layer_types),
        "step": None if results is None else results.run["step"],
        "num_parameters": None if results is None else results.run["num_parameters"],
        "rows": [] if results is None else [_slim(row, run.config) for row in results.rows],
        "budget_check": None if results is None else results.budget_check,
        "training": training.read_training(run.workdir),
    }


def _slim(row: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Drops the fields of a row that the comparison does not draw, and adds the ``label`` of its method in the run."""
    label = label_of(row["method"], config.model.layer_types)
    return {name: value for name, value in page.slim(row).items() if not name.endswith("_per_head")} | {"label": label}


def _different_settings(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """Lists ``field`` and ``values``, one per run, of the fields that are not the same in all."""
    flat = [training.flat_settings(run.config.to_dict()) for run in runs]
    fields = {field: [settings[field] for settings in flat] for field in flat[0]}
    return [
        {"field": field, "values": values}
        for field, values in fields.items()
        if any(value != values[0] for value in values)
    ]


def _notes(runs: Sequence[_Run]) -> list[str]:
    """Collects notes for the reader of the comparison."""
    notes = [
        f"{run.name} has not been evaluated yet: {evaluate_command(run.workdir.path)} evaluates it."
        for run in runs
        if run.results is None
    ]
    notes += [
        f"{run.name} was evaluated by a version that did not keep sums by document, which others are compared by: "
        f"{evaluate_command(run.workdir.path)} evaluates it again."
        for run in runs
        if run.results is not None and _is_dense(run) and _own(run) is None
    ]
    evaluated = [run for run in runs if run.results is not None]
    if (different := _different_slices(evaluated)) is not None:
        notes.append(different)
    window = _window(evaluated)
    if window is not None and (base := _own(window)) is not None and base["by_slice"] is not None:
        notes.append(f'On slices, "the trained window" is {window.name}.')
    texts: dict[tuple[Any, ...], list[str]] = {}
    for run in evaluated:
        texts.setdefault(_text_of(run), []).append(run.name)
    if len(texts) > 1:
        groups = "; ".join(", ".join(names) for names in texts.values())
        notes.append(
            f"Not all were measured on the same held-out tokens ({groups}): their perplexities do not compare, bits "
            "per byte only where the text is the same."
        )
    return notes


def _different_slices(evaluated: Sequence[_Run]) -> str | None:
    """Describes slices that are not the same tokens in all runs; None where all are."""
    marks: dict[str, dict[str, list[str]]] = {}
    for run in evaluated:
        assert run.results is not None
        found = run.results.rows[0]["by_slice"]
        for name, mark in zip(found["slices"], found["marks"], strict=True) if found is not None else ():
            marks.setdefault(name, {}).setdefault(mark, []).append(run.name)
    different = [name for name, runs in marks.items() if len(runs) > 1]
    if not different:
        return None
    groups = "; ".join(", ".join(names) for names in marks[different[0]].values())
    return (
        f'{len(different)} slices of the same name, as "{different[0]}", are not the same tokens ({groups}), so there '
        "are no ratios between those: evaluate the runs with the same --rare, --short_context and dense baseline."
    )
