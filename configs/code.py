"""Learned roles where there is something to remember: the source of Python's standard library, in contexts of 512.

    python train.py --config=configs/code.py --workdir=runs/code
    python train.py --config=configs/code.py --workdir=runs/code_window --config.model.layer_types=sliding
    python train.py --config=configs/code.py --workdir=runs/code_dense --config.model.layer_types=dense

Nothing is downloaded: the text is that of the Python that runs. The quickstart's model, with keys and tokens that know
the token before (docs/choices.md), so that it learns within minutes to look up what came after a name. The other two
lines train the rivals; README.md compares the three. Hardware: two CPU cores. Time: 12 minutes of one core.
"""

import pathlib

from natsjax.runtime.flags import read_config_file


def get_config():
    config = read_config_file(pathlib.Path(__file__).with_name("quickstart.py"))
    config.model.key_shift = True
    config.model.token_shift = True
    config.model.sliding_window = 25  # of the rival, 10 % of the mean context
    config.nats.windows = (6, 22, 88)  # roles begin as the middle one, a plain window of nearly the same KV
    config.nats.kv_budget = 0.1
    config.data.input = "package:stdlib"
    config.data.context_length = 512
    config.optimizer.warmup_steps = 60
    config.train.num_steps = 600
    return config
