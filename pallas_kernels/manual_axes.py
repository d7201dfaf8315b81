"""Mesh axes along which arrays differ inside ``jax.shard_map``.

JAX tracks them in types and refuses programs that do not declare them: a loop whose first carry is a constant but whose
later ones depend on the shard's data, or a kernel without them in its results. Outside there are no such axes.
"""

from typing import Any

import jax


def varying_axes(tree: Any) -> frozenset[str]:
    """Returns the mesh axes that any array of ``tree`` varies over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary_like(tree: Any, like: Any) -> Any:
    """Marks ``tree`` as varying over every axis that an array of ``like`` varies over; values do not change."""
    axes = varying_axes(like)

    def mark(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def vary_alike(tree: Any) -> Any:
    """Marks every array of ``tree`` as varying over the axes that any of them varies over."""
    return vary_like(tree, tree)
