"""Inside ``jax.shard_map``: along which axes of the mesh do arrays differ?

JAX follows that in types and refuses what forgets it: a loop whose first carry is a constant but whose later ones are
made of the shard's data, a kernel that does not say it of its results. Elsewhere there are no such axes.
"""

from typing import Any

import jax


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes that any array of ``tree`` varies over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary_like(tree: Any, like: Any) -> Any:
    """``tree`` marked as varying over every axis that an array of ``like`` varies over; the values stay."""
    axes = varying_axes(like)

    def mark(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def vary_alike(tree: Any) -> Any:
    """``tree`` with every array marked as varying over the axes that any of them varies over."""
    return vary_like(tree, tree)
