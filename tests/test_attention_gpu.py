"""The Hopper backend in Pallas' GPU interpreter: values and every gradient against the dense oracle in float64.

The inputs are bfloat16, and the oracle gets the same rounded numbers: what is left is the rounding of the weights, of
the gradients of the logits and of the results. The interpreter takes seconds for a kernel, so shapes are few and small;
``test_attention_gpu_aot`` compiles what is run here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import compiled, inputs, nats, oracle, relative_error, sampled
from cases import Shape, document_ends, role_ids

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import pallas_gpu
from pallas_kernels.nats_attention.pallas_gpu import GpuTiling
from pallas_kernels.nats_attention.tiling import Problem

interpreted = pytest.mark.skipif(
    jax.__version_info__[:2] < (0, 11), reason=f"the GPU interpreter needs jax >= 0.11; this is {jax.__version__}"
)

IN_PLACE = GpuTiling(interpret=True)
GATHERED = GpuTiling(columns=64, rows=64, thresholds=(128,), interpret=True)
TWO_BLOCKS = Shape(1, 131, 1, 2, 64, 5)
THREE_BLOCKS = Shape(1, 301, 1, 1, 128, 5)  # the last rows have hidden keys that have come to every end: plain tiles
TOLERANCE = 1e-2


def attention(window, tiling=IN_PLACE, **options):
    return nats(window, implementation="pallas_gpu", tiling=tiling, **options)


def problem_of(shape, *patterns, seed=2, spread=2.0):
    """``(q, k, v, roles, document_end, weight)``, a sequence for each (roles, documents) of ``patterns``.

    They share a call, because what takes time in the interpreter is each kernel anew.
    """
    rng = np.random.default_rng(seed)
    q, k, v, weight = inputs(shape._replace(b=len(patterns)), spread=spread, dtype=jnp.bfloat16)
    ids, ends = [], []
    for pattern, documents in patterns:
        ids.append(role_ids(pattern, shape, rng))
        end = document_ends(documents, shape, rng)
        ends.append(np.full((1, shape.length), shape.length, np.int32) if end is None else end)
    return q, k, v, jax.nn.one_hot(np.concatenate(ids), 3), np.concatenate(ends), weight


def assert_close(got, expected):
    assert [x.dtype for x in got] == [jnp.bfloat16] * 4 + [jnp.float32]
    for x, y in zip(got, expected, strict=True):
        for sequence in range(len(x)):
            assert relative_error(x[sequence], y[sequence]) < TOLERANCE, sequence


@interpreted
@pytest.mark.parametrize(
    ("shape", "tiling", "patterns", "mask_gradient"),
    [
        (
            TWO_BLOCKS,
            IN_PLACE,
            [("random", "one"), ("all_global", "packed"), ("no_global", "padding"), ("all_sliding", "one")],
            "exact",
        ),
        (TWO_BLOCKS._replace(g=1, k=2), IN_PLACE, [("bursts", "padding")], "visible"),
        (THREE_BLOCKS, GATHERED, [("random", "one")], "exact"),
    ],
    ids=["head_dim_64", "visible", "head_dim_128_gathered"],
)
def test_pallas_gpu_equals_the_oracle(shape, tiling, patterns, mask_gradient):
    arguments = problem_of(shape, *patterns)
    got = compiled(attention(shape.window, tiling, mask_gradient=mask_gradient), *arguments)
    assert_close(got, oracle(shape.window, arguments, mask_gradient))


@interpreted
def test_sampled_rows_give_what_xla_gives_for_the_same_draw():
    shape = TWO_BLOCKS._replace(g=1)
    arguments = problem_of(shape, ("random", "packed"))
    got = compiled(sampled(shape.window, 1 / 4, 7, implementation="pallas_gpu", tiling=IN_PLACE), *arguments)
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arguments]
    assert_close(got, compiled(sampled(shape.window, 1 / 4, 7, implementation="xla"), *wide))


@interpreted
def test_large_logits_among_masked_out_keys_do_not_underflow_the_visible_ones():
    shape = TWO_BLOCKS._replace(g=1)
    q, k, v, _, _, _ = problem_of(shape, ("all_sliding", "one"), spread=1.0)
    k = k.at[:, 0].set(400 * jnp.sign(q[:, -1]))  # key 0 ended long before the last query
    key_end = jnp.arange(shape.length)[None, None] + 6

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(implementation, tiling):
        return na.interval_attention(q, k, v, key_end, implementation=implementation, tiling=tiling)

    got = run("pallas_gpu", IN_PLACE)
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert relative_error(got[:, -1], run("xla", None)[:, -1]) < TOLERANCE


PROBLEM = Problem(batch=1, queries=4096, keys=4096, num_kv_heads=2, group=4, head_dim=64, window=64, dtype="bfloat16")


@interpreted
def test_ahead_of_time_the_mesh_says_which_gpu_it_is():
    def check(name):
        device = jax.sharding.AbstractDevice(name, None, "gpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
            pallas_gpu.check(PROBLEM, pallas_gpu.default_tiling(PROBLEM))

    check("NVIDIA H100 80GB HBM3")
    check("NVIDIA GH200 480GB")
    with pytest.raises(NotImplementedError, match="A100"):
        check("NVIDIA A100-SXM4-80GB")


@pytest.mark.skipif(jax.__version_info__[:2] >= (0, 11), reason="this jax is new enough")
def test_an_old_jax_is_refused_with_the_version_that_is_needed():
    with pytest.raises(NotImplementedError, match=r"jax >= 0\.11"):
        pallas_gpu.check(PROBLEM, pallas_gpu.default_tiling(PROBLEM))


def test_every_tiling_that_it_proposes_fits_into_shared_memory():
    for head_dim in (64, 128):
        tilings = pallas_gpu.candidate_tilings(PROBLEM._replace(head_dim=head_dim))
        assert pallas_gpu.default_tiling(PROBLEM._replace(head_dim=head_dim)) in tilings
        assert all(tiling.thresholds == (128,) for tiling in tilings)
