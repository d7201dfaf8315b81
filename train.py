"""Trains and evaluates the experiment of a config file.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.GROUP.FIELD=VALUE …]

Run the same command again after an interruption: it goes on where it was.
"""

import sys

from natsjax import train
from natsjax.command_line import parse_train_flags, run_command


def main() -> None:
    """Flags to config to run."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__.strip())
        return
    config, workdir = parse_train_flags(sys.argv)
    evaluation = train.run(config, workdir)
    print(evaluation.summary())


if __name__ == "__main__":
    run_command(main)
