"""1B parameters with learned roles, in Llama's shape: 16 layers, width 2048, 16 heads, 8 KV heads, head dim 128.

    python -m natsjax.plan --config=configs/nats_1b.py:v5p-128 --topology=v5p-128
    python train.py --config=configs/nats_1b.py:v5p-128 --workdir=DIR --config.data.prepared_dir=CORPUS

The word after the colon names the hardware and sets the fields that depend on it: v5e-16, v5p-128, v6e-256 or h100-8.
The default is v5p-128. The dense baseline: --config.model.layer_types=dense. Hardware: compiled for all four
(docs/scaling.md has memory and time of a step); no accelerator has trained it yet.
20,000 steps of 1M tokens are 21B tokens, twenty per parameter.
"""

from natsjax.config import default_config
from natsjax.config_fields import did_you_mean
from natsjax.errors import UserError

HARDWARE = {
    "v5e-16": {"train.gradient_accumulation_steps": 2},
    "v5p-128": {"train.gradient_accumulation_steps": 1},
    "v6e-256": {"train.gradient_accumulation_steps": 1},
    "h100-8": {"train.gradient_accumulation_steps": 1},
}
"""Fields with which a step fits into memory (docs/scaling.md)."""


def get_config(hardware="v5p-128"):
    if hardware not in HARDWARE:
        meant = did_you_mean(hardware, HARDWARE)
        raise UserError(f"--config=configs/nats_1b.py:{hardware}: one of {', '.join(HARDWARE)} was expected{meant}.")
    config = default_config()
    config.model.layer_types = "nats"
    config.model.num_layers = 16
    config.model.embed_dim = 2048
    config.model.num_heads = 16
    config.model.num_kv_heads = 8
    config.model.head_dim = 128
    config.model.mlp_dim = 8192
    config.model.tie_embeddings = True
    config.model.rope_theta = 500_000.0
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.nats.window = 64
    config.nats.kv_budget = 0.1
    config.nats.budget_ramp_steps = 2000
    config.data.prepared_dir = "data/corpus"
    config.data.vocab_size = 32_768
    config.data.context_length = 4096
    config.optimizer.peak_learning_rate = 3e-4
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.train.num_steps = 20000
    config.train.batch_size = 256
    config.update_from_flattened_dict(HARDWARE[hardware])
    config.checkpoint.save_every = 500
    config.eval.num_contexts = 512
    return config
