"""The logger of the package: lines of the first process, on standard error and in the ``log.txt`` of a run.

    from natsjax.runtime.log import logger

    logger.info("resuming from step 100")

It is the ``logging`` logger named ``natsjax``. It prints plain lines from INFO on without any setup, and hands nothing
to the root logger, which libraries set up as they are imported. A record with ``extra=EVERY_PROCESS`` is printed by
every process.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator

from natsjax.errors import UserError, printable
from natsjax.runtime import distributed
from natsjax.runtime.files import append, reason, unwritable

EVERY_PROCESS = {"every_process": True}
"""``extra`` of a record that each process logs for itself."""

logger = logging.getLogger("natsjax")


class _StandardError(logging.Handler):
    """Prints to what ``sys.stderr`` is at that moment: the live display replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _File(logging.Handler):
    """Appends lines with their time (UTC) to a file; after a failure it writes no more, and nothing else is affected.

    Args:
      path: the file.

    Raises:
      OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._has_failed:
            return
        try:
            append(self._file, f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        except OSError as error:
            self._has_failed = True
            print(
                f"{printable(os.fspath(self._path))} gets no more lines: {reason(error)}", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def also_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Appends what is logged in the block to a file as well, and the exception that ends it.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        handler = _File(path)
    except OSError as error:
        raise unwritable(path, error) from error
    handler.addFilter(_is_wanted)
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, _ending(error), (), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def _ending(error: BaseException) -> str:
    """Formats what ended a run: a line, or a traceback where it is no mistake of a person."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "".join(traceback.format_exception(error)).rstrip()


def _is_wanted(record: logging.LogRecord) -> bool:
    return distributed.is_main() or getattr(record, "every_process", False)


def _as_text(record: logging.LogRecord) -> bool:
    """Escapes bytes of file names that are not UTF-8, so that every handler can encode the line."""
    record.msg = record.getMessage().encode("utf-8", "backslashreplace").decode("utf-8")
    record.args = None
    return True


def _set_up() -> None:
    logger.addFilter(_as_text)
    handler = _StandardError()
    handler.addFilter(_is_wanted)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


_set_up()
