"""Wall time of a run, by what it was spent on."""

import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal

import jax


class WallTime:
    """Clock of a run by activity, as the host sees it: nothing waits for the devices.

    It starts when the object is made. Before ``begin_steps`` come data, the state (initialized or restored) and
    compiling. After it, each moment counts as input, as saving, as evaluating or, if it is none of them, as steps.

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
        """Seconds since the run was started."""
        return self._clock() - self._began

    @property
    def compiling(self) -> float:
        """Seconds for compiling the step, or for loading a compiled one."""
        return self._spent["compiling"]

    @property
    def stepping(self) -> float:
        """Seconds in steps, as ``goodput`` counts them."""
        if self._steps_began is None:
            return 0.0
        others = sum(self._spent[what] for what in ("input", "saving", "evaluating"))
        return max(0.0, self._clock() - self._steps_began - others)

    @property
    def evaluating(self) -> float:
        """Seconds for evaluations on held-out text between steps."""
        return self._spent["evaluating"]

    @contextlib.contextmanager
    def spent_on(self, what: Literal["compiling", "saving", "evaluating"]) -> Iterator[None]:
        """Counts the time that the block takes."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent[what] += self._clock() - began

    def begin_steps(self) -> None:
        """Counts all time from now on as steps, unless it is spent on something else."""
        self._steps_began = self._clock()

    def when_done(self, result: jax.Array) -> Future[float]:
        """Returns the time at which a step is done, from a thread that waits for one of its results."""

        def wait() -> float:
            jax.block_until_ready(result)
            return self._clock()

        return self._watcher.submit(wait)

    @contextlib.contextmanager
    def waiting_for_input(self, step: Future[float] | None) -> Iterator[None]:
        """Counts the part of the block's time in which the devices had nothing to do.

        Args:
          step: the last step that they were given (``when_done``); None: there was none.
        """
        began = self._clock()
        yield
        ended = self._clock()
        if step is None:
            self._spent["input"] += ended - began
        elif step.done():
            self._spent["input"] += max(0.0, ended - max(began, step.result()))

    def fractions(self) -> dict[str, float]:
        """Computes fractions of the wall time since this process began the run, in [0, 1].

        ``goodput`` is steps: all time since ``begin_steps``, without ``input_wait``, evaluations (``train.eval_every``)
        and the time for which saving held up the loop (copying the state off the devices, waiting for the previous
        save). Metrics are read,
        written and shown while the next step runs, so this counts as steps. Each start of a run counts for itself:
        steps that a killed process lost, and that are done again, do not lower it.

        ``input_wait`` is waiting for batches with no step left to do.
        """
        total = self.since_start
        if self._steps_began is None or total <= 0:
            return {"goodput": 0.0, "input_wait": 0.0}
        return {"goodput": self.stepping / total, "input_wait": self._spent["input"] / total}

    def close(self) -> None:
        """Ends the thread."""
        self._watcher.shutdown(wait=False, cancel_futures=True)
