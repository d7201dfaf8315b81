"""The thread that generates: a bounded queue in front of the rows of one decode loop.

Everything that touches a device happens in this thread, between whose turns the queue and cancellations are looked at.
"""

import collections
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from natsjax.decode.rows import Drawn, Row, RowRequest, Rows
from natsjax.errors import UserError
from natsjax.runtime.log import logger
from natsjax.serve.metrics import Metrics

_NO_MEMORY = (
    "the memory of the devices is too small for what was asked for; send shorter or fewer requests at a time, or start "
    "the server with fewer --rows, a smaller --max_length or --chunk, or fewer keys (--role_bias, --max_kv)."
)
_FAILED = "the server failed while it generated this; its log has the reason."


class Job(Protocol):
    """A sequence to generate, and who hears of it; all calls come from the engine's thread."""

    request: RowRequest

    def take(self, drawn: Drawn) -> str | None:
        """Takes new tokens; returns why it wants no more ("stop", "length"), or None. The last ones end it anyhow."""
        ...

    def fail(self, message: str) -> None:
        """Hears that nothing more will come, and why, in a sentence."""
        ...


class QueueFullError(Exception):
    """There is no place for more sequences."""


class StoppingError(Exception):
    """No more sequences are taken."""


class Engine:
    """Runs jobs in the rows of a decode loop, first come, first served.

    Args:
      rows: of the loop; nobody else uses them.
      max_queue: sequences that may wait for a row.
      metrics: get the numbers.
    """

    def __init__(self, rows: Rows, max_queue: int, metrics: Metrics):
        self.rows, self.max_queue, self._metrics = rows, max_queue, metrics
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[Row, Job] = {}
        self._cancelled: set[Job] = set()
        self._since: dict[Job, float] = {}  # when each came; of all jobs that have not ended, wherever they are
        self._is_stopping, self._cut = False, None  # type: bool, str | None
        self._thread = threading.Thread(target=self._run, name="natsjax-engine", daemon=True)
        self._counted = (0, 0)  # evicted keys and transfers that the metrics have
        metrics.rows.set(rows.num_rows)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    # --- from other threads ---

    @property
    def is_alive(self) -> bool:
        """True while it takes jobs and runs them."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def most_jobs(self) -> int:
        """Jobs that it has room for, running and waiting."""
        return self.rows.num_rows + self.max_queue

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of the jobs, or none.

        Raises:
          QueueFullError: there is no place for all of them now.
          StoppingError: the server is being stopped.
        """
        with self._changed:
            if not self.is_alive:
                raise StoppingError
            if len(self._since) + len(jobs) > self.most_jobs:
                raise QueueFullError
            self._waiting.extend(jobs)
            self._since.update(dict.fromkeys(jobs, time.monotonic()))
            self._metrics.queue_length.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs, of which no more is wanted; those that have ended are left alone."""
        with self._changed:
            self._cancelled.update(job for job in jobs if job in self._since)
            self._changed.notify()

    def stop(self) -> None:
        """Takes no more jobs; those that are there go on, and the thread ends behind the last one."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def cut(self, message: str) -> None:
        """Ends all jobs; ``message`` is why, as a sentence."""
        with self._changed:
            self._is_stopping, self._cut = True, message
            self._changed.notify()

    def join(self, seconds: float) -> bool:
        """Waits for the end of the thread; returns False where it does not come in time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- in the thread ---

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:
            logger.exception("the engine has ended")
            raise
        finally:
            with self._changed:
                self._is_stopping = True
            self._fail_all(_FAILED)

    def _turn(self) -> bool:
        """Looks at what has changed and generates some tokens; returns False at the end."""
        with self._changed:
            while not (self._waiting or self._cancelled or self._is_stopping) and self.rows.is_idle:
                self._changed.wait()
            cut = self._cut
            cancelled, self._cancelled = self._cancelled, set()
            gone = [job for job in self._waiting if job in cancelled]
            for job in gone:
                self._waiting.remove(job)
            free = self.rows.num_free + sum(job in cancelled for job in self._running.values())
            starting = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        if cut is not None:
            self._fail_all(cut)
            return False
        for job in gone:
            self._end(job, "cancelled")
        for row, job in list(self._running.items()):
            if job in cancelled:
                self._release(row, job, "cancelled")
        for job in starting:
            self._begin(job)
        self._count()
        if not self.rows.is_idle:
            self._advance()
            self._count()
        with self._changed:
            return bool(self._waiting or self._running or not self._is_stopping)

    def _begin(self, job: Job) -> None:
        try:
            row = self.rows.begin(job.request)
        except UserError as error:
            self._end(job, "error", str(error))
            return
        self._running[row] = job
        self._metrics.prompt_tokens.inc(len(job.request.prompt))

    def _advance(self) -> None:
        try:
            found = self.rows.advance()
        except Exception as error:
            # The loop's arrays may be gone: what ran is lost, and the next jobs get a new one.
            if "RESOURCE_EXHAUSTED" in str(error):
                message = _NO_MEMORY
                logger.error(f"error: {message}")
            else:
                message = _FAILED
                logger.exception("generation failed")
            self.rows.reset()
            for row, job in list(self._running.items()):
                self._release(row, job, "error", message)
            return
        for drawn in found:  # a row may have been given up by what came before
            if drawn.row in self._running:
                self._give(self._running[drawn.row], drawn)

    def _give(self, job: Job, drawn: Drawn) -> None:
        row = drawn.row
        if row.error is not None:
            self._release(row, job, "error", row.error)
            return
        if not drawn.of_prompt:
            if row.num_drawn and row.num_drawn == len(drawn.tokens):
                self._metrics.first_token.observe(time.monotonic() - self._since[job])
            self._metrics.tokens.inc(len(drawn.tokens))
        try:
            reason = job.take(drawn)
        except Exception:
            logger.exception("an answer failed")
            self._release(row, job, "error", _FAILED)
            return
        if reason is not None:
            self._release(row, job, reason)

    def _release(self, row: Row, job: Job, reason: str, message: str | None = None) -> None:
        self.rows.release(row)
        self._running.pop(row, None)
        self._end(job, reason, message)

    def _end(self, job: Job, reason: str, message: str | None = None) -> None:
        with self._changed:
            since = self._since.pop(job, None)
            self._cancelled.discard(job)
        if since is not None:
            self._metrics.seconds.observe(time.monotonic() - since)
            self._metrics.sequences.labels(reason).inc()
        if message is not None:
            job.fail(message)

    def _fail_all(self, message: str) -> None:
        self.rows.reset()
        self._running.clear()
        with self._changed:
            self._waiting.clear()
            jobs = list(self._since)
        for job in jobs:
            self._end(job, "error", message)
        self._count()

    def _count(self) -> None:
        """Brings the numbers of queue, rows and keys up to date."""
        metrics, rows = self._metrics, self.rows
        with self._changed:
            metrics.queue_length.set(len(self._waiting))
        metrics.rows_busy.set(rows.num_busy)
        metrics.kv_live.set(rows.live)
        slots, size = rows.allocated
        metrics.kv_allocated.set(slots)
        metrics.kv_bytes.set(size)
        evicted, transfers = rows.evicted, rows.transfers
        metrics.kv_evicted.inc(evicted - self._counted[0])
        metrics.kv_transfers.inc(transfers - self._counted[1])
        self._counted = evicted, transfers
