"""Sampled role gradients: unbiased, exact where nothing is masked out, the same for the same key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import arguments_of
from cases import Shape

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import reference, sampling
from pallas_kernels.nats_attention.xla import XlaTiling

SHAPE = Shape(2, 47, 2, 2, 8, 3)
TILING = XlaTiling(query_block=8, key_block=8, lanes=3, thresholds=(8,), sampled_run=3)


def problem(documents="packed"):
    *primals, end, dout = arguments_of(SHAPE, [("random", documents)], np.random.default_rng(0), spread=2.0)
    return tuple(primals), end, dout


@functools.partial(jax.jit, static_argnums=0)
def gradients(mask_gradient, primals, document_end, dout, sample_key):
    options = {"mask_gradient": mask_gradient, "sample_key": sample_key, "tiling": TILING, "window": SHAPE.window}
    return jax.vjp(lambda *x: na.nats_attention(*x, document_end=document_end, **options), *primals)[1](dout)


def test_the_mean_over_draws_is_the_exact_gradient():
    given = problem("one")  # long: most keys have masked-out pairs
    exact = np.asarray(gradients(na.Exact(), *given, None)[3], np.float64)
    draws = 600
    keys = jax.random.split(jax.random.key(1), draws)
    sampled = jax.lax.map(lambda key: gradients(na.Sampled(0.25), *given, key)[3], keys)
    sampled = np.asarray(sampled, np.float64)
    error = sampled.std(0, ddof=1) / np.sqrt(draws)
    off = np.abs(sampled.mean(0) - exact)
    spread = error > 1e-5 * np.abs(exact).max()
    assert spread.mean() > 0.3  # most gradients depend on the draw
    # Of some 400 standardised means the largest is about 3; heavy-tailed entries (a row in sixteen) add to that.
    z = off[spread] / error[spread]
    assert np.sqrt((z**2).mean()) < 1.15
    assert z.max() < 6
    assert off[~spread].max() < 1e-4 * np.abs(exact).max()


def test_query_key_and_value_never_depend_on_the_draw():
    given = problem()
    exact = gradients(na.Exact(), *given, None)
    sampled = gradients(na.Sampled(0.25), *given, jax.random.key(3))
    for x, y in zip(exact[:3], sampled[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_the_same_key_draws_the_same_and_another_key_does_not():
    given = problem()
    first, again, other = (
        np.asarray(gradients(na.Sampled(0.25), *given, jax.random.key(seed))[3]) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_all_of_the_queries_are_the_exact_gradient():
    given = problem("one")  # long: most keys have masked-out pairs
    whole = gradients(na.Sampled(1.0), *given, jax.random.key(0))
    for x, y in zip(whole, gradients(na.Exact(), *given, None), strict=True):
        np.testing.assert_array_equal(x, y)


def test_without_masked_out_pairs_a_draw_changes_nothing():
    (query, key, value, _), end, dout = problem()
    roles = jax.nn.one_hot(jnp.zeros((SHAPE.b, SHAPE.k, SHAPE.length), jnp.int32), 3)
    given = ((query, key, value, roles), end, dout)
    for x, y in zip(
        gradients(na.Sampled(0.2), *given, jax.random.key(0)), gradients(na.Visible(), *given, None), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", ["one", "padding"])
def test_one_stratum_a_run_gives_what_the_oracle_gives(documents):
    """With as many strata as runs every query is drawn once, with weight 1: the sampled path must be exact."""
    (query, key, value, roles), end, dout = problem(documents)
    almost_all = na.Sampled(0.999)  # rounds to all runs but is not the shortcut for a fraction of 1
    got = gradients(almost_all, (query, key, value, roles), end, dout, jax.random.key(0))

    def oracle(*primals):
        return reference.closed_form_attention(*primals, end, SHAPE.window, SHAPE.h**-0.5, True, False)

    for x, y in zip(got, jax.vjp(oracle, query, key, value, roles)[1](dout), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


def test_keys_of_both_kinds_can_be_given():
    given = problem()
    new = gradients(na.Sampled(0.25), *given, jax.random.key(7))
    old = gradients(na.Sampled(0.25), *given, jax.random.PRNGKey(7))
    np.testing.assert_array_equal(new[3], old[3])


def test_the_edges_of_many_strata_stay_in_range():
    """They come from a product beyond int32, as with 2 ** 21 queries in runs of 16 and an eighth of them."""
    length = 100_000
    rows = sampling.draw_rows(jax.random.key(0), length=length, fraction=0.5, run=1)
    queries = np.asarray(rows.queries)
    assert (np.diff(queries) > 0).all()
    assert queries[0] >= 0
    assert queries[-1] < length
    assert np.asarray(rows.weight, np.float64).sum() == length
