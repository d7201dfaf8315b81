"""Where a run's numbers go: ``metrics.jsonl``, TensorBoard and a line on the terminal; and where its time goes."""

import collections
import concurrent.futures
import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from natsjax import processes
from natsjax.errors import UserError
from natsjax.workdir import Workdir

_SECONDS_BETWEEN_LINES = 10.0  # where standard error is no terminal


def perplexity(cross_entropy: float) -> float:
    """``exp`` of nats per token, infinite where it overflows."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


class MetricsWriter:
    """Writes metrics by step; a resumed run first drops what an interrupted one wrote beyond its checkpoint.

    Args:
      workdir: of the run.
      start_step: the step that the run goes on from.
    """

    def __init__(self, workdir: Workdir, start_step: int):
        self._path = workdir.metrics_file
        try:
            _drop_after(self._path, start_step)
            self._file = open(self._path, "a")  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be read and written: {error}.") from error
        self._tensorboard = SummaryWriter(str(workdir.tensorboard), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes floats and (nested) lists of floats; a list goes to TensorBoard as a scalar per entry."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}.") from error
        for name, value in values.items():
            for index, entry in np.ndenumerate(np.asarray(value)):
                path = "/".join([name, *map(str, index)]) if index else name
                self._tensorboard.add_scalar(path, float(entry), step)

    def flush(self) -> None:
        """Writes out what TensorBoard buffers, so that a killed process loses nothing from before a checkpoint."""
        self._tensorboard.flush()

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that a killed process left unfinished is passed over."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)


class Progress:
    """Step, loss, perplexity, KV fraction, tokens/s and time left: a bar on a terminal, now and then a line elsewhere.

    Args:
      total: steps of the run.
      start: the step that it goes on from.
      shown: False shows nothing.
    """

    def __init__(self, total: int, start: int, shown: bool):
        self._total, self._start, self._began = total, start, time.monotonic()
        self._step = start
        self._bar = (
            tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
            if (shown and sys.stderr.isatty())
            else None
        )
        self._lines = shown and self._bar is None
        self._last_line = -math.inf

    def update(
        self, step: int, loss: float, cross_entropy: float, kv_fraction: float, tokens_per_second: float
    ) -> None:
        """Shows where the run is."""
        text = (
            f"loss {loss:.3f}, perplexity {perplexity(cross_entropy):.4g}, KV {100 * kv_fraction:.1f} %, "
            f"{tokens_per_second:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._step)
        elif self._lines and (time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = time.monotonic()
            spent = self._last_line - self._began
            left = spent / max(1, step - self._start) * (self._total - step)
            print(f"step {step}/{self._total}: {text}, {left:.0f} s left", file=sys.stderr, flush=True)
        self._step = step

    def say(self, text: str) -> None:
        """A line on standard error, of process 0 alone, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            processes.say(text)

    def close(self) -> None:
        """Leaves the line as it is."""
        if self._bar is not None:
            self._bar.close()


class WallTime:
    """Where the wall time of a run goes, as the host sees it: nothing waits for the devices.

    It begins with the object. Before ``begin_steps`` come data, the state (initialised or restored) and compiling;
    after it each moment belongs to input, to saving or, all the rest, to steps.

    Args:
      clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began = clock()
        self._steps_began: float | None = None
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._watcher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="natsjax-step")

    @property
    def since_start(self) -> float:
        """Seconds."""
        return self._clock() - self._began

    @property
    def compiling(self) -> float:
        """Seconds that the step took to compile, or to load where it had been compiled before."""
        return self._spent["compiling"]

    @contextlib.contextmanager
    def spent_on(self, what: Literal["compiling", "saving"]) -> Iterator[None]:
        """Counts the time that the block takes."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent[what] += self._clock() - began

    def begin_steps(self) -> None:
        """From now on, what is not spent on something else goes into steps."""
        self._steps_began = self._clock()

    def when_done(self, result: jax.Array) -> Future[float]:
        """The time at which a step is done, seen by a thread that waits for one of its results."""

        def wait() -> float:
            jax.block_until_ready(result)
            return self._clock()

        return self._watcher.submit(wait)

    @contextlib.contextmanager
    def waiting_for_input(self, step: Future[float] | None) -> Iterator[None]:
        """Counts the time that the block takes, as far as the devices had nothing to do.

        Args:
          step: the last one that they were given (``when_done``); None: there was none.
        """
        began = self._clock()
        yield
        ended = self._clock()
        if step is None:
            self._spent["input"] += ended - began
        elif step.done():
            self._spent["input"] += max(0.0, ended - max(began, step.result()))

    def shares(self) -> dict[str, float]:
        """Shares of the wall time since this process began the run, in [0, 1].

        ``goodput``: steps. It is all time since ``begin_steps``, without ``input_wait``, and without what saving held
        the loop up for: copying the state off the devices, and waiting for the save before. Reading, writing and
        showing metrics happens while the next step runs, and counts as steps. Each start of a run counts for itself:
        steps that were lost with a killed process, and done again, do not lower it.

        ``input_wait``: waiting for batches with no step left to do.
        """
        total = self.since_start
        if self._steps_began is None or total <= 0:
            return {"goodput": 0.0, "input_wait": 0.0}
        steps = self._clock() - self._steps_began - self._spent["input"] - self._spent["saving"]
        return {"goodput": max(0.0, steps) / total, "input_wait": self._spent["input"] / total}

    def close(self) -> None:
        """Lets go of the thread."""
        self._watcher.shutdown(wait=False, cancel_futures=True)
