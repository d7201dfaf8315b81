"""Training of a run for every KV budget (or KV penalty) and seed, and their Pareto frontier.

    python -m natsjax.sweep --config=configs/recall.py --workdir=sweeps/recall --kv_budgets=0.05,0.1,0.2 --seeds=0,1,2
    python -m natsjax.sweep --config=configs/recall.py --workdir=sweeps/penalties --kv_penalties=0.01,0.1,1 --dense

After an interruption the same command keeps the finished runs and resumes the stopped one. More budgets, KV penalties
or seeds only add runs. docs/sweep.md describes the results and how to read them.
"""

import contextlib
import dataclasses
import gc
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence

import jax

from natsjax import train
from natsjax.config import Config
from natsjax.config_fields import resolve_paths
from natsjax.errors import UserError, first_line
from natsjax.report import compare
from natsjax.report.results import try_reports, write_files
from natsjax.runs.workdir import Workdir
from natsjax.runtime import distributed
from natsjax.runtime.log import logger
from natsjax.sweep.pareto import draw_pareto, format_pareto, format_runs, pareto_of
from natsjax.sweep.runs import (
    PlannedRun,
    SweepRun,
    check_data,
    check_existing,
    failed,
    finished,
    forget,
    measured,
    plan_runs,
    with_shared_corpus,
    write_record,
)

LINES_FILE = "sweep.jsonl"
PICTURE_FILE = "sweep.png"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Attributes:
      runs: all runs, seed by seed, with those that failed.
      paths: written files: ``sweep.jsonl``, with a line per run, ``sweep.png``, and the page that compares the runs.
    """

    runs: tuple[SweepRun, ...]
    paths: tuple[pathlib.Path, ...]

    @property
    def failures(self) -> list[SweepRun]:
        """Runs that failed."""
        return [run for run in self.runs if run.status == "failed"]

    def summary(self) -> str:
        """Formats the tables of runs and of means over seeds, the errors and the files, as text for the terminal."""
        parts = [format_runs(self.runs)]
        if points := pareto_of(self.runs):
            parts.append(format_pareto(points, any(run.show_accuracy for run in self.runs)))
        if self.failures:
            parts.append("\n".join(f"failed: {run.name}: {run.error}" for run in self.failures))
        parts.append("\n".join(f"wrote {path}" for path in self.paths))
        return "\n\n".join(parts)


def run(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    kv_budgets: Sequence[float] | None = None,
    kv_penalties: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    dense: bool = False,
    progress: bool = True,
) -> Sweep:
    """Trains and evaluates a run for every budget (or KV penalty) and seed, and draws the Pareto frontier.

    Every run is an ordinary workdir, ``workdir/NAME``, trained by ``natsjax.train.run`` in this process, one after
    another (a second process would not get the devices of an accelerator). Runs that were begun are resumed. All share
    the corpus ``workdir/corpus``, unless ``data.prepared_dir`` or ``data.mixture`` names others. Mistakes are found
    before the first training. If a run fails, its error is recorded, the others are trained, and the next call tries it
    again.

    Args:
      config: config of all runs; ``train.seed``, ``nats.kv_penalty_mode`` and ``nats.kv_budget`` or
        ``nats.kv_penalty`` are set for each.
      workdir: folder of the sweep, created if it is missing.
      kv_budgets: KV budgets, in (0, 1]; these or KV penalties.
      kv_penalties: fixed KV penalties, in nats per token for a KV fraction of 1.
      seeds: ``train.seed`` of the runs.
      dense: True to train also the dense baseline of each seed.
      progress: True to show progress bars.

    Returns:
      The runs and the files.

    Raises:
      UserError: a mistake in the lists, the config, the data or the folder; or this is one of several processes.
      Interrupted: after SIGINT or SIGTERM; the run that was training has saved its state.

    Example:
      >>> sweep = natsjax.sweep.run(config, "sweeps/recall", kv_budgets=[0.05, 0.1, 0.2], seeds=[0, 1, 2])
      >>> print(sweep.summary())
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise UserError(
            f"natsjax.sweep needs a single process, and this is one of {jax.process_count()}; on a cluster, train "
            "each run with train.py and compare them with python -m natsjax.report --workdir=A,B,…."
        )
    sweep = Workdir(workdir)
    directory = sweep.path
    train_config = dataclasses.replace(config.train, progress=progress and config.train.progress)
    config = resolve_paths(dataclasses.replace(config, train=train_config))
    runs = plan_runs(config, directory, kv_budgets, kv_penalties, seeds, dense)
    if sweep.config_file.exists():
        raise UserError(f"--workdir={directory}: it holds a run; give the sweep a folder of its own.")
    ended: dict[str, SweepRun] = {}
    with sweep.lock(), _terminated_as_interrupted():
        try:
            try_reports([directory / LINES_FILE, directory / PICTURE_FILE, sweep.report / "report.html"])
            check_existing(runs)
            runs = with_shared_corpus(runs, directory, progress)
            check_data(runs, progress)
            _train_all(runs, directory, ended)
        except KeyboardInterrupt as error:
            done = sum(run.status == "finished" for run in ended.values())
            logger.info(
                f"the sweep in {directory} stops with {done} of {len(runs)} runs finished; run the same command again "
                "to resume"
            )
            raise distributed.Interrupted from error
        known = tuple(ended[run.name] for run in runs)
        paths = [*_write(known, directory), *_write_page(known, directory)]
    return Sweep(known, tuple(paths))


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Handles SIGTERM as Ctrl-C while no training handles it."""

    def terminate(number, frame):
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _train_all(runs: Sequence[PlannedRun], directory: pathlib.Path, ended: dict[str, SweepRun]) -> None:
    """Trains the runs that are not finished, and writes the files after each.

    ``ended``, the runs that have ended by name, is filled here, so that the caller has it after an interruption.
    """
    for planned in runs:
        if (known := finished(planned)) is not None:
            ended[planned.name] = known
    if ended:
        logger.info(f"sweep: {len(ended)} of {len(runs)} runs are finished")
    left = [planned for planned in runs if planned.name not in ended]
    for number, planned in enumerate(left):
        time_left = _time_left([run.seconds for run in ended.values()], len(left) - number)
        logger.info(f"sweep: run {runs.index(planned) + 1} of {len(runs)}, {planned.name}{time_left}")
        ended[planned.name] = _train_one(planned)
        _write([ended[run.name] for run in runs if run.name in ended], directory)


def _train_one(planned: PlannedRun) -> SweepRun:
    """Trains and evaluates a run; a failure is also a result."""
    whole = not Workdir(planned.workdir).has_checkpoint()
    began = time.monotonic()
    forget(planned)
    try:
        evaluation = train.run(planned.config, planned.workdir)
    except UserError as error:
        found = failed(planned, str(error))
    except jax.errors.JaxRuntimeError as error:  # for example too little memory
        found = failed(planned, f"the program failed on the device: {first_line(error)}.")
    else:
        found = measured(planned, evaluation, time.monotonic() - began if whole else None)
    if found.error is not None:
        logger.info(f"sweep: {planned.name} failed: {found.error}")
    write_record(found, planned.config)
    # Each run compiles a step of its own, and the programs of a process are limited (65530 mappings on Linux).
    jax.clear_caches()
    gc.collect()
    return found


def _time_left(seconds: Sequence[float | None], count: int) -> str:
    """Estimates the time of ``count`` runs from those that were trained without interruption."""
    known = [value for value in seconds if value is not None]
    if not known:
        return ""
    minutes = count * sum(known) / len(known) / 60
    if minutes < 1:
        return ", less than a minute left"
    return f", about {f'{minutes / 60:.1f} h' if minutes >= 90 else f'{minutes:.0f} min'} left"


def _write(runs: Sequence[SweepRun], directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes the lines and the picture of the runs that have ended."""
    lines = "".join(f"{run.to_json()}\n" for run in runs)
    picture = draw_pareto(runs, directory.resolve().name)
    return write_files({directory / LINES_FILE: lines.encode(), directory / PICTURE_FILE: picture})


def _write_page(runs: Sequence[SweepRun], directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes the page that compares the finished runs, if there are several."""
    workdirs = [run.workdir for run in runs if run.status == "finished"]
    if len(workdirs) < 2:
        return []
    return compare.compare(workdirs, Workdir(directory).report, title=directory.resolve().name)
