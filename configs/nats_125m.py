"""The paper's from-scratch model with learned roles: ``dense_125m`` with window 16 and a KV budget.

    python train.py --config=configs/nats_125m.py --workdir=runs/nats_125m --config.data.input=FOLDER

Hardware: made for one accelerator with 80 GB; it has not been run at this size yet.
"""

import importlib.util
import pathlib


def get_config():
    path = pathlib.Path(__file__).with_name("dense_125m.py")
    spec = importlib.util.spec_from_file_location("dense_125m", path)
    dense_125m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dense_125m)
    config = dense_125m.get_config()
    config.model.attention = "nats"
    config.nats.window = 16
    config.nats.kv_budget = 0.1
    config.nats.budget_ramp_steps = 2000
    return config
