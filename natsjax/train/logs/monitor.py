"""What a run writes and shows of its steps: ``docs/metrics.md`` lists every field and every warning."""

import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from natsjax.config import Config
from natsjax.errors import first_line
from natsjax.kv_fraction import perplexity
from natsjax.runs.workdir import Workdir
from natsjax.runtime import distributed, watchdog
from natsjax.runtime.chips import chip_of
from natsjax.runtime.log import logger
from natsjax.train.flops import step_flops
from natsjax.train.logs.display import Display, Shown
from natsjax.train.logs.metrics import MetricsWriter
from natsjax.train.logs.wall_time import WallTime
from natsjax.train.logs.wandb import WandbWriter
from natsjax.train.logs.warnings import Health
from natsjax.train.step import StepMetrics, Trainer

EVERY_STEP = ("loss", "cross_entropy", "gradient_norm", "update_norm", "skipped")
"""What is fetched from the devices after each step; the rest is where it is logged, or where these are not finite."""


def fetch_every_step(metrics: StepMetrics) -> StepMetrics:
    """The metrics of a step with those of ``EVERY_STEP`` on the host; all of them where one is not finite."""
    values = jax.device_get([getattr(metrics, name) for name in EVERY_STEP])
    metrics = metrics._replace(**dict(zip(EVERY_STEP, values, strict=True)))
    return metrics if all(math.isfinite(value) for value in values) else jax.device_get(metrics)


class Monitor:
    """Writes and shows the metrics of a run's steps; to be closed.

    Args:
      config: of the run.
      workdir: of it.
      trainer: of it.
      start: the step that the run goes on from.
      wall_time: of the run.

    Raises:
      UserError: what is there of earlier starts cannot be read and written.
    """

    def __init__(self, config: Config, workdir: Workdir, trainer: Trainer, start: int, wall_time: WallTime):
        self._config, self._wall_time = config, wall_time
        self._vocab_size, devices = trainer.vocab_size, trainer.mesh.devices.flat
        chips = [chip_of(device) for device in devices]
        self._peak = None if None in chips else sum(chip.flops for chip in chips if chip is not None)
        self._writer = MetricsWriter(workdir, start) if distributed.is_main() else None
        self._wandb: WandbWriter | None = None
        if config.train.wandb and distributed.is_main():
            with watchdog.phase("starting Weights & Biases"):
                self._wandb = WandbWriter(config, workdir)
        self._health = Health(config)
        self._profile = Profile(config, workdir, start)
        self._layers = [layer for layer, kind in enumerate(config.model.all_layer_types) if kind == "nats"]
        shown = config.train.progress and distributed.is_main()
        self._display = Display(config.train.num_steps, start, shown, str(workdir.path))
        self._logged_step, self._logged_time = start, time.monotonic()
        self._first_step: int | None = start + 1  # until its metrics are read
        self._once: dict[str, float] = {}  # for the next line of metrics alone

    def close(self) -> None:
        """Leaves the terminal and the files in order."""
        self._display.close()
        self._profile.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            with watchdog.phase("sending the rest to Weights & Biases"):
                self._wandb.close()

    def flush(self) -> None:
        """Writes out what is buffered.

        Raises:
          UserError: it cannot be written.
        """
        if self._writer is not None:
            self._writer.flush()

    def before(self, step: int, state: Any) -> None:
        """Before a step is given to the devices, from ``state``, an array tree that the steps before make."""
        self._profile.before(step, state)

    def finished(self, step: int, metrics: StepMetrics) -> None:
        """Writes and shows a step that is done, where it is one that is logged.

        Args:
          step: its number, from 1.
          metrics: of ``fetch_every_step``.

        Raises:
          UserError: they cannot be written.
        """
        if step == self._first_step:
            self._say_first_step()
        if step % self._config.train.log_every and step != self._config.train.num_steps:
            self._display.advance(step)
            return
        if not distributed.is_main():
            return
        line = flat(jax.device_get(metrics))
        line |= self._speed(step, line["kv_fraction"])
        for change in self._health.update(step, line):
            logger.info(f"{'warning: ' if change.began else ''}{change.text}")
        line |= memory() | self._wall_time.shares() | self._once | {"warnings": self._health.active}
        self._once = {}
        if self._writer is not None:
            self._writer.write(step, line)
        if self._wandb is not None:
            self._wandb.write(step, line)
        self._display.update(self._shown(step, line))

    def _speed(self, step: int, kv_fraction: float) -> dict[str, float]:
        """Since the logged step before."""
        now = time.monotonic()
        steps, seconds = step - self._logged_step, max(now - self._logged_time, 1e-9)
        self._logged_step, self._logged_time = step, now
        tokens = self._config.train.batch_size * self._config.data.context_length
        flops = step_flops(self._config, self._vocab_size, kv_fraction=kv_fraction, recomputation=False).total
        rates = {"tokens_per_second": steps * tokens / seconds, "flops_per_second": steps * flops / seconds}
        return rates if self._peak is None else rates | {"mfu": rates["flops_per_second"] / self._peak}

    def _shown(self, step: int, line: Mapping[str, Any]) -> Shown:
        has_roles = self._config.model.has_roles
        return Shown(
            step=step,
            loss=line["loss"],
            perplexity=line["perplexity"],
            kv_fraction=line["kv_fraction"],
            tokens_per_second=line["tokens_per_second"],
            kv_budget=line["kv_budget"] if has_roles and self._config.nats.kv_penalty_mode == "controlled" else None,
            kv_penalty=line["kv_penalty"] if has_roles else None,
            mfu=line.get("mfu"),
            roles=np.mean(line["role_fractions"], axis=1)[self._layers] if has_roles else None,
            layers=self._layers,
            warnings=line["warnings"],
        )

    def _say_first_step(self) -> None:
        """How long it took until the first step of this start was done."""
        seconds, compiling = self._wall_time.since_start, self._wall_time.compiling
        self._first_step = None
        self._once = {"time_to_first_step": seconds, "compile_time": compiling}
        share = 100 * compiling / seconds
        logger.info(f"first step after {seconds:.1f} s, {compiling:.1f} s ({share:.0f} %) to compile or load it")


class Profile:
    """The JAX profiler around the steps of ``train.profile``, of process 0; to be closed.

    Args:
      config: of the run.
      workdir: the trace lies in its ``profile/``, for TensorBoard or Perfetto.
      start: the step that the run goes on from; where it is beyond the first one, what is left is recorded.
    """

    def __init__(self, config: Config, workdir: Workdir, start: int):
        self._path, self._running = workdir.profile, False
        self._first, self._last = config.train.profile or (0, 0)
        self._wanted = bool(config.train.profile) and start < self._last and distributed.is_main()

    def before(self, step: int, state: Any) -> None:
        """Starts before the first step, and stops when the devices are done with the last one."""
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
                logger.info(f"the profiler does not start ({first_line(error)}); training goes on")

    def close(self) -> None:
        """Stops where it runs."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            logger.info(f"the profile lies in {self._path}; tensorboard --logdir={self._path} shows it")
        except (RuntimeError, OSError) as error:
            logger.info(f"the profile cannot be written to {self._path} ({first_line(error)}); training goes on")


def memory() -> dict[str, float]:
    """Bytes: of the fullest device of this process where devices tell, else of this process in the host's memory."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if stats:
        in_use = max(float(one.get("bytes_in_use", 0)) for one in stats)
        return {"memory_in_use": in_use, "peak_memory": max(float(one.get("peak_bytes_in_use", 0)) for one in stats)}
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return {"host_memory": float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))}
    except OSError:  # no Linux: the most that it ever was, in bytes on macOS and in KiB elsewhere
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"host_memory": float(most if sys.platform == "darwin" else 1024 * most)}


def flat(values: StepMetrics) -> dict[str, Any]:
    """Metrics on the host as floats and nested lists of floats, with ``perplexity``; parts as ``NAME/PART``."""
    line: dict[str, Any] = {}
    for field, value in values._asdict().items():
        parts = {field: value}
        if isinstance(value, Mapping):
            parts = {f"{field.removesuffix('s')}/{part}": x for part, x in value.items()}
        line |= {name: np.asarray(x, np.float64).tolist() for name, x in parts.items()}
    return line | {"perplexity": perplexity(line["cross_entropy"])}
