"""Attention layers of type "head_roles": each KV head learns whether it reads everything or a window.

A rival of learned roles, whose roles do not depend on the token. In training a head mixes full attention and a sliding
window, ``z · full + (1 - z) · window``, where z follows a hard concrete distribution, 0 or 1 with positive probability.
Later a head's keys are all GLOBAL or, but for the first of each document, all SLIDING.

The KV penalty is that of the expected fraction of heads with ``z > 0``, and its controller that of learned roles.

Sources: PruLong, arXiv:2506.17121; the hard concrete distribution: arXiv:1712.01312. Axis letters as in
``natsjax.model.transformer``.
"""

import math

import jax
import jax.numpy as jnp

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature and ends of the hard concrete distribution (arXiv:1712.01312, section 4)."""


SHIFT = BETA * math.log(-LOW / HIGH)
"""Logarithm of the odds at which half of the draws are above 0."""


def hard_concrete(log_alpha: jax.Array, key: jax.Array) -> jax.Array:
    """Draws from hard concrete distributions with a gradient, float32, in [0, 1], of the shape of ``log_alpha``."""
    uniform = jax.random.uniform(key, log_alpha.shape, minval=1e-6, maxval=1 - 1e-6)
    concrete = jax.nn.sigmoid((jnp.log(uniform) - jnp.log1p(-uniform) + log_alpha) / BETA)
    return jnp.clip(concrete * (HIGH - LOW) + LOW, 0, 1)


def probability_of_full(log_alpha: jax.Array) -> jax.Array:
    """Returns the probability that a draw is above 0, which is what the penalty counts."""
    return jax.nn.sigmoid(log_alpha - SHIFT)
