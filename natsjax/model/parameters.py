"""Parts of a model, which learning rates and norms are given for; each parameter is made with the name of its part."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PARTS = ("embedding", "attention", "scorer", "mlp", "norm", "unembedding")
"""In the order in which they are shown."""


def norms_by_part(tree: Any, parts: Any) -> dict[str, jax.Array]:
    """Returns the Euclidean norm of each part of the model, float32 scalars.

    Args:
      tree: arrays, nested as the parameters.
      parts: the part of each, nested alike (``transformer.ModelStructure.parts``).
    """
    labels = jax.tree.leaves(parts)
    leaves = list(zip(labels, jax.tree.leaves(tree), strict=True))
    return {
        part: optax.tree.norm([leaf.astype(jnp.float32) for label, leaf in leaves if label == part])
        for part in PARTS
        if part in labels
    }
