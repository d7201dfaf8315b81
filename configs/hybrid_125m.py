"""``nats_125m`` with full attention in every third layer; the others learn roles.

    python train.py --config=configs/hybrid_125m.py --workdir=runs/hybrid_125m --config.data.input=FOLDER

The KV budget is a mean over all layers, and the dense third alone takes a third: 0.4 leaves a tenth to each of the
others. Queries and keys are normalized, and the learning rate stays at its peak until the last fifth of the steps, so
that the run can be extended from any checkpoint before. Hardware: made for one accelerator with 80 GB; it has not been
run at this size yet.
"""

import pathlib

from natsjax.runtime.flags import read_config_file


def get_config():
    config = read_config_file(pathlib.Path(__file__).with_name("nats_125m.py"))
    config.model.layer_types = "nats,nats,dense"
    config.model.qk_norm = True
    config.nats.kv_budget = 0.4
    config.optimizer.schedule = "wsd"
    return config
