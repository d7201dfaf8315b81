"""Logging of training steps to files, the terminal and services; ``docs/metrics.md`` lists all metrics and warnings."""

import math
import os
import resource
import sys
import time
from typing import Any

import jax
import numpy as np

from natsjax.config import Config
from natsjax.errors import first_line
from natsjax.kv_fraction import perplexity
from natsjax.runs.metrics import in_order
from natsjax.runs.workdir import HELD_OUT_LOSS, Workdir
from natsjax.runtime import distributed
from natsjax.runtime.chips import chip_of
from natsjax.runtime.log import logger
from natsjax.train.flops import step_flops
from natsjax.train.logs.display import Display, duration
from natsjax.train.logs.step_breakdown import StepBreakdown
from natsjax.train.logs.trackers import Tracker, chosen_services
from natsjax.train.logs.wall_time import WallTime
from natsjax.train.logs.warnings import ActiveWarnings
from natsjax.train.logs.writer import MetricsWriter
from natsjax.train.step import StepMetrics, Trainer

EVERY_STEP = ("loss", "cross_entropy", "gradient_norm", "update_norm", "skipped")
"""Metrics that are fetched from the devices after each step; the others only if they are logged, or if one of these is
not finite."""


def fetch_every_step(metrics: StepMetrics) -> StepMetrics:
    """Fetches the metrics of ``EVERY_STEP`` to the host, and all of them if one is not finite."""
    values = jax.device_get([metrics[name] for name in EVERY_STEP])
    metrics = metrics | dict(zip(EVERY_STEP, values, strict=True))
    return metrics if all(math.isfinite(value) for value in values) else jax.device_get(metrics)


class Monitor:
    """Logger of the metrics of a run's steps; to be closed.

    Args:
      config: of the run.
      workdir: of it.
      trainer: of it.
      start: last step that is done.
      wall_time: of the run.

    Raises:
      UserError: metrics of earlier starts cannot be read and written.
    """

    def __init__(self, config: Config, workdir: Workdir, trainer: Trainer, start: int, wall_time: WallTime):
        self._config, self._wall_time = config, wall_time
        self._vocab_size, devices = trainer.vocab_size, trainer.mesh.devices.flat
        chips = [chip_of(device) for device in devices]
        self._peak = None if None in chips else sum(chip.flops for chip in chips if chip is not None)
        self._writer = MetricsWriter(workdir, start) if distributed.is_main() else None
        services = chosen_services(config) if distributed.is_main() else []
        self._trackers = [Tracker(service, config, workdir) for service in services]
        self._warnings = ActiveWarnings(config)
        self._profile = Profile(config, workdir, start)
        is_recorded = config.train.step_breakdown and not config.train.profile and distributed.is_main()
        self._breakdown = StepBreakdown(is_recorded, start, config.train.num_steps, trainer.program)
        self._start, self._done = start, start
        shown = config.train.progress and distributed.is_main()
        self._display = Display(config, start, shown, str(workdir.path))
        self._logged_step, self._logged_time = start, time.monotonic()
        self._first_step: int | None = start + 1  # until its metrics are read
        self._once: dict[str, float] = {}  # for the next line of metrics alone

    def close(self) -> None:
        """Leaves the terminal and the files in order."""
        self._display.close()
        self._profile.close()
        self._breakdown.close()
        if self._writer is not None:
            self._writer.close()
        for tracker in self._trackers:
            tracker.close()

    def flush(self) -> None:
        """Writes the buffers to the disk.

        Raises:
          UserError: a file cannot be written.
        """
        if self._writer is not None:
            self._writer.flush()

    def before(self, step: int, state: Any) -> None:
        """Prepares for a step, from ``state``, an array tree that the steps before compute; starts the profiler."""
        self._profile.before(step, state)
        had = self._breakdown.fractions
        self._breakdown.before(step, state)
        if self._breakdown.fractions and not had:
            self._once |= {f"{phase}_fraction": part for phase, part in self._breakdown.fractions.items()}

    def finished(self, step: int, metrics: StepMetrics) -> None:
        """Writes and shows a step that is done, if it is one that is logged, or was evaluated.

        Args:
          step: its number, from 1.
          metrics: of ``fetch_every_step``, with those of ``HeldOut.measure`` where it was evaluated.

        Raises:
          UserError: they cannot be written.
        """
        self._done = step
        if step == self._first_step:
            self._log_first_step()
        is_logged = step % self._config.train.log_every == 0 or step == self._config.train.num_steps
        if not is_logged and HELD_OUT_LOSS not in metrics:
            self._display.advance(step)
            return
        if not distributed.is_main():
            return
        line = numbers(jax.device_get(metrics))
        line |= self._speed(step, line["kv_fraction"])
        for change in self._warnings.update(step, line):
            logger.info(f"{'warning: ' if change.began else ''}{change.text}")
        line |= memory() | self._wall_time.fractions() | self._once | {"warnings": self._warnings.names}
        line = in_order(line)
        self._once = {}
        if self._writer is not None:
            self._writer.write(step, line)
        for tracker in self._trackers:
            tracker.write(step, line)
        self._display.update(step, line)

    def _speed(self, step: int, kv_fraction: float) -> dict[str, float]:
        """Computes rates since the logged step before, without the time of evaluations."""
        now = time.monotonic() - self._wall_time.evaluating
        steps, seconds = step - self._logged_step, max(now - self._logged_time, 1e-9)
        self._logged_step, self._logged_time = step, now
        tokens = self._config.train.batch_size * self._config.data.context_length
        flops = step_flops(self._config, self._vocab_size, kv_fraction=kv_fraction, recomputation=False).total
        rates = {"tokens_per_second": steps * tokens / seconds, "flops_per_second": steps * flops / seconds}
        return rates if self._peak is None else rates | {"mfu": rates["flops_per_second"] / self._peak}

    def summary(self) -> str:
        """Returns a sentence about speed, time and memory of this start's steps."""
        steps, seconds = self._done - self._start, self._wall_time.stepping
        tokens = self._config.train.batch_size * self._config.data.context_length
        parts = [f"{part:.0%} {phase}" for phase, part in self._breakdown.fractions.items()]
        parts.append(f"{self._wall_time.fractions()['input_wait']:.0%} of all time waiting for input")
        return (
            f"{steps:,} steps of {tokens:,} tokens in {duration(seconds)}, {steps * tokens / max(seconds, 1e-9):,.0f} "
            f"tokens/s: {', '.join(parts)}; peak memory {peak_memory() / 1e9:.2f} GB"
        ).replace("%", " %")

    def _log_first_step(self) -> None:
        """Logs the time until the first step of this start was done."""
        seconds, compiling = self._wall_time.since_start, self._wall_time.compiling
        self._first_step = None
        self._once |= {"time_to_first_step": seconds, "compile_time": compiling}
        percent = 100 * compiling / seconds
        logger.info(f"first step after {seconds:.1f} s, {compiling:.1f} s ({percent:.0f} %) to compile or load it")


class Profile:
    """JAX profiler of process 0 around the steps of ``train.profile``; to be closed.

    Args:
      config: of the run.
      workdir: the trace is stored in its ``profile/``, for TensorBoard or Perfetto.
      start: last step that is done; only the steps after it can be recorded.
    """

    def __init__(self, config: Config, workdir: Workdir, start: int):
        self._path, self._running = workdir.profile, False
        self._first, self._last = config.train.profile or (0, 0)
        self._wanted = bool(config.train.profile) and start < self._last and distributed.is_main()

    def before(self, step: int, state: Any) -> None:
        """Starts the profiler before its first step, and stops it when the devices are done with its last one."""
        if self._running and step > self._last:
            jax.block_until_ready(state)
            self.close()
        if self._wanted and self._first <= step <= self._last:
            self._wanted = False
            jax.block_until_ready(state)  # the step before is not a part of it
            try:
                jax.profiler.start_trace(str(self._path))
                self._running = True
            except (RuntimeError, OSError) as error:
                logger.info(f"the profiler does not start ({first_line(error)}); training continues")

    def close(self) -> None:
        """Stops the profiler if it runs."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            logger.info(f"the profile is in {self._path}; tensorboard --logdir={self._path} shows it")
        except (RuntimeError, OSError) as error:
            logger.info(f"the profile cannot be written to {self._path} ({first_line(error)}); training continues")


def memory() -> dict[str, float]:
    """Measures bytes in use on the fullest device of this process, or in host memory if devices do not report them."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if stats:
        in_use = max(float(one.get("bytes_in_use", 0)) for one in stats)
        return {"memory_in_use": in_use, "peak_memory": max(float(one.get("peak_bytes_in_use", 0)) for one in stats)}
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return {"host_memory": float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))}
    except OSError:  # not Linux
        return {"host_memory": _most_host_memory()}


def _most_host_memory() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)  # bytes on macOS, elsewhere KiB


def peak_memory() -> float:
    """Measures the most bytes that the fullest device of this process had in use, or this process in host memory."""
    return memory().get("peak_memory") or _most_host_memory()


def numbers(metrics: StepMetrics) -> dict[str, Any]:
    """Converts metrics on the host to floats and nested lists of floats, and adds ``perplexity``."""
    line = {name: np.asarray(value, np.float64).tolist() for name, value in metrics.items()}
    return line | {"perplexity": perplexity(line["cross_entropy"])}
