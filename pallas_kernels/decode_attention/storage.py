"""Layouts in memory of the keys and values of a KV buffer.

Slots come in blocks, and a block of all heads is contiguous: a program that reads the occupied prefix of a buffer reads
whole blocks. Three formats, because platforms read in different ways:

* "transposed": keys ``[…, h, u]``, values ``[…, u, h]``. A CPU's products want keys this way.
* "packed": one array ``[…, u, 2h]``, the key before the value: one copy brings both, and with head dim 64 a row fills
  the 128 lanes of a TPU, which would be padded otherwise.
* "plain": keys and values ``[…, u, h]`` in one block: what library calls take.

Axis letters: ``l`` layer, ``j`` block, ``b`` batch, ``k`` KV head, ``c`` slot, ``u`` slot in a block (``c = j · u``),
``h`` head dim.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Format = Literal["transposed", "packed", "plain"]
FORMATS: tuple[Format, ...] = ("transposed", "packed", "plain")


@dataclasses.dataclass(frozen=True)
class Storage:
    """Keys and values of some layers, in slots.

    Attributes:
      arrays: keys ``[l, j, b, k, h, u]`` or ``[l, j, b, k, u, h]`` and values ``[l, j, b, k, u, h]``, or both packed in
        one ``[l, j, b, k, u, 2h]``.
      format: which of these.
    """

    arrays: tuple[jax.Array, ...]
    format: Format

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array, format: Format, block: int) -> "Storage":
        """Builds a storage from arrays ``[l, b, k, c, h]``.

        Args:
          keys, values: ``c`` is a multiple of ``block``.
          format: of the storage.
          block: slots in a block; "plain" has a single one.
        """
        layers, b, k, c, h = keys.shape
        u = c if format == "plain" else block
        if c % u:
            raise ValueError(f"{c} slots are no multiple of the block of {u}.")

        def blocks(x):
            return jnp.moveaxis(x.reshape(layers, b, k, c // u, u, h), 3, 1)

        keys, values = blocks(keys), blocks(values)
        if format == "transposed":
            return cls((jnp.swapaxes(keys, -1, -2), values), format)
        if format == "packed":
            return cls((jnp.concatenate([keys, values], axis=-1),), format)
        return cls((keys, values), format)

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype, format: Format, block: int) -> "Storage":
        """Zeros; ``shape = (l, b, k, c, h)``, the rest as in ``of``."""
        one_layer = jax.eval_shape(
            lambda: cls.of(jnp.zeros((1, *shape[1:]), dtype), jnp.zeros((1, *shape[1:]), dtype), format, block)
        )
        return cls(tuple(jnp.zeros((shape[0], *x.shape[1:]), dtype) for x in one_layer.arrays), format)

    @property
    def block_size(self) -> int:
        """Slots in a block (u)."""
        return self.arrays[-1].shape[-2]

    @property
    def num_blocks(self) -> int:
        """Blocks (j)."""
        return self.arrays[0].shape[1]

    @property
    def capacity(self) -> int:
        """Slots of a (sequence, KV head) (c)."""
        return self.num_blocks * self.block_size

    @property
    def head_dim(self) -> int:
        """Head dim h of keys and values."""
        width = self.arrays[-1].shape[-1]
        return width // 2 if self.format == "packed" else width

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``(l, b, k, c, h)``."""
        layers, _, b, k = self.arrays[0].shape[:4]
        return layers, b, k, self.capacity, self.head_dim

    @property
    def dtype(self):
        """Dtype of keys and values."""
        return self.arrays[0].dtype

    def block(self, layer: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns a block of a layer: keys ``[b, k, h, u]`` and values ``[b, k, u, h]``."""
        parts = tuple(_block_of(x, layer, number) for x in self.arrays)
        if self.format == "packed":
            return jnp.swapaxes(parts[0][..., : self.head_dim], -1, -2), parts[0][..., self.head_dim :]
        return (parts[0] if self.format == "transposed" else jnp.swapaxes(parts[0], -1, -2)), parts[1]

    def layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of a layer, ``[b, k, c, h]`` each, in the order of the slots."""
        parts = tuple(jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in self.arrays)
        if self.format == "packed":
            keys, values = parts[0][..., : self.head_dim], parts[0][..., self.head_dim :]
        else:
            keys, values = parts
            keys = jnp.swapaxes(keys, -1, -2) if self.format == "transposed" else keys

        def slots(x):
            j, b, k, u, h = x.shape
            return jnp.moveaxis(x, 0, 2).reshape(b, k, j * u, h)

        return slots(keys), slots(values)

    def set_layer(self, layer: jax.Array, keys: jax.Array, values: jax.Array) -> "Storage":
        """Returns the storage with all slots of one layer replaced; the inverse of ``layer``."""
        new = Storage.of(keys[None].astype(self.dtype), values[None].astype(self.dtype), self.format, self.block_size)
        arrays = tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, layer, 0) for x, y in zip(self.arrays, new.arrays, strict=True)
        )
        return dataclasses.replace(self, arrays=arrays)

    def put(self, slot: jax.Array, key: jax.Array, value: jax.Array) -> "Storage":
        """Writes one new key and value for every head.

        Args:
          slot: int32 ``[l, b, k]``; what is not in ``0 … c-1`` is not written.
          key, value: ``[l, b, k, h]``.
        """
        block, within = jax.lax.div(slot, self.block_size), jax.lax.rem(slot, self.block_size)
        outside = (slot < 0) | (slot >= self.capacity)
        block = jnp.where(outside, self.num_blocks, block)  # negative numbers would count from the end
        layer, b, k = (jax.lax.broadcasted_iota(jnp.int32, slot.shape, axis) for axis in range(3))

        def rows(x, new):
            return x.at[layer, block, b, k, within].set(new.astype(x.dtype), mode="drop")

        def columns(x, new):
            return x.at[layer, block, b, k, :, within].set(new.astype(x.dtype), mode="drop")

        if self.format == "packed":
            return dataclasses.replace(self, arrays=(rows(self.arrays[0], jnp.concatenate([key, value], axis=-1)),))
        write_key = columns if self.format == "transposed" else rows
        return dataclasses.replace(self, arrays=(write_key(self.arrays[0], key), rows(self.arrays[1], value)))


jax.tree_util.register_dataclass(Storage, data_fields=["arrays"], meta_fields=["format"])


def _block_of(x: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
    start = [layer, number, *(jnp.int32(0) for _ in x.shape[2:])]
    return jax.lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0, 0]
