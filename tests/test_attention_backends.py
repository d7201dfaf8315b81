"""Every backend of the attention: values and every gradient against the dense oracle in float64.

The oracle gets the rounded numbers that the backend gets. What needs a device runs in Pallas' interpreters, and is
compiled by the aot tests. The GPU's takes seconds for a kernel, so its shapes are few and small.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import (
    BACKENDS,
    DOCUMENTS,
    GPU_GATHERED,
    GPU_IN_PLACE,
    PROBLEM,
    TPU_GATHERED,
    arguments_of,
    compiled,
    gpu_interpreter,
    inputs,
    nats,
    oracle,
    relative_error,
    sampled,
)
from cases import ROLE_PATTERNS, SHAPES, Shape, pairs_of, role_ids
from jax.experimental.pallas import tpu as pltpu
from processes import SLOW

from pallas_kernels import nats_attention as na
from pallas_kernels.nats_attention import pallas_gpu, pallas_tpu
from pallas_kernels.nats_attention.pallas_tpu import TpuTiling

GPU_SHAPE = Shape(1, 131, 1, 2, 64, 5)
TPU_SHAPE = Shape(1, 517, 1, 2, 64, 5)
TPU_CASES = [
    (TPU_SHAPE, TPU_GATHERED, "exact"),
    (Shape(2, 301, 2, 1, 128, 40), TpuTiling(query_block=256, key_block=128, interpret=True), "exact"),
    (
        Shape(1, 385, 1, 3, 32, 1),
        TpuTiling(query_block=128, key_block=256, thresholds=(256,), interpret=True),
        "visible",
    ),
]
EVERY = [[case] for case in pairs_of(ROLE_PATTERNS, DOCUMENTS, every=True)]
MANY = [[case] for case in pairs_of(ROLE_PATTERNS, DOCUMENTS, every=SLOW)]
# Few compilations.
WHOLE = [[case] for case in pairs_of(ROLE_PATTERNS, ("whole", "packed", "padding"), every=SLOW)]


LADDERS = [[case] for case in (("random", "packed"), ("bursts", "padding"), ("no_global", "whole"))]


def larger(*values):
    return pytest.param(*values, marks=pytest.mark.larger)


def on_gpu(*values):
    return pytest.param("pallas_gpu", *values, marks=gpu_interpreter)


@pytest.mark.parametrize(
    ("implementation", "shape", "tiling", "mask_gradient", "calls"),
    [
        *(
            ("xla", SHAPES[name], None, mask_gradient, EVERY)
            for name in ("one_token", "tiny", "grouped", "no_window", "ladder")
            for mask_gradient in ("exact", "visible")
        ),
        larger("xla", SHAPES["two_blocks"], None, "exact", MANY),
        larger("xla", SHAPES["two_blocks"], None, "visible", MANY),
        *(larger("pallas_tpu", *case, WHOLE) for case in TPU_CASES),
        larger("xla", SHAPES["two_blocks"]._replace(window=(1, 40, 150)), None, "exact", MANY),
        ("pallas_tpu", TPU_SHAPE._replace(window=(5, 140)), TPU_GATHERED, "exact", LADDERS),
        on_gpu(GPU_SHAPE._replace(g=1, window=(2, 70)), GPU_IN_PLACE, "exact", [[("random", "whole")]]),
        on_gpu(
            GPU_SHAPE,
            GPU_IN_PLACE,
            "exact",
            [[("random", "whole"), ("all_global", "packed"), ("no_global", "padding"), ("all_sliding", "whole")]],
        ),
        on_gpu(GPU_SHAPE._replace(g=1, k=2), GPU_IN_PLACE, "visible", [[("bursts", "padding")]]),
        # The last rows have hidden keys that have come to every end: plain tiles.
        on_gpu(Shape(1, 301, 1, 1, 128, 5), GPU_GATHERED, "exact", [[("random", "whole")]]),
    ],
)
def test_it_equals_the_oracle(implementation, shape, tiling, mask_gradient, calls):
    backend, rng = BACKENDS[implementation], np.random.default_rng(2)
    attention = nats(shape.window, mask_gradient=mask_gradient, implementation=implementation, tiling=tiling)
    for patterns in calls:
        arguments = arguments_of(shape, patterns, rng, dtype=backend.dtype, spread=backend.spread)
        got, expected = compiled(attention, *arguments), oracle(shape.window, arguments, mask_gradient)
        assert [x.dtype for x in got] == [backend.dtype] * 4 + [jnp.float32]
        for x, y in zip(got, expected, strict=True):
            for number, pattern in enumerate(patterns):
                part = slice(number * shape.b, (number + 1) * shape.b)
                assert relative_error(x[part], y[part]) < backend.tolerance, pattern


@pytest.mark.parametrize(
    ("implementation", "shape", "tiling", "mask_gradient", "roles"),
    [
        ("xla", SHAPES["grouped"], None, "exact", ["all_sliding"]),
        *(("pallas_tpu", *case, ["all_sliding", "random"]) for case in TPU_CASES),
        on_gpu(GPU_SHAPE._replace(g=1), GPU_IN_PLACE, "exact", ["all_sliding"]),
    ],
)
def test_large_logits_among_masked_out_keys_do_not_underflow_the_visible_ones(
    implementation, shape, tiling, mask_gradient, roles
):
    """The key of token 0 ends long before the last query, for which its logit would be by far the largest."""
    backend, rng = BACKENDS[implementation], np.random.default_rng(2)
    attention = nats(shape.window, mask_gradient=mask_gradient, implementation=implementation, tiling=tiling)
    for pattern in roles:
        spread = 3.0 if implementation == "pallas_tpu" else 1.0
        q, k, *others = arguments_of(shape, [(pattern, "whole")], rng, dtype=backend.dtype, spread=spread)
        k = k.at[:, 0].set(backend.loud * jnp.sign(q[:, -1, :: shape.g]))
        assert (jnp.argmax(jnp.abs(jnp.einsum("bnh,bskh->bs", q[:, -1], k)), -1) == 0).all()
        arguments = (q, k, *others)
        expected = oracle(shape.window, arguments, mask_gradient)
        if implementation == "pallas_gpu":  # gradients of the queries that read it are differences of rounded numbers
            got = [jax.jit(attention)(*arguments[:5])]
            assert np.isfinite(np.asarray(got[0], np.float32)).all()
        else:
            got = compiled(attention, *arguments)
            for x, y in zip(got, expected, strict=True):
                assert relative_error(x, y) < backend.loud_tolerance, pattern
        assert relative_error(got[0][:, -1], expected[0][:, -1]) < backend.loud_tolerance
        if implementation == "xla":
            np.testing.assert_allclose(got[0][:, -1], expected[0][:, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "shape", "tiling", "fraction", "patterns"),
    [
        ("pallas_tpu", TPU_SHAPE, TPU_GATHERED, 1 / 3, [(roles, "one") for roles in ROLE_PATTERNS]),
        ("pallas_tpu", TPU_SHAPE._replace(window=(5, 140)), TPU_GATHERED, 1 / 3, [("random", "one")]),
        on_gpu(GPU_SHAPE._replace(g=1), GPU_IN_PLACE, 1 / 4, [("random", "packed")]),
    ],
)
def test_sampled_rows_give_what_xla_gives_for_the_same_draw(implementation, shape, tiling, fraction, patterns):
    backend, rng = BACKENDS[implementation], np.random.default_rng(3)
    for pattern in patterns:
        arguments = arguments_of(shape, [pattern], rng, dtype=backend.dtype, spread=backend.spread)
        got = compiled(sampled(shape.window, fraction, 7, implementation=implementation, tiling=tiling), *arguments)
        wide = [x.astype(jnp.float32) if x is not None and x.dtype == jnp.bfloat16 else x for x in arguments]
        assert [x.dtype for x in got] == [backend.dtype] * 4 + [jnp.float32]
        for x, y in zip(got, compiled(sampled(shape.window, fraction, 7, implementation="xla"), *wide), strict=True):
            assert relative_error(x, y) < backend.tolerance, pattern


@pytest.mark.parametrize(
    ("shape", "options"),
    [(SHAPES["grouped"], {}), (TPU_SHAPE, {"implementation": "pallas_tpu", "tiling": TPU_GATHERED})],
)
def test_bfloat16_is_close_and_keeps_dtypes(shape, options):
    arguments = arguments_of(shape, [("random", "one")], np.random.default_rng(3), dtype=jnp.bfloat16)
    got = compiled(nats(shape.window, **options), *arguments)
    assert [x.dtype for x in got] == [jnp.bfloat16] * 4 + [jnp.float32]
    for x, y in zip(got, oracle(shape.window, arguments), strict=True):
        assert relative_error(x, y) < 3e-2


def test_copies_and_semaphores_as_a_tpu_has_them():
    """The emulation starts with NaN in every buffer: a tile that is read before its copy has come would show."""
    shape, rng = TPU_SHAPE._replace(length=300), np.random.default_rng(6)
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


@pytest.mark.parametrize("change", [{}, {"group": 1}, {"group": 32}, {"head_dim": 256}, {"queries": 1}, {"keys": 7}])
def test_every_tiling_for_a_tpu_that_is_proposed_is_served(change):
    problem = PROBLEM._replace(**change)
    for tiling in [pallas_tpu.default_tiling(problem), *pallas_tpu.candidate_tilings(problem)]:
        pallas_tpu.check(problem, tiling)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_default_tiling_for_a_gpu_is_among_those_that_are_proposed(head_dim):
    tilings = pallas_gpu.candidate_tilings(PROBLEM._replace(head_dim=head_dim))
    assert pallas_gpu.default_tiling(PROBLEM._replace(head_dim=head_dim)) in tilings
    assert all(tiling.thresholds == (128,) for tiling in tilings)


@gpu_interpreter
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
