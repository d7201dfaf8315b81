"""The optimizer: AdamW after a global-norm clip, linear warm-up and cosine decay, all of it optax."""

from typing import Any

import optax

from natsjax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step (from 0) to learning rate: 0 to the peak over the warm-up, then a cosine to the end at ``num_steps``."""
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.peak_learning_rate,
        peak_value=config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=config.end_learning_rate,
    )


def optimizer(config: OptimizerConfig, num_steps: int, decayed: Any) -> optax.GradientTransformation:
    """The update rule.

    Args:
      config: rates and decays.
      num_steps: length of the run, for the schedule.
      decayed: bools, nested as the parameters: whether weight decay applies (a parameter's role says so, not its
        rank).
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )
