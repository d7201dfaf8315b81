"""The command ``python -m natsjax.generate``: text from prompts."""

import sys
from collections.abc import Sequence

from natsjax.generate.flags import parse_generate_flags
from natsjax.runtime.flags import run_command
from natsjax.runtime.log import logger


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Raises:
      UserError: see ``run`` and ``parse_generate_flags``.
    """
    arguments = parse_generate_flags(
        argv,
        "Continues prompts with the newest checkpoint of a run or an export. Prompts and their continuations go to "
        "standard output at once, one after another; the closing line (tokens, seconds, and the KV cache beside that "
        "of full attention) goes to standard error.",
    )
    from natsjax.generate.texts import run  # here: the parser is built before anything slow is imported

    found = run(**arguments, stream=sys.stdout, warn=lambda note: logger.warning(f"warning: {note}"))
    logger.info(found.summary())
    return 0


if __name__ == "__main__":
    run_command(main)
