"""Where the time of a run goes."""

import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal

import jax


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
