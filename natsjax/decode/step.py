"""A chunk of tokens through the model, against the keys in a buffer: the pure functions of decoding.

A chunk of one token is a step of decoding, longer ones are prefill. The model's own blocks run, with
``BufferAttention`` in place of ``natsjax.model.attention.MaskedAttention``. Prefill in chunks, decoding token by token,
and the masked forward pass of the whole sequence give the same logits, up to rounding (docs/method.md 5).

Sequences in a batch may have different lengths: in a chunk each has ``num_tokens[b]`` of them, at the front, and
the first has the index ``begin[b]``.

Axis letters: ``b`` batch, ``t`` token of the chunk, ``k`` KV head, ``g`` query heads per KV head, ``h`` head dim,
``d`` embedding dim, ``l`` layer of a group, ``c`` slot.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from natsjax.config import LAYER_TYPES, Config
from natsjax.decode.buffer import AXES, UNTIL_GLOBAL, KVBuffer, LayerGroup, NewKeys
from natsjax.model import sharding
from natsjax.model.attention import SINK_AXES, Attention, below_sink
from natsjax.model.inputs import Batch
from natsjax.model.selective import maskable, masks, selection, selective_attention
from natsjax.model.transformer import Transformer
from natsjax.policies.base import DecodingPolicy, cut, window_end
from pallas_kernels.decode_attention import decode_attention, observed_attention
from pallas_kernels.nats_attention import GLOBAL, LOCAL, NO_END, SLIDING, interval_attention, key_end_from_roles


class Chunk(NamedTuple):
    """Tokens to read.

    Attributes:
      tokens: int32 ``[b, t]``.
      num_tokens: int32 ``[b]``, of each sequence.
      begin: int32 ``[b]``, index of the first of them in its sequence.
      before: int32 ``[b]``, the token before the first one; read where ``begin > 0``.
      observed_from: int32 ``[b]``: the attention of queries from this index on counts, where the policy observes it.
      role_ids: int8 ``[num_layers, b, k, t]``, or None: as the policy chooses.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    begin: jax.Array
    before: jax.Array
    observed_from: jax.Array
    role_ids: jax.Array | None = None

    @property
    def batch(self) -> Batch:
        """The tokens, each sequence as a document without an end."""
        step = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)
        is_token = step < self.num_tokens[:, None]
        return Batch(self.tokens, self.begin[:, None] + step, jnp.where(is_token, NO_END, 0))

    @property
    def previous(self) -> jax.Array:
        """int32 ``[b, t]``, the token before each, -1 where there is none."""
        parts = [self.before[:, None], sharding.reshard(self.tokens[:, :-1], "batch", None)]
        previous = sharding.reshard(jnp.concatenate(parts, axis=1), "batch", "sequence")
        return jnp.where(self.batch.is_first, -1, previous)

    @property
    def last(self) -> jax.Array:
        """int32 ``[b]``, the last token of each sequence: ``before`` of the chunk that comes next."""
        is_last = jnp.arange(self.tokens.shape[1], dtype=jnp.int32) == self.num_tokens[:, None] - 1
        last = jnp.sum(jnp.where(is_last, self.tokens, 0), axis=1, dtype=jnp.int32)
        return jnp.where(self.num_tokens > 0, last, self.before)

    @property
    def next_index(self) -> jax.Array:
        """int32 ``[b]``, index of the query that comes next."""
        return self.begin + self.num_tokens


class Reads(NamedTuple):
    """Result of reading a chunk; nothing is written yet.

    Attributes:
      hidden: ``[b, t, d]``, input of the output layer; meaningless where there is no token.
      new: the keys to write, by group.
      live: int32 ``[num_layers, b, k, t]``, number of keys that each query read, or None.
      need: int32 ``[num_layers]``, slots that the fullest head of each layer needs (of ``loop.read_chunk`` alone).
    """

    hidden: jax.Array
    new: tuple[NewKeys, ...]
    live: jax.Array | None
    need: jax.Array | None = None


def forward_chunk(
    model: Transformer, buffer: KVBuffer, chunk: Chunk, policy: DecodingPolicy, *, count_live: bool = False
) -> Reads:
    """Reads a chunk; the buffer stays as it is.

    Args:
      model: the transformer.
      buffer: of the tokens before.
      chunk: the tokens; a single one is read by the decoding kernels, unless the policy observes attention, live keys
        are counted, or there are "selective" layers.
      policy: decides how long keys live.
      count_live: True to get ``live``.
    """
    structure, layers = nnx.split(model.blocks)
    config = model.config.model
    kinds = jnp.array([LAYER_TYPES.index(kind) for kind in config.all_layer_types], jnp.int32)
    rotary = jnp.array(config.all_rotary)
    is_alike = len(set(config.all_rotary)) == 1
    x = model.embed(chunk.tokens, chunk.previous if config.token_shift else None)
    new, live, first = [], [], 0
    for group in buffer:

        def layer(x, number, group=group, first=first):
            def own(values):
                return jax.lax.dynamic_index_in_dim(values, first + number, 0, keepdims=False)

            role_ids = None if chunk.role_ids is None else own(chunk.role_ids)
            attend = BufferAttention(group, number, chunk, policy, kinds[first + number], role_ids, count_live)
            is_rotary = config.all_rotary[0] if is_alike else rotary[first + number]
            block = nnx.merge(structure, jax.tree.map(own, layers))
            return block(x, chunk.batch.positions, attend, before=attend.before, is_rotary=is_rotary)

        x, (written, read) = jax.lax.scan(layer, x, jnp.arange(group.num_layers, dtype=jnp.int32))
        new.append(written)
        live.append(read)
        first += group.num_layers
    return Reads(model.final_norm(x), tuple(new), jnp.concatenate(live) if count_live else None)


class BufferAttention(NamedTuple):
    """A ``natsjax.model.attention.AttentionFunction`` over the keys in the buffer and those of the chunk.

    Its result is ``(NewKeys, live)`` of the layer, the latter int32 ``[b, k, t]`` or None.

    Attributes:
      group: of the buffer.
      layer: int32 scalar, number of the layer in the group.
      chunk: the tokens.
      policy: decides how long keys live.
      kind: int32 scalar, of the layer: index in ``LAYER_TYPES``.
      role_ids: int8 ``[b, k, t]``, or None: as the policy chooses.
      count_live: True to get ``live``.
    """

    group: LayerGroup
    layer: jax.Array
    chunk: Chunk
    policy: DecodingPolicy
    kind: jax.Array
    role_ids: jax.Array | None
    count_live: bool

    @property
    def before(self) -> jax.Array | None:
        """``projected_key`` of the token before the chunk, ``[b, k, h]``, with ``model.key_shift``; or None."""
        keys = self.group.key_before
        return None if keys is None else jax.lax.dynamic_index_in_dim(keys, self.layer, 0, keepdims=False)

    def _key_before_next(self, attention: Attention, x) -> jax.Array | None:
        """``before`` of the chunk that comes next."""
        before, count = self.before, self.chunk.num_tokens[:, None, None]
        if before is None:
            return None
        is_last = jnp.arange(x.shape[1], dtype=jnp.int32) == self.chunk.num_tokens[:, None] - 1
        last = jnp.sum(jnp.where(is_last[..., None], x, 0), axis=1, keepdims=True, dtype=x.dtype)
        return jnp.where(count > 0, attention.projected_key(last)[:, 0], before)

    def __call__(self, attention: Attention, x, query, key, value):
        """See ``AttentionFunction``."""
        batch, config = self.chunk.batch, attention.config
        rule = self.policy.chunk_choice(batch.positions, config)._replace(role_ids=self.role_ids)
        ids, end = None, rule.key_end
        if end is None:
            ids = rule.choose(rule.perturb(attention.scorer(x)), batch.is_first)
        ids, end, window = _by_kind(self.kind, config, batch.positions, ids, end)
        is_observed, count_live, has_masks = self.policy.observes_attention, self.count_live, config.model.has_masks
        slots, structure = jax.tree.flatten(self.group)

        def on_device(
            query, key, value, ids, end, sink, layer, window, may_mask, positions, is_token, observed_from, *slots
        ):
            new = _new_keys(key, value, ids, end, window, positions, is_token)
            group: LayerGroup = jax.tree.unflatten(structure, slots)
            if has_masks:
                at = jnp.where(is_token, positions, -1)
                out, sums, live = _read_selectively(
                    query, key, value, new, group, layer, at, sink, may_mask, count_live
                )
            elif query.shape[1] == 1 and not is_observed and not count_live:
                out = decode_attention(
                    _merge_heads(query)[:, 0],
                    key[:, 0],
                    value[:, 0],
                    group.storage,
                    key_end=group.key_end,
                    length=group.length,
                    position=positions[:, 0],
                    layer=layer,
                    sink=None if sink is None else sink.reshape(-1),
                )
                sums, live = (), ()
            else:
                observed = positions >= observed_from[:, None] if is_observed else None
                at = jnp.where(is_token, positions, -1)
                out, sums, live = _read_all(query, key, value, new, group, layer, at, sink, observed, count_live)
                if self.policy.joins_heads:
                    sums = tuple(_over_heads(x) for x in sums)
                if self.policy.observes_last:
                    forgets = jnp.any(observed & is_token, axis=1)[:, None]
                    sums = (*sums, jnp.broadcast_to(forgets, sums[0].shape[:2]))
            return out.reshape(query.shape), *new, *sums, *live  # new and sums in the order of ``NewKeys``

        by_head = ("batch", "kv_heads", None)
        given = ("batch", "kv_heads" if end is not None and end.shape[1] > 1 else None, None)
        of_heads = (None, "kv_heads" if window.shape[1] > 1 else None, None)
        tokens = (("batch", None), ("batch", None), ("batch",))
        places = ((), of_heads, ())
        axes = (_QUERY, _KEY, _KEY, by_head, given, SINK_AXES, *places, *tokens, *(AXES[x.ndim] for x in slots))
        out_axes = [_QUERY, (*by_head, None), (*by_head, None), by_head, by_head, by_head[:2]]
        out_axes += [by_head] * (2 * (is_observed or has_masks))
        out_axes += [by_head[:2]] * self.policy.observes_last + [by_head] * count_live
        is_selective = self.kind == LAYER_TYPES.index("selective")
        numbers = (self.layer, window, is_selective, batch.positions, batch.is_token, self.chunk.observed_from)
        mapped = sharding.shard_map(on_device, axes, out_axes)
        out, *rest = mapped(query, key, value, ids, end, attention.sink_logits, *numbers, *slots)
        live = rest.pop() if count_live else None
        new = dataclasses.replace(NewKeys(*rest), key_before=self._key_before_next(attention, x))
        return out, (new, live)


def _new_keys(key, value, ids, end, window, positions, is_token):
    """Returns the first fields of the layer's ``NewKeys``, from roles ``ids`` or else from ends."""
    if ids is not None:
        end, local_end = _ends_by_role(ids, positions[:, 0], is_token, window)
    else:
        shape = (key.shape[0], key.shape[2], key.shape[1])
        end = jnp.broadcast_to(jnp.where(is_token[:, None], end, 0), shape)
        local_end = jnp.full_like(end[..., 0], UNTIL_GLOBAL)
    position = jnp.broadcast_to(positions[:, None], end.shape)
    return jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), position, end, local_end


def _read_all(query, key, value, new, group: LayerGroup, layer, at, sink, observed, count_live):
    """Attends over slots and new keys side by side: ``(out, attention sums if observed, live keys if counted)``."""
    keys, values, key_position, ends = _joined(key, value, new, group, layer)
    places = {"query_position": at, "key_position": key_position}
    heads = _merge_heads(query)
    sums: tuple[jax.Array, ...] = ()
    live: tuple[jax.Array, ...] = ()
    if observed is not None:
        sink = None if sink is None else sink.reshape(-1)
        out, received = observed_attention(heads, keys, values, ends, observed=observed, sink=sink, **places)
        sums = (received[..., group.capacity :], received[..., : group.capacity])
    else:
        found = interval_attention(heads, keys, values, ends, return_lse=sink is not None, **places)
        out = below_sink(found, sink)
    if count_live:
        live = (jnp.sum(_is_read(at, key_position, ends), axis=-1, dtype=jnp.int32),)
    return out, sums, live


def _over_heads(received):
    """Adds up what the keys of all KV heads received, slot by slot: float32 ``[b, k, c]``, the same in every head."""
    total = sharding.psum(jnp.sum(received, axis=1, keepdims=True), "kv_heads")
    return jnp.broadcast_to(total, received.shape)


def _read_selectively(query, key, value, new, group: LayerGroup, layer, at, sink, is_selective, count_live):
    """Reads as ``_read_all`` does in a model with "selective" layers: the sums are what keys are given as masks.

    Keys are the same in all heads, and so are masks. In layers of other kinds nothing is given.
    """
    keys, values, key_position, ends = _joined(key, value, new, group, layer)
    is_read = _is_read(at, key_position, ends)
    before = jax.lax.dynamic_index_in_dim(group.attention_sum, layer, 0, keepdims=False)[:, 0]
    before = jnp.pad(before, ((0, 0), (0, query.shape[1])))
    may_mask = maskable(at, key_position[:, 0], is_read[:, 0]) & is_selective
    # Of the layer's first head, which is the first device's.
    selected = sharding.from_first(selection(query[:, :, 0, 0], keys[:, :, 0], may_mask), "kv_heads")
    masked, _ = masks(selected, before)
    out = selective_attention(query, keys, values, masked, is_read, sink)
    given = jnp.sum(selected, axis=1)[:, None]
    given = jnp.broadcast_to(given, (*ends.shape[:2], given.shape[-1]))
    live = (jnp.sum(is_read, axis=-1, dtype=jnp.int32),) if count_live else ()
    return out, (given[..., group.capacity :], given[..., : group.capacity]), live


def _joined(key, value, new, group: LayerGroup, layer):
    """Puts slots and new keys side by side: keys, values ``[b, s, k, h]``, positions and ends ``[b, k, s]``."""
    _, _, position, end, local_end = new
    slot_end, slot_position = (
        jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (group.key_end, group.key_position)
    )
    slot_end = jnp.where(slot_end == UNTIL_GLOBAL, local_end[..., None], slot_end)
    keys, values = (
        jnp.concatenate([jnp.swapaxes(slots, 1, 2), x.astype(slots.dtype)], axis=1)
        for slots, x in zip(group.storage.layer(layer), (key, value), strict=True)
    )
    key_position = jnp.concatenate([slot_position, position], axis=-1)
    return keys, values, key_position, jnp.concatenate([slot_end, end], axis=-1)


def _is_read(at, key_position, ends):
    """Marks the keys that each query reads: bool ``[b, k, t, s]``."""
    at = at[:, None, :, None]
    return (key_position[:, :, None] <= at) & (at < ends[:, :, None])


def _merge_heads(query: jax.Array) -> jax.Array:
    """Reshapes ``[b, t, k, g, h]`` to ``[b, t, n, h]``."""
    return query.reshape(*query.shape[:2], -1, query.shape[-1])


def _by_kind(kind, config: Config, positions, ids, end):
    """Fits roles and ends to the kind of the layer.

    Returns:
      Both, and the windows of SLIDING keys, int32 ``[r, k, 1]``, or ``[r, 1, 1]`` where all heads are alike.
    """
    model = config.model
    sliding, windows = (
        jnp.array([cut(window) for window in of_kind], jnp.int32)[:, None]
        for of_kind in (model.head_windows, config.nats.sliding_windows)
    )
    windows = windows[..., None]
    is_dense, is_sliding = (kind == LAYER_TYPES.index(name) for name in ("dense", "sliding"))
    if ids is not None and not all(model.is_role_layer()):
        ids = jnp.where(is_dense, GLOBAL, jnp.where(is_sliding, SLIDING, ids)).astype(ids.dtype)
        is_first = jnp.arange(len(windows))[:, None, None] == 0  # the role of all keys of a "sliding" layer
        windows = jnp.where(is_sliding & is_first, sliding, windows)
    if end is not None and "sliding" in model.layer_types:
        end = jnp.where(is_sliding, jnp.minimum(end, window_end(positions[:, None], sliding)), end)
    return ids, end, windows


def _ends_by_role(ids, index, is_token, windows):
    """Returns ``NewKeys.key_end`` (int32 ``[b, k, t]``) and ``local_end [b, k]`` from roles ``[b, k, t]``."""
    length = ids.shape[-1]
    ids = jnp.where(is_token[:, None], ids, SLIDING)  # padding ends no key
    end = key_end_from_roles(ids, window=list(windows))  # counted from the chunk's first token
    waiting = jnp.where(ids == LOCAL, UNTIL_GLOBAL, NO_END)
    end = jnp.where(end == NO_END, waiting, end + index[:, None, None])
    first_global = jnp.min(jnp.where(ids == GLOBAL, jnp.arange(length, dtype=jnp.int32), length), axis=-1)
    local_end = jnp.where(first_global < length, index[:, None] + first_global + 1, UNTIL_GLOBAL)
    return jnp.where(is_token[:, None], end, 0), local_end


# No mesh for decoding divides sequences.
_QUERY: sharding.Axes = ("batch", None, "kv_heads", None, None)
_KEY: sharding.Axes = ("batch", None, "kv_heads", None)
