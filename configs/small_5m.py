"""A model of 5M parameters with the recipe of small models, for a machine with a few cores and an hour or two.

    python -m natsjax.data.prepare --input=FOLDER --vocab_size=4096 --output=data/corpus
    python train.py --config=configs/small_5m.py --workdir=runs/small_5m

8M tokens in contexts of 512. ``--config.model.layer_types=dense`` and ``=sliding`` (with ``model.sliding_window``)
train the rivals. Small batches make many steps of few tokens, and Muon takes them; docs/recipe.md has the measurements,
on a model of a quarter of the size. Hardware: two CPU cores.
"""

from natsjax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 6
    config.model.embed_dim = 256
    config.model.num_heads = 8
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.mlp_dim = 688
    config.model.qk_norm = True
    config.model.key_shift = True
    config.model.token_shift = True
    config.nats.windows = (6, 22, 88)  # roles begin as the middle one, a plain window of nearly the same KV
    config.nats.kv_budget = 0.1
    config.data.prepared_dir = "data/corpus"
    config.data.vocab_size = 4096
    config.data.context_length = 512
    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 8e-3
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_steps = 400
    config.train.num_steps = 4000
    config.train.batch_size = 4
    config.train.eval_every = 500
    config.checkpoint.save_every = 250
    config.eval.num_contexts = 128
    config.eval.num_calibration_contexts = 32
    return config
