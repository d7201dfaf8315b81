"""Flags of ``train.py``: a config file and overrides of its fields, every mistake one sentence."""

import dataclasses
import pathlib
import sys
import typing
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from natsjax.config import Config, nearest
from natsjax.errors import UserError

_OVERRIDE = "--config."
_USAGE = "usage: python train.py --config=configs/NAME.py --workdir=DIR [--config.GROUP.FIELD=VALUE …]"


def parse_train_flags(argv: Sequence[str]) -> tuple[Config, pathlib.Path]:
    """``(config, workdir)`` from the command line (``argv[0]`` is the program).

    Raises:
      UserError: a flag, file, field or value that does not fit; the message says which.
    """
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", None, "the experiment", flag_values=values, sys_argv=list(argv))
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    _require_config_file(argv)
    _check_overrides(argv)
    try:
        rest = values(list(argv))
    except (flags.Error, TypeError) as error:
        raise UserError(f"{str(error).split(chr(10))[0].rstrip('.')}; {_USAGE}.") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; {_USAGE}.")
    if values["workdir"].value is None:
        raise UserError(f"--workdir is missing; {_USAGE}.")
    return Config.from_dict(flag.value), pathlib.Path(values["workdir"].value)


def _require_config_file(argv: Sequence[str]) -> None:
    """ml_collections would go on with a placeholder when the file is missing: say it here instead."""
    names = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    if not names:
        raise UserError(f"--config=FILE is missing; {_USAGE}.")
    path = names[-1].split(":", 1)[0]
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={path}: there is no such file.")


def _check_overrides(argv: Sequence[str]) -> None:
    """Looks fields up before ml_collections does, whose errors for unknown and mistyped ones are hard to read."""
    for argument in argv:
        if not argument.startswith(_OVERRIDE):
            continue
        path, _, value = argument.removeprefix(_OVERRIDE).partition("=")
        group: type = Config
        kind: type | None = None
        for name in path.split("."):
            fields = typing.get_type_hints(group) if dataclasses.is_dataclass(group) else {}
            if name not in fields:
                raise UserError(f"unknown config field {path}{nearest(name, fields) if fields else ''}.")
            group = kind = fields[name]
        if dataclasses.is_dataclass(kind):
            raise UserError(
                f"config field {path} is a group of fields; set one of them, as in --config.{path}.NAME=VALUE."
            )
        if kind in (int, float):
            try:
                kind(value)
            except ValueError as error:
                raise UserError(f"config field {path} is {value!r}; {kind.__name__} was expected.") from error
        if kind is bool and value.lower() not in ("", "true", "false", "0", "1"):
            raise UserError(f"config field {path} is {value!r}; true or false was expected.")


def run_command(main: Callable[[], None]) -> None:
    """Runs a command; a ``UserError`` becomes one sentence on standard error and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
