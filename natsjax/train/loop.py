"""The loop: resume, step, save, stop when asked to, evaluate; ``monitor`` writes and shows what the steps report."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NoReturn

import jax
import numpy as np

from natsjax import evaluate, kv_fraction, report
from natsjax.config import FORMER_DEFAULTS, Config
from natsjax.config_fields import format_value
from natsjax.data import iterate, train_dataset
from natsjax.errors import UserError
from natsjax.model import sharding
from natsjax.model.inputs import Batch
from natsjax.policies import budgets
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.data import RunData, length_of_run, open_data, resolve_length
from natsjax.runs.initial_parameters import InitialParameters
from natsjax.runs.load import LoadedRun
from natsjax.runs.paths import settle_paths
from natsjax.runs.workdir import Workdir
from natsjax.runtime import distributed, log, signals, watchdog
from natsjax.runtime.compilation_cache import compilation_cache
from natsjax.runtime.log import logger
from natsjax.runtime.signals import StopRequests
from natsjax.train.held_out import HeldOut
from natsjax.train.logs import trackers
from natsjax.train.logs.monitor import Monitor, fetch_every_step
from natsjax.train.logs.nonfinite import FiniteCheck
from natsjax.train.logs.wall_time import WallTime
from natsjax.train.step import StepMetrics, Trainer, TrainState, schedules_at

Interrupted = distributed.Interrupted


def run(config: Config, path: str | os.PathLike[str]) -> evaluate.Evaluation:
    """Trains to the last step, resuming from the newest checkpoint in the workdir, and evaluates.

    Several processes (``natsjax.runtime.distributed``) call it alike, with the same workdir; the first writes in it.

    Args:
      config: of the run.
      path: the workdir; made when it is not there.

    Returns:
      Result of the evaluation; its files are in ``report/``.

    Raises:
      UserError: the config, the data or the workdir do not fit; the loss is not finite; a disk is full.
      Interrupted: SIGINT or SIGTERM came; the state was saved, where anything was trained since the last save.
    """
    with _trained(config, path) as (loaded, stop):
        saved = f"all {loaded.step} steps are trained and saved; run the same command again to evaluate the run"
        with stop.at_once(saved), watchdog.phase("evaluating"):
            return evaluate.run(loaded.workdir.path, loaded=loaded, progress=loaded.config.train.progress)


def fit(config: Config, path: str | os.PathLike[str]) -> LoadedRun:
    """Trains as ``run`` does, without the evaluation.

    Returns:
      The trained run in memory, for ``natsjax.evaluate.run(path, loaded=…)`` or measurements of your own.

    Raises:
      UserError, Interrupted: as in ``run``.
    """
    with _trained(config, path) as (loaded, _):
        return loaded


@contextlib.contextmanager
def _trained(config: Config, path: str | os.PathLike[str]) -> Iterator[tuple[LoadedRun, signals.StopRequests]]:
    """Trains to the last step; yields the run while its workdir is still locked, and the handler of signals."""
    wall_time = WallTime()
    workdir = Workdir(path)
    workdir.refuse_export()
    config = settle_paths(config, workdir)
    trackers.check(config)
    with (
        contextlib.closing(wall_time),
        signals.stop_requests() as stop,
        stop.at_once("nothing was trained since it was started; run the same command again to resume"),
        watchdog.watching(config.train.hang_timeout_seconds),
        _locked(workdir),
        compilation_cache(config.train.compilation_cache, workdir.compiled),
    ):
        if distributed.is_main():
            workdir.try_writing("checkpoints/", "tensorboard/", *["profile/"] * bool(config.train.profile))
            report.try_report(workdir)
        for line in workdir.compare_config(config):
            logger.info(f"resuming with {line}")
        config = _with_own_defaults(config, workdir)
        earlier = workdir.earlier_config()
        with (
            stop.at_once("the data was being prepared; run the same command again to resume"),
            watchdog.phase("preparing the data"),
        ):
            data = _open_data(config, workdir)
        workdir.compare_data(data.fingerprint)
        config = resolve_length(config, data)
        logger.info(f"data: {data.description}")
        logger.info(f"length of the run: {length_of_run(config, data)}")
        _check_budget(config, data)
        evaluate.check(config, data)
        trainer = Trainer(config, data.vocabulary.vocab_size)
        initial = _initial_parameters(config, workdir, data, trainer)
        distributed.barrier("the checks of the workdir")
        if distributed.is_main():
            workdir.record(config, data.fingerprint)
            workdir.record_start()
        state = _train(config, workdir, data, trainer, initial, wall_time, stop, earlier)
        loaded = LoadedRun(
            workdir,
            config,
            trainer.structure,
            trainer.served_parameters(state),
            int(state.step),
            data,
            trainer.mesh,
        )
        yield loaded, stop


@contextlib.contextmanager
def _locked(workdir: Workdir) -> Iterator[None]:
    """Holds the workdir for all processes; its ``log.txt`` gets what is logged meanwhile."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(workdir.lock())
            stack.enter_context(log.also_to(workdir.log_file))
        distributed.barrier("the lock of the workdir")
        yield


def _with_own_defaults(config: Config, workdir: Workdir) -> Config:
    """Keeps the values that were defaults when a resumed run began."""
    kept = workdir.with_own_defaults(config)
    for path in FORMER_DEFAULTS:
        group, name = path.split(".")
        own, asked = (getattr(getattr(x, group), name) for x in (kept, config))
        if own != asked:
            logger.info(
                f"resuming with {path} = {format_value(own)} as the run began, not {format_value(asked)}, the default "
                "since; a new --workdir takes that"
            )
    return kept


def _open_data(config: Config, workdir: Workdir) -> RunData:
    """Opens the data; where it has to be prepared, one process does it, and the others wait."""
    if distributed.is_main():
        data = open_data(config, workdir, progress=config.train.progress)
    distributed.barrier("the data")
    return data if distributed.is_main() else open_data(config, workdir, progress=False)


def _check_budget(config: Config, data: RunData) -> None:
    """Reports what the window alone costs, warns of an unused one, and refuses a budget that no roles can meet.

    Raises:
      UserError: ``nats.kv_budget`` cannot be reached.
    """
    if not config.model.has_roles:
        return
    all_sliding = kv_fraction.all_sliding_model_kv_fraction(config, data.piece_lengths)
    nats, window = config.nats, config.nats.sliding_windows[0]
    if nats.windows and nats.window not in (window, type(nats).window):  # no mistake: a config file may have had one
        logger.warning(
            f"warning: nats.window = {nats.window} has no effect beside nats.windows = {format_value(nats.windows)}"
        )
    logger.info(f"KV fraction with all tokens SLIDING, window {window}: {100 * all_sliding:.2f} %")
    if config.nats.kv_penalty_mode == "controlled":
        kv_budgets = budgets.check_role_budgets(
            config, [config.nats.kv_budget], data.piece_lengths, name="nats.kv_budget"
        )
        if (below := budgets.about_global_tokens(config, kv_budgets, data.piece_lengths)) is not None:
            logger.info(below)


def _initial_parameters(config: Config, workdir: Workdir, data: RunData, trainer: Trainer) -> InitialParameters | None:
    """Opens the parameters that a run that begins takes from another one."""
    if not config.train.init_from or workdir.has_checkpoint():
        return None
    return InitialParameters(config, trainer.model, data.vocabulary)


def _train(
    config: Config,
    workdir: Workdir,
    data: RunData,
    trainer: Trainer,
    initial: InitialParameters | None,
    wall_time: WallTime,
    stop: StopRequests,
    earlier: Config | None,
) -> TrainState:
    """Steps from the newest checkpoint to the end."""
    keep = config.checkpoint
    checkpoints = Checkpoints(
        workdir.checkpoints,
        max_to_keep=keep.max_to_keep,
        keep_every=keep.keep_every,
    )
    with contextlib.closing(checkpoints):
        with watchdog.phase("reading or making the state that the run begins with"):
            state = _restore_or_init(trainer, checkpoints, config, initial)
        start = int(state.step)
        held_out = HeldOut(config, workdir, data, trainer, start)
        if keep.keep_best:
            checkpoints.best = held_out.best
        if start >= config.train.num_steps or held_out.should_stop():
            return state
        _say_new_schedule(config, earlier, start)
        with stop.later("the step is compiled"):
            with watchdog.phase("compiling the step"), wall_time.spent_on("compiling"):
                trainer.compile()
            # A collective gives up on a process that still compiles (Gloo: after 30 s).
            distributed.barrier("the compiled step")
            loop = _Loop(config, workdir, trainer, checkpoints, held_out, start, wall_time, stop)
            rows = sharding.batch_rows(trainer.mesh, config.train.batch_size)
            dataset = train_dataset(data.source, batch_size=config.train.batch_size, rows=rows)
            with contextlib.closing(loop), contextlib.closing(iterate(dataset, start)) as batches:
                return loop.run(state, batches)


def _restore_or_init(
    trainer: Trainer, checkpoints: Checkpoints, config: Config, initial: InitialParameters | None
) -> TrainState:
    latest = checkpoints.latest_step()
    if latest is None:
        state = trainer.init()
        if initial is not None:
            state = state._replace(parameters=initial.put_into(state.parameters))
        size = sum(x.size for x in jax.tree.leaves(state.parameters))
        logger.info(f"training {size / 1e6:.2f}M parameters for {config.train.num_steps} steps{_on_devices(trainer)}")
        return state
    state = checkpoints.restore(trainer.abstract_state())
    distributed.barrier(f"step {int(state.step)}")  # where one found its part damaged, they are not at the same
    logger.info(f"resuming from step {int(state.step)}{_on_devices(trainer)}")
    return state


def _on_devices(trainer: Trainer) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in sharding.axes_of(trainer.mesh))
    return f" on {trainer.mesh.size} devices: {axes}" if axes else ""


def _say_new_schedule(config: Config, earlier: Config | None, step: int) -> None:
    """Logs what another length of the run does to its schedules, whose values may jump."""
    if earlier is None or earlier.train.num_steps == config.train.num_steps:
        return
    now, ends = schedules_at(config, step), (config.train.num_steps, earlier.train.num_steps)
    for name, then in schedules_at(earlier, step).items():
        if not math.isclose(then, now[name], rel_tol=1e-3):
            logger.info(
                f"the {name}'s schedule now ends at step {ends[0]} instead of {ends[1]}: at step {step} it goes "
                f"from {then:.3g} to {now[name]:.3g}"
            )


class _Loop:
    """Steps, each dispatched before the one before it is looked at.

    While the devices do step n, the host fetches batch n+1 and sends it on its way, and only then reads the metrics of
    step n-1: neither input nor metrics hold the devices up, as long as they take less time than a step.
    """

    def __init__(
        self,
        config: Config,
        workdir: Workdir,
        trainer: Trainer,
        checkpoints: Checkpoints,
        held_out: HeldOut,
        start: int,
        wall_time: WallTime,
        stop: StopRequests,
    ):
        self._stop, self._finite = stop, FiniteCheck(config)
        self._config, self._trainer, self._checkpoints, self._wall_time = config, trainer, checkpoints, wall_time
        self._held_out = held_out
        self._monitor = Monitor(config, workdir, trainer, start, wall_time)
        self._saved = time.monotonic()

    def close(self) -> None:
        self._monitor.close()

    def run(self, state: TrainState, batches: Iterator[dict[str, np.ndarray]]) -> TrainState:
        step, last = int(state.step), self._config.train.num_steps
        pending: StepMetrics | None = None
        with self._stop.later("the step is done and saved"), watchdog.phase(f"in step {step + 1}"):
            if distributed.any_process(self._stop.requested is not None):  # it came while the step was compiled
                self._save_and_stop(step, state)
            self._wall_time.begin_steps()
            batch = self._next(batches, None)
            while step < last:
                self._monitor.before(step + 1, state)
                state, metrics = self._trainer.step(state, batch)
                running = self._wall_time.when_done(metrics["loss"])
                if step + 1 < last:
                    batch = self._next(batches, running)
                if pending is not None:
                    self._handle(step, pending)
                    watchdog.progress(f"in step {step + 1}")
                step, pending = step + 1, metrics
                stop = distributed.any_process(self._stop.requested is not None)
                is_saved = step % self._config.checkpoint.save_every == 0 or step == last or stop or self._is_time(step)
                if self._held_out.is_due(step) or is_saved:
                    self._handle(step, pending, state)  # never save what a non-finite loss has spoiled
                    watchdog.progress(f"in step {step + 1}")
                    pending = None
                    if stop:
                        self._save_and_stop(step, state)
                    if is_saved or self._is_new_best(step):
                        self._save(step, state)
                    if self._held_out.should_stop():
                        self._save(step, state)
                        evals = self._config.train.early_stopping_evals
                        logger.info(f"stopping at step {step}: {evals} evaluations did not lower the held-out loss")
                        break
            with watchdog.phase(f"saving step {step}"):
                self._checkpoints.wait()
        logger.info(self._monitor.summary())
        if (about_best := self._held_out.summary()) is not None:
            logger.info(about_best)
        return state

    def _is_new_best(self, step: int) -> bool:
        return self._config.checkpoint.keep_best and self._held_out.best == step

    def _is_time(self, step: int) -> bool:
        """Returns True if the last save is ``checkpoint.save_every_minutes`` ago, by the clock of process 0.

        It is looked at when metrics are logged: processes that agree wait for their devices.
        """
        minutes = self._config.checkpoint.save_every_minutes
        if not minutes or step % self._config.train.log_every:
            return False
        return distributed.of_main(time.monotonic() - self._saved >= 60 * minutes)

    def _next(self, batches: Iterator[dict[str, np.ndarray]], running: Future[float] | None) -> Batch:
        """Returns the next batch, on its way to the devices, which may still be running a step."""
        with watchdog.phase("waiting for a batch"), self._wall_time.waiting_for_input(running):
            rows = next(batches)
        return self._trainer.put_batch(rows)

    def _save(self, step: int, state: TrainState) -> None:
        with watchdog.phase(f"saving step {step}"), self._wall_time.spent_on("saving"):
            self._monitor.flush()
            if self._is_new_best(step):
                self._checkpoints.best = step
            self._checkpoints.save(step, self._trainer.to_save(state))
            self._saved = time.monotonic()

    def _save_and_stop(self, step: int, state: TrainState) -> NoReturn:
        """Ends the run where it can be resumed."""
        self._save(step, state)
        with watchdog.phase(f"saving step {step}"), self._wall_time.spent_on("saving"):
            self._checkpoints.wait()
        why = self._stop.requested or "asked to stop on another host"
        logger.info(f"{why}: saved step {step}; run the same command again to resume")
        raise Interrupted

    def _handle(self, step: int, metrics: StepMetrics, state: TrainState | None = None) -> None:
        """Checks and shows the metrics of a step; with the state after it, evaluates it where that is due."""
        values: dict[str, Any] = fetch_every_step(metrics)
        found = self._finite.look(step, values)
        if found is not None:
            self._checkpoints.wait()
            raise UserError(found.sentence(self._checkpoints.latest_step()))
        if state is not None and self._held_out.is_due(step):
            with watchdog.phase(f"evaluating step {step}"), self._wall_time.spent_on("evaluating"):
                values = values | self._held_out.measure(step, state)
        self._monitor.finished(step, values)
