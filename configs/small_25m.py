"""A model of 27M parameters with the recipe of small models, for a GPU or a machine with many cores.

    python -m natsjax.data.prepare --input=FOLDER --vocab_size=8192 --output=data/corpus
    python train.py --config=configs/small_25m.py --workdir=runs/small_25m

200M tokens in contexts of 1024. The recipe is that of ``configs/small_5m.py``, chosen on smaller models
(docs/recipe.md): Muon's updates have the size of AdamW's in every shape, so the learning rate is the same. At this size
it has not been run.
"""

from natsjax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 8
    config.model.embed_dim = 512
    config.model.num_heads = 8
    config.model.num_kv_heads = 4
    config.model.head_dim = 64
    config.model.mlp_dim = 1376
    config.model.qk_norm = True
    config.model.key_shift = True
    config.model.token_shift = True
    config.nats.windows = (12, 46, 184)  # roles begin as the middle one, a plain window of nearly the same KV
    config.nats.kv_budget = 0.1
    config.data.prepared_dir = "data/corpus"
    config.data.vocab_size = 8192
    config.data.context_length = 1024
    config.optimizer.name = "muon"
    config.optimizer.peak_learning_rate = 8e-3
    config.optimizer.final_learning_rate = 0.0
    config.optimizer.warmup_steps = 1000
    config.train.num_steps = 12_000
    config.train.batch_size = 16
    config.train.eval_every = 1000
    config.checkpoint.save_every = 500
    config.eval.num_contexts = 128
    config.eval.num_calibration_contexts = 32
    return config
