"""Where each parameter is in a Hugging Face folder: names and shapes of its tensors, in both directions.

PyTorch's linear maps have their outputs before their inputs and one axis for all heads; ours have the inputs first and
an axis each for KV heads, query heads per KV head and head dim, with the layers in front. The order of query heads is
the same (KV-head-major), and so are the halves of a head that the rotary embedding pairs.

Axis letters as in ``natsjax.model.transformer``.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from natsjax.errors import UserError

_MOST_NAMED = 3  # tensors in a message
BFLOAT16 = np.dtype(jax.numpy.bfloat16)


class _Tensor(NamedTuple):
    """The tensor of a parameter.

    Attributes:
      name: without the prefix of its layer.
      num_inputs: axes of the parameter that its inputs are summed over; they come first in ours and last in theirs.
        0: a vector. None: both have the same axes.
    """

    name: str
    num_inputs: int | None


_OF_LAYER = {
    "attention_norm.scale": _Tensor("input_layernorm.weight", 0),
    "attention.query": _Tensor("self_attn.q_proj.weight", 1),
    "attention.query_bias": _Tensor("self_attn.q_proj.bias", 0),
    "attention.key": _Tensor("self_attn.k_proj.weight", 1),
    "attention.key_bias": _Tensor("self_attn.k_proj.bias", 0),
    "attention.value": _Tensor("self_attn.v_proj.weight", 1),
    "attention.value_bias": _Tensor("self_attn.v_proj.bias", 0),
    "attention.query_norm.scale": _Tensor("self_attn.q_norm.weight", 0),
    "attention.key_norm.scale": _Tensor("self_attn.k_norm.weight", 0),
    "attention.gate": _Tensor("self_attn.gate_proj.weight", 1),
    "attention.sink": _Tensor("self_attn.sinks", 0),
    "attention.scorer.weight": _Tensor("self_attn.scorer.weight", 1),
    "attention.scorer.bias": _Tensor("self_attn.scorer.bias", 0),
    "attention.output": _Tensor("self_attn.o_proj.weight", 3),
    "mlp_norm.scale": _Tensor("post_attention_layernorm.weight", 0),
    "mlp.gate": _Tensor("mlp.gate_proj.weight", 1),
    "mlp.up": _Tensor("mlp.up_proj.weight", 1),
    "mlp.down": _Tensor("mlp.down_proj.weight", 1),
}
"""Tensors of a layer by the parameter's path in its block."""

EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
_OTHERS = {
    "embedding": _Tensor(EMBEDDING, None),
    "final_norm.scale": _Tensor("model.norm.weight", 0),
    "unembedding": _Tensor(UNEMBEDDING, None),
}
_BLOCKS = "blocks"


class TensorSource(Protocol):
    """Tensors of a file or a folder, under their names in a Hugging Face folder."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, float32, float16 or bfloat16."""
        ...


def read_parameters(source: TensorSource, abstract: Any) -> dict[str, Any]:
    """Reads all parameters of a model.

    Args:
      source: of the tensors.
      abstract: nested dict of ``jax.ShapeDtypeStruct``: the parameters of ``natsjax.model.transformer.ModelStructure``.

    Returns:
      NumPy arrays, nested alike.

    Raises:
      UserError: a tensor is missing, there is one more, one has another shape, or a value is not finite.
    """
    places = {path: list(_tensors(path, leaf.shape)) for path, leaf in flat(abstract).items()}
    wanted = {name: shape for tensors in places.values() for name, shape, _ in tensors}
    _check_tensors(source, wanted)
    found = {}
    for path, leaf in flat(abstract).items():
        array = np.empty(leaf.shape, leaf.dtype)
        for at, (name, _, to_ours) in enumerate(places[path]):
            tensor = source.read(name)
            if not np.isfinite(tensor).all():
                raise UserError(f"{source.where}: the tensor {name} has values that are not numbers (NaN or infinity).")
            if path[0] == _BLOCKS:
                array[at] = to_ours(tensor)
            else:
                array[...] = to_ours(tensor)
        found[path] = array
    return _nested(found)


def tensors_of(parameters: Any) -> dict[str, Callable[[], np.ndarray]]:
    """Returns a function for each tensor of a model, which makes it when it is called.

    Args:
      parameters: nested dict of arrays.
    """
    found: dict[str, Callable[[], np.ndarray]] = {}
    for path, leaf in flat(parameters).items():
        for at, (name, shape, _) in enumerate(_tensors(path, leaf.shape)):
            index = at if path[0] == _BLOCKS else ...
            num_inputs = _tensor(path).num_inputs

            def make(leaf=leaf, index=index, shape=shape, num_inputs=num_inputs):
                array = np.asarray(leaf[index])
                return array.reshape(shape[::-1]).T if num_inputs else array.reshape(shape)

            found[name] = make
    return found


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of nested dicts by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def _nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree


def _tensor(path: tuple[str, ...]) -> _Tensor:
    return _OF_LAYER[".".join(path[1:])] if path[0] == _BLOCKS else _OTHERS[".".join(path)]


def _tensors(
    path: tuple[str, ...], shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]]:
    """Yields the tensors of a parameter, layer by layer: name, shape, and the function that lays it out as ours."""
    tensor, is_in_layers = _tensor(path), path[0] == _BLOCKS
    own = shape[1:] if is_in_layers else shape
    count = tensor.num_inputs
    if count is None:
        theirs = own
    elif count:
        theirs = (math.prod(own[count:]), math.prod(own[:count]))
    else:
        theirs = (math.prod(own),)

    def to_ours(array: np.ndarray) -> np.ndarray:
        return (array.T if count else array).reshape(own)

    for layer in range(shape[0]) if is_in_layers else (None,):
        yield tensor.name if layer is None else f"model.layers.{layer}.{tensor.name}", theirs, to_ours


def _check_tensors(source: TensorSource, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes, before anything is read."""
    there = source.shapes
    if missing := [name for name in wanted if name not in there]:
        raise UserError(f"{source.where} lacks {_named(missing)}, which its config asks for.")
    if others := [name for name in there if name not in wanted]:
        raise UserError(
            f"{source.where} has {_named(others)} beyond those of its config; natsjax would leave out a part of this "
            "model."
        )
    for name, shape in wanted.items():
        if tuple(there[name]) != shape:
            raise UserError(
                f"{source.where}: the tensor {name} has the shape {_shape(there[name])}; its config asks for "
                f"{_shape(shape)}."
            )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"the tensor{'s' if names[1:] else ''} {', '.join(names[:_MOST_NAMED])}{more}"


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
