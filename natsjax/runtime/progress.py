"""Progress of long work on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from natsjax.runtime import watchdog

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 10.0
_MEGABYTE = 1e6


class Progress:
    """Progress of a pass over text, in documents and bytes; a context manager.

    Args:
      task: its name, for example "Encoding".
      shown: False: nothing is written.
      documents: how many there will be, or None.
      num_bytes: bytes of UTF-8 in them, or None.
    """

    def __init__(self, task: str, *, shown: bool, documents: int | None = None, num_bytes: int | None = None):
        self._task = task
        self._of_documents = "" if documents is None else f" of {documents:,}"
        self._num_bytes = num_bytes
        self._of_bytes = "" if num_bytes is None else f" of {num_bytes / _MEGABYTE:,.1f}"
        self._documents = self._bytes = 0
        self._began = self._told = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        self._lines = shown and not on_terminal()
        if shown and not self._lines:
            self._bar = _new_bar(TextColumn("{task.fields[documents]}"), DownloadColumn(), TransferSpeedColumn())
            self._bar.add_task(task, total=num_bytes, documents="")
            self._bar.start()

    def add(self, documents: int, num_bytes: int) -> None:
        """Adds what was done since the last call.

        Args:
          documents: number of documents.
          num_bytes: UTF-8 bytes in them.
        """
        watchdog.progress()
        self._documents += documents
        self._bytes += num_bytes
        if self._bar is not None:
            done = f"{self._documents:,}{self._of_documents} documents,"
            self._bar.update(self._bar.task_ids[0], advance=num_bytes, documents=done)
        elif self._lines and (now := time.monotonic()) - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        megabytes = self._bytes / _MEGABYTE
        left = ""
        if self._num_bytes is not None and self._bytes:
            left = f", {seconds * (self._num_bytes - self._bytes) / self._bytes:,.0f} s left"
        return (
            f"{self._task}: {self._documents:,}{self._of_documents} documents, {megabytes:,.1f}{self._of_bytes} MB, "
            f"{megabytes / seconds:.1f} MB/s{left}"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def bar(items: Sequence[Item], title: str, shown: bool) -> Iterator[Item]:
    """Yields the items, with a bar on a terminal, elsewhere behind a plain line; each is progress to the watchdog.

    Args:
      items: what is worked on, one after another.
      title: of the bar.
      shown: False: nothing is written.
    """
    noted = watchdog.each_is_progress(items)
    if shown and not on_terminal():
        print(f"{title}: {len(items)}", file=sys.stderr, flush=True)
    elif shown:
        with _new_bar(MofNCompleteColumn()) as drawn:
            yield from drawn.track(noted, total=len(items), description=title)
        return
    yield from noted


def on_terminal() -> bool:
    """Returns whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _new_bar(*columns: ProgressColumn) -> rich.progress.Progress:
    return rich.progress.Progress(
        TextColumn("{task.description}"),
        BarColumn(20),
        *columns,
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # it may be a file
    )
