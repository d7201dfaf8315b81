"""The parts of a model that numbers are given for: which one a parameter belongs to, and norms by part."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PARTS = ("embedding", "attention", "scorer", "mlp", "norm", "unembedding")
"""In the order in which they are shown."""

_BY_NAME = {"scorer": "scorer", "mlp": "mlp", "embedding": "embedding", "unembedding": "unembedding"}


def part_of(path: tuple[str, ...]) -> str:
    """The part of a parameter, one of ``PARTS``, from its names, outermost first.

    Example:
      >>> part_of(("blocks", "attention", "scorer", "bias"))
      'scorer'
    """
    if any(name.endswith("_norm") for name in path):
        return "norm"
    return next((_BY_NAME[name] for name in path if name in _BY_NAME), "attention")


def part_labels(parameters: Any) -> Any:
    """The part of every leaf, nested as the parameters (nested dicts)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: part_of(tuple(str(key.key) for key in path)), parameters, is_leaf=lambda x: x is None
    )


def norms_by_part(tree: Any) -> dict[str, jax.Array]:
    """The Euclidean norm of each part that is there, float32 scalars; ``tree`` is nested as the parameters."""
    labels = jax.tree.leaves(part_labels(tree))
    leaves = list(zip(labels, jax.tree.leaves(tree), strict=True))
    return {
        part: jnp.asarray(optax.tree.norm([leaf for label, leaf in leaves if label == part]), jnp.float32)
        for part in PARTS
        if part in labels
    }
