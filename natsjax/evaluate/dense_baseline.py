"""Other runs on the same data that a run is compared with: its dense baseline, and one with trained windows."""

import dataclasses
import os

from natsjax.errors import UserError
from natsjax.runs.load import LoadedRun, load


def load_baseline(
    run: LoadedRun, baseline_workdir: str | os.PathLike[str], *, prepared_dir: str | os.PathLike[str] | None = None
) -> LoadedRun:
    """Loads the dense baseline of a run: full attention in the same shape, trained on the same tokens.

    Args:
      run: the run, with roles, masks or trained windows.
      baseline_workdir: of the dense baseline.
      prepared_dir: folder of the prepared corpus of both; None: as ``natsjax.load`` finds it.

    Raises:
      UserError: it is no dense run on the same contexts (the message names what differs), or ``run`` is dense itself.
    """
    where = f"--baseline_workdir={os.fspath(baseline_workdir)}"
    if is_dense(run):
        raise UserError(f"{where}: {run.workdir.path} is itself a dense run; leave the flag out.")
    baseline = load(baseline_workdir, prepared_dir=prepared_dir)
    if not is_dense(baseline):
        raise UserError(
            f"{where}: the run has model.layer_types = {baseline.config.model.layer_pattern}, not dense; name one "
            "with dense layers alone."
        )
    _check_data(run, baseline, f"{where}: it is no dense baseline of {run.workdir.path}")
    return baseline


def load_window(
    run: LoadedRun, window_workdir: str | os.PathLike[str], *, prepared_dir: str | os.PathLike[str] | None = None
) -> LoadedRun:
    """Loads a run with trained windows, the rival that pays as little.

    Args:
      run: the run that is compared with it.
      window_workdir: of the run with windows.
      prepared_dir: as in ``load_baseline``.

    Raises:
      UserError: none of its layers is "sliding", it learned roles or masks, or it has other contexts.
    """
    where = f"--window_workdir={os.fspath(window_workdir)}"
    window = load(window_workdir, prepared_dir=prepared_dir)
    model = window.config.model
    if "sliding" not in model.layer_types or model.has_roles or model.has_masks:
        raise UserError(
            f'{where}: the run has model.layer_types = {model.layer_pattern}; name one with "sliding" layers, or '
            '"sliding" and dense ones.'
        )
    _check_data(run, window, f"{where}: it cannot be compared with {run.workdir.path}")
    return window


def is_dense(run: LoadedRun) -> bool:
    """Checks if all layers are dense."""
    return set(run.config.model.layer_types) == {"dense"}


def _check_data(run: LoadedRun, other: LoadedRun, clause: str) -> None:
    """Refuses a run on other contexts; the message begins with the clause."""
    marks = _data_marks(run)
    for name, theirs in _data_marks(other).items():
        if (ours := marks[name]) != theirs:
            raise UserError(f"{clause}, for its {name} is {theirs} instead of {ours}; name a run on the same data.")


def baseline_notes(run: LoadedRun, baseline: LoadedRun) -> list[str]:
    """Returns sentences about an uneven comparison: another shape, number of steps, or order of the contexts."""
    pairs = {name: (theirs, _shape(run)[name]) for name, theirs in _shape(baseline).items()}
    return [f"The dense baseline's {name} is {a}, this run's {b}." for name, (a, b) in pairs.items() if a != b]


def _data_marks(run: LoadedRun) -> dict[str, object]:
    """Returns the values that two runs on the same contexts have in common, the most telling first."""
    return {
        "data.context_length": run.config.data.context_length,
        # A recall task is its own vocabulary, without a fingerprint apart from the data's.
        "tokenizer fingerprint": getattr(run.data.vocabulary, "fingerprint", None),
        "data fingerprint": run.data.fingerprint,
    }


def _shape(run: LoadedRun) -> dict[str, object]:
    """Returns the values that a fair comparison has in common."""
    model = dataclasses.asdict(run.config.model)
    free = ("layer_types", "sliding_window", "remat")  # the first two are the difference, the last changes no number
    return {"step": run.step, "data.shuffle": run.config.data.shuffle} | {
        f"model.{name}": value for name, value in model.items() if name not in free
    }
