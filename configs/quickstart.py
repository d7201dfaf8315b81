"""A small language model on code in minutes, with a KV cache that learned what to keep: from text to perplexity.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=configs/quickstart.py --workdir=runs/window --config.model.layer_types=sliding
    python train.py --config=configs/quickstart.py --workdir=runs/dense --config.model.layer_types=dense

The source of Python's standard library (that of the Python that runs; nothing is downloaded), a byte-level BPE of 2048
trained on it, 1M parameters. The other two lines train the rivals: a window of the same KV, and full attention.
Hardware: two CPU cores. Time: 12 minutes of one core each. README.md compares the three; docs/choices.md has the
measurements behind each choice.
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
    config.model.token_shift = True
    config.model.key_shift = True
    config.model.sliding_window = 25  # of the rival, 10 % of the mean context
    config.nats.windows = (6, 22, 88)  # roles begin as the middle one, a plain window of nearly the same KV
    config.nats.kv_budget = 0.1
    config.data.input = "package:stdlib"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2048
    config.data.context_length = 512
    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 8e-3
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_steps = 60
    config.train.num_steps = 600
    config.train.batch_size = 4
    config.train.log_every = 10
    config.checkpoint.save_every = 100
    config.eval.num_contexts = 128
    config.eval.num_calibration_contexts = 32
    return config
