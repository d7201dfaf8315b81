"""The one exception for mistakes that a person can put right, and what other exceptions say, for its sentence."""

import re

_MOST = 300  # characters of another's words in a sentence
_REPR = re.compile(r"<(?:bound method|built-in|function|class|module|coroutine|[\w.]+ object at)\b")


class UserError(Exception):
    r"""A mistake in what a person asked for: a config field, an input file, a workdir.

    Its message is one clear sentence that names the field or file, the value found and what would be right.
    The commands print it without a traceback and exit with status 2; from Python it is an ordinary exception.

    Args:
      message: the sentence. Names of files and fields in it may hold anything: what cannot be printed on one line is
        escaped, as in ``new\nline.txt``.
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_printable, message)))


def first_line(error: BaseException) -> str:
    r"""Returns the first line of an exception for a sentence of ours, without reprs of objects or a stop.

    Args:
      error: of a library or the system; where it says nothing, its type is what is known.

    Example:
      >>> first_line(ValueError("no index. See <bound method spec of Store({\n  'driver': 'zarr'…"))
      'no index'
    """
    text = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if (found := _REPR.search(line)) is not None:  # the sentence that ends in the inner life of an object
        before = line[: found.start()]
        line = before.rpartition(". ")[0] or before
    line = line.rstrip(" .:;,(") or type(error).__name__
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """Returns the text as one line of a terminal: what cannot be printed is escaped."""
    return "".join(map(_printable, text))
