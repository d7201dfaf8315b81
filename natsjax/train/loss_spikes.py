"""Loss spikes: when a step's update is left out because its loss stands out from those before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MEAN_DECAY, _VARIANCE_DECAY = 0.9, 0.95
"""Short: the mean has to keep up with a loss that falls."""
_LEAST_STEPS = 50
"""Before any is skipped: a running average of fewer says little."""
_LEAST_DEVIATION = 0.01
"""Of the mean: where the loss hardly varies, a small step up is no spike."""


class SpikeDetector(NamedTuple):
    """Running statistics of cross-entropy: checkpointed with the run.

    Attributes:
      mean: float32 scalar, nats.
      variance: float32 scalar.
      steps: int32 scalar, steps that the statistics have seen.
      skipped: int32 scalar, updates that were left out.
    """

    mean: jax.Array
    variance: jax.Array
    steps: jax.Array
    skipped: jax.Array


def start_detector() -> SpikeDetector:
    """Before the first step."""
    return SpikeDetector(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))


def detect(detector: SpikeDetector, cross_entropy: jax.Array, threshold: float) -> tuple[jax.Array, SpikeDetector]:
    """Whether a step's loss is a spike, and the detector after it.

    A loss that is not finite is none: it does not go away by being passed over, and the run says what it is.

    Args:
      detector: of the steps before.
      cross_entropy: float32 scalar, of this step, nats.
      threshold: standard deviations above the mean; 0: nothing is a spike.

    Returns:
      ``(is_spike, detector)``, the first a bool scalar.
    """
    deviation = jnp.maximum(jnp.sqrt(detector.variance), _LEAST_DEVIATION * jnp.abs(detector.mean))
    highest = detector.mean + threshold * deviation
    is_known = detector.steps >= _LEAST_STEPS
    is_spike = is_known & (cross_entropy > highest) & jnp.isfinite(cross_entropy) & (threshold > 0)
    # A spike counts as what just is none: it moves the mean, so that a loss that stays high is accepted in the end.
    seen = jnp.where(is_spike, highest, cross_entropy)
    plain = 1 / (detector.steps + 1).astype(jnp.float32)  # at first, plain averages
    off = seen - detector.mean
    mean = detector.mean + jnp.maximum(1 - _MEAN_DECAY, plain) * off
    # Off the mean before it: of the first step, which has none, nothing.
    off = jnp.where(detector.steps > 0, off, 0)
    variance = detector.variance + jnp.maximum(1 - _VARIANCE_DECAY, plain) * (jnp.square(off) - detector.variance)
    return is_spike, SpikeDetector(mean, variance, detector.steps + 1, detector.skipped + is_spike.astype(jnp.int32))
