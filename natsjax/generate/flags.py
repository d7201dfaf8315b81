"""Flags of ``python -m natsjax.generate``: prompts, sampling, policies, devices, files."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from natsjax.config import MeshConfig
from natsjax.config_fields import did_you_mean, nearest
from natsjax.data.readers.file_marks import check_no_pointer
from natsjax.errors import UserError
from natsjax.policies.registry import NATS, POLICIES
from natsjax.runtime.flags import Parser, typed_text

if TYPE_CHECKING:
    from natsjax.policies.base import DecodingPolicy

_MAX_ROLE_BIAS = 1e6  # logits are of order 1 to 10

READING_TEMPERATURE = 0.8
"""The command's default: text to read. Greedy text soon repeats itself."""

# For --help, which imports no JAX; a test compares them with ``DecodeSettings`` and ``EVICTIONS``.
DEFAULTS = {"chunk": 512, "block": 128, "eviction": "soonest_end"}
EVICTION_NAMES = ("soonest_end", "oldest")

_TOO_LARGE = 2**30  # numbers become int32, and are added to others


def parse_generate_flags(argv: Sequence[str] | None, description: str) -> dict[str, Any]:
    """Returns the arguments of ``natsjax.generate.run``.

    Args:
      argv: the command line, without the program; None: this process's.
      description: the beginning of ``--help``.

    Raises:
      UserError: a flag or its value does not fit, or there is no prompt; the message names it.
    """
    flags = _parser(description).parse_args(argv)
    from natsjax.decode.sampling import Sampling  # here: the parser is built before anything slow is imported

    check_sizes(flags, ("max_new_tokens", "batch_size", "top_k"))
    names = [field.name for field in dataclasses.fields(Sampling)]
    return decoding_arguments(flags) | {
        "max_new_tokens": flags.max_new_tokens,
        "sampling": Sampling(**{name: getattr(flags, name) for name in names}),
        "stop_tokens": () if flags.stop_tokens is None else _ids("stop_tokens", flags.stop_tokens),
        "ignore_eos": flags.ignore_eos,
        "batch_size": flags.batch_size,
        "output": flags.output,
        "echo": flags.echo,
        "prompts": _prompts(flags),
    }


def check_sizes(flags: argparse.Namespace, names: Sequence[str]) -> None:
    """Checks that numbers are not too large for a program.

    Raises:
      UserError: one is.
    """
    for name in names:
        if (value := getattr(flags, name)) is not None and value >= _TOO_LARGE:
            raise UserError(f"--{name}={value}: it is too large; choose a number below {_TOO_LARGE}.")


def decoding_arguments(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns what ``add_model_flags`` and ``add_decoding_flags`` read: the run, policy, settings and devices.

    Raises:
      UserError: a value does not fit; the message names it.
    """
    from natsjax.decode.decoder import DecodeSettings

    check_sizes(flags, ("max_kv", "chunk", "block"))
    if flags.eviction is not None and flags.max_kv is None:
        raise UserError(f"--eviction={flags.eviction}: without --max_kv nothing is evicted; give that too.")
    given = {"chunk": flags.chunk, "block": flags.block, "max_kv": flags.max_kv, "eviction": flags.eviction}
    return {
        "workdir": flags.workdir,
        "policy": parse_policy(flags.policy, flags.role_bias),
        "settings": DecodeSettings(**{name: value for name, value in given.items() if value is not None}),
        "mesh_config": None if flags.mesh is None else parse_mesh(flags.mesh),
        "prepared_dir": flags.prepared_dir,
        "checkpoint": flags.checkpoint,
    }


def add_model_flags(parser: Parser) -> None:
    """Adds ``--workdir`` and ``--checkpoint``."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run, as given to train.py, or an export")
    parser.add_checkpoint()


def add_decoding_flags(parser: Parser) -> None:
    """Adds the flags of which keys live, of devices, and of the prepared corpus."""
    add = parser.add_argument
    add("--role_bias", type=float, metavar="F", help="of a nats run: above 0 keeps more keys, below fewer (default: 0)")
    add(
        "--policy",
        metavar="NAME",
        help="which keys live (default: nats, or full for a dense run). "
        + "; ".join(f"{entry.form}: {entry.summary}" for entry in POLICIES.values()).replace("%", "%%"),
    )
    add("--max_kv", type=int, metavar="N", help="the most keys of a head; what has to go for it is counted")
    add(
        "--eviction",
        metavar="NAME",
        help=f"what goes first at --max_kv: {', '.join(EVICTION_NAMES)} (default: {DEFAULTS['eviction']})",
    )
    add(
        "--mesh",
        metavar="AXIS=N,…",
        help="devices: data and fsdp divide the batch, tensor the heads; -1: the rest (default: as the run was "
        "trained, where there are as many devices, else all along fsdp)",
    )
    add(
        "--chunk",
        type=int,
        metavar="N",
        help=f"prompt tokens read at once; --max_kv evicts behind them (default: {DEFAULTS['chunk']})",
    )
    add(
        "--block",
        type=int,
        metavar="N",
        help=f"keys are allocated in multiples of it (default: {DEFAULTS['block']}), or of a part of it for short "
        "sequences on a CPU",
    )
    add(
        "--prepared_dir",
        metavar="DIR",
        help="the folder of the prepared corpus (default: looked for beside the run, and where it was)",
    )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(prog="python -m natsjax.generate", description=description)
    add_model_flags(parser)
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        type=typed_text,
        metavar="TEXT",
        help="where a document begins, may be empty; for several: again",
    )
    add(
        "--prompt_file",
        metavar="FILE",
        help="a prompt in each line, an empty one in an empty line; - is standard input, which is read without this "
        "flag too where it is no terminal and no prompt is given",
    )
    add(
        "--prompt_tokens",
        action="append",
        metavar="ID,ID,…",
        help="a prompt as token ids, with the one that begins a document; all there is for a recall run, whose tokens "
        "are no text; for several: again",
    )
    add("--batch_size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="after each prompt, at most (default: 128)")
    add(
        "--temperature",
        type=float,
        default=READING_TEMPERATURE,
        metavar="F",
        help=f"of sampling; 0: always the likeliest token, greedy (default: {READING_TEMPERATURE:g})",
    )
    add(
        "--top_k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens; 0: from all (default: 0)"
    )
    add(
        "--top_p",
        type=float,
        default=1.0,
        metavar="F",
        help="sample from the likeliest tokens that reach this probability together (default: 1)",
    )
    add(
        "--min_p",
        type=float,
        default=0.0,
        metavar="F",
        help="sample from tokens with at least this fraction of the likeliest one's probability (default: 0)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of sampling: the same gives the same text (default: 0)")
    add("--stop_tokens", metavar="ID,ID,…", help="token ids after which a prompt is done, beside EOS")
    add("--ignore_eos", action="store_true", help="continue where the model ends the document")
    add_decoding_flags(parser)
    add("--output", metavar="FILE", help="also write prompts, texts, ids and log-probabilities: JSON, a line a prompt")
    add(
        "--echo",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write each prompt before what follows it",
    )
    return parser


# --- prompts ---


def _prompts(flags: argparse.Namespace) -> list[str] | list[list[int]]:
    """Returns the prompts from the one place that the flags name, or from standard input."""
    given = [name for name in ("prompt", "prompt_file", "prompt_tokens") if getattr(flags, name) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]}, --{given[1]}: these are two places for prompts; choose one.")
    if flags.prompt is not None:
        return flags.prompt
    if flags.prompt_tokens is not None:
        return [_ids("prompt_tokens", text) for text in flags.prompt_tokens]
    if not given and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError("there is no prompt: give --prompt=TEXT or --prompt_file=FILE, or pipe lines of text in.")
    return _lines(flags.prompt_file or "-")


def _lines(name: str) -> list[str]:
    """Reads a prompt from each line of a file, or of standard input for ``-``."""
    what = "standard input" if name == "-" else f"--prompt_file={name}"
    if name == "-" and sys.stdin is None:
        raise UserError("--prompt_file=-: standard input is closed; give a file, or --prompt=TEXT.")
    try:
        if name == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(name, "rb") as file:
                content = file.read()
            check_no_pointer(pathlib.Path(name), content)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{what}: it cannot be read ({error.strerror}); name another file.") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"0x{content[error.start]:02x}"
        raise UserError(f"{what}: line {line} has the byte {byte}, which is no UTF-8; convert it to UTF-8.") from error
    if not text:
        raise UserError(f"{what}: it is empty, so there is no prompt; an empty line is an empty one.")
    # Not splitlines, which also splits at form feeds and the like.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _ids(flag: str, text: str) -> list[int]:
    """Reads token ids."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{flag}={text}: these are no ids; separate them by commas, as in 0,5,7.") from error


# --- policies and meshes by name ---


def policy_forms() -> list[str]:
    """Returns the texts that ``parse_policy`` takes, with letters for numbers."""
    return [entry.form for entry in POLICIES.values()]


def parse_policy(text: str | None, role_bias: float | None = None) -> "DecodingPolicy | None":
    """Returns a policy by name; None where nothing is asked for.

    Args:
      text: one of ``policy_forms``.
      role_bias: for a policy that reads the model's roles.

    Raises:
      UserError: it is none of them, or a number does not fit.

    Example:
      >>> parse_policy("streaming_llm:4,60")
      StreamingLLM(num_sinks=4, window=60)
    """
    if role_bias is not None and not abs(role_bias) <= _MAX_ROLE_BIAS:
        raise UserError(
            f"--role_bias={role_bias}: it is out of range; choose one from -{_MAX_ROLE_BIAS:g} to {_MAX_ROLE_BIAS:g}."
        )
    if text is None:
        if role_bias is None:
            return None
        return NATS.make(role_bias)
    name, colon, rest = text.partition(":")
    if name not in POLICIES:
        raise UserError(
            f"--policy={text}: there is no such policy{did_you_mean(name, POLICIES)}; choose one of "
            f"{', '.join(policy_forms())}."
        )
    entry = POLICIES[name]
    if role_bias is not None and not entry.reads_roles:
        raise UserError(f"--role_bias={role_bias:g}: --policy={text} does not read the model's roles; leave one out.")
    words = rest.split(",") if colon else []
    try:
        numbers = [number.kind(word) for number, word in zip(entry.numbers, words, strict=False)]
    except ValueError:
        numbers = []
    if len(numbers) != len(words) or len(words) < sum(number.required for number in entry.numbers):
        raise UserError(f"--policy={text}: its numbers do not fit; give it as {entry.form}.")
    if any(number >= _TOO_LARGE for number in numbers):
        raise UserError(f"--policy={text}: a number is too large; choose numbers below {_TOO_LARGE}.")
    try:
        return entry.make(*numbers, *([] if role_bias is None else [role_bias]))
    except ValueError as error:  # out of the policy's range
        raise UserError(f"--policy={text}: {str(error).rstrip('.')}.") from error


def parse_mesh(text: str) -> MeshConfig:
    """Reads sizes of a mesh by name; axes without one get 1, or what is left where no other does.

    Raises:
      UserError: an axis is unknown, named twice or divides sequences, or a size does not fit.

    Example:
      >>> parse_mesh("data=2,tensor=4")
      MeshConfig(data=2, fsdp=-1, tensor=4, context=1)
    """
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, word = part.partition("=")
        try:
            size = int(word)
        except ValueError as error:
            raise UserError(f"--mesh={text}: it is not AXIS=N,…; give it as in data=2,tensor=4.") from error
        if name not in axes:
            raise UserError(f"--mesh={text}: unknown axis {name!r}{nearest(name, axes)}.")
        if name in sizes:
            raise UserError(f"--mesh={text}: {name} is there twice; name each axis once.")
        if size < 1 and size != -1:
            raise UserError(f"--mesh={text}: {name} has no such size; choose 1 or more, or -1 for the rest.")
        sizes[name] = size
    if sizes.get("context", 1) != 1:
        raise UserError(f"--mesh={text}: decoding divides batch and heads, not sequences; leave context out.")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"--mesh={text}: -1, the rest, is there twice; name it once.")
    if -1 in sizes.values():
        sizes.setdefault("fsdp", 1)
    return MeshConfig(**sizes)
