"""Gathering long-lived keys, lists of live blocks, sampled rows: each against its definition, pair by pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ROLE_PATTERNS, Shape, document_ends, role_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import SLOW

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import blocks, layout, sampling
from pallas_kernels.nats_attention.backend import Intervals
from pallas_kernels.nats_attention.xla import XlaTiling


def intervals(pattern, length, window, seed, documents="one"):
    shape = Shape(2, length, 2, 1, 4, window)
    rng = np.random.default_rng(seed)
    ids, end = role_ids(pattern, shape, rng), document_ends(documents, shape, rng)
    key_end = na.key_end_from_roles(jnp.asarray(ids), window=window, document_end=None if end is None else end)
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), key_end.shape)
    return Intervals(position[:, 0], position, key_end)


# Length, thresholds and capacity, which are compiled anew each time: few, or all of them.
SIZES = [(1, (3,), 1), (2, (2, 9), 6), (13, (1, 4, 16), 6), (40, (2, 9), 1), (40, (3,), 40)]
if SLOW:
    SIZES = list(itertools.product([1, 2, 13, 40], [(3,), (2, 9), (1, 4, 16)], [1, 6, 40]))
cases = given(
    st.sampled_from(ROLE_PATTERNS),
    st.sampled_from(SIZES),
    st.sampled_from([0, 3]),
    st.integers(0, 2**31),
    st.sampled_from(["one", "packed", "padding"]),
)


@settings(max_examples=60, deadline=None)
@pytest.mark.larger
@cases
def test_every_key_has_one_living_slot_and_long_lives_come_first(pattern, sizes, window, seed, documents):
    length, thresholds, capacity = sizes
    _, position, end = intervals(pattern, length, window, seed, documents)
    arranged = layout.arrange(position, end, thresholds=thresholds, capacity=capacity)
    where, until = (np.asarray(x) for x in layout.gather_intervals(arranged, position, end))
    slot, position, end = (np.asarray(x) for x in (arranged.slot, position, end))
    np.testing.assert_array_equal(np.take_along_axis(where, slot, 2), position)
    np.testing.assert_array_equal(np.take_along_axis(until, slot, 2), end)
    alive = until > where
    assert alive.sum() == (end > position).sum()  # nothing is read twice, nothing is dropped
    lifetime = end.astype(np.int64) - position
    for b, k in np.ndindex(end.shape[:2]):
        classes = sum((lifetime[b, k] > threshold).astype(int) for threshold in thresholds)
        wanted = sorted(np.flatnonzero(classes), key=lambda s: (-classes[s], s))
        expected = wanted[:capacity] + [length] * (capacity - len(wanted))
        np.testing.assert_array_equal(np.asarray(arranged.source)[b, k], expected)


@settings(max_examples=30, deadline=None)
@pytest.mark.larger
@cases
def test_scatter_back_is_the_transpose_of_gather(pattern, sizes, window, seed, documents):
    length, thresholds, capacity = sizes
    _, position, end = intervals(pattern, length, window, seed, documents)
    arranged = layout.arrange(position, end, thresholds=thresholds, capacity=capacity)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, 2, length, 3)), jnp.float32)
    where, until = layout.gather_intervals(arranged, position, end)
    alive = (until > where)[..., None]
    y = jnp.where(alive, jnp.asarray(rng.normal(size=(2, 2, capacity + length, 3)), jnp.float32), 0)
    there = jnp.sum(layout.gather(arranged, x) * y)
    dead = jnp.where((end > position)[..., None], x, 0)  # keys that nothing reads have no living slot
    np.testing.assert_allclose(there, jnp.sum(dead * layout.scatter_back(arranged, y)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(layout.scatter_back(arranged, jnp.where(alive, layout.gather(arranged, x), 0)), dead)


@settings(max_examples=60, deadline=None)
@pytest.mark.larger
@cases
def test_lists_hold_every_visible_pair_once(pattern, sizes, window, seed, documents):
    length, thresholds, capacity = sizes
    query_block, key_block = (1, 3, 8)[seed % 3], (1, 4)[seed % 2]
    given = intervals(pattern, length, window, seed, documents)
    capacity += -capacity % key_block  # keys in place begin at a block
    arranged = layout.arrange(*given[1:], thresholds=thresholds, capacity=capacity)
    position, end = layout.gather_intervals(arranged, *given[1:])
    by_slot = Intervals(
        jnp.pad(given.query_position, ((0, 0), (0, -length % query_block)), constant_values=-1),
        jnp.pad(position, ((0, 0), (0, 0), (0, -length % key_block)), constant_values=na.NO_END),
        jnp.pad(end, ((0, 0), (0, 0), (0, -length % key_block))),
    )
    tiles = blocks.visible_tiles(by_slot, query_block, key_block)
    at = np.asarray(by_slot.query_position)[:, None, :, None]
    visible = (np.asarray(by_slot.key_position)[:, :, None] <= at) & (at < np.asarray(by_slot.key_end)[:, :, None])
    b, k, t, s = visible.shape
    tiled = visible.reshape(b, k, t // query_block, query_block, s // key_block, key_block)
    alive, plain = (np.asarray(x) for x in tiles)
    assert not (tiled.any((3, 5)) & ~alive).any()
    np.testing.assert_array_equal(plain, tiled.all((3, 5)))
    lists = blocks.live_blocks(tiles)
    for index in np.ndindex(lists.num_alive.shape):
        order, num_plain, num_alive = (np.asarray(x[index]) for x in lists)
        assert sorted(order) == list(range(s // key_block))
        assert set(order[:num_plain]) == set(np.flatnonzero(plain[index]))
        assert set(order[:num_alive]) == set(np.flatnonzero(alive[index]))


def test_gathering_leaves_few_blocks_alive():
    """5 % scattered GLOBAL keys keep every contiguous block alive; gathered ones do not."""
    length, window, block = 8192, 256, 128
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.choice(3, (1, 1, length), p=[0.05, 0.475, 0.475]))
    end = na.key_end_from_roles(ids, window=window)
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), end.shape)

    def computed(position, end):
        tiles = blocks.visible_tiles(Intervals(jnp.arange(length)[None], position, end), block, block)
        return int(tiles.alive.sum()) * block**2

    live = int(jnp.sum(jnp.minimum(end, length) - position))
    in_place = computed(position, end)
    arranged = layout.arrange(position, end, thresholds=(window + 1,), capacity=length // 2)
    gathered = computed(*layout.gather_intervals(arranged, position, end))
    assert in_place > 11 * live
    assert gathered < 2.2 * live


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 17, 300]),
    st.sampled_from([0.01, 0.125, 0.5, 1]),
    st.sampled_from([1, 16]),
    st.integers(0, 2**31),
)
def test_sampled_rows_are_one_run_of_each_stratum(length, fraction, run, seed):
    rows = sampling.draw_rows(jax.random.key(seed), length=length, fraction=fraction, run=run)
    index, weight = np.asarray(rows.queries), np.asarray(rows.weight)
    assert (np.diff(index) >= 0).all()
    assert index.min() >= 0
    assert index.max() < length
    assert len(set(index[weight > 0])) == (weight > 0).sum()
    runs = -(-length // run)
    assert weight[::run].sum() == runs  # the strata make up the sequence
    assert len(index) == run * sampling.num_strata(length, fraction, run)


def test_sampled_rows_keep_the_expectation_of_a_sum():
    length, total = 103, np.zeros(103)
    draw = jax.jit(lambda key: sampling.draw_rows(key, length=length, fraction=0.25, run=4))
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = jax.vmap(draw)(keys)
    np.add.at(total, np.asarray(rows.queries), np.asarray(rows.weight))
    # a row is drawn with probability 1 / weight, so the mean weight is 1 and its error about sqrt(weight / draws)
    np.testing.assert_allclose(total / 4000, 1, atol=5 * np.sqrt(5 / 4000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_block": 0}, "query_block=0"),
        ({"capacity": 1.5}, "capacity=1.5"),
        ({"thresholds": (9, 3)}, "ascending"),
        ({"lanes": 0}, "lanes=0"),
    ],
)
def test_wrong_tilings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        XlaTiling(**{"query_block": 8, "key_block": 8} | change)
