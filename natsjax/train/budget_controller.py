"""The controller that controls the KV penalty to a budget, and the schedules of budget and temperature."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natsjax.config import NatsConfig


def temperature_at(step: jax.Array, config: NatsConfig, num_steps: int) -> jax.Array:
    """Of the straight-through softmax, float32 scalar: on a geometric path from the first step to the last."""
    if config.final_temperature == 0:
        return jnp.float32(config.temperature)
    progress = jnp.minimum(step / max(1, num_steps - 1), 1.0)
    return jnp.float32(config.temperature) * (config.final_temperature / config.temperature) ** progress


class Controller(NamedTuple):
    """State of the KV penalty, float32 scalars: checkpointed with the run.

    Attributes:
      log_kv_penalty: natural logarithm of ``kv_penalty``.
      average: running average of the KV fraction.
    """

    log_kv_penalty: jax.Array
    average: jax.Array


def start_controller(config: NatsConfig) -> Controller:
    """The controller before the first step."""
    # A fixed KV penalty may be 0, whose logarithm only says "nothing".
    return Controller(jnp.log(jnp.float32(config.kv_penalty)), jnp.float32(1.0))


def kv_penalty(controller: Controller) -> jax.Array:
    """Nats per token per unit of KV fraction, float32 scalar."""
    return jnp.exp(controller.log_kv_penalty)


def budget_at(step: jax.Array, config: NatsConfig) -> jax.Array:
    """The budget that a controlled KV penalty aims at: 1 up to ``budget_ramp_start``, then down to ``kv_budget``."""
    progress = jnp.clip((step + 1 - config.budget_ramp_start) / max(1, config.budget_ramp_steps), 0.0, 1.0)
    if config.budget_ramp == "geometric":
        return config.kv_budget**progress
    if config.budget_ramp == "cosine":
        progress = (1 - jnp.cos(jnp.pi * progress)) / 2
    return 1.0 + progress * (config.kv_budget - 1.0)


def steer(controller: Controller, kv_fraction: jax.Array, step: jax.Array, config: NatsConfig) -> Controller:
    """The controller after a step.

    Args:
      controller: the state that the step used.
      kv_fraction: float32 scalar, of the step's global batch.
      step: int32 scalar, the step's number.
      config: the bounds and rates.
    """
    average = config.average_decay * controller.average + (1 - config.average_decay) * kv_fraction
    if config.kv_penalty_mode == "fixed":
        return Controller(controller.log_kv_penalty, average)
    budget = budget_at(step, config)
    log_kv_penalty = controller.log_kv_penalty + config.kv_penalty_lr * jnp.clip((average - budget) / budget, -1, 1)
    bounds = jnp.log(jnp.float32(config.min_kv_penalty)), jnp.log(jnp.float32(config.max_kv_penalty))
    return Controller(jnp.clip(log_kv_penalty, *bounds), average)
