"""Reports where a run is stuck: a thread that looks on while the run notes what it is doing and that it progresses.

    with watchdog.watching(900):
        with watchdog.phase("evaluating"):
            for setting in watchdog.each_is_progress(settings):
                ...

Whoever works in between need not know whether anybody watches: ``phase`` and ``progress`` set two fields then, and do
nothing else. The thread reads them, and never touches the run. It is Python: code that holds Python's lock for good
silences it too. The stacks are not those of ``faulthandler``, which has no names of threads before Python 3.14, and
writes past the live display and ``log.txt``.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from natsjax.runtime import distributed
from natsjax.runtime.log import EVERY_PROCESS, logger

Item = TypeVar("Item")

_LOOKS = 10  # within the time after which it reports

_watchdog: "Watchdog | None" = None


class Watchdog:
    """The last progress of a run, and reports when there is none any more.

    Args:
      seconds: time without progress after which it reports.
      clock: returns seconds, never going back.
      tell: takes a report, lines of text.
    """

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] | None = None,
    ):
        self._seconds, self._clock, self._tell = seconds, clock, tell or _tell
        self._phase = "starting"
        self._heard = clock()
        self._stuck: tuple[str, float] | None = None  # phase and time of the last progress, once it has spoken

    @property
    def phase(self) -> str:
        """The name of what the run is doing."""
        return self._phase

    def progress(self, phase: str | None = None) -> None:
        """Notes progress; and, unless None, what the run does from now on."""
        if phase is not None:
            self._phase = phase
        self._heard = self._clock()

    def look(self) -> None:
        """Reports once that a run is stuck, and once that it continues."""
        heard, phase = self._heard, self._phase
        who = distributed.label()
        if self._stuck is not None and self._stuck[1] != heard:
            stuck_phase, since = self._stuck
            self._stuck = None
            self._tell(f"{who}continued after {heard - since:.0f} s ({stuck_phase})")
        silent = self._clock() - heard
        if silent >= self._seconds and self._stuck is None:
            self._stuck = (phase, heard)
            self._tell(
                f"{who}no progress for {silent:.0f} s while {phase} (train.hang_timeout_seconds = "
                f"{self._seconds:g}); the run continues, and this is where its threads are:\n{_stacks()}"
            )


@contextlib.contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Watches what the block does, from a thread of its own.

    Args:
      seconds: time without progress after which that is logged, with the stacks of all Python threads; 0: never.
    """
    global _watchdog
    if not seconds:
        yield
        return
    outer, _watchdog = _watchdog, Watchdog(seconds)
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(_watchdog, over, seconds), name="natsjax-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _watchdog = outer
        over.set()
        thread.join()


def progress(phase: str | None = None) -> None:
    """Notes progress; and, unless None, what the run does from now on, as in ``"in step 12"``."""
    if _watchdog is not None:
        _watchdog.progress(phase)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Notes what the block does, as in ``"saving step 12"``; after it, the run does what it did before."""
    if _watchdog is None:
        yield
        return
    before = _watchdog.phase
    progress(name)
    try:
        yield
    finally:
        progress(before)


def each_is_progress(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items; every one that is asked for is progress."""
    for item in items:
        progress()
        yield item
    progress()


def _watch(watchdog: Watchdog, over: threading.Event, seconds: float) -> None:
    while not over.wait(seconds / _LOOKS):
        watchdog.look()


def _stacks() -> str:
    """Formats all Python threads but this one, the main one first, innermost frame last."""
    frames = sys._current_frames()  # the only way to another thread's stack
    me, main = threading.get_ident(), threading.main_thread()
    texts = []
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not main):
        frame = frames.get(thread.ident or 0)
        if frame is not None and thread.ident != me:
            texts.append(f"thread {thread.name}:\n{''.join(traceback.format_stack(frame)).rstrip()}")
    return "\n".join(texts)


def _tell(text: str) -> None:
    """Logs for this process: it may be the only one that is stuck."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; the run continues
        logger.warning(text, extra=EVERY_PROCESS)
