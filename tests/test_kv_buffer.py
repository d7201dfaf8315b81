"""The buffer against a list of keys: what is written is there until its end, what is dead is free."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.decode import allocation
from natsjax.decode import buffer as kv_buffer
from natsjax.decode.buffer import UNTIL_GLOBAL, NewKeys
from natsjax.policies.attention_score import H2O, TOVA, SnapKV
from natsjax.policies.eviction import Oldest, SoonestEnd
from pallas_kernels.decode_attention import Storage
from pallas_kernels.decode_attention.storage import FORMATS
from pallas_kernels.nats_attention import NO_END

LAYERS, BATCH, HEADS, HEAD_DIM, BLOCK = 2, 2, 2, 4, 4


def empty(slots=8, layers=(LAYERS,), format="transposed", observed=False):
    slots = [slots] * len(layers) if isinstance(slots, int) else slots
    sizes = {"batch": BATCH, "num_kv_heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "block": BLOCK}
    return allocation.empty(layers, slots, **sizes, format=format, adds_up=observed)


def key_of(layer, row, head, index):
    """A key that says whose it is; its value is the negative."""
    return np.array([layer, row, head, index], np.float32)


def new_keys(begin, ends, local_end=None, attention_sum=None):
    """``ends``: int ``[l, b, k, t]``; the keys of indices ``begin … begin + t - 1``."""
    ends = np.asarray(ends)
    keys = np.zeros((*ends.shape, HEAD_DIM), np.float32)
    for place in np.ndindex(ends.shape):
        keys[place] = key_of(*place[:3], begin + place[3])
    position = np.broadcast_to(begin + np.arange(ends.shape[3]), ends.shape)
    local_end = np.full(ends.shape[:3], UNTIL_GLOBAL) if local_end is None else local_end
    arrays = (keys, -keys, position.astype(np.int32), ends.astype(np.int32), np.asarray(local_end, np.int32))
    return NewKeys(*map(jnp.asarray, arrays), attention_sum=attention_sum)


def live_of(buffer, at):
    """``{(layer, row, head): {index: end}}`` of the slots; keys and values must say the same as the numbers beside."""
    found, first = {}, 0
    for group in buffer:
        keys, values = np.asarray(group.keys), np.asarray(group.values)
        for place in np.ndindex(group.key_end.shape):
            end = int(group.key_end[place])
            if end > at:
                assert place[3] < int(group.length[place[:3]])
                whose = (first + place[0], *place[1:3])
                index = int(group.key_position[place])
                assert np.array_equal(keys[place], key_of(*whose, index)), "a key has been lost"
                assert np.array_equal(values[place], -keys[place])
                entries = found.setdefault(whose, {})
                assert index not in entries, "a key is there twice"
                entries[index] = end
        first += group.num_layers
    return found


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["GLOBAL", "LOCAL", "SLIDING"]), min_size=3, max_size=14), st.sampled_from(FORMATS))
def test_tokens_live_as_long_as_their_role_says(roles, format):
    """Token by token with another role pattern in every head, compacted now and then."""
    window, (group,) = 2, empty(slots=16, format=format)
    expected = {place: {} for place in np.ndindex(LAYERS, BATCH, HEADS)}
    expire, write, compact = jax.jit(kv_buffer.expire), jax.jit(kv_buffer.write_token), jax.jit(kv_buffer.compact)
    for t in range(len(roles)):
        ends, local_end = np.zeros((LAYERS, BATCH, HEADS, 1)), np.full((LAYERS, BATCH, HEADS), UNTIL_GLOBAL)
        for number, place in enumerate(expected):
            role = roles[(t + number) % len(roles)]
            ends[place] = {"GLOBAL": NO_END, "LOCAL": UNTIL_GLOBAL, "SLIDING": t + window + 1}[role]
            if role == "GLOBAL":
                local_end[place] = t + 1
                ended = {s: t + 1 if end == UNTIL_GLOBAL else end for s, end in expected[place].items()}
                expected[place] = ended
            expected[place] = {s: end for s, end in expected[place].items() if end > t + 1}
            if ends[place][0] > t + 1:
                expected[place][t] = int(ends[place][0])
        new, at = new_keys(t, ends, local_end), jnp.full(BATCH, t, jnp.int32)
        slot = kv_buffer.free_slot(group, at, jnp.int32(NO_END))
        group = write(expire(group, new.local_end), new, slot)
        assert live_of((group,), t + 1) == {place: keys for place, keys in expected.items() if keys}
        if t % 4 == 3:
            group, evicted = compact(group, at + 1)
            assert live_of((group,), t + 1) == {place: keys for place, keys in expected.items() if keys}
            assert not evicted.any()
            lengths = np.array([len(keys) for keys in expected.values()]).reshape(group.length.shape)
            assert np.array_equal(group.length, lengths)
            assert np.array_equal(kv_buffer.occupancy((group,), at + 1), lengths)


@pytest.mark.parametrize("format", FORMATS)
def test_a_chunk_joins_what_lives(format):
    buffer = empty(slots=8, format=format)
    ends = np.full((LAYERS, BATCH, HEADS, 3), UNTIL_GLOBAL)
    ends[..., 0] = NO_END
    ends[0, 1, 0, 2] = 0  # padding
    group, _ = jax.jit(kv_buffer.write_chunk)(buffer[0], new_keys(0, ends), jnp.array([3, 3]))
    ends = np.full((LAYERS, BATCH, HEADS, 2), NO_END)
    local_end = np.full((LAYERS, BATCH, HEADS), UNTIL_GLOBAL)
    local_end[1] = 4  # layer 1: the LOCAL keys end with the first of these
    new = new_keys(3, ends, local_end)
    at = jnp.array([5, 5])
    assert np.array_equal(np.asarray(kv_buffer.need(group, new, at))[1], np.full((BATCH, HEADS), 3))
    group, evicted = jax.jit(kv_buffer.write_chunk)(group, new, at)
    live = live_of((group,), 5)
    assert sorted(live[0, 0, 0]) == [0, 1, 2, 3, 4]
    assert sorted(live[0, 1, 0]) == [0, 1, 3, 4]
    assert sorted(live[1, 1, 1]) == [0, 3, 4]
    assert not evicted.any()


def test_what_does_not_fit_is_not_lost_silently():
    (group,) = empty(slots=4)
    new = new_keys(0, np.full((LAYERS, BATCH, HEADS, 6), NO_END))
    assert np.all(np.asarray(kv_buffer.need(group, new, jnp.array([6, 6]))) == 6)
    _, evicted = kv_buffer.write_chunk(group, new, jnp.array([6, 6]))
    assert np.all(np.asarray(evicted) == 2)


def test_regrouping_keeps_every_slot():
    buffer = empty(slots=8, layers=(1, 3, 2))
    filled = []
    for group, first in zip(buffer, (0, 1, 4), strict=True):
        ends = np.full((group.num_layers, BATCH, HEADS, 5), NO_END)
        new = new_keys(0, ends)
        shift = np.zeros(HEAD_DIM, np.float32)
        shift[0] = first  # the layer's number in the whole model
        new = dataclasses.replace(new, keys=new.keys + shift, values=new.values - shift)
        filled.append(kv_buffer.write_chunk(group, new, jnp.array([5, 5]))[0])
    before = live_of(tuple(filled), 5)
    assert len(before) == 6 * BATCH * HEADS
    for layers, slots in (((6,), (16,)), ((2, 4), (8, 12)), ((4, 1, 1), (8, 16, 8))):
        moved = jax.jit(allocation.regroup)(tuple(filled), empty(slots, layers))
        assert [group.capacity for group in moved] == list(slots)
        assert live_of(moved, 5) == before


def slots_for(positions, ends, attention_sum=None):
    """One head of each layer, row and KV head with these keys: arrays ``[b, k, c]`` as an eviction sees them."""
    shape = (BATCH, HEADS, len(positions))
    arrays = [None if x is None else jnp.broadcast_to(jnp.asarray(x), shape) for x in (positions, ends, attention_sum)]
    return (*arrays, jnp.full((BATCH, 1, 1), max(positions) + 1))


@pytest.mark.parametrize(
    ("eviction", "gone"),
    [
        (SoonestEnd(), [3, 1, 2]),  # ends at 9, then of those without end the oldest; never the first
        (Oldest(), [1, 2, 3]),
        (H2O(3, 1), [2, 0, 3]),
        (SnapKV(3, 1), [0, 1, 2]),
        (TOVA(3), [4, 2, 0]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_goes_first(eviction, gone):
    positions, ends = np.array([0, 1, 2, 3, 4]), np.array([NO_END, UNTIL_GLOBAL, NO_END, 9, NO_END])
    attention_sum = np.array([0.2, 0.9, 0.1, 0.3, 0.0], np.float32)
    first, second = (np.asarray(x)[0, 0] for x in eviction.scores(*slots_for(positions, ends, attention_sum)))
    assert np.lexsort((second, first))[:3].tolist() == gone


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_eviction_leaves_the_limit_and_counts_what_went(limit):
    (group,) = empty(slots=8)
    new = new_keys(0, np.full((LAYERS, BATCH, HEADS, 6), NO_END))
    at = jnp.array([6, 6])
    group, evicted = jax.jit(kv_buffer.write_chunk)(group, new, at, Oldest(), jnp.int32(limit))
    kept = [0, *range(7 - limit, 6)]
    assert {tuple(sorted(keys)) for keys in live_of((group,), 6).values()} == {tuple(kept)}
    assert np.all(np.asarray(evicted) == 6 - limit)
    # One more token: the oldest but the first makes room.
    new = new_keys(6, np.full((LAYERS, BATCH, HEADS, 1), NO_END))
    slot = kv_buffer.slot_to_evict(group, new, Oldest(), at + 1, jnp.int32(limit))
    group = kv_buffer.write_token(group, new, slot)
    kept = [0, *range(8 - limit, 7)]  # with room for one, that is the first, and the new one goes
    assert {tuple(sorted(keys)) for keys in live_of((group,), 7).values()} == {tuple(kept)}


def test_sizes_are_few_and_close():
    sizes = {allocation.round_up(need, 128) for need in range(1, 2**15)}
    assert len(sizes) <= 8 * 8 + 8
    assert all(size % 128 == 0 for size in sizes)
    for need in (1, 100, 128, 129, 1000, 5000, 131072):
        assert need <= allocation.round_up(need, 128) <= max(128, 1.125 * need + 128)
        assert allocation.grown(need, 1) <= 1.27 * need + 2


@pytest.mark.parametrize("block", [16, 64, 100, 128])
def test_nothing_takes_more_than_full_attention(block):
    """At every length, for every need: blocks of any size follow the length, fixed ones are whole."""
    for most in [*range(1, 301), 1023, 1024, 1025, 5000]:
        full = allocation.slots_for(most, block, most, any_block=True)
        assert most <= full <= (most if most <= 2 * block else max(most + 15, allocation.round_up(most, block)))
        needs = range(1, most + 1) if most <= 64 else range(1, most + 1, most // 13)
        sizes = set()
        for need in needs:
            slots = allocation.slots_for(need, block, most, any_block=True)
            assert need <= slots <= full
            assert slots <= 1.125 * need + max(32, most / 8)
            unit = allocation.storage_block(slots, block)
            assert slots % unit == 0
            assert unit <= 2 * block
            sizes.add(slots)
            fixed = allocation.slots_for(need, block, most, any_block=False)
            assert fixed == allocation.round_up(need, block) <= allocation.slots_for(most, block, most, any_block=False)
        assert len(sizes) <= 40  # each is compiled for
    assert allocation.slots_for(73, 128, 73, any_block=True) == 73
    assert allocation.slots_for(9, 128, 73, any_block=True) == 16
    assert allocation.slots_for(200, 128, 73, any_block=True) == 73  # nothing needs more than the sequence has


def test_storage_takes_the_sizes_of_every_length():
    for most in (1, 7, 73, 129, 257, 300, 511):
        slots = allocation.slots_for(most, 128, most, any_block=True)
        shape = (2, 1, 3, slots, 8)
        unit = allocation.storage_block(slots, 128)
        storage = jax.eval_shape(lambda: Storage.empty(shape, "float32", "transposed", unit))  # noqa: B023
        assert storage.shape == shape
        assert sum(x.size for x in storage.arrays) == 2 * 2 * 3 * slots * 8


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=12), st.integers(1, 4))
def test_groups_hold_every_layer_and_are_worth_their_number(need, most):
    sizes = allocation.layer_groups(need, most)
    assert sum(sizes) == len(need)
    assert 1 <= len(sizes) <= min(most, len(need))

    def slots(sizes):
        bounds = np.cumsum([0, *sizes])
        return sum((b - a) * max(need[a:b]) for a, b in itertools.pairwise(bounds))

    # By hand: every way to cut once.
    if most >= 2 and len(need) >= 2:
        best = min(slots([n, len(need) - n]) for n in range(1, len(need)))
        assert slots(sizes) <= 1.1 * best
