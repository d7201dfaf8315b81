"""The loop: resume, step, log, save, stop when asked to, evaluate.

A line of ``metrics.jsonl`` has what a step reports (``train_step.StepMetrics``), ``perplexity``, ``tokens_per_second``,
and ``goodput`` and ``input_wait`` (``metrics.WallTime.shares``). The first line of each start also has
``time_to_first_step``, seconds from the call of ``run`` until the metrics of its first step were there, and
``compile_time``, the seconds of these that compiling the step took, or loading it (``train.compilation_cache``).
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from natsjax import evaluate, partition, processes, token_types
from natsjax.checkpoint import Checkpoints
from natsjax.compilation_cache import compilation_cache
from natsjax.config import Config
from natsjax.data import iterate, train_dataset
from natsjax.errors import UserError
from natsjax.initial_parameters import InitialParameters
from natsjax.loading import LoadedRun
from natsjax.losses import Batch
from natsjax.metrics import MetricsWriter, Progress, WallTime, perplexity
from natsjax.run_data import RunData, open_data
from natsjax.train_step import StepMetrics, Trainer, TrainState
from natsjax.workdir import Workdir

Interrupted = processes.Interrupted


def run(config: Config, path: str | os.PathLike[str]) -> evaluate.Evaluation:
    """Trains to the last step, going on from the newest checkpoint in the workdir, and evaluates.

    Several processes (``natsjax.processes``) call it alike, with the same workdir; the first of them writes in it.

    Args:
      config: of the run.
      path: the workdir; made when it is not there.

    Returns:
      What evaluation measured; its files lie in ``report/``.

    Raises:
      UserError: the config, the data or the workdir do not fit; the loss is not finite; a disk is full.
      Interrupted: SIGINT or SIGTERM came; the state was saved.
    """
    wall_time = WallTime()
    workdir = Workdir(path)
    workdir.refuse_export()
    with (
        contextlib.closing(wall_time),
        _locked(workdir),
        compilation_cache(config.train.compilation_cache, workdir),
    ):
        for line in workdir.compare_config(config):
            processes.say(f"resuming with {line}")
        data = _open_data(config, workdir)
        workdir.compare_data(data.fingerprint)
        processes.say(f"data: {data.description}")
        _check_budget(config, data)
        evaluate.check(config, data)
        trainer = Trainer(config, data.vocabulary.vocab_size)
        initial = _initial_parameters(config, workdir, data, trainer)
        processes.wait_for_all("the checks of the workdir")
        if processes.is_main():
            workdir.record(config, data.fingerprint)
        state = _train(config, workdir, data, trainer, initial, wall_time)
        loaded = LoadedRun(workdir, config, trainer.structure, state.parameters, int(state.step), data, trainer.mesh)
        return evaluate.run(workdir.path, loaded=loaded, progress=config.train.progress)


@contextlib.contextmanager
def _locked(workdir: Workdir) -> Iterator[None]:
    """Holds the workdir for all processes."""
    with workdir.lock() if processes.is_main() else contextlib.nullcontext():
        processes.wait_for_all("the lock of the workdir")
        yield


def _open_data(config: Config, workdir: Workdir) -> RunData:
    """The data; where it has to be prepared, one process does it, and the others wait."""
    if processes.is_main():
        data = open_data(config, workdir, progress=config.train.progress)
    processes.wait_for_all("the data")
    return data if processes.is_main() else open_data(config, workdir, progress=False)


def _check_budget(config: Config, data: RunData) -> None:
    """Says the smallest KV fraction that the window allows, and refuses a budget below it.

    Raises:
      UserError: ``nats.kv_budget`` cannot be reached.
    """
    if config.model.attention != "nats":
        return
    smallest = token_types.smallest_kv_fraction(data.piece_lengths, config.nats.window)
    processes.say(f"smallest possible KV fraction with window {config.nats.window}: {100 * smallest:.2f} %")
    if config.nats.price == "steered" and config.nats.kv_budget < smallest:
        raise UserError(
            f"nats.kv_budget = {config.nats.kv_budget} is below what the window alone costs: with nats.window = "
            f"{config.nats.window} and data.context_length = {config.data.context_length} the smallest possible KV "
            f"fraction is {smallest:.4f}."
        )


def _initial_parameters(config: Config, workdir: Workdir, data: RunData, trainer: Trainer) -> InitialParameters | None:
    """What a run that begins takes from another one."""
    if not config.train.initial_parameters or workdir.has_checkpoint():
        return None
    return InitialParameters(config, trainer.model, data.vocabulary)


def _train(
    config: Config,
    workdir: Workdir,
    data: RunData,
    trainer: Trainer,
    initial: InitialParameters | None,
    wall_time: WallTime,
) -> TrainState:
    """Steps from the newest checkpoint to the end."""
    checkpoints = Checkpoints(workdir.checkpoints, keep_last=config.checkpoint.keep_last)
    with contextlib.closing(checkpoints):
        state = _restore_or_init(trainer, checkpoints, config, initial)
        start = int(state.step)
        if start >= config.train.num_steps:
            return state
        with wall_time.spent_on("compiling"):
            trainer.compile()
        # A collective gives up on a process that still compiles (Gloo: after 30 s).
        processes.wait_for_all("the compiled step")
        loop = _Loop(config, workdir, trainer, checkpoints, start, wall_time)
        rows = partition.batch_rows(trainer.mesh, config.train.batch_size)
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
        processes.say(f"training {size / 1e6:.2f}M parameters for {config.train.num_steps} steps{_on_devices(trainer)}")
        return state
    state = checkpoints.restore(trainer.abstract_state())
    processes.wait_for_all(f"step {int(state.step)}")  # where one found its part damaged, they are not at the same
    processes.say(f"going on from step {int(state.step)}{_on_devices(trainer)}")
    return state


def _on_devices(trainer: Trainer) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in partition.axes_of(trainer.mesh))
    return f" on {trainer.mesh.size} devices: {axes}" if axes else ""


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """A list that SIGINT and SIGTERM add their names to while a step runs; a second SIGINT interrupts at once."""
    requests: list[str] = []

    def request(number, frame):
        if requests:
            signal.default_int_handler(number, frame)
        requests.append(signal.Signals(number).name)

    try:
        old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs the loop there handles signals
        yield requests
        return
    try:
        yield requests
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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
        start: int,
        wall_time: WallTime,
    ):
        self._config, self._trainer, self._checkpoints, self._wall_time = config, trainer, checkpoints, wall_time
        self._writer = MetricsWriter(workdir, start) if processes.is_main() else None
        self._progress = Progress(config.train.num_steps, start, config.train.progress and processes.is_main())
        self._logged_step, self._logged_time = start, time.monotonic()
        self._first_step: int | None = start + 1  # until its metrics are read
        self._once: dict[str, float] = {}  # for the next line of metrics alone

    def close(self) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def run(self, state: TrainState, batches: Iterator[dict[str, np.ndarray]]) -> TrainState:
        step, last = int(state.step), self._config.train.num_steps
        pending: StepMetrics | None = None
        with _stop_requests() as requests:
            self._wall_time.begin_steps()
            batch = self._next(batches, None)
            while step < last:
                state, metrics = self._trainer.step(state, batch)
                running = self._wall_time.when_done(metrics.loss)
                if step + 1 < last:
                    batch = self._next(batches, running)
                if pending is not None:
                    self._handle(step, pending)
                step, pending = step + 1, metrics
                stop = processes.any_process(bool(requests))
                if step % self._config.checkpoint.save_every == 0 or step == last or stop:
                    self._handle(step, pending)  # never save what a non-finite loss has spoilt
                    pending = None
                    self._save(step, state)
                if stop:
                    with self._wall_time.spent_on("saving"):
                        self._checkpoints.wait()
                    why = requests[0] if requests else "asked to stop on another host"
                    processes.say(f"{why}: saved step {step}; run the same command again to go on")
                    raise Interrupted
            self._checkpoints.wait()
        return state

    def _next(self, batches: Iterator[dict[str, np.ndarray]], running: Future[float] | None) -> Batch:
        """The next batch, on its way to the devices, which may still be running a step."""
        with self._wall_time.waiting_for_input(running):
            rows = next(batches)
        return self._trainer.put_batch(rows)

    def _save(self, step: int, state: TrainState) -> None:
        with self._wall_time.spent_on("saving"):
            if self._writer is not None:
                self._writer.flush()
            self._checkpoints.save(step, state)

    def _handle(self, step: int, metrics: StepMetrics) -> None:
        """Checks and shows the metrics of a step."""
        values: StepMetrics = jax.device_get(metrics)
        if not (math.isfinite(values.loss) and math.isfinite(values.gradient_norm)):
            self._checkpoints.wait()
            saved = self._checkpoints.latest_step()
            where = (
                "there is no checkpoint yet" if saved is None else f"the last good checkpoint is that of step {saved}"
            )
            raise UserError(
                f"the loss at step {step} is {float(values.loss)} (gradient norm {float(values.gradient_norm)}) and "
                f"training cannot go on; {where}; a lower optimizer.peak_learning_rate or optimizer.clip_norm in a new "
                "--workdir may help."
            )
        if step == self._first_step:
            self._say_first_step()
        if step % self._config.train.log_every and step != self._config.train.num_steps:
            return
        now = time.monotonic()
        tokens = self._config.train.batch_size * self._config.data.context_length * (step - self._logged_step)
        tokens_per_second = tokens / max(now - self._logged_time, 1e-9)
        self._logged_step, self._logged_time = step, now
        if self._writer is not None:
            extra = self._wall_time.shares() | self._once
            self._writer.write(step, _loggable(values, tokens_per_second) | extra)
            self._once = {}
        self._progress.update(
            step, float(values.loss), float(values.cross_entropy), float(values.kv_fraction), tokens_per_second
        )

    def _say_first_step(self) -> None:
        """How long it took until the first step of this start was done."""
        seconds, compiling = self._wall_time.since_start, self._wall_time.compiling
        self._first_step = None
        self._once = {"time_to_first_step": seconds, "compile_time": compiling}
        share = 100 * compiling / seconds
        self._progress.say(f"first step after {seconds:.1f} s, {compiling:.1f} s ({share:.0f} %) to compile or load it")


def _loggable(values: StepMetrics, tokens_per_second: float) -> dict[str, Any]:
    """The line of metrics.jsonl: floats and lists of floats."""
    line = {field: np.asarray(value, np.float64).tolist() for field, value in values._asdict().items()}
    line["perplexity"] = perplexity(line["cross_entropy"])
    line["tokens_per_second"] = tokens_per_second
    return line
