"""Detection of loss spikes: steps whose update is skipped because their loss is an outlier."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MEAN_DECAY, _VARIANCE_DECAY = 0.9, 0.95
"""Short, so that the mean follows a falling loss."""
_LEAST_STEPS = 50
"""Steps before the first update may be skipped: an average of fewer means little."""
_LEAST_DEVIATION = 0.01
"""Smallest standard deviation, as a fraction of the mean: while the loss hardly varies, a small rise is no spike."""


class SpikeDetector(NamedTuple):
    """Running statistics of the cross-entropy; they are saved in checkpoints.

    Attributes:
      mean: float32 scalar, nats.
      variance: float32 scalar.
      steps: int32 scalar, number of steps in the statistics.
      skipped: int32 scalar, number of skipped updates.
    """

    mean: jax.Array
    variance: jax.Array
    steps: jax.Array
    skipped: jax.Array


def start_detector() -> SpikeDetector:
    """Returns the state before the first step."""
    return SpikeDetector(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))


def detect(detector: SpikeDetector, cross_entropy: jax.Array, threshold: float) -> tuple[jax.Array, SpikeDetector]:
    """Decides if a step's loss is a spike, and updates the statistics.

    A loss that is not finite is no spike: skipping the update would not help, and the run ends with a report.

    Args:
      detector: statistics of the steps before.
      cross_entropy: cross-entropy of this step, nats, float32 scalar.
      threshold: standard deviations above the mean; 0: no loss is a spike.

    Returns:
      ``(is_spike, detector)``, the first a bool scalar.
    """
    deviation = jnp.maximum(jnp.sqrt(detector.variance), _LEAST_DEVIATION * jnp.abs(detector.mean))
    highest = detector.mean + threshold * deviation
    is_known = detector.steps >= _LEAST_STEPS
    is_spike = is_known & (cross_entropy > highest) & jnp.isfinite(cross_entropy) & (threshold > 0)
    # A spike counts as the largest loss that is none: a loss that stays high is accepted after some steps.
    seen = jnp.where(is_spike, highest, cross_entropy)
    plain = 1 / (detector.steps + 1).astype(jnp.float32)  # plain averages at first
    off = seen - detector.mean
    mean = detector.mean + jnp.maximum(1 - _MEAN_DECAY, plain) * off
    # The deviation from the mean before this step, which the first step does not have.
    off = jnp.where(detector.steps > 0, off, 0)
    variance = detector.variance + jnp.maximum(1 - _VARIANCE_DECAY, plain) * (jnp.square(off) - detector.variance)
    return is_spike, SpikeDetector(mean, variance, detector.steps + 1, detector.skipped + is_spike.astype(jnp.int32))
