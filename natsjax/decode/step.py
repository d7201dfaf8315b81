"""A chunk of tokens through the model, against the keys that a buffer holds: the pure functions of decoding.

A chunk of one token is a step of decoding, longer ones are prefill. Prefill in chunks, decoding token by token, and the
masked forward pass of the whole sequence give the same logits, up to rounding (docs/method.md 5).

Sequences in a batch may have different lengths: in a chunk each has ``num_tokens[b]`` of them, at the front, and
the first has the index ``begin[b]``.

Axis letters: ``b`` batch, ``t`` token of the chunk, ``k`` KV head, ``g`` query heads per KV head, ``h`` head dim,
``d`` width, ``l`` layer of a group, ``c`` slot.
"""

import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from natsjax.config import LAYER_TYPES, Config
from natsjax.decode.buffer import AXES, UNTIL_GLOBAL, KVBuffer, LayerGroup, NewKeys
from natsjax.model import roles, sharding
from natsjax.model.attention import RoleSampling
from natsjax.model.transformer import Block, Transformer
from natsjax.policies.base import cut, window_end
from natsjax.policies.interval import IntervalPolicy
from natsjax.policies.nats import Nats
from natsjax.policies.observing import AttentionScorePolicy
from pallas_kernels.decode_attention import decode_attention, observed_attention
from pallas_kernels.nats_attention import GLOBAL, LOCAL, NO_END, SLIDING, interval_attention, key_end_from_roles

DecodingPolicy = IntervalPolicy | Nats | AttentionScorePolicy


class Chunk(NamedTuple):
    """Tokens to read.

    Attributes:
      tokens: int32 ``[b, t]``.
      num_tokens: int32 ``[b]``, of each sequence.
      begin: int32 ``[b]``, index of the first of them in its sequence.
      observed_from: int32 ``[b]``: the attention of queries from this index on counts, for ``AttentionScorePolicy``.
      role_ids: int8 ``[num_layers, b, k, t]``, or None: as the policy says.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    begin: jax.Array
    observed_from: jax.Array
    role_ids: jax.Array | None = None

    @property
    def next_index(self) -> jax.Array:
        """int32 ``[b]``, of the query that comes next."""
        return self.begin + self.num_tokens


class Reads(NamedTuple):
    """What came of a chunk.

    Attributes:
      hidden: ``[b, t, d]``, what the output layer reads; meaningless where there is no token.
      new: the keys to write, by group.
      live: int32 ``[num_layers, b, k, t]``, how many keys each query read, or None.
    """

    hidden: jax.Array
    new: tuple[NewKeys, ...]
    live: jax.Array | None


def forward_chunk(
    model: Transformer, buffer: KVBuffer, chunk: Chunk, policy: DecodingPolicy, *, count_live: bool = False
) -> Reads:
    """Reads a chunk; the buffer stays as it is.

    Args:
      model: the transformer.
      buffer: of the tokens before.
      chunk: the tokens; a single one is read by the decoding kernels, unless the policy observes or live keys are
        counted.
      policy: how long keys live.
      count_live: whether ``live`` is asked for.
    """
    positions = chunk.begin[:, None] + jnp.arange(chunk.tokens.shape[1], dtype=jnp.int32)
    structure, layers = nnx.split(model.blocks)
    kinds = jnp.array([LAYER_TYPES.index(kind) for kind in model.config.model.all_layer_types], jnp.int32)
    x = model.embed(chunk.tokens)
    new, live, first = [], [], 0
    for group in buffer:

        def layer(x, number, group=group, first=first):
            state = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, first + number, 0, keepdims=False), layers)
            block = nnx.merge(structure, state)
            role_ids = chunk.role_ids
            if role_ids is not None:
                role_ids = jax.lax.dynamic_index_in_dim(role_ids, first + number, 0, keepdims=False)
            kind = kinds[first + number]
            return _block(block, x, positions, group, number, kind, chunk, policy, role_ids, count_live)

        x, (written, read) = jax.lax.scan(layer, x, jnp.arange(group.num_layers, dtype=jnp.int32))
        new.append(written)
        live.append(read)
        first += group.num_layers
    return Reads(model.final_norm(x), tuple(new), jnp.concatenate(live) if count_live else None)


def _block(block: Block, x, positions, group, layer, kind, chunk, policy, role_ids, count_live):
    """``Block.__call__`` with the attention over the buffer and the chunk; ``kind`` is traced."""
    attention = block.attention
    normed = block.attention_norm(x)
    query, key, value = attention.project(normed, positions)
    ids = end = None
    if isinstance(policy, Nats):
        logits = attention.scorer(normed)
        logits += roles.role_bias_logits(policy.role_bias, attention.config.nats.biased_roles)
        first = roles.first_of_document(positions)
        ids = attention.choose_roles(logits, first, RoleSampling(role_ids=role_ids))
    elif isinstance(policy, IntervalPolicy):
        end = policy.key_end(positions, attention.config.model.num_kv_heads)
    else:
        end = jnp.full_like(positions, NO_END)[:, None]
    ids, end, window = _by_kind(kind, attention.config, positions, ids, end)
    is_observed = isinstance(policy, AttentionScorePolicy)
    out, new, live = _attend(query, key, value, ids, end, group, layer, chunk, window, is_observed, count_live)
    x = x + attention.merge(out)
    return x + block.mlp(block.mlp_norm(x)), (new, live)


def _by_kind(kind, config: Config, positions, ids, end):
    """Roles, ends and the window of SLIDING keys, as the kind of the layer says."""
    model = config.model
    sliding = cut(model.sliding_window)
    window = jnp.int32(cut(config.nats.window))
    is_dense, is_sliding = (kind == LAYER_TYPES.index(name) for name in ("dense", "sliding"))
    if ids is not None and set(model.layer_types) != {"nats"}:
        ids = jnp.where(is_dense, GLOBAL, jnp.where(is_sliding, SLIDING, ids)).astype(ids.dtype)
        window = jnp.where(is_sliding, sliding, window)
    if end is not None and "sliding" in model.layer_types:
        end = jnp.where(is_sliding, jnp.minimum(end, window_end(positions[:, None], sliding)), end)
    return ids, end, window


def _attend(query, key, value, ids, end, group, layer, chunk, window, is_observed, count_live):
    """On each device's sequences and heads: ``(out [b, t, k, g, h], NewKeys of the layer, live [b, k, t] or None)``."""
    slots, structure = jax.tree.flatten(group)
    numbers = (chunk.begin, chunk.num_tokens, chunk.observed_from)

    def on_device(query, key, value, ids, end, layer, window, index, count, observed_from, *slots):
        group: LayerGroup = jax.tree.unflatten(structure, slots)
        step = jnp.arange(query.shape[1], dtype=jnp.int32)
        positions, is_token = index[:, None] + step, step < count[:, None]
        if ids is not None:
            end, local_end = _ends_by_role(ids, index, is_token, window)
        else:
            shape = (key.shape[0], key.shape[2], key.shape[1])
            end = jnp.broadcast_to(jnp.where(is_token[:, None], end, 0), shape)
            local_end = jnp.full_like(end[..., 0], UNTIL_GLOBAL)
        position = jnp.broadcast_to(positions[:, None], end.shape)
        attention_sum = seen = live = None
        heads = query.reshape(*query.shape[:2], -1, query.shape[-1])
        if query.shape[1] == 1 and not is_observed and not count_live:
            out = decode_attention(
                heads[:, 0],
                key[:, 0],
                value[:, 0],
                group.storage,
                key_end=group.key_end,
                length=group.length,
                position=index,
                layer=layer,
            )
        else:
            slot_end, slot_position = (
                jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (group.key_end, group.key_position)
            )
            slot_end = jnp.where(slot_end == UNTIL_GLOBAL, local_end[..., None], slot_end)
            all_ends = jnp.concatenate([slot_end, end], axis=-1)
            all_positions = jnp.concatenate([slot_position, position], axis=-1)
            slot_key, slot_value = group.storage.layer(layer)
            all_keys = jnp.concatenate([jnp.swapaxes(slot_key, 1, 2), key.astype(slot_key.dtype)], axis=1)
            all_values = jnp.concatenate([jnp.swapaxes(slot_value, 1, 2), value.astype(slot_key.dtype)], axis=1)
            at = jnp.where(is_token, positions, -1)
            if is_observed:
                out, all_attention_sum = observed_attention(
                    heads,
                    all_keys,
                    all_values,
                    all_ends,
                    query_position=at,
                    key_position=all_positions,
                    observed=positions >= observed_from[:, None],
                )
                seen, attention_sum = all_attention_sum[..., : group.capacity], all_attention_sum[..., group.capacity :]
            else:
                found = interval_attention(
                    heads, all_keys, all_values, all_ends, query_position=at, key_position=all_positions
                )
                out = typing.cast(jax.Array, found)
            if count_live:
                at = at[:, None, :, None]
                is_read = (all_positions[:, :, None] <= at) & (at < all_ends[:, :, None])
                live = jnp.sum(is_read, axis=-1, dtype=jnp.int32)
        keys, values = (jnp.swapaxes(x, 1, 2) for x in (key, value))
        results = (out.reshape(query.shape), keys, values, position, end, local_end, attention_sum, seen, live)
        return tuple(x for x in results if x is not None)

    by_head = ("batch", "kv_heads", None)
    axes = (
        _QUERY,
        _KEY,
        _KEY,
        by_head,
        ("batch", "kv_heads" if end is not None and end.shape[1] > 1 else None, None),
        (),
        (),
        *(("batch",),) * 3,
        *(AXES[x.ndim] for x in slots),
    )
    out_axes = [_QUERY, (*by_head, None), (*by_head, None), by_head, by_head, by_head[:2]]
    out_axes += [by_head] * (2 * is_observed + count_live)
    out, *rest = sharding.shard_map(on_device, axes, out_axes)(
        query, key, value, ids, end, layer, window, *numbers, *slots
    )
    live = rest.pop() if count_live else None
    return out, NewKeys(*rest), live


def _ends_by_role(ids, index, is_token, window):
    """``NewKeys.key_end`` (int32 ``[b, k, t]``) and ``local_end [b, k]`` from roles ``[b, k, t]``."""
    length = ids.shape[-1]
    ids = jnp.where(is_token[:, None], ids, SLIDING)  # what is no token ends nobody
    end = key_end_from_roles(ids, window=window)  # counted from the chunk's first token
    waiting = jnp.where(ids == LOCAL, UNTIL_GLOBAL, NO_END)
    end = jnp.where(end == NO_END, waiting, end + index[:, None, None])
    first_global = jnp.min(jnp.where(ids == GLOBAL, jnp.arange(length, dtype=jnp.int32), length), axis=-1)
    local_end = jnp.where(first_global < length, index[:, None] + first_global + 1, UNTIL_GLOBAL)
    return jnp.where(is_token[:, None], end, 0), local_end


# No mesh for decoding divides sequences.
_QUERY: sharding.Axes = ("batch", None, "kv_heads", None, None)
_KEY: sharding.Axes = ("batch", None, "kv_heads", None)
