"""A front: trains a run for every KV budget (or KV penalty) and seed, one after another, and draws quality against KV.

    python -m natsjax.sweep --config=configs/recall.py --workdir=sweeps/recall --kv_budgets=0.05,0.1,0.2 --seeds=0,1,2
    python -m natsjax.sweep --config=configs/recall.py --workdir=sweeps/KV penalties --kv_penalties=0.01,0.1,1 --dense

Run the same command again after an interruption: what is finished stays, and the run that was stopped goes on where it
was. More budgets, KV penalties or seeds only add runs. docs/sweep.md says what comes out and how to read it.
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
    """What a sweep trained and found.

    Attributes:
      runs: as they were asked for, seed by seed; those that failed say why.
      paths: files written: ``sweep.jsonl``, with a line a run, ``sweep.png``, and the page that compares the runs.
    """

    runs: tuple[SweepRun, ...]
    paths: tuple[pathlib.Path, ...]

    @property
    def failures(self) -> list[SweepRun]:
        """The runs that failed."""
        return [run for run in self.runs if run.status == "failed"]

    def summary(self) -> str:
        """The tables of runs and of settings, what failed and the files, as plain text for the terminal."""
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
    """Trains and evaluates a run for every setting and seed, goes on with those that were begun, and draws the front.

    Every run is an ordinary workdir, ``workdir/NAME``, trained by ``natsjax.train.run`` in this process, one after
    another: on an accelerator a second process would find the devices taken, and what a run does when it is stopped or
    fails is then what it does alone. They share the corpus ``workdir/corpus``, unless ``data.prepared_dir`` or
    ``data.mixture`` names others. Mistakes are found before the first training. A run that fails is written down with
    its sentence, the others go on, and the next call tries it again.

    Args:
      config: what the runs have in common; ``train.seed`` and, by what is swept, ``nats.kv_penalty_mode``,
        ``nats.kv_budget`` or ``nats.kv_penalty`` are set for each.
      workdir: folder of the sweep; made when it is not there.
      kv_budgets: KV fractions that a controlled KV penalty aims at, in (0, 1]; these or KV penalties.
      kv_penalties: fixed KV penalties, nats per token per unit of KV fraction.
      seeds: ``train.seed`` of each setting.
      dense: also train the dense baseline of each seed.
      progress: show progress bars.

    Returns:
      The runs and the files.

    Raises:
      UserError: the lists, the config, the data or what lies in the folder do not fit; or this is one of several
        processes.
      Interrupted: SIGINT or SIGTERM came; the run that was training saved its state.

    Example:
      >>> sweep = natsjax.sweep.run(config, "sweeps/recall", kv_budgets=[0.05, 0.1, 0.2], seeds=[0, 1, 2])
      >>> print(sweep.summary())
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise UserError(
            f"natsjax.sweep trains with one process, and this is one of {jax.process_count()}; on a cluster, train "
            "each run with train.py and compare them with python -m natsjax.report --workdir=A,B,…."
        )
    directory = Workdir(workdir).path
    train_config = dataclasses.replace(config.train, progress=progress and config.train.progress)
    config = resolve_paths(dataclasses.replace(config, train=train_config))
    runs = plan_runs(config, directory, kv_budgets, kv_penalties, seeds, dense)
    if Workdir(directory).config_file.exists():
        raise UserError(f"--workdir={directory} holds a run; a sweep wants a folder of its own.")
    ended: dict[str, SweepRun] = {}
    with Workdir(directory).lock(), _terminated_as_interrupted():
        try:
            sweep = Workdir(directory)
            try_reports([directory / LINES_FILE, directory / PICTURE_FILE, sweep.report / "report.html"])
            check_existing(runs)
            runs = with_shared_corpus(runs, directory, progress)
            check_data(runs, progress)
            _train_all(runs, directory, ended)
        except KeyboardInterrupt as error:
            done = sum(run.status == "finished" for run in ended.values())
            logger.info(
                f"the sweep in {directory} stops with {done} of {len(runs)} runs finished; run the same command again "
                "to go on"
            )
            raise distributed.Interrupted from error
        known = tuple(ended[run.name] for run in runs)
        paths = [*_write(known, directory), *_write_page(known, directory)]
    return Sweep(known, tuple(paths))


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is as good as Ctrl-C, where no training takes care of it."""

    def terminate(number, frame):
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: whoever runs the sweep there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _train_all(runs: Sequence[PlannedRun], directory: pathlib.Path, ended: dict[str, SweepRun]) -> None:
    """Trains what is not finished; ``ended`` gets every run, the files what there is after each.

    Args:
      runs: to be trained.
      directory: of the sweep.
      ended: by name, filled here, so that the caller has it when this is interrupted.
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
    """Trains and evaluates a run; a failure is a result too."""
    whole = not Workdir(planned.workdir).has_checkpoint()
    began = time.monotonic()
    forget(planned)
    try:
        evaluation = train.run(planned.config, planned.workdir)
    except UserError as error:
        found = failed(planned, str(error))
    except jax.errors.JaxRuntimeError as error:  # too little memory, say; a dense baseline needs more than the rest
        found = failed(planned, f"the program failed on the device: {first_line(error)}.")
    else:
        found = measured(planned, evaluation, time.monotonic() - began if whole else None)
    if found.error is not None:
        logger.info(f"sweep: {planned.name} failed: {found.error}")
    write_record(found, planned.config)
    # Each run compiles a step of its own, and a process may hold only so many programs (65530 mappings on Linux).
    jax.clear_caches()
    gc.collect()
    return found


def _time_left(seconds: Sequence[float | None], count: int) -> str:
    """What ``count`` runs will take, by those that were trained in one go."""
    known = [value for value in seconds if value is not None]
    if not known:
        return ""
    minutes = count * sum(known) / len(known) / 60
    if minutes < 1:
        return ", less than a minute left"
    return f", about {f'{minutes / 60:.1f} h' if minutes >= 90 else f'{minutes:.0f} min'} left"


def _write(runs: Sequence[SweepRun], directory: pathlib.Path) -> list[pathlib.Path]:
    """The lines and the picture of the runs that have ended."""
    lines = "".join(f"{run.to_json()}\n" for run in runs)
    picture = draw_pareto(runs, directory.resolve().name)
    return write_files({directory / LINES_FILE: lines.encode(), directory / PICTURE_FILE: picture})


def _write_page(runs: Sequence[SweepRun], directory: pathlib.Path) -> list[pathlib.Path]:
    """The page that compares the runs that finished, where they are several; each has a report of its own anyway."""
    workdirs = [run.workdir for run in runs if run.status == "finished"]
    if len(workdirs) < 2:
        return []
    return compare.compare(workdirs, Workdir(directory).report, title=directory.resolve().name)
