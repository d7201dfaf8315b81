"""The KV buffer: keys and values in slots of static shape, each with the first query that cannot read it any more.

A buffer is a tuple of ``LayerGroup``, neighboring layers with one capacity. Every function here is pure and compiles
once for a shape. A slot is *free* from the query ``key_end`` on, and writing takes free slots first. ``length`` is a
high-water mark: slots from there on are free, attention reads those before. Where arrays are divided among devices,
each device works on its own sequences and heads.

A LOCAL key whose GLOBAL token has not come yet has ``key_end = UNTIL_GLOBAL``; ``expire`` sets its end.

``pallas_kernels.decode_attention.storage`` alone knows the layout of keys and values in memory.

What functions here take: ``group``, of the buffer; ``at``, int32 ``[b]``, index of the next query; ``limit``, int32
scalar or ``[l, 1]``, only slots before it count.

Axis letters: ``l`` layer of a group, ``b`` batch, ``k`` KV head, ``c`` slot, ``t`` token of a chunk, ``h`` head dim.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from natsjax.model import sharding
from natsjax.policies.base import Eviction
from pallas_kernels.decode_attention import Storage
from pallas_kernels.nats_attention import NO_END

AXES: dict[int, sharding.Axes] = {
    6: (None, None, "batch", "kv_heads", None, None),  # storage
    5: (None, "batch", "kv_heads", None, None),
    4: (None, "batch", "kv_heads", None),
    3: (None, "batch", "kv_heads"),
    2: (None, None),
    1: ("batch",),
    0: (),
}
"""Names of an array's axes, by their number."""

UNTIL_GLOBAL = NO_END - 1
"""``key_end`` of a LOCAL key until its head's next GLOBAL token comes."""


def by_shard(function: Callable) -> Callable:
    """Wraps ``function`` to run on each device's own sequences and heads, where there are several devices."""
    return sharding.by_rank(function, AXES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Slots of some neighboring layers.

    Attributes:
      storage: keys, with the rotary phase of their own position, and values, ``[l, b, k, c, h]`` each.
      key_position: int32 ``[l, b, k, c]``, index of each key in its sequence.
      key_end: int32 ``[l, b, k, c]``, the first query that cannot read the slot, which is then free; 0: never used.
      length: int32 ``[l, b, k]``, all slots from here on are free.
      attention_sum: float32 ``[l, b, k, c]``, what each key has received. For policies that observe it that is
        attention, of all queries or, with ``NewKeys.forgets``, of the last ones. In a model with "selective" layers it
        is masks, the same in all heads, and 0 in other layers. Else None.
      key_before: ``[l, b, k, h]``, with ``model.key_shift`` what ``Attention.projected_key`` gave of the newest token,
        which is mixed into the next one's key; or None.
    """

    storage: Storage
    key_position: jax.Array
    key_end: jax.Array
    length: jax.Array
    attention_sum: jax.Array | None = None
    key_before: jax.Array | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return self.key_end.shape[0]

    @property
    def capacity(self) -> int:
        """C."""
        return self.key_end.shape[3]

    @property
    def keys(self) -> jax.Array:
        """``[l, b, k, c, h]``, in the order of the slots: a copy."""
        return jax.lax.map(lambda layer: self.storage.layer(layer)[0], jnp.arange(self.num_layers))

    @property
    def values(self) -> jax.Array:
        """``[l, b, k, c, h]``, in the order of the slots: a copy."""
        return jax.lax.map(lambda layer: self.storage.layer(layer)[1], jnp.arange(self.num_layers))


KVBuffer = tuple[LayerGroup, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewKeys:
    """Keys and values on their way into the slots of a group.

    Attributes:
      keys, values: ``[l, b, k, t, h]``, the keys with the rotary phase of their own position.
      key_position, key_end: int32 ``[l, b, k, t]``; ``key_end = 0`` where there is no token.
      local_end: int32 ``[l, b, k]``, the end of the LOCAL keys that were waiting: one behind the first GLOBAL token
        among these, ``UNTIL_GLOBAL`` where there is none.
      attention_sum: float32 ``[l, b, k, t]``, attention, or masks, that these keys have received from the queries of
        the chunk; None where nothing adds it up.
      slot_attention: float32 ``[l, b, k, c]``, the same of the keys in the slots.
      forgets: bool ``[l, b, k]``, True where what the slots had received before the chunk counts no more, for policies
        that observe the last query alone; None: it counts.
      key_before: ``[l, b, k, h]``, of the group behind the chunk; or None.
    """

    keys: jax.Array
    values: jax.Array
    key_position: jax.Array
    key_end: jax.Array
    local_end: jax.Array
    attention_sum: jax.Array | None = None
    slot_attention: jax.Array | None = None
    forgets: jax.Array | None = None
    key_before: jax.Array | None = None


@by_shard
def insert(group: LayerGroup, other: LayerGroup, row: jax.Array) -> LayerGroup:
    """Copies sequences into rows of a group; other rows stay as they are.

    Args:
      group: of any number of sequences.
      other: as many slots, and one sequence for each device that the batch is divided among.
      row: int32, as many: the row of each, counted from the first of its device; -1 where none is to be copied.
    """
    at = jnp.maximum(row[0], 0)

    def put(x, y):
        axis = AXES[x.ndim].index("batch")
        y = jnp.where(row[0] < 0, jax.lax.dynamic_slice_in_dim(x, at, 1, axis), y.astype(x.dtype))
        return jax.lax.dynamic_update_slice_in_dim(x, y, at, axis)

    return jax.tree.map(put, group, other)


@by_shard
def clear(group: LayerGroup, is_cleared: jax.Array) -> LayerGroup:
    """Frees all slots of the sequences that bool ``is_cleared [b]`` marks."""
    is_cleared = is_cleared[:, None]
    return dataclasses.replace(
        group,
        key_end=jnp.where(is_cleared[..., None], 0, group.key_end),
        length=jnp.where(is_cleared, 0, group.length),
    )


@by_shard
def expire(group: LayerGroup, local_end: jax.Array) -> LayerGroup:
    """Sets the end of the LOCAL keys that were waiting for it to ``NewKeys.local_end``.

    After a GLOBAL token at t that is ``t + 1``, for its own query still reads them; else ``UNTIL_GLOBAL``.
    """
    return dataclasses.replace(group, key_end=_expired(group.key_end, local_end))


def _expired(key_end: jax.Array, local_end: jax.Array) -> jax.Array:
    return jnp.where(key_end == UNTIL_GLOBAL, local_end[..., None], key_end)


@by_shard
def receive(group: LayerGroup, new: NewKeys) -> LayerGroup:
    """Adds what the keys in the slots have received from the new queries, where that is added up."""
    return dataclasses.replace(group, attention_sum=_received(group, new))


def _received(group: LayerGroup, new: NewKeys) -> jax.Array | None:
    """Returns ``attention_sum`` after the chunk."""
    if group.attention_sum is None or new.slot_attention is None:
        return group.attention_sum
    before = group.attention_sum
    if new.forgets is not None:
        before = jnp.where(new.forgets[..., None], 0, before)
    # The group may have been grown since the chunk was read; new slots are at the end.
    missing = group.capacity - new.slot_attention.shape[3]
    return before + jnp.pad(new.slot_attention, [(0, 0)] * 3 + [(0, missing)])


def limits_of(buffer: KVBuffer, limit: jax.Array) -> list[jax.Array]:
    """Divides limits of all layers, int32 ``[num_layers, 1]``, among the groups; a scalar holds for all of them."""
    if limit.ndim == 0:
        return [limit] * len(buffer)
    return jnp.split(limit, np.cumsum([group.num_layers for group in buffer])[:-1])


@by_shard
def free_slot(group: LayerGroup, at: jax.Array, limit: jax.Array) -> jax.Array:
    """Finds the first free slot of every head, the capacity where there is none: int32 ``[l, b, k]``."""
    slot = jax.lax.broadcasted_iota(jnp.int32, group.key_end.shape, 3)
    is_free = (group.key_end <= at[:, None, None]) & (slot < _by_layer(limit))
    return jnp.min(jnp.where(is_free, slot, group.capacity), axis=-1)


@by_shard
def slot_to_evict(group: LayerGroup, new: NewKeys, eviction: Eviction, at: jax.Array, limit: jax.Array) -> jax.Array:
    """Finds the slot of the key that goes first where all are live, the capacity where that is the new one.

    It comes after ``expire``, and there is one new token (t = 1).

    Returns:
      int32 ``[l, b, k]``.
    """

    def layer(arrays):
        key_position, key_end, attention_sum = arrays
        return eviction.scores(key_position, key_end, attention_sum, at[:, None, None])

    def with_new(x, y):
        return None if x is None or y is None else jnp.concatenate([x, y], axis=-1)

    pairs = (
        (group.key_position, new.key_position),
        (group.key_end, new.key_end),
        (group.attention_sum, new.attention_sum),
    )
    keys = jax.lax.map(layer, tuple(with_new(*pair) for pair in pairs))
    slot = jax.lax.broadcasted_iota(jnp.int32, keys[0].shape, 3)
    candidates = (slot < _by_layer(limit)) | (slot == group.capacity)
    for key in keys:
        key = jnp.where(candidates, key, _highest(key.dtype))
        candidates &= key == jnp.min(key, axis=-1, keepdims=True)
    return jnp.min(jnp.where(candidates, slot, group.capacity), axis=-1)


def _by_layer(limit: jax.Array) -> jax.Array:
    """Gives a limit the axes ``[l or 1, b, k, c]``."""
    return jnp.reshape(limit, (-1, 1, 1, 1))


def _highest(dtype) -> jax.Array:
    return jnp.asarray(jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max, dtype)


@by_shard
def write_token(group: LayerGroup, new: NewKeys, slot: jax.Array) -> LayerGroup:
    """Writes one key of each head (t = 1) into a slot, after ``expire``.

    The slots, int32 ``[l, b, k]``, are those of ``free_slot``; a key for the slot ``c`` is not written.
    """
    here = jax.lax.broadcasted_iota(jnp.int32, group.key_end.shape, 3) == slot[..., None]

    def put(x, y):
        return x if x is None or y is None else jnp.where(here, y, x)

    return LayerGroup(
        group.storage.put(slot, new.keys[..., 0, :], new.values[..., 0, :]),
        put(group.key_position, new.key_position),
        put(group.key_end, new.key_end),
        jnp.where(slot < group.capacity, jnp.maximum(group.length, slot + 1), group.length),
        put(group.attention_sum, new.attention_sum),
        new.key_before,
    )


@by_shard
def need(group: LayerGroup, new: NewKeys | None, at: jax.Array) -> jax.Array:
    """Counts live slots of heads, with the new keys: int32 ``[l, b, k]``; ``at`` is int32 ``[b]``, the next query."""
    at = at[:, None, None]
    if new is None:
        return jnp.sum(group.key_end > at, axis=-1, dtype=jnp.int32)
    live = jnp.sum(_expired(group.key_end, new.local_end) > at, axis=-1, dtype=jnp.int32)
    return live + jnp.sum(new.key_end > at, axis=-1, dtype=jnp.int32)


@by_shard
def write_chunk(
    group: LayerGroup, new: NewKeys, at: jax.Array, eviction: Eviction | None = None, limit: jax.Array | None = None
) -> tuple[LayerGroup, jax.Array]:
    """Writes the chunk's keys that live on behind the live ones, which move to the front.

    Args:
      group: of the buffer, of at least ``need`` slots (or ``limit``).
      new: the chunk's keys.
      at: int32 ``[b]``, the first query behind the chunk.
      eviction: rule where more than ``limit`` would be live; None: nothing goes.
      limit: at most the capacity.

    Returns:
      The group, in which every slot before ``length`` is live, and the live keys that were evicted: int32
      ``[l, b, k]``.
    """
    key_end = _expired(group.key_end, new.local_end)
    group = dataclasses.replace(group, key_end=key_end, attention_sum=_received(group, new))
    return _keep(group, new, at, eviction, limit)


@by_shard
def compact(
    group: LayerGroup, at: jax.Array, eviction: Eviction | None = None, limit: jax.Array | None = None
) -> tuple[LayerGroup, jax.Array]:
    """Moves live slots to the front, in order, and lowers ``length`` to their number; see ``write_chunk``."""
    return _keep(group, None, at, eviction, limit)


def _keep(group, new, at, eviction, limit):
    """Gathers the live keys of the slots and the new ones, layer by layer."""
    at = at[:, None, None]
    limits = None if limit is None else jnp.broadcast_to(jnp.reshape(limit, -1), group.num_layers)

    def own(x, layer):
        return None if x is None else jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)

    def step(layer, carry):
        storage, key_position, key_end, length, attention_sum, evicted = carry

        def with_new(slots, name):
            if new is None or slots is None:
                return slots
            return jnp.concatenate([slots, getattr(new, name)[layer].astype(slots.dtype)], axis=2)

        keys, values = (with_new(*pair) for pair in zip(storage.layer(layer), ("keys", "values"), strict=True))
        position = with_new(own(key_position, layer), "key_position")
        end = with_new(own(key_end, layer), "key_end")
        received = with_new(own(attention_sum, layer), "attention_sum")
        is_live = end > at
        live = jnp.sum(is_live, axis=-1, dtype=jnp.int32)
        if eviction is not None:
            weights = eviction.weights(keys, is_live) if eviction.reads_keys else received
            scores = eviction.scores(position, end, weights, at)
            limit = jax.lax.dynamic_index_in_dim(limits, layer, 0, keepdims=False)
            most = jnp.minimum(eviction.head_budgets(scores, is_live, limit), limit)
            is_live &= _rank(scores, is_live) >= (live - most)[..., None]
        kept = jnp.sum(is_live, axis=-1, dtype=jnp.int32)
        order = jnp.argsort(~is_live, axis=-1, stable=True)[..., : group.capacity]

        def gather(x):
            return jnp.take_along_axis(x, order if x.ndim == 3 else order[..., None], axis=2)

        used = jnp.arange(group.capacity) < kept[..., None]

        def put(x, y):
            return jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), layer, 0)

        return (
            storage.set_layer(layer, gather(keys), gather(values)),
            put(key_position, gather(position)),
            put(key_end, jnp.where(used, gather(end), 0)),
            put(length, jnp.minimum(kept, group.capacity)),
            None if received is None else put(attention_sum, gather(received)),
            put(evicted, live - jnp.minimum(kept, group.capacity)),
        )

    carry = (group.storage, group.key_position, group.key_end, group.length, group.attention_sum, 0 * group.length)
    storage, key_position, key_end, length, attention_sum, evicted = jax.lax.fori_loop(0, group.num_layers, step, carry)
    key_before = group.key_before if new is None else new.key_before
    return LayerGroup(storage, key_position, key_end, length, attention_sum, key_before), evicted


def _rank(scores: tuple[jax.Array, jax.Array], is_live: jax.Array) -> jax.Array:
    """Counts the live slots that go before each live one: int32 ``[b, k, c]``."""
    slot = jax.lax.broadcasted_iota(jnp.int32, is_live.shape, is_live.ndim - 1)
    sorted_slots = jax.lax.sort((~is_live, *scores, slot), num_keys=3)[-1]
    return jnp.argsort(sorted_slots, axis=-1)


def occupancy(buffer: KVBuffer, at: jax.Array) -> jax.Array:
    """Counts live slots: int32 ``[num_layers, b, k]``; ``at`` is int32 ``[b]``, the next query."""
    return jnp.concatenate([need(group, None, at) for group in buffer])
