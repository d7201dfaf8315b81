"""Standard output and error that take whatever a command prints, so that no printing costs a result.

    with standard_streams.guarded():
        ...                             # print, logging and rich as ever

A character that the stream's encoding lacks is replaced, and what can no longer be written is dropped: whoever read it
has gone (``| head``, a terminal that was closed), the disk behind it is full, or it was closed from the beginning.
"""

import codecs
import contextlib
import errno
import io
import json
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any

_READER_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ESHUTDOWN)
_INPUT, _OUTPUT, _ERROR = 0, 1, 2  # file descriptors

_REPLACE = "natsjax.replace"
"""Name of the handler of characters that an encoding lacks; Python looks handlers up by name."""

# For our own marks and panels; anything else is escaped, as in k\xf6ln, so that nothing is lost.
_PLAIN = str.maketrans(
    {"±": "+-", "…": "...", "≥": ">=", "≤": "<=", "°": "~", "↵": "\\n", "⟨": "<", "⟩": ">"}
    | {"█": "#", "▓": "+", "░": "."}
)


class OutputLost(Exception):
    """Standard output is gone, and with it the one thing that the work was for."""


class _Descriptor(io.FileIO):
    """A file descriptor that takes everything, and remembers that some of it could not be written.

    Args:
      stream: Python's, on this descriptor, which stays open with it.

    Attributes:
      lost: why not all was written, or None.
      reader_gone: whether that is because nobody reads any more, which is no failure.
    """

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.fileno(), "w", closefd=False)
        self.name = stream.name
        self.lost: OSError | None = None
        self.reader_gone = False
        self._stream = stream  # its end would close the descriptor

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # another program set the terminal not to block
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            self.lose(error)
        return size

    def lose(self, error: OSError) -> None:
        """Drops what cannot be written; where that is for good, what follows too, of other writers as well."""
        # A closed terminal gives EIO; so does a broken disk.
        gone = error.errno in _READER_GONE or (error.errno == errno.EIO and not self._is_file())
        if self.lost is None:
            self.lost, self.reader_gone = error, gone
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)

    def _is_file(self) -> bool:
        return stat.S_ISREG(os.fstat(self.fileno()).st_mode)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Keeps a command from failing as it prints, from here to the end of the process.

    Raises:
      SystemExit: standard output is incomplete, and not because its reader had seen enough: status 1, unless the block
        has another.
    """
    _open_closed_descriptors()
    sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)
    out = sys.stdout
    try:
        yield
    except OutputLost:
        pass
    except SystemExit as end:
        if end.code:
            raise
    if (error := _lost(out)) is not None:
        print(f"error: not all could be written to standard output: {error.strerror}.", file=sys.stderr)
        sys.exit(1)


def check(stream: Any) -> None:
    """Ends work that is for standard output alone once nothing more can be written to it.

    Raises:
      OutputLost: nothing more can be written to it.
    """
    descriptor = _descriptor_of(stream)
    if descriptor is not None and descriptor.lost is not None:
        raise OutputLost


def print_json(value: Any) -> None:
    """Prints a line of JSON that is valid in every encoding of standard output; non-ASCII in UTF-8 alone."""
    text = json.dumps(value, ensure_ascii=False)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # None: text in memory
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    print(text if is_utf8 and not _has_surrogates(text) else json.dumps(value))


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _open_closed_descriptors() -> None:
    """Opens closed descriptors: else C libraries would log into the next open file, such as a checkpoint."""
    for number in (_INPUT, _OUTPUT, _ERROR):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)


def _safe(stream: Any) -> Any:
    """Returns the stream with replacements; one of the system is put on a descriptor that takes everything."""
    if stream is None:  # closed from the beginning
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or _descriptor_of(stream) is not None:
        return stream
    if type(stream) is not io.TextIOWrapper or not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
        stream.reconfigure(errors=_REPLACE)  # a test's, memory, or a console of Windows
        return stream
    descriptor = _Descriptor(stream)
    try:
        stream.reconfigure(errors=_REPLACE)  # loggers hold it
    except OSError as error:  # of its flush
        descriptor.lose(error)
    unbuffered = isinstance(stream.buffer, io.FileIO)
    return io.TextIOWrapper(
        descriptor if unbuffered else io.BufferedWriter(descriptor),
        encoding=stream.encoding,
        errors=_REPLACE,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _descriptor_of(stream: Any) -> _Descriptor | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Descriptor) else None


def _lost(stream: Any) -> OSError | None:
    """Returns the failure of a stream that is to be reported at its end."""
    stream.flush()
    descriptor = _descriptor_of(stream)
    return None if descriptor is None or descriptor.reader_gone else descriptor.lost


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_REPLACE, _replacement)
