"""Statistics of roles against counting pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from natsjax.kv_fraction import sliding_windows
from natsjax.model.inputs import Batch
from natsjax.train import losses, role_statistics
from natsjax.train.role_statistics import live_keys, live_quantiles, live_thresholds, role_sums
from pallas_kernels.nats_attention import key_end_from_roles
from pallas_kernels.nats_attention.roles import LOCAL


def batch_and_roles(layers=2, heads=2, seed=0):
    batch = tiny.packed_batch(seed, batch=4, length=24)
    rng = np.random.default_rng(seed)
    ids = rng.choice(4, (layers, 4, heads, 24), p=[0.15, 0.45, 0.3, 0.1]).astype(np.int8)
    return batch, np.where(batch["positions"][None, :, None] == 0, 0, ids).astype(np.int8)


def pairs(ids, batch, windows):
    """bool ``[b, k, t, s]``: the query reads the key."""
    end = np.asarray(key_end_from_roles(jnp.asarray(ids), window=windows, document_end=batch["document_end"]))
    t, s = np.arange(24)[:, None], np.arange(24)
    return (s <= t) & (t < end[:, :, None, :])


@pytest.mark.parametrize("windows", [(0, 1), (2, 6), (3, 100)])
@pytest.mark.parametrize("seed", range(3))
def test_live_keys_are_the_pairs_of_each_query(seed, windows):
    batch, ids = batch_and_roles(seed=seed)
    found = live_keys(jnp.asarray(ids[0]), Batch.from_rows(batch).is_first, jnp.array([windows]))
    valid = np.broadcast_to(batch["document_end"][:, None] > 0, found.shape)
    np.testing.assert_array_equal(np.asarray(found)[valid], pairs(ids[0], batch, windows).sum(-1)[valid])


def test_sums_count_tokens_pairs_and_locals_without_end():
    model = {"layer_types": "nats,sliding", "sliding_window": 5}
    config = tiny.config(model=model, nats={"windows": (2, 7), "initial_roles": ()})
    batch, ids = batch_and_roles()
    ids[1] = 2  # of a sliding layer
    sums = jax.tree.map(np.asarray, jax.jit(role_sums, static_argnums=2)(ids, Batch.from_rows(batch), config))
    valid = batch["document_end"] > 0
    for layer, windows in enumerate([(2, 7), (5, 7)]):
        live = pairs(ids[layer], batch, windows).sum(-1)
        at_valid = np.broadcast_to(valid[:, None], live.shape)
        more = [np.sum(live[at_valid] > threshold) for threshold in live_thresholds(24)]
        np.testing.assert_array_equal(sums.more_live[layer], more)
        for head in range(2):
            roles = ids[layer, :, head]
            np.testing.assert_array_equal(sums.counts[layer, head], np.bincount(roles[valid], minlength=4))
            ends = batch["document_end"]
            unended = [not np.any(roles[b, s + 1 : ends[b, s]] == 0) for b, s in np.argwhere(valid & (roles == LOCAL))]
            assert sums.unended[layer, head] == np.sum(unended)


def test_quantiles_are_those_of_the_counts_rounded_up_to_a_threshold():
    rng = np.random.default_rng(0)
    live = rng.integers(1, 900, (2, 5000))
    thresholds = live_thresholds(1024)
    more = np.stack([[np.sum(row > threshold) for threshold in thresholds] for row in live])
    found = np.asarray(live_quantiles(jnp.asarray(more, jnp.float32), jnp.float32(5000), 1024))
    exact = np.quantile(live, role_statistics.QUANTILES, axis=1, method="inverted_cdf").T
    assert np.all(found >= exact)
    assert np.all(found <= 1.13 * exact + 1)


def test_thresholds_reach_from_one_key_to_all():
    for length in (1, 2, 24, 131072):
        thresholds = live_thresholds(length)
        assert (thresholds[0], thresholds[-1]) == (1, length)
        assert np.all(np.diff(thresholds) > 0)


def test_windows_are_the_layers_own():
    config = tiny.config(
        model={"layer_types": "nats,sliding,dense", "num_layers": 6, "sliding_window": 7}, nats={"window": 3}
    )
    assert sliding_windows(config).tolist() == [[[3]], [[7]], [[3]], [[3]], [[7]], [[3]]]
    ladder = tiny.config(
        model={"layer_types": "nats,sliding", "sliding_window": 7}, nats={"windows": (1, 5), "initial_roles": ()}
    )
    assert sliding_windows(ladder).tolist() == [[[1, 5]], [[7, 5]]]


def test_entropy_is_that_of_the_scorer_without_noise():
    config = tiny.config(nats={"initial_roles": (0.5, 0.25, 0.25)})
    from natsjax.train.step import Trainer

    trainer = Trainer(config, tiny.VOCAB_SIZE)
    _, metrics = trainer.step(trainer.init(), tiny.packed_batch(batch=4))
    np.testing.assert_allclose(metrics["scorer_entropy"], 1.5 * np.log(2), rtol=1e-5)
    batch = Batch.from_rows(tiny.packed_batch(batch=4))
    firsts = np.sum(batch.is_first & batch.is_token)
    np.testing.assert_allclose(metrics["forced_globals"], firsts / losses.batch_totals(batch).tokens, rtol=1e-6)
