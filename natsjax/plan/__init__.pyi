from .train_step import plan_apart as plan_apart
