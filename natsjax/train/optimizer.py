"""The optimizer, from optax: clipping by global norm, AdamW, a linear warm-up and a decay."""

from typing import Any

import optax

from natsjax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step (from 0): a warm-up from 0, then a decay to ``num_steps``.

    "cosine" decays from the end of the warm-up; "wsd" stays at the peak and decays linearly over the last
    ``decay_fraction`` of the steps (warm-up-stable-decay, arXiv:2404.06395).
    """
    if config.schedule == "wsd":
        decay = min(max(1, round(config.decay_fraction * num_steps)), max(1, num_steps - config.warmup_steps))
        parts = [optax.schedules.constant_schedule(config.peak_learning_rate)]
        boundaries = []
        if config.warmup_steps:
            parts.insert(0, optax.schedules.linear_schedule(0.0, config.peak_learning_rate, config.warmup_steps))
            boundaries.append(config.warmup_steps)
        parts.append(optax.schedules.linear_schedule(config.peak_learning_rate, config.final_learning_rate, decay))
        return optax.schedules.join_schedules(parts, [*boundaries, max(num_steps - decay, config.warmup_steps)])
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.peak_learning_rate,
        peak_value=config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=config.final_learning_rate,
    )


def optimizer(config: OptimizerConfig, num_steps: int, decayed: Any, is_scorer: Any) -> optax.GradientTransformation:
    """Builds the update rule.

    Args:
      config: rates and decays.
      num_steps: length of the run, for the schedule.
      decayed: bools, nested as the parameters: True where weight decay applies.
      is_scorer: bools, nested as the parameters: True where ``scorer_learning_rate`` applies.
    """
    scorer = optax.identity()
    if config.scorer_learning_rate:
        scorer = optax.masked(optax.scale(config.scorer_learning_rate / config.peak_learning_rate), is_scorer)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_by_global_norm) if config.clip_by_global_norm else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
        scorer,
    )
