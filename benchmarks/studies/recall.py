"""Recall under the defaults of roles, beside the values that ``configs/recall.py`` pins (docs/choices.md).

    python -m benchmarks.study --study=benchmarks/studies/recall.py --workdir=studies/recall

``BUDGETS`` makes an arm of each smaller budget, to find where recall breaks.
"""

CONFIG = "configs/recall.py"
COMMON = {
    "train.progress": False,
    "train.step_breakdown": False,
    "checkpoint.save_every": 10_000,
    "eval.num_contexts": 1024,
}
DEFAULTS = {
    "nats.kv_penalty": 0.02,
    "nats.kv_penalty_gain": 4.0,
    "nats.kv_penalty_lr": 0.0,
    "nats.min_kv_penalty": 5e-3,
    "nats.final_noise": 0.0,
    "nats.budget_ramp_steps": 0,
}
BUDGETS = (0.08, 0.07, 0.06, 0.05)
ARMS = {
    "as pinned": {},
    "defaults": DEFAULTS,
    "defaults and the ramp": DEFAULTS | {"nats.budget_ramp_steps": 1000},
} | {f"defaults at {budget:.0%}": DEFAULTS | {"nats.kv_budget": budget} for budget in BUDGETS}
REFERENCE = "as pinned"
