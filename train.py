"""Trains and evaluates the experiment of a config file.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.GROUP.FIELD=VALUE …]

Run the same command again after an interruption: it resumes where it was. On several machines run it on all of them,
with the same workdir (docs/clusters.md).
"""

import sys

from natsjax import train
from natsjax.runtime import distributed
from natsjax.runtime.cpu_devices import use_cores
from natsjax.runtime.flags import join_processes, parse_train_flags, run_command, train_help


def main() -> None:
    """Flags to config to run."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(train_help(__doc__))
        return
    join_processes(sys.argv)
    with distributed.fail_together():
        config, workdir = parse_train_flags(sys.argv)
        from natsjax.model import sharding  # here: --help needs nothing slow

        on_cores = sharding.for_cores(config)
        if use_cores(lambda count: sharding.fits(on_cores, count, trains=True)) > 1:
            config = on_cores
        evaluation = train.run(config, workdir)
        if distributed.is_main():
            print(evaluation.summary())


if __name__ == "__main__":
    run_command(main)
