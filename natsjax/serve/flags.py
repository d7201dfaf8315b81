"""Flags of ``python -m natsjax.serve``: addresses and limits, beside those of generation."""

import os
from collections.abc import Sequence
from typing import Any

from natsjax.config_fields import real_path
from natsjax.data.readers.file_marks import check_no_pointer
from natsjax.errors import UserError
from natsjax.generate.flags import add_decoding_flags, add_model_flags, check_sizes, decoding_arguments
from natsjax.runtime.flags import Parser, typed_text

API_KEY_VARIABLE = "NATSJAX_API_KEY"
"""Environment variable with the key that clients must give; a flag would be seen by every user of the machine."""

_COUNTS = ("rows", "max_queue", "max_length", "max_body", "segment")


def parse_serve_flags(argv: Sequence[str] | None) -> dict[str, Any]:
    """Returns the arguments of ``natsjax.serve.run``.

    Args:
      argv: the command line, without the program; None: this process's.

    Raises:
      UserError: a flag or its value does not fit; the message names it.
    """
    flags = _parser().parse_args(argv)
    check_sizes(flags, _COUNTS)
    arguments = decoding_arguments(flags)
    names = ("host", "port", "rows", "max_queue", "max_length", "max_body", "segment", "grace_seconds", "model_name")
    return arguments | {name: getattr(flags, name) for name in names} | {"api_key": _api_key(flags.api_key_file)}


def _parser() -> Parser:
    parser = Parser(
        prog="python -m natsjax.serve",
        description="Serves completions of the newest checkpoint of a run or an export over HTTP, as OpenAI's "
        "/v1/completions does. Requests share one decode loop, whose rows they get as these become free. SIGTERM and "
        "Ctrl-C stop it when running requests are answered.",
    )
    add = parser.add_argument
    add_model_flags(parser)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine (default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="0: any that is free (default: 8000)")
    add(
        "--api_key_file",
        metavar="FILE",
        help=f"a file with the key that clients must give (default: the environment variable {API_KEY_VARIABLE}, or "
        "none)",
    )
    add("--model_name", type=typed_text, metavar="NAME", help="of the model (default: the name of its folder)")
    add("--rows", type=int, default=8, metavar="N", help="sequences that are generated at a time (default: 8)")
    add(
        "--max_queue",
        type=int,
        default=64,
        metavar="N",
        help="sequences that wait for a row; with more, requests get status 429 (default: 64)",
    )
    add(
        "--max_length",
        type=int,
        metavar="N",
        help="tokens of a sequence, prompt and new ones together (default: data.context_length of the run)",
    )
    add("--max_body", type=int, default=1 << 20, metavar="BYTES", help="of a request (default: 1048576)")
    add(
        "--segment",
        type=int,
        default=8,
        metavar="N",
        help="tokens that are drawn before new requests are looked at, and streamed together (default: 8)",
    )
    add(
        "--grace_seconds",
        type=float,
        default=30.0,
        metavar="F",
        help="time that running requests get when the server is told to stop (default: 30)",
    )
    add_decoding_flags(parser)
    return parser


def _api_key(file: str | None) -> str | None:
    """Reads the key from a file, else from the environment; None where there is none."""
    if file is None:
        key = os.environ.get(API_KEY_VARIABLE)
        if key is not None:
            _check_key(key, API_KEY_VARIABLE)
        return key
    path = real_path(file)
    try:
        content = path.read_bytes()
        check_no_pointer(path, content)
        key = content.decode("utf-8-sig").strip()
    except OSError as error:
        raise UserError(f"--api_key_file={file}: it cannot be read ({error.strerror}); name another file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--api_key_file={file}: it is no UTF-8 text; write the key alone into it.") from error
    _check_key(key, f"--api_key_file={file}")
    return key


def _check_key(key: str, where: str) -> None:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where}: the key must be of printable ASCII characters without spaces; choose another.")
