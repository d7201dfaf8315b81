"""The TPU backend in Pallas' interpreter: values and every gradient against the dense oracle in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import DOCUMENTS, compiled, inputs, nats, oracle, relative_error, sampled
from cases import ROLE_PATTERNS, Shape, document_ends, role_ids
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import pallas_tpu
from pallas_kernels.nats_attention.pallas_tpu import TpuTiling
from pallas_kernels.nats_attention.tiling import Problem

IN_PLACE = TpuTiling(query_block=128, key_block=128, interpret=True)
GATHERED = TpuTiling(query_block=128, key_block=128, thresholds=(128,), interpret=True)
WIDE_KEYS = TpuTiling(query_block=128, key_block=256, thresholds=(256,), interpret=True)
HIGH_ROWS = TpuTiling(query_block=256, key_block=128, interpret=True)
SHAPE = Shape(1, 517, 1, 2, 64, 5)


def attention(window, tiling, **options):
    return nats(window, implementation="pallas_tpu", tiling=tiling, **options)


@pytest.mark.parametrize(
    ("shape", "tiling", "mask_gradient"),
    [
        (SHAPE, GATHERED, "exact"),
        (Shape(2, 301, 2, 1, 128, 40), HIGH_ROWS, "exact"),
        (Shape(1, 385, 1, 3, 32, 1), WIDE_KEYS, "visible"),
    ],
    ids=["head_dim_64", "head_dim_128", "head_dim_32_padded"],
)
def test_pallas_tpu_equals_the_oracle(shape, tiling, mask_gradient):
    rng = np.random.default_rng(2)
    q, k, v, weight = inputs(shape, spread=3.0)
    # The key of token 0 ends long before the last query, for which its logit would be by far the largest.
    loud = k.at[:, 0].set(100 * jnp.sign(q[:, -1, :: shape.g]))
    cases = [(*case, k) for case in itertools.product(ROLE_PATTERNS, DOCUMENTS)]
    for pattern, documents, key in [*cases, ("all_sliding", "one", loud), ("random", "one", loud)]:
        end = document_ends(documents, shape, rng)
        if end is None:  # spelled out, so that it is not another compilation
            end = np.full((shape.b, shape.length), shape.length, np.int32)
        arguments = (q, key, v, jax.nn.one_hot(role_ids(pattern, shape, rng), 3), end, weight)
        got = compiled(attention(shape.window, tiling, mask_gradient=mask_gradient), *arguments)
        expected = oracle(shape.window, arguments, mask_gradient)
        for x, y in zip(got, expected, strict=True):
            assert relative_error(x, y) < (2e-5 if key is k else 1e-4), f"{pattern} {documents}"


def test_sampled_rows_give_what_xla_gives_for_the_same_draw():
    shape, rng = SHAPE, np.random.default_rng(3)
    q, k, v, weight = inputs(shape, spread=3.0)
    for pattern in ROLE_PATTERNS:
        arguments = (q, k, v, jax.nn.one_hot(role_ids(pattern, shape, rng), 3), None, weight)
        got = compiled(sampled(shape.window, 1 / 3, 7, implementation="pallas_tpu", tiling=GATHERED), *arguments)
        expected = compiled(sampled(shape.window, 1 / 3, 7, implementation="xla"), *arguments)
        for x, y in zip(got, expected, strict=True):
            assert relative_error(x, y) < 2e-5, pattern


def test_bfloat16_is_close_and_keeps_dtypes():
    shape, rng = SHAPE, np.random.default_rng(4)
    narrow = inputs(shape, dtype=jnp.bfloat16)
    roles = jax.nn.one_hot(role_ids("random", shape, rng), 3)
    got = compiled(attention(shape.window, GATHERED), *narrow[:3], roles, None, narrow[3])
    assert [x.dtype for x in got] == [jnp.bfloat16] * 4 + [jnp.float32]
    wide = [x.astype(jnp.float32) for x in narrow]
    expected = compiled(nats(shape.window, implementation="reference"), *wide[:3], roles, None, wide[3])
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y) < 3e-2


def test_copies_and_semaphores_as_a_tpu_has_them():
    """The emulation starts with NaN in every buffer: a tile that is read before its copy has come would show."""
    shape, rng = SHAPE._replace(length=300), np.random.default_rng(6)
    q, k, v, weight = inputs(shape)
    end = na.key_end_from_roles(role_ids("random", shape, rng), window=shape.window)

    def run(implementation, tiling):
        def loss(*arrays):
            out = na.interval_attention(*arrays, end, implementation=implementation, tiling=tiling)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    emulated = TpuTiling(query_block=128, key_block=128, interpret=pltpu.InterpretParams())
    for x, y in zip(jax.tree.leaves(run("pallas_tpu", emulated)), jax.tree.leaves(run("xla", None)), strict=True):
        assert relative_error(x, y) < 2e-5


PROBLEM = Problem(batch=1, queries=4096, keys=4096, num_kv_heads=2, group=4, head_dim=64, window=64, dtype="bfloat16")


@pytest.mark.parametrize("change", [{}, {"group": 1}, {"group": 32}, {"head_dim": 256}, {"queries": 1}, {"keys": 7}])
def test_every_tiling_that_it_proposes_is_served(change):
    problem = PROBLEM._replace(**change)
    tilings = [pallas_tpu.default_tiling(problem), *pallas_tpu.candidate_tilings(problem)]
    for tiling in tilings:
        pallas_tpu.check(problem, tiling)
