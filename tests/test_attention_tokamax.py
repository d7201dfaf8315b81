"""An oracle that is not ours: tokamax's attention, whose ``Mask(q_end=…)`` is exactly ``key_end`` (Python >= 3.12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ROLE_PATTERNS, SHAPES, document_ends, role_ids

from pallas_kernels import nats_attention as na

attention = pytest.importorskip("tokamax._src.ops.attention.api", reason="tokamax needs Python 3.12")
base = pytest.importorskip("tokamax._src.ops.attention.base")


@pytest.mark.parametrize("documents", ["one", "packed"])
@pytest.mark.parametrize("name", ["tiny", "grouped", "wide_window", "two_blocks"])
def test_forward_and_gradients_equal_tokamax(name, documents):
    shape, rng = SHAPES[name], np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(shape.b, shape.length, shape.k * shape.g, shape.h)), jnp.float32)
    key, value = jnp.asarray(rng.normal(size=(2, shape.b, shape.length, shape.k, shape.h)), jnp.float32)
    dout = jnp.asarray(rng.normal(size=query.shape), jnp.float32)

    @jax.jit
    def both(key_end):
        def theirs(*primals):
            mask = base.Mask(q_end=jnp.repeat(key_end, shape.g, axis=1), is_causal=True)
            return attention.IMPLEMENTATIONS["xla"](*primals, mask=mask)

        def ours(*primals):
            return na.interval_attention(*primals, key_end)

        results = []
        for attend in (theirs, ours):
            out, pullback = jax.vjp(attend, query, key, value)
            results.append((out, *pullback(dout)))
        return results

    for pattern in ROLE_PATTERNS:
        ids, end = role_ids(pattern, shape, rng), document_ends(documents, shape, rng)
        key_end = na.key_end_from_roles(
            jnp.asarray(ids), window=shape.window, document_end=None if end is None else jnp.asarray(end)
        )
        for x, y in zip(*both(key_end), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=pattern)
