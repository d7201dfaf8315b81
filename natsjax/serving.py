"""Parameters as decoding uses them."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from natsjax.config import Config
from natsjax.model.sharding import compute_spec
from natsjax.model.transformer import ModelStructure


def serving_parameters(parameters: Any, model: ModelStructure, config: Config, mesh: Mesh) -> Any:
    """Parameters as ``serving_layout`` says: every step of decoding uses all, so they are gathered and rounded once."""
    layout = serving_layout(model, config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, layout)
    cast = jax.jit(lambda p: jax.tree.map(lambda x, like: x.astype(like.dtype), p, layout), out_shardings=shardings)
    with jax.set_mesh(mesh):
        return cast(parameters)


def serving_layout(model: ModelStructure, config: Config, mesh: Mesh) -> Any:
    """The layout and, where that is how they are used, the dtype of the forward pass; scorer and norms stay float32.

    Returns:
      Nested dict of ``jax.ShapeDtypeStruct`` with shardings.
    """
    wide = ("scorer", "scale")

    def place(path, x, axes):
        is_wide = any(getattr(key, "key", None) in wide for key in path)
        sharding = NamedSharding(mesh, compute_spec(axes))
        return jax.ShapeDtypeStruct(x.shape, "float32" if is_wide else config.model.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, model.parameters, model.axes)
