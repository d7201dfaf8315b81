"""The compiled programs of decoding: read a chunk, write its keys, and a loop that generates.

Each compiles once for the shapes of the buffer. The loop stops by itself where a head has no free slot, before anything
is written, so that the host can move the run to a larger buffer.

What functions here take: ``parameters`` in the compute layout; the model's ``structure``; ``policy``, which decides how
long keys live; ``numbers`` and ``kind`` of the ``Sampling``; ``limit``, int32 scalar or ``[num_layers, 1]``, slots of a
head that may be used; ``num_likeliest``, of the likeliest tokens that are returned beside each one that is drawn.

Axis letters: ``b`` batch, ``t`` token of a chunk, ``n`` tokens of a segment, ``l`` layer, ``k`` KV head, ``d``
embedding dim.
"""

import functools
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from natsjax.decode import buffer as kv_buffer
from natsjax.decode import sampling
from natsjax.decode.buffer import KVBuffer, NewKeys
from natsjax.decode.sampling import Likeliest
from natsjax.decode.step import Chunk, Reads, forward_chunk
from natsjax.model import sharding
from natsjax.policies.base import DecodingPolicy, Eviction


@functools.partial(jax.jit, static_argnames=("structure", "count_live"))
def read_chunk(
    parameters: Any,
    buffer: KVBuffer,
    chunk: Chunk,
    policy: DecodingPolicy,
    *,
    structure: nnx.GraphDef,
    count_live: bool,
) -> Reads:
    """Runs ``step.forward_chunk`` and counts the slots that its keys need."""
    model = nnx.merge(structure, parameters)
    reads = forward_chunk(model, buffer, chunk, policy, count_live=count_live)
    pairs = zip(buffer, reads.new, strict=True)
    need = jnp.concatenate([fullest(kv_buffer.need(group, new, chunk.next_index)) for group, new in pairs])
    return reads._replace(need=sharding.replicate(need))


@functools.partial(jax.jit, static_argnames=("structure",), donate_argnames=("buffer",))
def read_tokens(
    parameters: Any,
    buffer: KVBuffer,
    chunk: Chunk,
    policy: DecodingPolicy,
    eviction: Eviction,
    limit: jax.Array,
    *,
    structure: nnx.GraphDef,
) -> tuple[KVBuffer, jax.Array, jax.Array]:
    """Reads a chunk as it would be generated: token by token, evicting after each.

    The buffer has at least ``limit`` slots, or one for each token.

    Returns:
      The buffer, ``hidden [b, t, d]``, and ``live``, int32 ``[num_layers, b, k, t]``, as in ``Reads``.
    """
    model = nnx.merge(structure, parameters)

    def step(carry, numbered):
        (buffer, before), (number, token) = carry, numbered
        # A sequence that has ended stays behind its last token.
        begin = chunk.begin + jnp.minimum(number, chunk.num_tokens)
        count = (number < chunk.num_tokens).astype(jnp.int32)
        one = Chunk(token[:, None], count, begin, before, chunk.observed_from)
        reads = forward_chunk(model, buffer, one, policy, count_live=True)
        buffer, _ = _written(buffer, reads.new, one.next_index, eviction, limit)
        return (buffer, one.last), (reads.hidden[:, 0], typing.cast(jax.Array, reads.live)[..., 0])

    tokens = sharding.reshard(jnp.swapaxes(chunk.tokens, 0, 1), None, "batch")
    numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    (buffer, _), (hidden, live) = jax.lax.scan(step, (buffer, chunk.before), (numbers, tokens))
    return buffer, jnp.swapaxes(hidden, 0, 1), jnp.moveaxis(live, 0, -1)


def fullest(live: jax.Array) -> jax.Array:
    """Takes each layer's fullest head: int32 ``[l, b, k]`` to ``[l]``."""
    return jnp.max(live, axis=(1, 2))


@functools.partial(jax.jit, donate_argnames=("buffer",))
def write_chunk(
    buffer: KVBuffer, new: tuple[NewKeys, ...], at: jax.Array, eviction: Eviction | None, limit: jax.Array | None
) -> tuple[KVBuffer, jax.Array]:
    """Runs ``buffer.write_chunk``; counts the evicted keys, int32 ``[num_layers, b, k]``."""
    return _written(buffer, new, at, eviction, limit)


def _written(buffer, new, at, eviction, limit):
    limits = _limits(buffer, limit)
    groups = zip(buffer, new, limits, strict=True)
    pairs = [kv_buffer.write_chunk(group, keys, at, eviction, most) for group, keys, most in groups]
    return tuple(group for group, _ in pairs), jnp.concatenate([evicted for _, evicted in pairs])


def _limits(buffer, limit):
    return [None] * len(buffer) if limit is None else kv_buffer.limits_of(buffer, limit)


@functools.partial(jax.jit, donate_argnames=("buffer",))
def compact(
    buffer: KVBuffer, at: jax.Array, eviction: Eviction | None = None, limit: jax.Array | None = None
) -> tuple[KVBuffer, jax.Array]:
    """Runs ``buffer.compact``; counts the evicted keys, int32 ``[num_layers, b, k]``."""
    limits = _limits(buffer, limit)
    pairs = [kv_buffer.compact(group, at, eviction, most) for group, most in zip(buffer, limits, strict=True)]
    return tuple(group for group, _ in pairs), jnp.concatenate([evicted for _, evicted in pairs])


def last_hidden(hidden: jax.Array, count: jax.Array, before: jax.Array) -> jax.Array:
    """Picks each sequence's last token so far: ``[b, d]``.

    Args:
      hidden: ``[b, t, d]``, of a chunk.
      count: int32 ``[b]``, tokens in it.
      before: ``[b, d]``, of the chunks before, for sequences without a token in this one.
    """
    is_last = jnp.arange(hidden.shape[1], dtype=jnp.int32) == count[:, None] - 1
    last = jnp.sum(jnp.where(is_last[..., None], hidden, 0), axis=1, dtype=hidden.dtype)
    return jnp.where((count > 0)[:, None], last, before)


@functools.partial(jax.jit, static_argnames=("structure", "kind", "num_likeliest"))
def first_token(
    parameters: Any,
    hidden: jax.Array,
    sequence: jax.Array,
    index: jax.Array,
    numbers: sampling.Numbers,
    *,
    structure: nnx.GraphDef,
    kind: sampling.Kind,
    num_likeliest: int = 0,
) -> tuple[jax.Array, jax.Array, Likeliest | None]:
    """Draws the token after the prompt, from ``hidden [b, d]``; returns it, its log-probability, the likeliest ones."""
    logits = nnx.merge(structure, parameters).logits(hidden)
    drawn = sampling.sample(logits, sequence, index, kind, numbers)
    return *drawn, sampling.likeliest(logits, num_likeliest) if num_likeliest else None


@functools.partial(jax.jit, static_argnames=("structure", "num_likeliest"))
def prompt_logprobs(
    parameters: Any, hidden: jax.Array, following: jax.Array, *, structure: nnx.GraphDef, num_likeliest: int
) -> tuple[jax.Array, Likeliest | None]:
    """Computes the log-probability of the token that follows each one of a chunk.

    Args:
      hidden: ``[b, t, d]``, of the chunk.
      following: int32 ``[b, t]``, the token behind each.

    Returns:
      float32 ``[b, t]``, and the likeliest ones there, ``[b, t, n]``.
    """
    model = nnx.merge(structure, parameters)

    def step(_, at):  # logits of one token of each sequence at a time: those of a chunk may not fit
        x, token = at
        logits = model.logits(x)
        logprob = sampling.logprobs_of(logits, token)
        return None, (logprob, sampling.likeliest(logits, num_likeliest) if num_likeliest else None)

    hidden = sharding.reshard(jnp.swapaxes(hidden, 0, 1), None, "batch", None)
    following = sharding.reshard(jnp.swapaxes(following, 0, 1), None, "batch")
    _, found = jax.lax.scan(step, None, (hidden, following))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), found)


class Loop(NamedTuple):
    """State of a generation.

    Attributes:
      buffer: of all tokens before ``token``.
      token: int32 ``[b]``, drawn and not yet read.
      before: int32 ``[b]``, the token before it.
      at: int32 ``[b]``, its index.
      sequence: int32 ``[b]``, the number of each sequence, for its draws.
      remaining: int32 ``[b]``, tokens that may still be drawn after ``token``.
      done: bool ``[b]``: nothing is drawn any more.
      evicted: int32 ``[num_layers, b, k]``, live keys that were evicted.
      read: float32 ``[num_layers, b, k]``, live keys that the queries have read, their own among them.
      most: int32 ``[num_layers, b, k]``, the most that one query has read.
    """

    buffer: KVBuffer
    token: jax.Array
    before: jax.Array
    at: jax.Array
    sequence: jax.Array
    remaining: jax.Array
    done: jax.Array
    evicted: jax.Array
    read: jax.Array
    most: jax.Array


class Segment(NamedTuple):
    """Result of a segment of the loop, for the host.

    Attributes:
      tokens: int32 ``[b, n]``, those that were drawn, at the front.
      logprobs: float32 ``[b, n]``.
      num_drawn: int32 ``[b]``, number of them.
      all_done: bool.
      lacks_capacity: bool ``[num_groups]``: the loop stopped for a head in this group has no free slot.
      need: int32 ``[num_layers]``, live slots of the fullest head.
      occupied: int32 ``[num_layers]``, the longest prefix of a layer's heads that attention reads.
      live: int32 ``[b]``, live slots of each sequence, over all layers and heads.
      evicted: int32 ``[b]``, live keys that were evicted, over all layers and heads, since the sequence began.
      likeliest: ``[b, n, num_likeliest]``, beside ``tokens``; None for no number.
    """

    tokens: jax.Array
    logprobs: jax.Array
    num_drawn: jax.Array
    all_done: jax.Array
    lacks_capacity: jax.Array
    need: jax.Array
    occupied: jax.Array
    live: jax.Array
    evicted: jax.Array
    likeliest: Likeliest | None


class RowStart(NamedTuple):
    """State of the sequences that begin, int32 ``[b]`` each, in their rows; see ``Loop``."""

    token: jax.Array
    before: jax.Array
    at: jax.Array
    sequence: jax.Array
    remaining: jax.Array


@functools.partial(jax.jit, donate_argnames=("loop",))
def insert_rows(loop: Loop, new: KVBuffer, row: jax.Array, is_new: jax.Array, start: RowStart) -> Loop:
    """Begins sequences in rows that are done; the others go on as if nothing had happened.

    Args:
      loop: of all rows.
      new: of the sequences that begin, and ``row``, their rows: as ``buffer.insert`` takes them.
      is_new: bool ``[b]``, True for these rows.
      start: their state.
    """

    def put(x, y):
        return jnp.where(is_new, y, x)

    def zero(x):
        return jnp.where(is_new[:, None], jnp.zeros_like(x), x)

    return Loop(
        tuple(kv_buffer.insert(group, other, row) for group, other in zip(loop.buffer, new, strict=True)),
        put(loop.token, start.token),
        put(loop.before, start.before),
        put(loop.at, start.at),
        put(loop.sequence, start.sequence),
        put(loop.remaining, start.remaining),
        loop.done & ~is_new,
        zero(loop.evicted),
        zero(loop.read),
        zero(loop.most),
    )


@functools.partial(jax.jit, donate_argnames=("loop",))
def clear_rows(loop: Loop, is_cleared: jax.Array) -> Loop:
    """Ends the sequences of the rows that bool ``is_cleared [b]`` marks, and frees their slots."""
    buffer = tuple(kv_buffer.clear(group, is_cleared) for group in loop.buffer)
    return loop._replace(buffer=buffer, done=loop.done | is_cleared)


@functools.partial(jax.jit, static_argnames=("structure", "kind", "length", "num_likeliest"), donate_argnames=("loop",))
def decode_segment(
    parameters: Any,
    loop: Loop,
    policy: DecodingPolicy,
    numbers: sampling.Numbers,
    stop: jax.Array,
    eviction: Eviction | None,
    limit: jax.Array,
    *,
    structure: nnx.GraphDef,
    kind: sampling.Kind,
    length: int,
    num_likeliest: int = 0,
) -> tuple[Loop, Segment]:
    """Draws up to ``length`` tokens (n) for each sequence.

    A sequence is done after one of the tokens ``stop``, int32 ``[m]``, or ``[b, m]`` for its own. Where a head has no
    free slot, the rule ``eviction`` applies, or, where that is None, the loop stops.
    """
    model = nnx.merge(structure, parameters)
    tokens = sharding.reshard(jnp.zeros((loop.token.shape[0], length), jnp.int32), "batch", None)
    likeliest = None
    if num_likeliest:
        ids = sharding.reshard(jnp.zeros((*tokens.shape, num_likeliest), jnp.int32), "batch", None, None)
        likeliest = Likeliest(ids, ids.astype(jnp.float32))
    carry = (loop, _free(loop, limit), jnp.int32(0), tokens, tokens.astype(jnp.float32), likeliest, 0 * loop.at)

    def goes_on(carry):
        loop, slots, step, *_ = carry
        may = (step < length) & ~jnp.all(loop.done)
        return may if eviction is not None else may & ~jnp.any(_lacks_capacity(loop, slots))

    def body(carry):
        loop, slots, step, tokens, logprobs, likeliest, count = carry
        chunk = Chunk(loop.token[:, None], (~loop.done).astype(jnp.int32), loop.at, loop.before, 0 * loop.at)
        reads = forward_chunk(model, loop.buffer, chunk, policy)
        at = chunk.next_index
        groups, evicted = [], []
        limits = kv_buffer.limits_of(loop.buffer, limit)
        for group, new, slot, most in zip(loop.buffer, reads.new, slots, limits, strict=True):
            # What is scored by more than the keys' indices may order all keys of a head anew with every token.
            if policy.observes_attention or (eviction is not None and eviction.reads_keys):
                group, lost = kv_buffer.write_chunk(group, new, at, eviction, most)
            else:
                group, lost = _write(group, new, slot, loop.done, at, eviction, most)
            groups.append(group)
            evicted.append(lost)
        logits = model.logits(reads.hidden[:, 0])
        token, logprob = sampling.sample(logits, loop.sequence, at, kind, numbers)
        token = jnp.where(loop.done, loop.token, token)
        remaining = loop.remaining - chunk.num_tokens
        read = jnp.where(loop.done[:, None], 0, kv_buffer.occupancy(loop.buffer, loop.at) + 1)
        is_stop = jnp.any(token[:, None] == stop, axis=-1)
        loop = loop._replace(
            buffer=tuple(groups),
            token=token,
            before=chunk.last,
            at=at,
            remaining=remaining,
            done=loop.done | is_stop | (remaining <= 0),
            evicted=loop.evicted + jnp.concatenate(evicted),
            read=loop.read + read,
            most=jnp.maximum(loop.most, read),
        )
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, 1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, logprob[:, None], step, 1)
        if likeliest is not None:
            found = sampling.likeliest(logits, num_likeliest)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
            likeliest = jax.tree.map(lambda x, y: put(x, y[:, None]), likeliest, found)
        return loop, _free(loop, limit), step + 1, tokens, logprobs, likeliest, count + chunk.num_tokens

    loop, slots, _, tokens, logprobs, likeliest, count = jax.lax.while_loop(goes_on, body, carry)
    occupied = kv_buffer.occupancy(loop.buffer, loop.at)
    segment = Segment(
        tokens,
        logprobs,
        count,
        jnp.all(loop.done),
        _lacks_capacity(loop, slots) if eviction is None else jnp.zeros(len(slots), bool),
        fullest(occupied),
        jnp.concatenate([fullest(group.length) for group in loop.buffer]),
        jnp.sum(occupied, axis=(0, 2)),
        jnp.sum(loop.evicted, axis=(0, 2)),
        likeliest,
    )
    return loop, sharding.replicate(segment)


def _write(group, new, slot, done, at, eviction, limit):
    """Writes one key into its slot and counts live keys that are lost by it. ``at`` is the next query."""
    group, lost = kv_buffer.expire(group, new.local_end), 0 * slot
    if group.attention_sum is not None:
        group = kv_buffer.receive(group, new)
    if eviction is not None:
        # A chunk would keep the same: keys that the next query can read, the new one among them.
        slot = kv_buffer.free_slot(group, at, limit)
        lives = (new.key_end[..., 0] > at[:, None]) & ~done[:, None]
        full = (slot == group.capacity) & lives
        slot = jnp.where(full, kv_buffer.slot_to_evict(group, new, eviction, at, limit), slot)
        slot = jnp.where(lives, slot, group.capacity)
        lost = full.astype(jnp.int32)
    return kv_buffer.write_token(group, new, jnp.where(done[:, None], group.capacity, slot)), lost


def _free(loop: Loop, limit) -> tuple[jax.Array, ...]:
    limits = kv_buffer.limits_of(loop.buffer, limit)
    return tuple(kv_buffer.free_slot(group, loop.at, most) for group, most in zip(loop.buffer, limits, strict=True))


def _lacks_capacity(loop: Loop, slots) -> jax.Array:
    """Marks groups, bool ``[num_groups]``, with a head that has no free slot."""
    pairs = zip(loop.buffer, slots, strict=True)
    return jnp.stack([jnp.any((slot >= group.capacity) & ~loop.done[:, None]) for group, slot in pairs])
