"""Progress through text: documents, bytes and how fast, as a bar on a terminal and as lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

from natsjax.runtime import watchdog

_SECONDS_BETWEEN_LINES = 10.0
_MEGABYTE = 1e6


class Progress:
    """How far a pass over the text has come, on stderr; a context manager.

    Args:
      task: what is being done, for example "Encoding".
      shown: False: nothing is written.
      documents: how many there will be, or None.
      num_bytes: of UTF-8 in them, or None.
    """

    def __init__(self, task: str, *, shown: bool, documents: int | None = None, num_bytes: int | None = None):
        self._task = task
        self._of_documents = "" if documents is None else f" of {documents:,}"
        self._num_bytes = num_bytes
        self._of_bytes = "" if num_bytes is None else f" of {num_bytes / _MEGABYTE:,.1f}"
        self._documents = self._bytes = 0
        self._began = self._said = time.monotonic()
        is_terminal = shown and sys.stderr.isatty()
        self._lines = shown and not is_terminal
        self._bar = tqdm(
            desc=task, total=num_bytes, unit="B", unit_scale=True, disable=not is_terminal, leave=False, file=sys.stderr
        )

    def add(self, documents: int, num_bytes: int) -> None:
        """So much more is done.

        Args:
          documents: number of documents.
          num_bytes: UTF-8 bytes in them.
        """
        watchdog.progress()
        self._documents += documents
        self._bytes += num_bytes
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{self._documents:,}{self._of_documents} documents", refresh=False)
            self._bar.update(num_bytes)
        elif self._lines and (now := time.monotonic()) - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
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
        self._bar.close()


@contextmanager
def log_lines() -> Iterator[None]:
    """For as long as the block lasts, what natsjax logs, from INFO on, goes to stderr as plain lines.

    `logging.basicConfig` would do nothing: Orbax logs while it is imported, which sets up the root logger.
    """
    logger, handler = logging.getLogger("natsjax"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
