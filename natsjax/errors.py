"""The one exception for mistakes that a person can put right."""


class UserError(Exception):
    """A mistake in what a person asked for: a config field, an input file, a workdir.

    Its message is one clear sentence that names the field or file, the value found and what would be right.
    The commands print it without a traceback and exit with status 2; from Python it is an ordinary exception.
    """
