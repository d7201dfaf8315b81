"""Calls in processes of their own, each with a time limit: one that hangs or crashes ends nothing else.

A process is forked, so that it need not import anything again. The caller must have touched no device before: JAX's
threads do not survive a fork.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

_SECONDS_TO_END = 10
"""For a process that has answered, and for one that was killed while its device was busy."""


class CallFailed(Exception):
    """A call that raised, whose process ended, or that was stopped; ``details`` is its traceback, where it has one."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(reason)
        self.details = details


class _Answer(NamedTuple):
    value: Any = None
    reason: str = ""
    details: str = ""


def call(function: Callable[..., Any], *arguments: Any, seconds: float, log: pathlib.Path) -> Any:
    """Returns ``function(*arguments)``, computed in a process of its own.

    Args:
      function: its result must be picklable.
      arguments: of the function.
      seconds: after which the process is killed, with those that it has started.
      log: file that standard output and standard error of the process are added to.

    Raises:
      CallFailed: there is no result.
    """
    seconds = max(seconds, 0)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, log, function, arguments))
    process.start()
    with contextlib.suppress(OSError):  # it is ended by then, or has done this by itself
        os.setpgid(process.pid, process.pid)  # type: ignore[arg-type]
    sender.close()
    answered = False
    try:
        if not receiver.poll(seconds):
            raise CallFailed(f"stopped after {seconds:.0f} s")
        try:
            found = receiver.recv()
        except EOFError:
            process.join()
            raise CallFailed(f"its process ended with exit status {process.exitcode}; see {log.name}") from None
        answered = True
    finally:
        receiver.close()
        _end(process, at_once=not answered)
    if found.reason:
        raise CallFailed(found.reason, found.details)
    return found.value


def _answer(sender: Connection, log: pathlib.Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Serves a call, in its process."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    try:
        answer = _Answer(function(*arguments))
    except BaseException as error:  # SystemExit too: the caller has to know
        lines = str(error).strip().splitlines() or ["without a message"]
        answer = _Answer(reason=f"{type(error).__name__}: {lines[0]}", details=traceback.format_exc())
    sys.stdout.flush()
    sender.send(answer)


def _end(process: BaseProcess, *, at_once: bool) -> None:
    """Ends a process and those that it has started."""
    if not at_once:
        process.join(_SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join(_SECONDS_TO_END)
