"""Shows what a model is trained on: contexts of a corpus, token by token.

    python -m natsjax.data.inspect --prepared_dir=data/sotu --context_length=256
    python -m natsjax.data.inspect --workdir=runs/sotu --step=100 --row=3

Contexts are decoded with their document pieces, boundaries of tokens, positions, and where nothing is learned. Those of
the training split are the ones that a run sees, step by step; those of the validation split the slice that it is
measured on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from typing import Any

from natsjax.config import Config, DataConfig
from natsjax.config_fields import resolve_paths
from natsjax.data.corpus import SPLITS
from natsjax.errors import UserError
from natsjax.runtime import standard_streams
from natsjax.runtime.flags import Parser, read_config_file, run_command


def _config_of(options: argparse.Namespace) -> tuple[Config, str]:
    """Returns the config as flags change it, and the prepared corpus or mixture (empty for recall)."""
    prepared = os.path.expanduser(options.prepared_dir)
    if options.workdir:
        from natsjax.runs.paths import locate
        from natsjax.runs.workdir import Workdir

        workdir = Workdir(options.workdir)
        config = workdir.read_config()
        if not prepared and config.data.source == "corpus":
            found = locate(config.data, workdir.path, workdir.known_fingerprint())
            prepared = found.mixture or found.prepared_dir
        if not prepared and config.data.source == "none":
            raise UserError(f"--workdir={options.workdir} was imported and has no corpus; give one as --prepared_dir.")
    elif options.config:
        config = resolve_paths(Config.from_dict(read_config_file(options.config)))
        prepared = prepared or config.data.mixture or config.data.prepared_dir
        if not prepared and config.data.source == "corpus":
            raise UserError(
                f"--config={options.config} names no prepared corpus (data.prepared_dir is empty, so that each run has "
                "its own); give the corpus as --prepared_dir, or a run as --workdir."
            )
    elif prepared:
        config = Config()
    else:
        raise UserError("nothing to inspect: give --prepared_dir=DIR, --workdir=DIR or --config=FILE.")
    if config.data.source == "recall" and not options.prepared_dir:
        prepared = ""
    data, training = (
        {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        for names in (("context_length", "shuffle"), ("seed", "batch_size"))
    )
    # Ranges are checked below and by what is made of them: here the rest of the config plays no part.
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, **data), train=dataclasses.replace(config.train, **training)
    )
    return config, prepared


def _index(options: argparse.Namespace, batch_size: int) -> tuple[int, dict[str, Any]]:
    """Returns the number of the context that is asked for, and its place."""
    for name in ("step", "row", "context", "context_length", "seed", "batch_size"):
        value = getattr(options, name)
        least = 1 if name in ("context_length", "batch_size") else 0
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: it must be at least {least}.")
    if options.split != "train" and options.step is not None:
        raise UserError(f"--step={options.step} is about training; of the split {options.split!r} give --context.")
    if options.context is not None:
        if options.step is not None or options.row is not None:
            raise UserError(f"--context={options.context} names the context already; leave --step and --row out.")
        index = options.context
    elif options.split != "train":
        index = options.row or 0
    else:
        row = options.row or 0
        if row >= batch_size:
            raise UserError(f"--row={row}: a step has {batch_size} rows, 0 to {batch_size - 1}.")
        index = (options.step or 0) * batch_size + row
    if options.split != "train":
        return index, {}
    step, row = divmod(index, batch_size)
    return index, {"step": step, "row": row}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (2: a mistake)."""
    try:
        options = _parser().parse_args(arguments)
        # Here: the parser is built before anything slow is imported.
        from natsjax.data.inspect.contexts import example_at, open_data
        from natsjax.data.inspect.examples import COLOR_LEGEND, LEGEND

        config, prepared = _config_of(options)
        index, place = _index(options, config.train.batch_size)
        data = open_data(config, options.split, prepared)
        if place:
            documents = data.documents_in_batch(place["step"], config.train.batch_size)
            place |= {} if documents is None else {"documents_in_batch": documents}
        example = example_at(data, options.split, index, place)
        if options.json:
            standard_streams.print_json(example.to_json())
        else:
            color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            print(COLOR_LEGEND if color else LEGEND)
            for line in example.lines(color=color):
                print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m natsjax.data.inspect",
        description="Show a context that a model is trained or measured on: decoded, with its document pieces, token "
        "boundaries, positions, and where nothing is learned.",
        epilog="Examples: --prepared_dir=data/sotu   |   --workdir=runs/sotu --step=100 --row=3",
    )
    parser.add_argument("--prepared_dir", default="", help="folder of a prepared corpus, or DIR=WEIGHT,DIR=WEIGHT")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--workdir", default="", help="a run, whose data and settings are taken")
    source.add_argument("--config", default="", help="a config file, whose data and settings are taken")
    parser.add_argument("--split", default="train", choices=SPLITS, help="(default: train)")
    parser.add_argument("--step", type=int, help="training step (default: 0)")
    parser.add_argument("--row", type=int, help="row of the step's batch (default: 0)")
    parser.add_argument("--context", type=int, help="instead of step and row: number of the context in its split")
    defaults = Config()
    settings = (
        ("context_length", "tokens in a context", defaults.data.context_length),
        ("seed", "of the data order", defaults.train.seed),
        ("batch_size", "contexts in a step", defaults.train.batch_size),
    )
    for name, help, default in settings:
        parser.add_argument(f"--{name}", type=int, help=f"{help} (default: that of the run or config, else {default})")
    order = typing.get_args(typing.get_type_hints(DataConfig)["shuffle"])
    help = f"what an epoch puts into a random order (default: as above, else {defaults.data.shuffle})"
    parser.add_argument("--shuffle", choices=order, help=help)
    parser.add_argument("--json", action="store_true", help="print everything as one line of JSON")
    return parser


if __name__ == "__main__":
    run_command(main)
