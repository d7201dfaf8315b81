"""Compiles a run's step for other hardware and prints its memory, communication and least time.

    python -m natsjax.plan --config=configs/nats_1b.py:v5p-128 --topology=v5p-128 [--config.GROUP.FIELD=VALUE …]

Memory and collectives are those of the step of ``train.py`` as the accelerator's own compiler compiles it. Times are
roofline bounds from the vendors' peaks: most runs are slower. ``--topology=local`` stands for this machine's devices.
``--search`` compiles the step under every rematerialization policy, each with the fewest microbatches that fit. TPU
flags in LIBTPU_INIT_ARGS have the same effect as on a run.

``--decode`` compiles the decode loop instead, on a mesh for decoding unless ``--config.mesh.*`` is given.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from natsjax.config_fields import resolve_paths
from natsjax.errors import UserError
from natsjax.plan import topologies
from natsjax.runtime.files import check_files, write_text_file
from natsjax.runtime.flags import flag_help, parse_config_flags, run_command

if TYPE_CHECKING:
    from natsjax.plan.decoding import DecodePlan
    from natsjax.plan.train_step import Plan

_USAGE = (
    "usage: python -m natsjax.plan --config=configs/NAME.py[:HARDWARE] --topology=NAME [--config.GROUP.FIELD=VALUE …]"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 if the program does not fit.

    Raises:
      UserError: a mistake in the flags, the config or the topology.
    """
    argv = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, topologies.known_topologies(), flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "TPU slices connected by the data-center network", flag_values=values)
    flags.DEFINE_bool("search", False, "try rematerialization policies and numbers of microbatches", flag_values=values)
    flags.DEFINE_string("json", None, "also write all numbers to this file, as JSON", flag_values=values)
    flags.DEFINE_string("program", None, "also write the compiled program's text to this file", flag_values=values)
    flags.DEFINE_bool("decode", False, "plan the decode loop instead of the training step", flag_values=values)
    flags.DEFINE_integer("decode_batch", None, "sequences; by default 16 a replica of the weights", flag_values=values)
    flags.DEFINE_integer("decode_context", None, "tokens of each; by default data.context_length", flag_values=values)
    flags.DEFINE_float("decode_kv", None, "live fraction of them; by default nats.kv_budget", flag_values=values)
    if "--help" in argv or "-h" in argv:
        print(flag_help(__doc__ or "", values))
        return 0
    # Here: --help needs nothing that is slow to import.
    from natsjax.plan.decoding import DecodeRequest, plan_decode_apart
    from natsjax.plan.search import search, search_table
    from natsjax.plan.summary import as_json, decode_as_json, decode_summary, summary
    from natsjax.plan.train_step import plan_apart

    config = resolve_paths(parse_config_flags(argv, values, _USAGE))
    if not values["topology"].value:
        raise UserError(f"--topology is missing: {topologies.known_topologies()}.")
    files = {name: pathlib.Path(values[name].value).expanduser() for name in ("json", "program") if values[name].value}
    for name, path in files.items():
        if not path.absolute().parent.is_dir():
            raise UserError(f"--{name}={path}: there is no such folder.")
        check_files(f"--{name}={path}", [path])
    if files and values["search"].value:
        raise UserError("--search makes several plans, --json and --program are for one; leave out --search.")
    topology = (values["topology"].value, values["num_slices"].value)
    asked = {name: values[f"decode_{name}"].value for name in ("batch", "context", "kv")}
    if values["decode"].value:
        if values["search"].value:
            raise UserError("--search is for the training step; leave it out with --decode.")
        as_trained = any(argument.startswith("--config.mesh.") for argument in argv)
        decoding = plan_decode_apart(config, *topology, DecodeRequest(**asked, as_trained=as_trained))
        return _report(decoding, decode_summary(decoding), decode_as_json(decoding), files)
    for name, value in asked.items():
        if value is not None:
            raise UserError(f"--decode_{name}={value}: it has no effect without --decode; add that.")
    if values["search"].value:
        plans = []
        for made in search(config, *topology):
            print(f"{summary(made)}\n", flush=True)
            plans.append(made)
        print(search_table(plans))
        return 0 if any(made.fits is not False for made in plans) else 1
    made = plan_apart(config, *topology)
    return _report(made, summary(made), as_json(made), files)


def _report(made: "Plan | DecodePlan", text: str, numbers: dict[str, Any], files: dict[str, pathlib.Path]) -> int:
    """Writes and prints; the exit status."""
    unwritten = files.pop("program", None) if made.refusal is not None else None
    texts = {"json": json.dumps(numbers, indent=2) + "\n", "program": made.program}
    for name, path in files.items():
        write_text_file(path, texts[name])
    print(text)
    if unwritten is not None:
        print(f"--program={unwritten} is not written: there is no program.")
    return 1 if made.fits is False else 0


if __name__ == "__main__":
    run_command(main)
