"""Is there anything to remember? Python's standard library at small budgets: dense, windows and learned roles.

    python -m natsjax.data.prepare --input=package:stdlib --vocab_size=2048 --output=data/stdlib
    python -m benchmarks.study --study=benchmarks/studies/code.py --workdir=studies/code

The model and recipe of ``configs/speeches.py`` on code, in contexts of 512; with both shifts, those of the quickstart.
"""

CONFIG = "configs/speeches.py"
COMMON = {
    "data.input": "package:stdlib",
    "data.prepared_dir": "data/stdlib",
    "data.context_length": 512,
    "train.num_steps": 600,
    "optimizer.warmup_steps": 60,
    "train.progress": False,
    "train.step_breakdown": False,
    "checkpoint.save_every": 10_000,
    "eval.num_contexts": 128,
    "eval.batch_size": 8,
}
ARMS = {
    "dense": {"model.layer_types": "dense"},
    "trained window of 12": {"model.layer_types": "sliding", "model.sliding_window": 12},  # 5 % of the mean context
    "trained window of 25": {"model.layer_types": "sliding", "model.sliding_window": 25},  # 10 %
    "trained window of 51": {"model.layer_types": "sliding", "model.sliding_window": 51},  # 20 %
    "nats at 5 %": {"nats.window": 8, "nats.kv_budget": 0.05},
    "nats at 10 %": {"nats.window": 8, "nats.kv_budget": 0.1},
    "nats at 10 % with windows 4 and 16 and 64": {"nats.windows": (4, 16, 64), "nats.kv_budget": 0.1},
    "nats at 5 % with windows 4 and 16": {"nats.windows": (4, 16), "nats.kv_budget": 0.05},
    # Where a ladder begins: at its shortest window, or at the longest that the budget has room for (the default).
    "nats at 10 % from 4 of windows 4 and 16 and 64": {
        "nats.windows": (4, 16, 64),
        "nats.kv_budget": 0.1,
        "nats.initial_roles": (0.03, 0.03, 0.88, 0.03, 0.03),
    },
    # Ladders whose middle window is a plain window of nearly the budget.
    "nats at 5 % with windows 3 and 10 and 40": {"nats.windows": (3, 10, 40), "nats.kv_budget": 0.05},
    "nats at 10 % with windows 6 and 22 and 88": {"nats.windows": (6, 22, 88), "nats.kv_budget": 0.1},
    "nats at 20 % with windows 11 and 44 and 176": {"nats.windows": (11, 44, 176), "nats.kv_budget": 0.2},
    # Starts from dense attention; the budget falls to 10 % from step 150 to step 450.
    "nats at 10 % from dense of windows 6 and 22 and 88": {
        "nats.windows": (6, 22, 88),
        "nats.kv_budget": 0.1,
        "nats.initial_roles": (0.96, 0.01, 0.01, 0.01, 0.01),
        "nats.budget_ramp_start": 150,
        "nats.budget_ramp_steps": 300,
        "nats.budget_ramp": "geometric",
    },
}
PLAIN = dict(ARMS)
ARMS |= {f"{arm} and token shift": fields | {"model.token_shift": True} for arm, fields in PLAIN.items()}
SHIFTS = {"model.token_shift": True, "model.key_shift": True}
ARMS |= {f"{arm} and both shifts": fields | SHIFTS for arm, fields in PLAIN.items()}
REFERENCE = "trained window of 25"
