"""The controller of the KV penalty, and the schedules of budget and temperature (docs/method.md 2, 4.3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natsjax.config import NatsConfig


def temperature_at(step: jax.Array, config: NatsConfig, num_steps: int) -> jax.Array:
    """Returns the temperature of the straight-through softmax, float32 scalar; it changes geometrically."""
    if config.final_temperature == 0:
        return jnp.float32(config.temperature)
    progress = jnp.minimum(step / max(1, num_steps - 1), 1.0)
    return jnp.float32(config.temperature) * (config.final_temperature / config.temperature) ** progress


_INTEGRAL, _LEAST_RATE, _LARGEST_RATE = 60, 0.02, 0.1
"""Of ``integral_rate``; docs/choices.md has what they were chosen by. Above the largest one the penalty would swing."""


class Controller(NamedTuple):
    """The state of the KV penalty, float32 scalars; it is saved in checkpoints.

    Attributes:
      log_kv_penalty: natural logarithm of ``kv_penalty``.
      average: running average of the KV fraction.
    """

    log_kv_penalty: jax.Array
    average: jax.Array


def start_controller(config: NatsConfig) -> Controller:
    """Returns the state before the first step."""
    # A fixed KV penalty may be 0; exp(log 0) is 0 again. The average begins without an error.
    return Controller(jnp.log(jnp.float32(config.kv_penalty)), jnp.float32(budget_at(jnp.int32(0), config)))


def kv_penalty(controller: Controller) -> jax.Array:
    """Returns the KV penalty, in nats per token for a KV fraction of 1, float32 scalar."""
    return jnp.exp(controller.log_kv_penalty)


def budget_at(step: jax.Array, config: NatsConfig) -> jax.Array:
    """Returns the budget of a step: 1 up to ``budget_ramp_start``, then falling to ``kv_budget``."""
    progress = jnp.clip((step + 1 - config.budget_ramp_start) / max(1, config.budget_ramp_steps), 0.0, 1.0)
    if config.budget_ramp == "geometric":
        return config.kv_budget**progress
    if config.budget_ramp == "cosine":
        progress = (1 - jnp.cos(jnp.pi * progress)) / 2
    return 1.0 + progress * (config.kv_budget - 1.0)


def _error(ratio: jax.Array, config: NatsConfig) -> jax.Array:
    """Returns the error of a KV fraction over its budget, within 1."""
    # Runs without a proportional part were begun with this error.
    return jnp.clip(jnp.log(ratio) if config.kv_penalty_gain else ratio - 1, -1, 1)


def integral_rate(config: NatsConfig, num_steps: int) -> float:
    """Returns ``nats.kv_penalty_lr``, or what it follows from.

    What the model would keep grows while it learns. An integral lags behind a penalty that must rise, by what it rises
    in a step over this rate; the shorter the run, the faster it rises.
    """
    return config.kv_penalty_lr or min(max(_INTEGRAL / num_steps, _LEAST_RATE), _LARGEST_RATE)


def update_controller(
    controller: Controller, kv_fraction: jax.Array, step: jax.Array, config: NatsConfig, num_steps: int
) -> Controller:
    """Updates the state after a step: a proportional-integral controller of the KV penalty's logarithm.

    The error is ``log(average / budget)``, within 1. Its change moves the KV penalty at once, the error itself slowly,
    both from where the KV penalty is: at a bound nothing builds up.

    Args:
      controller: state that the step used.
      kv_fraction: KV fraction of the step's global batch, float32 scalar.
      step: number of the step, int32 scalar.
      config: bounds and rates.
      num_steps: steps of the run.
    """
    average = config.average_decay * controller.average + (1 - config.average_decay) * kv_fraction
    return _moved(controller, average, step, config, integral_rate(config, num_steps))


def update_after_skip(controller: Controller, step: jax.Array, config: NatsConfig) -> Controller:
    """Updates the state after a step whose update is skipped, and whose KV fraction does not count.

    The average stays, and the KV penalty with it, except where the budget has moved: the error that the next step
    compares its own with is that of this step.

    Args:
      controller, step, config: as in ``update_controller``.
    """
    return _moved(controller, controller.average, step, config, 0.0)


def _moved(
    controller: Controller, average: jax.Array, step: jax.Array, config: NatsConfig, kv_penalty_lr: float
) -> Controller:
    """Returns the state with a new average, and the KV penalty that follows from both."""
    if config.kv_penalty_mode == "fixed":
        return Controller(controller.log_kv_penalty, average)
    # The error of the step before follows from what a checkpoint has always held.
    error, before = (
        _error(fraction / budget_at(at, config), config)
        for fraction, at in ((average, step), (controller.average, jnp.maximum(step - 1, 0)))
    )
    change = kv_penalty_lr * error + config.kv_penalty_gain * (error - before)
    log_kv_penalty = controller.log_kv_penalty + change
    bounds = jnp.log(jnp.float32(config.min_kv_penalty)), jnp.log(jnp.float32(config.max_kv_penalty))
    return Controller(jnp.clip(log_kv_penalty, *bounds), average)
