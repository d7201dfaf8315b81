"""The full-attention dense baseline of the paper's from-scratch pair: 12 layers, width 768, 12 heads, context 1024.

    python train.py --config=configs/dense_125m.py --workdir=runs/dense_125m --config.data.input=FOLDER

Hardware: made for one accelerator with 80 GB; it has not been run at this size yet. 20,000 steps of 0.5M tokens are
10B tokens. Source: arXiv:2502.13251, from-scratch experiments (AdamW 6e-4 to 6e-5, weight decay 0.1, betas 0.9 and
0.95, warm-up 2000 steps, batches of 0.5M tokens).
"""

from natsjax.config import default_config


def get_config():
    config = default_config()
    config.model.layer_types = "dense"
    config.model.num_layers = 12
    config.model.embed_dim = 768
    config.model.num_heads = 12
    config.model.num_kv_heads = 12
    config.model.head_dim = 64
    config.model.mlp_dim = 2048
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.nats.window = 16
    config.data.prepared_dir = "data/corpus"
    config.data.vocab_size = 50304
    config.data.context_length = 1024
    config.optimizer.peak_learning_rate = 6e-4
    config.optimizer.final_learning_rate = 6e-5
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.train.num_steps = 20_000
    config.train.batch_size = 512
    config.train.gradient_accumulation_steps = 16
    config.checkpoint.save_every = 500
    config.eval.num_contexts = 512
    return config
