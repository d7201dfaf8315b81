"""The command ``python -m natsjax.serve``: completions over HTTP."""

from collections.abc import Sequence

from natsjax.runtime.flags import run_command
from natsjax.serve.flags import parse_serve_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Raises:
      UserError: see ``run`` and ``parse_serve_flags``.
    """
    arguments = parse_serve_flags(argv)
    from natsjax.serve.server import run  # here: the parser is built before anything slow is imported

    run(**arguments)
    return 0


if __name__ == "__main__":
    run_command(main)
