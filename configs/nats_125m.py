"""The paper's from-scratch model with learned roles: ``dense_125m`` with window 16 and a KV budget.

    python train.py --config=configs/nats_125m.py --workdir=runs/nats_125m --config.data.input=FOLDER

Hardware: made for one accelerator with 80 GB; it has not been run at this size yet.
"""

import pathlib

from natsjax.runtime.flags import read_config_file


def get_config():
    config = read_config_file(pathlib.Path(__file__).with_name("dense_125m.py"))
    config.model.layer_types = "nats"
    config.nats.window = 16
    config.nats.kv_budget = 0.1
    config.nats.budget_ramp_steps = 2000
    return config
