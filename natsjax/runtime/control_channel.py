"""The line between processes that train as one: few words, over TCP, from every process to process 0 and back.

It is there because JAX's own coordination tells too little and too late; ``distributed`` has the story. Process 0 holds
the end of every line, its own among them (``Hub``), and each process the other end of one (``Member``). A line of a
process that dies breaks at once, whatever the process was doing, and that is how its death is noticed.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple, NoReturn

from natsjax.errors import UserError

# Failures of several processes within this time are one: the same mistake made by all, or one failure and its echoes.
_SAME_TIME = 1.0
_END = "the end"


class Line:
    """Messages over a socket, a JSON object a line."""

    def __init__(self, end: socket.socket):
        self.socket = end
        self._begun = b""
        self._lock = threading.Lock()
        if end.family != socket.AF_UNIX:
            # A machine that lost its power sends nothing; noticed after a minute, before JAX's heartbeat misses it.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):
                    end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def send(self, **message: Any) -> None:
        """Sends a message; that a line is broken is found out by who reads it."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages that come next, perhaps none; None when the line is broken or somebody else's."""
        try:
            data = self.socket.recv(65536)
            *lines, self._begun = (self._begun + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return messages if data and all(isinstance(message, dict) for message in messages) else None

    def first(self, timeout: float) -> dict[str, Any] | None:
        """Returns the first message, or None where it does not come in time."""
        self.socket.settimeout(timeout)
        messages: list[dict[str, Any]] | None = []
        while messages == []:
            messages = self.receive()
        self.socket.settimeout(None)
        return messages[0] if messages else None

    def is_broken(self) -> bool:
        """Returns whether the other end is gone."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Ends the line."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Failure(NamedTuple):
    """The reason why all processes end.

    Attributes:
      rank: the process that it began with.
      message: what it reported.
      status: the exit status of all.
      lost: it reported nothing; its line broke.
    """

    rank: int
    message: str
    status: int
    lost: bool = False


def _lost(rank: int, count: int) -> Failure:
    why = "it was killed, crashed, or its machine is gone; its own log may have more"
    return Failure(rank, f"process {rank} of {count} was lost: {why}.", 1, lost=True)


def _failure(rank: int, error: BaseException) -> Failure:
    """Describes an exception to the other processes."""
    if isinstance(error, UserError):
        return Failure(rank, str(error), 2)
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, f"interrupted{f' by {error}' if str(error) else ''}", 130)
    if isinstance(error, SystemExit):
        if isinstance(error.code, int):
            return Failure(rank, f"exited with status {error.code}", error.code)
        return Failure(rank, str(error.code), 1)
    lines = str(error).strip().splitlines() or [""]
    return Failure(rank, f"{type(error).__name__}: {lines[0][:500]}", 1)


class Hub(threading.Thread):
    """Process 0's end of all lines, its own among them: gathers what each process reports and tells everyone.

    Args:
      lines: of every process.
    """

    def __init__(self, lines: dict[int, Line]):
        super().__init__(name="natsjax-hub", daemon=True)
        self._lines = lines
        self._failures: list[Failure] = []
        self._judge_at: float | None = None
        self._over = False  # all have finished, or a failure has been told: lines may break
        self._here: dict[int, str] = {}
        self._calls: dict[int, int] | None = None
        self.start()

    def run(self) -> None:
        """Serves all lines until they are broken."""
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, rank)
            while selector.get_map():
                wait = None if self._judge_at is None else max(self._judge_at - time.monotonic(), 0)
                for key, _ in selector.select(wait):
                    messages = self._lines[key.data].receive()
                    if messages is None:
                        selector.unregister(key.fileobj)
                        self._add(_lost(key.data, len(self._lines)))
                    for message in messages or []:
                        self._hear(key.data, message)
                if self._judge_at is not None and time.monotonic() >= self._judge_at:
                    self._judge()

    def _tell(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        match message:
            case {"failed": why, "status": status}:
                self._add(Failure(rank, why, status))
            case {"here": what}:
                self._meet(rank, what)
            case {"stop": _} if self._calls is None:
                self._calls = {}
                self._tell(count=True)
            case {"calls": calls} if self._calls is not None:
                self._calls[rank] = calls
                if len(self._calls) == len(self._lines):
                    self._tell(stop_at=1 + max(self._calls.values()))

    def _meet(self, rank: int, what: str) -> None:
        """Releases all when all are here."""
        self._here[rank] = what
        if len(self._here) < len(self._lines) or self._failures:
            return
        odd = [other for other, waits in sorted(self._here.items()) if waits != self._here[0]]
        if odd:
            difference = f"it waits for {self._here[odd[0]]} and process 0 for {self._here[0]}"
            self._add(Failure(odd[0], difference, 1))
            return
        self._here = {}
        self._over = what == _END
        self._tell(met=what)

    def _add(self, failure: Failure) -> None:
        if self._over or failure.rank in {known.rank for known in self._failures}:
            return
        self._failures.append(failure)
        self._judge_at = self._judge_at or time.monotonic() + _SAME_TIME

    def _judge(self) -> None:
        """Tells everyone where it began: with who was lost, else with who was first."""
        first = next((failure for failure in self._failures if failure.lost), self._failures[0])
        same = [failure for failure in self._failures if failure.message == first.message]
        self._tell(verdict=min(same))
        self._over, self._judge_at = True, None


class Member:
    """A process among several.

    Args:
      rank: which one.
      count: how many there are.
      line: to process 0.
      hub: in process 0.
    """

    def __init__(self, rank: int, count: int, line: Line, hub: Hub | None = None):
        self.rank, self.count, self._line, self._hub = rank, count, line, hub
        self._met, self._failing, self._judged = threading.Event(), threading.Event(), threading.Event()
        self._finished = False
        self._verdict: Failure | None = None
        self._ending = threading.Lock()  # whoever holds it ends the process
        self._changed = threading.Condition()
        self._calls, self._asked, self._counted = 0, False, False
        self._stop_at: int | None = None
        self._reader = threading.Thread(target=self._read, name="natsjax-line", daemon=True)
        self._reader.start()

    def any_process(self, flag: bool) -> bool:
        """Implements ``distributed.any_process``."""
        with self._changed:
            # Between saying how many calls it has made and hearing the common one, a process makes no further call.
            self._changed.wait_for(lambda: not self._counted or self._stop_at is not None)
            self._calls += 1
            if flag and not self._asked:
                self._asked = True
                self._line.send(stop=True)
            return self._stop_at is not None and self._calls >= self._stop_at

    def barrier(self, what: str) -> None:
        """Implements ``distributed.barrier``."""
        self._met.clear()
        self._line.send(here=what)
        self._met.wait()

    def finish(self) -> None:
        """Waits until all processes have come so far; they may still fail while it waits."""
        self.barrier(_END)
        self._reader.join()
        self._line.close()
        if self._hub is not None:
            self._hub.join(timeout=10)

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others, and ends this process as they end."""
        own = _failure(self.rank, error)
        self._failing.set()
        self._line.send(failed=own.message, status=own.status)
        self._judged.wait(_SAME_TIME + 10)
        with self._ending:
            verdict = self._verdict or own
            if verdict == own:
                _show_own(error)
            elif verdict.message != own.message:
                _show(verdict)
            self._leave(verdict.status)

    def _read(self) -> None:
        """Listens, in a thread of its own."""
        while not self._finished:
            messages = self._line.receive()
            if messages is None:
                self._end(_lost(0, self.count))
                return
            for message in messages:
                self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        match message:
            case {"verdict": verdict}:
                self._end(Failure(*verdict))
            case {"met": what}:
                self._finished = what == _END
                self._met.set()
            case {"count": _}:
                with self._changed:
                    self._counted = True
                    self._line.send(calls=self._calls)
            case {"stop_at": call}:
                with self._changed:
                    self._stop_at = call
                    self._changed.notify_all()

    def _end(self, verdict: Failure) -> None:
        """Ends this process for a failure, unless its main thread is about to do so."""
        if self._judged.is_set():
            return
        self._verdict = verdict
        self._judged.set()
        # It may be about to make the same mistake. JAX's client aborts when process 0 is lost: no time to wait then.
        wait = 0 if verdict.lost else _SAME_TIME
        self._failing.wait(wait)
        with self._ending:
            if not self._failing.is_set():
                _show(verdict)
                self._leave(verdict.status)

    def _leave(self, status: int) -> NoReturn:
        """Ends this process, process 0 when the others have heard why."""
        self._line.close()
        if self._hub is not None:
            self._hub.join(timeout=10)
        end_process(status)  # the main thread may sit in a collective, and JAX would wait for the others


def end_process(status: int) -> NoReturn:
    """Ends this process without cleaning up, but for what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _show_own(error: BaseException) -> None:
    """Prints an exception as a command that ends with it does."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)


def _show(verdict: Failure) -> None:
    where = "" if verdict.lost else f"process {verdict.rank}: "
    print(f"{os.linesep if sys.stderr.isatty() else ''}error: {where}{verdict.message}", file=sys.stderr, flush=True)
