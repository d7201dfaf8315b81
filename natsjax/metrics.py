"""Where a run's numbers go, ``metrics.jsonl`` and TensorBoard; and where its time goes."""

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from io import FileIO
from typing import Any, Literal

import jax
import numpy as np

from natsjax.errors import UserError, first_line
from natsjax.event_file import EventFile
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.runtime import distributed


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Floats as they are, and a scalar for each entry of a (nested) list; names are left out.

    Example:
      >>> scalars({"loss": 2.0, "live_keys": [[3.0, 4.0]], "warnings": ["no-global"]})
      {'loss': 2.0, 'live_keys/0/0': 3.0, 'live_keys/0/1': 4.0}
    """
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {
        "/".join([name, *map(str, index)]): float(entry)
        for name, array in arrays.items()
        if array.dtype.kind in "biuf"
        for index, entry in np.ndenumerate(array)
    }


class MetricsWriter:
    """Writes metrics by step; a resumed run first drops what an interrupted one wrote beyond its checkpoint.

    Args:
      workdir: of the run.
      start_step: the step that the run goes on from.
    """

    def __init__(self, workdir: Workdir, start_step: int):
        self._path, self._events_path = workdir.metrics_file, workdir.tensorboard
        try:
            _drop_after(self._path, start_step)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be read and written: {first_line(error)}.") from error
        try:
            self._events = EventFile(self._events_path, start_step)
        except OSError as error:
            self._file.close()
            raise _unwritten(self._events_path, error) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes floats, (nested) lists of floats, and lists of names; to TensorBoard go ``scalars``."""
        try:
            _append(self._file, (json.dumps({"step": step, **values}) + "\n").encode())
        except OSError as error:
            raise _unwritten(self._path, error) from error
        try:
            self._events.add(step, scalars(values))
        except OSError as error:
            raise _unwritten(self._events_path, error) from error

    def flush(self) -> None:
        """Writes out what TensorBoard buffers, so that a killed process loses nothing from before a checkpoint.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self._events.flush()
        except OSError as error:
            raise _unwritten(self._events_path, error) from error

    def close(self) -> None:
        """Writes out what is buffered; where that fails now, it is said, and what ends the run stays what it was."""
        self._file.close()
        try:
            self._events.close()
        except OSError as error:
            distributed.say(str(_unwritten(self._events_path, error)))


def _append(file: FileIO, data: bytes) -> None:
    """All of it or nothing: a full disk leaves no half line."""
    size, rest = file.seek(0, os.SEEK_END), data
    try:
        while rest:
            rest = rest[file.write(rest) or 0 :]
    except OSError:
        file.truncate(size)
        raise


def _unwritten(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror}; put that right and run the same command again, which goes on "
        "from the newest checkpoint."
    )


def _drop_after(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)


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
