"""Report of a run or of several: results of evaluations, drawn without measuring anything.

    python -m natsjax.report --workdir=DIR            writes DIR/report/ again
    python -m natsjax.report --workdir=A,B,C          compares runs, in ./report/

``natsjax.evaluate`` writes the report of its run with ``write_report``; ``natsjax.report.fields`` declares the fields
of rows, budget checks, samples and runs.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from natsjax.errors import UserError
from natsjax.report import page, picture, results, tasks, training
from natsjax.report.commands import evaluate_command, run_commands
from natsjax.report.results import Results
from natsjax.runs.workdir import Workdir
from natsjax.runtime.files import advice, reason, try_files

FILES = (results.ROWS_FILE, "pareto.png", "report.html", results.EVALUATION_FILE)
"""Files of a run's report."""


def write_report(
    workdir: Workdir,
    *,
    rows: Sequence[results.Row],
    budget_check: Mapping[str, Any] | None,
    samples: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
) -> list[Path]:
    """Writes rows, picture, page and all results, each file in one atomic step.

    Everything is rendered before the first file is replaced, so a failure in drawing leaves the previous report whole.

    Args:
      workdir: of the run; the files go into its ``report/``, and its metrics become the training curves.
      rows: the measured settings, at least one (``ROW_FIELDS``).
      budget_check: check of the budget (``BUDGET_CHECK_FIELDS``), or None for a run without roles.
      samples: held-out text for the role reader (``SAMPLE_FIELDS``).
      run: origin of the numbers (``RUN_FIELDS``).

    Returns:
      The paths of ``results.jsonl``, ``pareto.png``, ``report.html`` and ``evaluation.json``, in this order.

    Raises:
      ValueError: a field is missing, there are no rows, or a sample's roles do not fit its tokens.
      UserError: a file cannot be written, or ``metrics.jsonl`` cannot be read.
    """
    found = Results(list(rows), budget_check, list(samples), run)
    found.check()
    kept = results.stored(found)
    files = kept | _drawn(found, workdir)
    return results.write_files({workdir.report / name: files[name] for name in FILES})


def try_report(workdir: Workdir) -> None:
    """Tries, before a run is trained or measured, to write the files of ``write_report``.

    Raises:
      UserError: a file cannot be written, or that of the tasks cannot be read.
    """
    tasks.read_tasks(workdir.report)
    try:
        try_files([workdir.report / name for name in FILES])
    except OSError as error:
        is_refused = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        instead = "export the run to a place of your own (python -m natsjax.export) and evaluate that"
        raise UserError(
            f"--workdir={workdir.path}: the report file {error.filename} cannot be written: {reason(error)}; "
            f"{instead if is_refused and workdir.has_checkpoint() else advice(error)}."
        ) from error


def rewrite(workdir: str | os.PathLike[str]) -> list[Path]:
    """Draws the picture and the page of a run again, from the stored results of its evaluation.

    Args:
      workdir: of the run, or an export.

    Returns:
      The paths of ``pareto.png`` and ``report.html``, and of ``tasks.png`` where needles were asked for.

    Raises:
      UserError: there is no run, it was not evaluated, or a file cannot be read or written.
    """
    place = Workdir(workdir)
    place.read_config()
    try:
        found = results.read(place.report)
    except FileNotFoundError as error:
        command = evaluate_command(workdir)
        raise UserError(
            f"{place.path} has not been evaluated yet; {command} evaluates it and writes the report."
        ) from error
    files = _drawn(found, place)
    return results.write_files({place.report / name: files[name] for name in sorted(files)})


def _drawn(found: Results, workdir: Workdir) -> dict[str, bytes]:
    """Renders the picture and the page, with what ``natsjax.tasks`` has measured."""
    starts = training.read_starts(workdir)
    asked, layers = tasks.read_tasks(workdir.report), found.run["layers"]
    maps = tasks.picture(asked, layers)
    return ({} if maps is None else {tasks.PICTURE_FILE: maps}) | {
        "pareto.png": picture.pareto(found),
        "report.html": page.run_page(
            found,
            tasks=tasks.for_page(asked, layers),
            training=training.read_training(workdir),
            commands=run_commands(found, starts),
            changed=training.changed_settings(found.run["settings"]),
        ),
    }
