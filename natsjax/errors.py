"""The one exception for mistakes that a person can put right."""


class UserError(Exception):
    """A mistake in what a person asked for: a config field, an input file, a workdir.

    Its message is one clear sentence that names the field or file, the value found and what would be right.
    The commands print it without a traceback and exit with status 2; from Python it is an ordinary exception.

    Args:
      message: the sentence. Names of files and fields in it may hold anything: what cannot be printed on one line is
        escaped, as in ``new\\nline.txt``.
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """The text on one line of a terminal: what cannot be printed is escaped."""
    return "".join(map(_printable, text))
