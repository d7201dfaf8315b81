"""The exception for mistakes that a user can correct, and parts of its message."""

import re

_MOST = 300  # characters of another exception's message
_REPR = re.compile(r"<(?:bound method|built-in|function|class|module|coroutine|[\w.]+ object at)\b")


class UserError(Exception):
    r"""A user's mistake: in a config field, an input file, a workdir.

    Its message is one sentence that names the field or file, the value found and the remedy. The commands print it
    without a traceback and exit with status 2; from Python it is an ordinary exception.

    Args:
      message: the sentence. Characters of file and field names that cannot be printed on one line are escaped, as in
        ``new\nline.txt``.
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_printable, message)))


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an exception's message, without reprs of objects and a final period.

    Args:
      error: exception of a library or the system; without a message, the name of its type is returned.

    Example:
      >>> first_line(ValueError("no index. See <bound method spec of Store({\n  'driver': 'zarr'…"))
      'no index'
    """
    text = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if (found := _REPR.search(line)) is not None:  # the sentence that has the repr
        before = line[: found.start()]
        line = before.rpartition(". ")[0] or before
    line = line.rstrip(" .:;,(") or type(error).__name__
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """Returns the text as one line of a terminal: what cannot be printed is escaped."""
    return "".join(map(_printable, text))
