"""Says where a run is stuck: a thread that looks on while the run says what it is doing and how it comes along.

    with watchdog.watching(900):
        with watchdog.phase("evaluating"):
            for setting in watchdog.noting(settings):
                ...

Whoever works in between need not know whether anybody watches: ``phase`` and ``progress`` set two fields then, and do
nothing else. The thread reads them, and never touches the run. It is Python: what holds Python's lock for good silences
it too.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from natsjax.runtime import distributed

Item = TypeVar("Item")

_LOOKS = 10  # within the time after which it speaks

_watchdog: "Watchdog | None" = None


class Watchdog:
    """What has been heard of a run, and what is said when nothing is heard any more.

    Args:
      seconds: without progress, after which it speaks.
      clock: seconds, never going back.
      tell: gets what is said, lines of text.
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
        """What the run is doing."""
        return self._phase

    def progress(self, phase: str | None = None) -> None:
        """Notes that the run came along; and, unless None, what it does from now on."""
        if phase is not None:
            self._phase = phase
        self._heard = self._clock()

    def look(self) -> None:
        """Speaks once for a run that is stuck, and once when it goes on."""
        heard, phase = self._heard, self._phase
        who = distributed.label()
        if self._stuck is not None and self._stuck[1] != heard:
            stuck_phase, since = self._stuck
            self._stuck = None
            self._tell(f"{who}went on after {heard - since:.0f} s ({stuck_phase})")
        silent = self._clock() - heard
        if silent >= self._seconds and self._stuck is None:
            self._stuck = (phase, heard)
            self._tell(
                f"{who}no progress for {silent:.0f} s while {phase} (train.hang_timeout_seconds = "
                f"{self._seconds:g}); the run goes on, and this is where its threads are:\n{_stacks()}"
            )


@contextlib.contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Watches what the block does, from a thread of its own.

    Args:
      seconds: without progress, after which it says so on standard error, with the stacks of all Python threads; 0:
        nobody watches.
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
    """Says that the run came along; and, unless None, what it does from now on, as in ``"in step 12"``."""
    if _watchdog is not None:
        _watchdog.progress(phase)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Says what the block does, as in ``"saving step 12"``; after it, the run does what it did before."""
    if _watchdog is None:
        yield
        return
    before = _watchdog.phase
    progress(name)
    try:
        yield
    finally:
        progress(before)


def noting(items: Iterable[Item]) -> Iterator[Item]:
    """The items; every one that is asked for is progress."""
    for item in items:
        progress()
        yield item
    progress()


def _watch(watchdog: Watchdog, over: threading.Event, seconds: float) -> None:
    while not over.wait(seconds / _LOOKS):
        watchdog.look()


def _stacks() -> str:
    """Of all Python threads but this one, the main one first, innermost frame last."""
    frames = sys._current_frames()  # the only way to another thread's stack; faulthandler's text has no names
    me, main = threading.get_ident(), threading.main_thread()
    texts = []
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not main):
        frame = frames.get(thread.ident or 0)
        if frame is not None and thread.ident != me:
            texts.append(f"thread {thread.name}:\n{''.join(traceback.format_stack(frame)).rstrip()}")
    return "\n".join(texts)


def _tell(text: str) -> None:
    """Every process for itself: it may be the only one that is stuck."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; the run goes on
        print(text, file=sys.stderr, flush=True)
