"""Trains a run for every KV budget (or KV penalty) and seed, one after another, and draws quality against KV.

    python -m natsjax.sweep --config=configs/recall.py --workdir=sweeps/recall --kv_budgets=0.05,0.1,0.2 --seeds=0,1,2

After an interruption run the same command again: finished runs stay, and the interrupted one is resumed. More budgets,
KV penalties or seeds only add runs. docs/sweep.md describes the results.
"""

import sys
from collections.abc import Sequence

from absl import flags

from natsjax.errors import UserError
from natsjax.runtime import distributed
from natsjax.runtime.flags import flag_help, join_processes, parse_config_flags, run_command

_USAGE = (
    "usage: python -m natsjax.sweep --config=configs/NAME.py --workdir=DIR --kv_budgets=F,F,… [--seeds=N,N,…] "
    "[--config.GROUP.FIELD=VALUE …]"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status: 0, or 1 if a run failed.

    Raises:
      UserError: see ``run``.
    """
    argv = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the sweep; each run is a workdir in it", flag_values=values)
    flags.DEFINE_string("kv_budgets", None, "KV budgets, as 0.05,0.1,0.2", flag_values=values)
    flags.DEFINE_string(
        "kv_penalties",
        None,
        "fixed KV penalties instead of budgets, in nats per token for a KV fraction of 1, as 0.01,0.1,1",
        flag_values=values,
    )
    flags.DEFINE_string("seeds", "0", "train.seed of the runs, as 0,1,2", flag_values=values)
    flags.DEFINE_bool("dense", False, "also train the dense baseline of each seed", flag_values=values)
    if "--help" in argv or "-h" in argv:
        print(flag_help(__doc__ or "", values))
        return 0
    join_processes(argv)  # a sweep refuses to be one of several processes, which it can detect only after joining them
    with distributed.fail_together():
        config = parse_config_flags(argv, values, _USAGE)
        if not values["workdir"].value:
            raise UserError(f"--workdir is missing; {_USAGE}.")
        from natsjax.sweep.sweep import run  # here: --help needs nothing slow

        sweep = run(
            config,
            values["workdir"].value,
            kv_budgets=_numbers("kv_budgets", values, float),
            kv_penalties=_numbers("kv_penalties", values, float),
            seeds=_numbers("seeds", values, int) or (),
            dense=values["dense"].value,
        )
        print(sweep.summary())
    return 1 if sweep.failures else 0


def _numbers(name: str, values: flags.FlagValues, kind: type) -> list | None:
    """Parses the numbers of a flag; returns None if it is not given."""
    text = values[name].value
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError as error:
        what = "integers" if kind is int else "numbers"
        raise UserError(f"--{name}={text}: {what} separated by commas were expected.") from error


if __name__ == "__main__":
    run_command(main)
