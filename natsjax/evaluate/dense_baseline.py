"""The dense baseline that NAtS is compared with: full attention in the same shape, trained on the same tokens."""

import dataclasses
import os

from natsjax.errors import UserError
from natsjax.runs.load import LoadedRun, load


def load_baseline(
    run: LoadedRun, baseline_workdir: str | os.PathLike[str], *, prepared_dir: str | os.PathLike[str] | None = None
) -> LoadedRun:
    """Loads the dense baseline of a NAtS run, or of a rival's.

    Args:
      run: the NAtS run.
      baseline_workdir: of the dense baseline.
      prepared_dir: folder of the prepared corpus of both; None: as ``natsjax.load`` finds it.

    Raises:
      UserError: it is no dense run on the same contexts (the message names what differs), or ``run`` has neither
        roles nor masks.
    """
    where = f"--baseline_workdir={os.fspath(baseline_workdir)}"
    if not (run.config.model.has_roles or run.config.model.has_masks):
        raise UserError(f"{where}: {run.workdir.path} {_without_roles(run)}; leave the flag out.")
    baseline = load(baseline_workdir, prepared_dir=prepared_dir)
    if set(baseline.config.model.layer_types) != {"dense"}:
        raise UserError(
            f"{where}: the run has model.layer_types = {baseline.config.model.layer_pattern}, not dense; name one "
            "with dense layers alone."
        )
    marks = _data_marks(run)
    for name, theirs in _data_marks(baseline).items():
        if (ours := marks[name]) != theirs:
            raise UserError(
                f"{where}: it is no dense baseline of {run.workdir.path}, for its {name} is {theirs} instead of "
                f"{ours}; name a run on the same data."
            )
    return baseline


def baseline_notes(run: LoadedRun, baseline: LoadedRun) -> list[str]:
    """Returns sentences about an uneven comparison: another shape, number of steps, or order of the contexts."""
    pairs = {name: (theirs, _shape(run)[name]) for name, theirs in _shape(baseline).items()}
    return [f"The dense baseline's {name} is {a}, this run's {b}." for name, (a, b) in pairs.items() if a != b]


def _without_roles(run: LoadedRun) -> str:
    """Describes a run that has no roles to compare with a dense baseline."""
    model = run.config.model
    if set(model.layer_types) == {"dense"}:
        return "is itself a dense run"
    return f"has model.layer_types = {model.layer_pattern}, and only a run with learned roles has a dense baseline"


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
