"""The attention: the oracle against the relaxed mask, causality and lifetimes, what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import DOCUMENTS, compiled, inputs
from cases import ROLE_PATTERNS, SHAPES, Shape, document_ends, role_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import reference


@functools.cache
def relaxed(window):
    return lambda q, k, v, roles, end: reference.relaxed_attention(q, k, v, roles, window=window, document_end=end)


@functools.cache
def closed_form_without_clip(window):
    return lambda q, k, v, roles, end: reference.closed_form_attention(
        q, k, v, roles, end, window, q.shape[-1] ** -0.5, False
    )


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", ["one_token", "tiny", "grouped", "no_window", "wide_window", "ladder"])
def test_closed_form_equals_autodiff_of_the_relaxed_mask(x64, name):
    shape, rng = SHAPES[name], np.random.default_rng(1)
    q, k, v, weight = inputs(shape, dtype=jnp.float64)
    for pattern, documents in itertools.product(ROLE_PATTERNS, DOCUMENTS):
        roles = jax.nn.one_hot(role_ids(pattern, shape, rng), shape.num_roles, dtype=jnp.float64)
        end = document_ends(documents, shape, rng)
        arguments = (q, k, v, roles, end, weight)
        for got, expected in zip(
            compiled(closed_form_without_clip(shape.window), *arguments),
            compiled(relaxed(shape.window), *arguments),
            strict=True,
        ):
            np.testing.assert_allclose(
                got, expected, rtol=1e-9, atol=1e-11 * (1 + np.abs(expected).max()), err_msg=f"{pattern} {documents}"
            )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 17, 40]),  # few shapes: each is compiled anew
    st.one_of(st.integers(0, 9), st.sets(st.integers(0, 9), min_size=2, max_size=4).map(lambda x: tuple(sorted(x)))),
    st.integers(0, 2**31),
    st.sampled_from(["one", "packed", "padding"]),
)
def test_key_end_is_the_definition(length, window, seed, documents):
    shape = Shape(2, length, 2, 1, 4, window)
    rng = np.random.default_rng(seed)
    ids, end = role_ids("random", shape, rng), document_ends(documents, shape, rng)
    got = np.asarray(
        na.key_end_from_roles(jnp.asarray(ids), window=window, document_end=None if end is None else jnp.asarray(end))
    )
    for b, k, s in np.ndindex(ids.shape):
        following = [u for u in range(s + 1, length) if ids[b, k, u] == na.GLOBAL]
        windows = window if isinstance(window, tuple) else (window,)
        expected = [na.NO_END, following[0] + 1 if following else na.NO_END, *(s + x + 1 for x in windows)][
            ids[b, k, s]
        ]
        assert got[b, k, s] == (expected if end is None else min(expected, end[b, s]))


def test_a_window_beyond_int32_keeps_every_key():
    end = na.key_end_from_roles(jnp.full((1, 1, 6), na.SLIDING), window=na.NO_END)
    assert (np.asarray(end) > 6).all()
    shape = SHAPES["tiny"]
    q, k, v, _ = inputs(shape)
    roles = jax.nn.one_hot(jnp.full((shape.b, shape.k, shape.length), na.SLIDING), 3)
    out, expected = (na.nats_attention(q, k, v, roles, window=window) for window in (na.NO_END, shape.length))
    np.testing.assert_array_equal(out, expected)


def test_gradients_reach_exactly_the_keys_that_live():
    """Causality and lifetimes: the output of query t depends on the value at s iff s <= t < key_end[s]."""
    shape, rng = SHAPES["grouped"], np.random.default_rng(4)
    q, k, v, _ = inputs(shape)
    ids = jnp.asarray(role_ids("random", shape, rng))

    def per_query(v, end):
        out = na.nats_attention(q, k, v, jax.nn.one_hot(ids, 3), window=shape.window, document_end=end)
        out = out.reshape(shape.b, shape.length, shape.k, shape.g, shape.h)
        return jnp.abs(out).sum((0, 3, 4))  # [t, k]

    jacobian_of = jax.jit(jax.jacrev(per_query))
    t, s = np.arange(shape.length)[:, None], np.arange(shape.length)[None, :]
    for documents in DOCUMENTS:
        end = document_ends(documents, shape, rng)
        if end is None:  # spelled out, so that it is not another compilation
            end = np.full((shape.b, shape.length), shape.length, np.int32)
        jacobian = np.abs(jacobian_of(v, end)).sum(-1)  # [t, k, b, s, k']
        key_end = np.asarray(na.key_end_from_roles(ids, window=shape.window, document_end=end))
        for b, head in np.ndindex(shape.b, shape.k):
            visible = (s <= t) & (t < key_end[b, head][None, :])
            np.testing.assert_array_equal(jacobian[:, head, b, :, head] > 0, visible)
            np.testing.assert_array_equal(jacobian[:, head, b, :, 1 - head], 0)


def test_no_array_of_size_length_squared():
    """The compiled forward and backward hold no L×L array, and their memory grows linearly."""

    def memory(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        roles = jax.ShapeDtypeStruct((1, 2, length, 3), jnp.float32)

        def loss(q, k, v, roles):
            return na.nats_attention(q, k, v, roles, window=4).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, q, q, roles).compile()
        assert f"{length},{length}]" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = memory(2048), memory(8192)
    assert large < 4.5 * small


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roles": jnp.zeros((1, 1, 6, 3))}, "roles"),
        ({"value": jnp.zeros((2, 6, 1, 3))}, "value"),
        ({"window": -1}, "window=-1"),
        ({"window": ()}, r"window=\(\)"),
        ({"window": (2, 1)}, r"window=\(2, 1\): .* in ascending order"),
        ({"window": (1, 2)}, r"roles has shape \(2, 1, 6, 3\); \(2, 1, 6, 4\)"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"mask_gradient": "exakt"}, "exakt"),
        ({"mask_gradient": na.Visible}, "Visible"),
        ({"mask_gradient": None}, "None"),
        ({"implementation": "cuda"}, "cuda"),
        ({"document_end": jnp.zeros((1, 6), jnp.int32)}, "document_end"),
        ({"mask_gradient": "sampled"}, "sample_key"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    shape = SHAPES["tiny"]
    q, k, v, _ = inputs(shape)
    arguments = {"value": v, "roles": jnp.zeros((2, 1, 6, 3)), "window": 1} | change
    with pytest.raises(ValueError, match=message):
        na.nats_attention(q, k, **arguments)


def test_a_call_that_no_backend_serves_says_all_reasons(monkeypatch):
    def refuse(problem, tiling):
        raise NotImplementedError("not on a Tuesday")

    monkeypatch.setattr(na.api.xla, "check", refuse)
    shape = SHAPES["tiny"]
    q, k, v, _ = inputs(shape)
    with pytest.raises(NotImplementedError, match=r"no backend.*xla: not on a Tuesday"):
        na.nats_attention(q, k, v, jnp.zeros((2, 1, 6, 3)), window=1)
    with pytest.raises(NotImplementedError, match="xla: not on a Tuesday"):
        na.interval_attention(q, k, v, jnp.zeros((2, 1, 6), jnp.int32), implementation="xla")
