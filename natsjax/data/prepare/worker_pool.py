"""Processes that work on tasks for ``prepare``, and end with it whatever ends it.

They hold the reading end of a pipe whose writing end is the parent's alone: when the parent closes it, or dies of
whatever cause, they see the end of the pipe and leave at once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from natsjax.data.prepare.parts import KeptPartsError

# What is sent to a whole process group is the parent's to hear: it stops the workers.
_BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerPool:
    """A pool of fresh processes; a context manager that ends them at once if its block is left by an exception.

    Each process calls ``start(*arguments)`` first.
    """

    def __init__(self, workers: int, start: Callable[..., None], arguments: tuple[Any, ...]):
        # Not forked: threads of tokenizers and of array_record run in the parent.
        context = multiprocessing.get_context("spawn")
        stop, self._stop = context.Pipe(duplex=False)
        self._worker_end = stop
        self._executor = ProcessPoolExecutor(workers, context, _start_worker, (stop, start, arguments))

    def submit(self, work: Callable[..., Any], tasks: Sequence[Any]) -> list[Future]:
        """Lets the workers call ``work(task)`` for each task, the first ones first."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_SIGNALS)
        try:
            return [self._executor.submit(work, task) for task in tasks]  # makes processes, which inherit the mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._stop.close()
        self._executor.shutdown(wait=True)
        self._stop.close()
        self._worker_end.close()


def finished(futures: Sequence[Future], every: float) -> Iterator[None]:
    """Waits for all of them, and yields every so many seconds meanwhile, and once at the end.

    Raises:
      KeptPartsError: a process died.
      Exception: the first one that a task raised, in the order of the tasks.
    """
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=every)
        if any(future.exception() for future in done):
            first = next(future for future in futures if future.done() and future.exception())
            try:
                first.result()
            except BrokenProcessPool as error:
                raise KeptPartsError(
                    "a worker process of prepare ended before its work was done, for lack of memory perhaps, or "
                    'because the script that calls prepare() lacks `if __name__ == "__main__":`; run it again, with '
                    "fewer workers or with workers = 1, and it resumes from what is done."
                ) from error
        yield


def _start_worker(stop: connection.Connection, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_leave_with_parent, args=(stop,), daemon=True).start()
    # The processes share the cores; libraries shall not have a thread for every core in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    logging.disable(logging.WARNING)  # the parent says what there is to say, once
    start(*arguments)


def _leave_with_parent(stop: connection.Connection) -> None:
    connection.wait([stop])
    os._exit(1)
