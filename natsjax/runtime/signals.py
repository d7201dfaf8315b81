"""SIGINT and SIGTERM while a run lasts: the first one is honored where nothing is lost, a second one at once.

    with signals.stop_requests() as stop:
        with stop.at_once("run the same command again to resume"):
            ...                                 # may be left anywhere
        with stop.later("the step is compiled"):
            ...                                 # not left; whoever works here looks at ``stop.requested`` in time

Python runs a handler in the main thread, and only when that returns to Python, which may take minutes while XLA
compiles. So a thread of its own hears of signals too (``signal.set_wakeup_fd``): it prints what will follow, and for a
second signal it ends the process, whatever the main thread is doing.

Work that may be left anywhere but spends minutes inside libraries goes through ``interruptible``: it runs in a thread,
and the main one only waits.
"""

import contextlib
import contextvars
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

from natsjax.runtime import distributed
from natsjax.runtime.distributed import Interrupted
from natsjax.runtime.log import logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_STATUS = 130
"""Exit status of an interrupted run, whatever the signal."""

_SAME_SIGNAL = 0.5
"""Seconds: ``timeout`` and some launchers send a signal to a process and then to its group, where it comes again."""
_PUT_OFF = 0.05
"""Seconds until a signal is looked at again that came where nothing can be raised."""
_TELL_AFTER = 1.0
"""Seconds that a request waits before the reason is printed."""
_GRACE = 0.5
"""Seconds that interrupted work gets to put things in order."""
_T = TypeVar("_T")

_abandoned: list[threading.Thread] = []

_current: "StopRequests | None" = None


class StopRequests:
    """Requests to stop; made by ``stop_requests``.

    Attributes:
      requested: name of the first signal, None before it.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._at_once = False
        self._waits_for = "the step is done"
        self._left: BaseException | None = None  # raised by the handler
        self._is_leaving = False
        self._put_off = False
        self._echoes: list[threading.Timer] = []  # each sends a signal of our own, which is no second request

    @contextlib.contextmanager
    def at_once(self, sentence: str) -> Iterator[None]:
        """Leaves the block at the first signal, or does not begin it when that has come already.

        Args:
          sentence: what to do then, printed after the signal's name.

        Raises:
          Interrupted: a signal came; where there are several processes, ``KeyboardInterrupt`` with the signal's name,
            which ``distributed.fail_together`` tells the others.
        """
        before = self._at_once
        try:
            self._at_once = True
            if self.requested is None:
                yield
            if self.requested is not None:  # before the block, or where an exception is swallowed: in a callback, say
                raise self._interruption()
        except KeyboardInterrupt as error:
            if error is self._left:
                logger.info(f"{self.requested}: {sentence}")
                self._left = None  # logged; blocks around this one have nothing to add
            raise
        finally:
            self._at_once = before

    @contextlib.contextmanager
    def later(self, waits_for: str) -> Iterator[None]:
        """Keeps the block from being left at a signal.

        Args:
          waits_for: what has to happen before the run stops, as ``"the step is compiled"``.
        """
        before = self._at_once, self._waits_for
        self._at_once, self._waits_for = False, waits_for
        try:
            yield
        except Interrupted:
            self._is_leaving = True  # stopped as asked: nothing around this block is waited for any more
            raise
        finally:
            self._at_once, self._waits_for = before

    def _interruption(self) -> KeyboardInterrupt:
        alone = not distributed.label()
        self._is_leaving = True
        self._left = Interrupted(self.requested) if alone else KeyboardInterrupt(self.requested)
        return self._left

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal in the main thread, where Python calls this."""
        if self.requested is not None and not self._put_off:
            return  # the second one is the other thread's
        if self.requested is None:
            self.requested = signal.Signals(number).name
        self._put_off = self._at_once and _is_in_gc_callback(frame)
        if self._put_off:
            self._echoes.append(threading.Timer(_PUT_OFF, signal.pthread_kill, (threading.get_ident(), number)))
            self._echoes[-1].start()
        elif self._at_once:
            raise self._interruption()

    def _listen(self, end: socket.socket) -> None:
        """Waits for signals in a thread of its own, though the main one is busy, until the other end is closed."""
        first: float | None = None
        is_told = False
        num_echoes = 0
        while True:
            waits = first is not None and not is_told
            ready, _, _ = select.select([end], [], [], _TELL_AFTER if waits else None)
            if not ready:
                is_told = True
                if not (self._at_once or self._is_leaving):
                    logger.info(f"stopping as soon as {self._waits_for}; a second signal ends the run at once")
                continue
            numbers = end.recv(4096)
            if not numbers:
                return
            heard = [number for number in numbers if number in SIGNALS]
            new_echoes = min(len(self._echoes) - num_echoes, len(heard))
            num_echoes += new_echoes
            heard = heard[new_echoes:]
            if heard and first is None:
                first = time.monotonic()
            elif heard and first is not None and time.monotonic() - first > _SAME_SIGNAL:
                name = signal.Signals(heard[0]).name
                with contextlib.suppress(OSError, ValueError):
                    print(
                        f"a second {name}: ended at once; run the same command again to resume from the newest save",
                        file=sys.stderr,
                    )
                distributed.end(KeyboardInterrupt(name), EXIT_STATUS)


def interruptible(work: Callable[[], _T]) -> _T:
    """Calls ``work`` so that a signal is heard at once, though ``work`` be inside a library for minutes.

    It runs in a thread of its own, which must be able to end anywhere without loss. When the wait for it is left by an
    exception (``KeyboardInterrupt``), the same is raised in that thread. A library that does not come back within a
    second is left alone: what it returns one day is thrown away, and ``end_if_abandoned`` ends the process without it.
    In another thread than the main one, which hears of no signal, ``work`` is called directly.

    Returns:
      What ``work`` returned.

    Raises:
      BaseException: what ``work`` raised.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: Future[_T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.set_result(context.run(work))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="natsjax-interruptible", daemon=True)
    try:
        thread.start()
        return outcome.result()
    except BaseException:
        if not outcome.done() and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
            )
            thread.join(_GRACE)
            if thread.is_alive():
                _abandoned.append(thread)
        raise


def end_if_abandoned(status: int) -> None:
    """Ends an interrupted process at once where work is still inside a library; else does nothing.

    The interpreter's own end would wait for what that work has started, and a thread of native code that comes back
    in the middle of it aborts the process.

    Args:
      status: the exit status.
    """
    if any(thread.is_alive() for thread in _abandoned):
        distributed.end(KeyboardInterrupt("interrupted"), status)


def _is_in_gc_callback(frame: FrameType | None) -> bool:
    """Returns whether Python would print and forget an exception there; JAX has such a callback, called often."""
    codes = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Hears SIGINT and SIGTERM for as long as the block lasts; they do afterwards what they did before.

    In another thread than the main one nothing is heard: whoever runs the main one handles signals.
    """
    global _current
    stop = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    listener = threading.Thread(target=stop._listen, args=(ours,), name="natsjax-signals", daemon=True)
    outer, _current = _current, stop
    old_wakeup = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    old = {number: signal.signal(number, stop._handle) for number in SIGNALS}
    listener.start()
    try:
        yield stop
    finally:
        for echo in stop._echoes:  # nobody else shall hear one
            echo.cancel()
            echo.join()
        for number, handler in old.items():
            if handler is not None:  # one of C, which Python cannot put back
                signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        _current = outer
        wakeup.close()
        listener.join()
        ours.close()


def _in_child() -> None:
    """Restores the signals of a forked process, which is none of the run's: they end it."""
    if _current is not None and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)
