"""Flags of the commands: a config file, overrides of its fields and who else trains; every mistake one sentence."""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from natsjax.config import RENAMED_FIELDS, Config
from natsjax.config_fields import check_not_renamed, closest, did_you_mean, format_value, nearest
from natsjax.errors import UserError
from natsjax.runtime import distributed, signals, standard_streams
from natsjax.runtime.log import logger

_OVERRIDE = re.compile(r"--?config\.")
_MOST_OF_AN_ERROR = 250  # characters
_OF_ABSL = ("flagfile", "undefok")  # it always has them
_USAGE = "usage: python train.py --config=configs/NAME.py --workdir=DIR [--config.GROUP.FIELD=VALUE …]"
_CONFIG_HELP = "the experiment: a file of configs/, or one of your own; FILE.py:WORD gives its get_config a word"


class Parser(argparse.ArgumentParser):
    """Flags of a command that has no config; the nearest one is named for a flag or a choice that does not exist.

    Flags are not abbreviated: one that is added later would change what an abbreviation means.

    Raises:
      UserError: in place of ``SystemExit`` where the command line does not fit.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def add_checkpoint(self) -> None:
        """Adds ``--checkpoint``, which ``natsjax.load`` reads."""
        self.add_argument(
            "--checkpoint",
            default="newest",
            metavar="newest|best|STEP",
            help="the run's checkpoint: the newest, that of the lowest held-out loss (train.eval_every), or that of a "
            "step (default: newest)",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the flags; unknown ones are a mistake here already, before argparse misses the right ones."""
        words = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        names = sorted({name.lstrip("-") for name in known} - {"h"})
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            # What argparse takes for a value: a single dash, a number, words with spaces between them.
            if word.startswith("-") and word != "-" and name not in known and " " not in name and not _is_number(word):
                raise _unknown_flag(name, names, "see --help")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises ``UserError``."""
        raise UserError(f"{message.rstrip('.')}; see --help.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            meant = did_you_mean(value, known)
            raise argparse.ArgumentError(action, f"{format_value(value)} is none of {', '.join(known)}{meant}")


def typed_text(argument: str) -> str:
    """Checks the text of a flag that is no path, and decodes the bytes that Python keeps where the locale is not UTF-8.

    Raises:
      argparse.ArgumentTypeError: what was typed is no UTF-8.
    """
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode("utf-8")
        except UnicodeError as error:
            raise argparse.ArgumentTypeError(f"{format_value(argument)} is no UTF-8 text") from error
    return argument


def parse_budgets(text: str) -> list[float]:
    """Reads the KV fractions of ``--budgets``.

    Raises:
      UserError: they are no numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--budgets={text}: these are no numbers; separate them by commas, as in 0.05,0.1.") from error


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _unknown_flag(name: str, known: Sequence[str], advice: str) -> UserError:
    shown_name = name if re.fullmatch(r"[\w.-]{1,100}", name) else format_value(name)
    return UserError(f"unknown flag {shown_name}{nearest(name.lstrip('-'), known, '--')}; {advice}.")


def parse_train_flags(argv: Sequence[str]) -> tuple[Config, pathlib.Path]:
    """Reads ``(config, workdir)`` from the command line (``argv[0]`` is the program).

    Raises:
      UserError: a flag, file, field or value does not fit; the message names it.
    """
    values = _train_flags()
    config = parse_config_flags(argv, values, _USAGE)
    if not values["workdir"].value:
        raise UserError(f"--workdir is missing; {_USAGE}.")
    return config, pathlib.Path(values["workdir"].value)


def parse_config_flags(argv: Sequence[str], values: flags.FlagValues, usage: str) -> Config:
    """Reads the config that ``--config=FILE`` and ``--config.GROUP.FIELD=VALUE`` give.

    Args:
      argv: the command line (``argv[0]`` is the program).
      values: the other flags that there are; they are read into it.
      usage: the last part of a message about flags.

    Raises:
      UserError: a flag, file, field or value does not fit; the message names it.
    """
    _check_flags(argv, values, usage)
    read_config_file(_config_file(argv, usage))  # ml_collections reads it again, but hides what is wrong with it
    several = _check_overrides(argv)
    argv = [word for word in argv if _OVERRIDE.sub("", word, count=1).partition("=")[0] not in several]
    try:
        flag = config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, flag_values=values, sys_argv=list(argv))
        rest = values(list(argv))
        fields = flag.value
        for path, value in several.items():
            group, name = path.split(".")
            fields = {**fields, group: {**fields.get(group, {}), name: value}}
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise _flag_error(error, usage) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {format_value(rest[1])}; {usage}.")
    return Config.from_dict(fields)


def _check_flags(argv: Sequence[str], values: flags.FlagValues, usage: str) -> None:
    """Refuses unknown flags, before the ones that they were meant for are reported as missing."""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-") or word == "--":  # absl reads no further
            break
        flag, separator, _ = word.partition("=")
        name = flag.removeprefix("-").removeprefix("-")
        if name == "config" or name.startswith("config.") or name in _OF_ABSL:
            continue
        is_switch = name.startswith("no") and name[2:] in values and values[name[2:]].boolean
        if name not in values and not is_switch:
            raise _unknown_flag(flag, ["config", "help", *values], usage)
        if not separator and not is_switch and not values[name].boolean:
            next(words, None)  # its value


def join_processes(argv: Sequence[str]) -> None:
    """Calls ``distributed.initialize`` with the flags, before the rest is read and before any device is touched.

    A mistake in the rest is then made by processes that know each other, and reported once.

    Raises:
      UserError: the flags do not fit, or a process did not join in time.
    """
    values = flags.FlagValues()
    _define_process_flags(values)
    try:
        values(list(argv), known_only=True)
    except flags.Error as error:
        raise _flag_error(error, _USAGE) from error
    distributed.initialize(
        values["coordinator_address"].value,
        values["num_processes"].value,
        values["process_id"].value,
        timeout=values["initialization_timeout"].value,
    )


def train_help(text: str) -> str:
    """Returns the text of ``train.py --help``: ``text`` and every flag."""
    return flag_help(text, _train_flags())


def _train_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "where the run lives: the same folder for all processes", flag_values=values)
    _define_process_flags(values)
    return values


def flag_help(text: str, values: flags.FlagValues) -> str:
    """Returns the text of ``--help`` for a command with a config: ``text`` and every flag; ``values`` has its own."""
    flags.DEFINE_string("config", None, _CONFIG_HELP, flag_values=values)
    flags.DEFINE_string("config.GROUP.FIELD", None, "a field of the config, set to another value", flag_values=values)
    lines = [text.strip(), "", "Flags:"]
    for name in values:
        default = "" if values[name].default is None else f" (default: {values[name].default})"
        lines += textwrap.wrap(
            f"{values[name].help}{default}", 116, initial_indent=f"  --{name}: ", subsequent_indent="      "
        )
    return "\n".join(lines)


def _define_process_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, the same for all processes; this and the next two are for clusters that JAX does not "
        "detect (it does Cloud TPU, GKE, Slurm and Open MPI)",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes", None, "number of processes that train together; 1 turns detection off", flag_values=values
    )
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)
    flags.DEFINE_integer(
        "initialization_timeout", 300, "seconds that the processes wait for each other", flag_values=values
    )


def _flag_error(error: Exception, usage: str) -> UserError:
    text = str(error).strip().split("\n")[0].removeprefix("ERROR:: ").rstrip(".")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return UserError(f"{text[:_MOST_OF_AN_ERROR]}; {usage}.")


def read_config_file(path: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """Calls ``get_config()`` of a config file, or ``get_config("WORD")`` for ``FILE.py:WORD``.

    Raises:
      UserError: there is no such file, or something in it is wrong; the message names the line.
    """
    name, separator, word = os.fspath(path).partition(".py:")
    path = pathlib.Path(f"{name}.py" if separator else name)
    if not path.is_file():
        there = sorted(str(other) for other in path.parent.glob("*.py"))
        raise UserError(f"--config={path}: there is no such file{did_you_mean(str(path), there)}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} is no Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if separator and not inspect.signature(module.get_config).parameters:
            raise UserError(f"--config={path}:{word}: the get_config of this file takes no word, {word!r}.")
        config = module.get_config(word) if separator else module.get_config()
        if isinstance(config, ml_collections.ConfigDict | dict):
            return config
        raise UserError(
            f"{path}: get_config() returned {format_value(config)}; the config that it edited was expected "
            "(`return config`)."
        )
    except UserError:
        raise
    except Exception as error:  # the file is the user's own code, which may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise UserError(f"{path}{f', line {line}' if line else ''}: {_explained(error)}.") from error


def _explained(error: Exception) -> str:
    text = " ".join(str(error).replace("\\n", " ").split())
    for name in re.findall(r'instead of "(\w+)"|Key "(\w+)" does not|^\'(\w+)\'$', text):
        for old, new in RENAMED_FIELDS.items():
            if old.rpartition(".")[2] in name:
                return f"{old} was renamed to {new}"
    unknown = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
    if unknown:
        return f"unknown config field {unknown[2]}; did you mean {unknown[1]}"
    locked = re.search(r'Key "(\w+)" does not exist and cannot be added', text)
    if locked:
        return f"unknown config field {locked[1]}{_nearest_field(locked[1])}"
    return f"{type(error).__name__}: {text}".rstrip(".")


def _config_file(argv: Sequence[str], usage: str) -> str:
    if any(argument in ("-config", "--config") for argument in argv):
        raise UserError(f"--config=FILE was expected in one word, with an equals sign; {usage}.")
    names = [argument.split("=", 1)[1] for argument in argv if re.match("--?config=", argument)]
    if not names:
        raise UserError(f"--config=FILE is missing; {usage}.")
    return names[-1]


def _check_overrides(argv: Sequence[str]) -> dict[str, Any]:
    """Looks fields up before ml_collections does, whose errors for unknown and mistyped ones are hard to read.

    Returns:
      The values of fields that are a number or several, by path: ml_collections takes what the config file has of both.
    """
    several: dict[str, Any] = {}
    for argument in argv:
        if not _OVERRIDE.match(argument):
            continue
        path, separator, value = _OVERRIDE.sub("", argument, count=1).partition("=")
        path_shown = path if re.fullmatch(r"[\w.]{1,100}", path) else format_value(path)
        group: type = Config
        kind: type | None = None
        above = ""
        for name in path.split("."):
            fields = typing.get_type_hints(group) if dataclasses.is_dataclass(group) else {}
            if name not in fields:
                check_not_renamed(path, RENAMED_FIELDS)
                hint = _nearest_field(path) or (nearest(name, fields, above) if fields else "")
                raise UserError(f"unknown config field {path_shown}{hint}.")
            group = kind = fields[name]
            above += f"{name}."
        if dataclasses.is_dataclass(kind):
            raise UserError(
                f"config field {path} is a group of fields; set one of them, as in --config.{path}.NAME=VALUE."
            )
        if not separator and kind is not bool:
            raise UserError(f"--config.{path} has no value; --config.{path}=VALUE was expected, in one word.")
        _check_override(path, kind, value)
        if isinstance(kind, types.UnionType):
            numbers = tuple_parser.TupleParser().parse(value)
            several[path] = numbers if "," in value or len(numbers) != 1 else numbers[0]
    return several


def _nearest_field(path: str) -> str:
    """Returns ``"; did you mean GROUP.FIELD"``, or "": by the last name, in the group that was meant or in another."""
    group, _, name = path.rpartition(".")
    paths = list(_field_paths(Config))
    close = closest(name, [other.rpartition(".")[2] for other in paths])
    found = [other for other in paths if other.rpartition(".")[2] == close]
    if not found:
        return ""
    return f"; did you mean {max(found, key=lambda other: difflib.SequenceMatcher(None, group, other).ratio())}"


def _field_paths(group: type, above: str = "") -> Iterator[str]:
    for name, kind in typing.get_type_hints(group).items():
        yield f"{above}{name}"
        if dataclasses.is_dataclass(kind):
            yield from _field_paths(typing.cast(type, kind), f"{above}{name}.")


def _check_override(path: str, kind: Any, value: str) -> None:
    if kind in (int, float):
        try:
            kind(value)
        except ValueError as error:
            raise UserError(f"{path} = {format_value(value)}: {kind.__name__} was expected.") from error
    if kind is bool and value.lower() not in ("", "true", "false", "0", "1"):
        raise UserError(f"{path} = {format_value(value)}: true or false was expected.")
    if typing.get_origin(kind) is tuple or isinstance(kind, types.UnionType):
        try:
            tuple_parser.TupleParser().parse(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(
                f"{path} = {format_value(value)}: numbers separated by commas were expected, as in (0.1,0.2)."
            ) from error


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command, whose result is the exit status; a ``UserError`` becomes one sentence and exit status 2.

    Its printing cannot fail (``standard_streams``); where standard output is incomplete for a reason such as a full
    disk, the exit status is 1. An error inside ``distributed.fail_together`` of several processes is printed there,
    once, and does not come here.
    """
    # Orbax reports every part of a save at INFO, without a cluster missing coordination at WARNING, and at ERROR, with
    # a traceback, what it raises as well; asyncio does so too.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_echoes
    with standard_streams.guarded():
        try:
            status = main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            logger.info("interrupted")
            signals.end_if_abandoned(signals.EXIT_STATUS)
            sys.exit(signals.EXIT_STATUS)
        if status:
            sys.exit(status)


def _without_echoes(unraisable: Any) -> None:
    """Drops what TensorStore raises behind a failed save, once an array (a ``sys.unraisablehook``)."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
