"""The recipe of small models: update rule, learning rate, batch, schedule, weight decay, options (docs/recipe.md).

    python -m natsjax.data.prepare --input=TRAIN --validation_input=VALIDATION --vocab_size=4096 --output=data/novels
    python -m benchmarks.study --study=benchmarks/studies/recipe.py --workdir=studies/recipe

Every arm has the same tokens, 1.02M of novels, and a model of 1.25M parameters in the shape of ``configs/small_5m.py``.
"""

from typing import Any

Fields = dict[str, Any]

TOKENS = 1_024_000
CONFIG = "configs/small_5m.py"
COMMON = {
    "data.prepared_dir": "data/novels",
    "data.context_length": 256,
    "model.layer_types": "dense",
    "model.num_layers": 4,
    "model.embed_dim": 128,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.mlp_dim": 344,
    "model.qk_norm": False,
    "model.token_shift": False,
    "nats.windows": (),
    "train.eval_every": 0,
    "train.progress": False,
    "train.step_breakdown": False,
    "optimizer.final_learning_rate": 0.0,
    "checkpoint.save_every": 10_000,
    "eval.num_contexts": 256,
    "eval.num_calibration_contexts": 32,
    "eval.batch_size": 16,
}


def batch(size: int) -> Fields:
    """Returns fields for so many contexts in a step, as many tokens in all, and a warm-up over a tenth of the steps."""
    steps = TOKENS // (size * COMMON["data.context_length"])
    return {"train.batch_size": size, "train.num_steps": steps, "optimizer.warmup_steps": steps // 10}


def rule(name: str, learning_rate: float, size: int, **fields: Any) -> Fields:
    """Returns fields of an arm; two underscores in the name of a field stand for the dot."""
    named = {field.replace("__", "."): value for field, value in fields.items()}
    return {"optimizer.name": name, "optimizer.peak_learning_rate": learning_rate} | batch(size) | named


def muon(**fields: Any) -> Fields:
    """Returns Muon at the learning rate and batch that the arms above it found."""
    return rule("muon", 8e-3, 4, **fields)


def longer(fields: Fields) -> Fields:
    """Returns an arm with half as many steps again."""
    steps = fields["train.num_steps"] * 3 // 2
    return fields | {"train.num_steps": steps}


DEFAULTS = {"optimizer__final_learning_rate": 2e-4, "optimizer__warmup_steps": 50}
"""Of ``natsjax.config``, which the two arms that have them are named after; their batch there is 32."""
WINDOW = {"model__layer_types": "sliding", "model__sliding_window": 19}
NATS = {"model__layer_types": "nats", "nats__window": 4, "nats__kv_budget": 0.15}
ARMS = {
    "muon 8e-3 batch 4": muon(),
    "adamw 2e-3 batch 16 (defaults)": rule("adamw", 2e-3, 16, **DEFAULTS),
    "adamw 2e-3 batch 16 (defaults) x 1.5": longer(rule("adamw", 2e-3, 16, **DEFAULTS)),
    "adamw 4e-3 batch 16": rule("adamw", 4e-3, 16),
    "adamw 4e-3 batch 16 x 1.5": longer(rule("adamw", 4e-3, 16)),
    "adamw 4e-3 batch 4": rule("adamw", 4e-3, 4),
    "muon 8e-3 batch 16": rule("muon", 8e-3, 16),
    "muon 4e-3 batch 4": rule("muon", 4e-3, 4),
    "muon 16e-3 batch 4": rule("muon", 16e-3, 4),
    "QK norm": muon(model__qk_norm=True),
    "token shift": muon(model__token_shift=True),
    "zero-initialized outputs": muon(model__zero_init_output=True),
    "batch 2": rule("muon", 8e-3, 2),
    "squared ReLU": muon(model__activation="squared_relu", model__mlp_dim=516),
    "decay of the embedding": muon(optimizer__embedding_weight_decay=0.1),
    "linear schedule": muon(optimizer__schedule="linear"),
    "no weight decay": muon(optimizer__weight_decay=0.0),
    "embedding at 4e-3": muon(optimizer__adamw_learning_rate=4e-3),
    "embedding at 16e-3": muon(optimizer__adamw_learning_rate=16e-3),
    "attention gate": muon(model__attention_gate=True),
    # The other layers' own learning rates.
    "window 4e-3": rule("muon", 4e-3, 4, **WINDOW),
    "window 8e-3": muon(**WINDOW),
    "window 16e-3": rule("muon", 16e-3, 4, **WINDOW),
    "nats 4e-3": rule("muon", 4e-3, 4, **NATS),
    "nats 8e-3": muon(**NATS),
    "nats 16e-3": rule("muon", 16e-3, 4, **NATS),
}
REFERENCE = "muon 8e-3 batch 4"
