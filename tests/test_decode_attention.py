"""Attention of one token over a KV buffer: every backend against the dense oracle, and the buffer's formats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import relative_error
from decode_attention_oracle import Case, Shape, case_of, cast, expected_of, run
from jax.experimental.pallas import tpu as pltpu
from processes import run as run_process

from pallas_kernels import decode_attention as da
from pallas_kernels.decode_attention import cudnn, pallas_tpu, reference, xla
from pallas_kernels.decode_attention.storage import FORMATS


def weights_of(query, keys, is_read, sink):
    """Softmax weights ``[…, k, g, s]`` in float64, with a sink ``[k, g]`` in the denominator."""
    weights = np.exp(np.einsum("...kgh,...ksh->...kgs", query, keys) * query.shape[-1] ** -0.5)
    weights = np.where(is_read[..., None, :], weights, 0)
    return weights / (weights.sum(-1, keepdims=True) + np.exp(sink)[..., None])


@pytest.mark.parametrize("format", FORMATS)
def test_a_sink_is_one_more_logit_whose_value_is_zero(format):
    shape = Shape(1, 2, 2, 3, 60, 8, 20)
    case, sink = case_of(shape), np.random.default_rng(1).normal(size=6) * 3
    narrow = cast(case, np.float32)
    got = da.decode_attention(
        *narrow[:3],
        da.Storage.of(*narrow[3:5], format, 20),
        **{"key_end": case.key_end, "length": case.length, "position": case.position},
        sink=jnp.asarray(sink, jnp.float32),
    )
    keys, values = (
        np.concatenate([x[0], own[:, :, None]], 2) for x, own in ((case.keys, case.key), (case.values, case.value))
    )
    is_read = np.concatenate([case.position[:, None, None] < case.key_end[0], np.ones((2, 2, 1), bool)], -1)
    weights = weights_of(case.query.reshape(2, 2, 3, 8), keys, is_read, sink.reshape(2, 3))
    expected = np.einsum("bkgs,bksh->bkgh", weights, values).reshape(2, 6, 8)
    assert relative_error(got, expected) < 2e-5
    with pytest.raises(ValueError, match="sink has shape"):
        da.decode_attention(
            *narrow[:3],
            da.Storage.of(*narrow[3:5], format, 20),
            key_end=case.key_end,
            length=case.length,
            position=case.position,
            sink=jnp.zeros(5),
        )


def test_keys_receive_less_attention_beside_a_sink():
    rng = np.random.default_rng(0)
    query, sink = 3 * rng.normal(size=(2, 5, 6, 8)), 3 * rng.normal(size=6)
    key, value = rng.normal(size=(2, 2, 9, 2, 8))
    key_position = np.broadcast_to(np.arange(9), (2, 2, 9))
    query_position = np.broadcast_to(np.arange(3, 8), (2, 5))
    key_end = rng.integers(0, 14, (2, 2, 9))
    observed = rng.random((2, 5)) < 0.7
    out, received = da.observed_attention(
        *(jnp.asarray(x, jnp.float32) for x in (query, key, value)),
        key_end,
        query_position=query_position,
        key_position=key_position,
        observed=observed,
        sink=jnp.asarray(sink, jnp.float32),
    )
    at = query_position[:, :, None, None]
    is_read = (key_position[:, None] <= at) & (at < key_end[:, None])
    weights = weights_of(query.reshape(2, 5, 2, 3, 8), np.moveaxis(key, 1, 2)[:, None], is_read, sink.reshape(2, 3))
    expected = np.einsum("btkgs,bskh->btkgh", weights, value).reshape(2, 5, 6, 8)
    assert relative_error(out, expected) < 2e-5
    assert relative_error(received, np.einsum("btkgs,bt->bks", weights, observed)) < 2e-5


def interpreted(monkeypatch, interpret=True):
    """The TPU kernel runs here when it is named."""
    monkeypatch.setattr(pallas_tpu, "attend", functools.partial(pallas_tpu.attend, interpret=interpret))
    run.clear_cache()


SMALL = [Shape(2, 2, 2, 3, 60, 8, 20), Shape(1, 3, 1, 8, 128, 64, 128), Shape(3, 1, 4, 1, 24, 16, 8)]
# Heads side by side, head dim 128, one head, head dim 256.
WHOLE_REGISTERS = [
    Shape(2, 2, 4, 1, 512, 64, 128),
    Shape(1, 3, 3, 8, 384, 128, 128),
    Shape(1, 2, 1, 3, 512, 64, 256),
    Shape(1, 1, 5, 9, 256, 256, 128),
]
WIDE, ROUNDED = (np.float32, 2e-5), (jnp.bfloat16, 4e-3)
"""Dtype and tolerance; in bfloat16 the result is rounded by up to 2^-9, and so are weights, which are many."""


@pytest.mark.parametrize(
    ("implementation", "shape", "format", "accuracy", "interpret"),
    [
        *(("xla", shape, format, WIDE, None) for shape in SMALL for format in FORMATS),
        *(("pallas_tpu", shape, "packed", WIDE, True) for shape in WHOLE_REGISTERS),
        # Copies and semaphores as a TPU has them. The emulation starts with NaN in every buffer: a block that is read
        # before its copy has come would show, and so would one that no copy brings.
        *(
            (
                "pallas_tpu",
                Shape(1, 4, heads, 2, 384, 64, 128),
                "packed",
                WIDE,
                pltpu.InterpretParams(dma_execution_mode=mode),
            )
            for mode, heads in (("on_wait", 4), ("eager", 2), ("on_wait", 1))
        ),
        ("xla", Shape(1, 2, 2, 3, 256, 16, 128), "transposed", ROUNDED, None),
        ("xla", Shape(1, 2, 2, 3, 256, 64, 128), "packed", ROUNDED, None),
        ("pallas_tpu", Shape(1, 2, 2, 3, 256, 64, 128), "packed", ROUNDED, True),
    ],
)
def test_it_equals_the_oracle(implementation, shape, format, accuracy, interpret, monkeypatch):
    interpreted(monkeypatch, interpret)
    dtype, tolerance = accuracy
    case = cast(case_of(shape), dtype)
    for layer in range(shape.layers):
        got = run(case, layer, format, shape.u, implementation)
        assert got.dtype == dtype
        assert relative_error(got, expected_of(case, layer)) < tolerance


def test_a_wide_query_is_not_rounded_to_a_narrow_buffer(monkeypatch):
    shape = Shape(1, 2, 2, 3, 256, 64, 128)
    case = cast(case_of(shape), np.float32)
    keys, values = (x.astype(jnp.bfloat16) for x in (case.keys, case.values))
    case = case._replace(keys=keys, values=values)
    interpreted(monkeypatch)
    for implementation in ("xla", "pallas_tpu"):
        got = run(case, 0, "packed", shape.u, implementation)
        assert relative_error(got, expected_of(case, 0)) < 2e-5, implementation


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_what_no_slot_below_the_length_is_in_is_not_read(implementation, monkeypatch):
    """Blocks behind the longest prefix (of the head, on a TPU) can hold anything."""
    shape = Shape(1, 2, 2, 1, 512, 64, 128)
    case = cast(case_of(shape), np.float32)
    length = np.array([[[0, 200], [256, 129]]], np.int32)
    below = np.arange(shape.c) < length[..., None]
    case = case._replace(length=length, key_end=np.where(below, 4 * shape.c, 0).astype(np.int32))
    occupied = -(-length // shape.u) * shape.u if implementation == "pallas_tpu" else 256
    kept = (np.arange(shape.c) < np.broadcast_to(occupied, length.shape)[..., None])[..., None]
    broken = case._replace(keys=np.where(kept, case.keys, np.nan), values=np.where(kept, case.values, np.nan))
    interpreted(monkeypatch)
    got = run(broken, 0, "packed", shape.u, implementation)
    assert relative_error(got, expected_of(case, 0)) < 2e-5


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_tpu"])
def test_any_end_length_and_position(implementation, monkeypatch):
    """Lengths beyond the buffer, ends and positions at the edges of int32, sequences that read no slot at all."""
    interpreted(monkeypatch)
    shape = Shape(2, 2, 4, 1, 512, 64, 128)
    block = None if implementation == "reference" else shape.u
    rng = np.random.default_rng(0)
    edges = [-(2**31), -1, 0, 1, 600, 2**31 - 2, 2**31 - 1]
    for draw in range(4):
        case = cast(case_of(shape, draw), np.float32)
        length = rng.choice([-(2**31), -1, 0, 1, 128, 200, shape.c, shape.c + 1, 2**31 - 1], case.length.shape)
        position = rng.choice([-(2**31), -1, 0, 600, 2**31 - 1], case.position.shape)
        now = np.maximum(position, 0)[:, None, None]
        key_end = np.where(rng.random(case.key_end.shape) < 0.5, now + 9, rng.choice(edges, case.key_end.shape))
        key_end = np.where(np.arange(shape.c) < length[..., None], key_end, np.minimum(key_end, now))
        numbers = {"key_end": key_end, "length": length, "position": position}
        case = case._replace(**{name: x.clip(-(2**31), 2**31 - 1).astype(np.int32) for name, x in numbers.items()})
        for layer, counts_as in ((1, 1), (-3, 0), (2**31 - 1, 1)):
            got = run(case, layer, "packed" if block else "plain", block, implementation)
            assert relative_error(got, by_definition(case, counts_as)) < 2e-5, (draw, layer)


def by_definition(case: Case, layer: int):
    """Computes attention in NumPy and float64; a negative position counts as 0."""
    b, k, h = case.key.shape
    query, *arrays = (np.asarray(x, np.float64) for x in case[:3])
    keys, values = (
        np.concatenate([x[layer], own[:, :, None]], axis=2)
        for x, own in zip((case.keys, case.values), arrays, strict=True)
    )
    is_read = np.maximum(case.position, 0)[:, None, None] < case.key_end[layer]
    is_read = np.concatenate([is_read, np.ones((b, k, 1), bool)], axis=2)[:, :, None]
    logits = np.einsum("bkgh,bkch->bkgc", query.reshape(b, k, -1, h), keys) * h**-0.5
    weights = np.exp(np.where(is_read, logits - logits.max(-1, keepdims=True), -np.inf))
    return (np.einsum("bkgc,bkch->bkgh", weights, values) / weights.sum(-1, keepdims=True)).reshape(query.shape)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        (Shape(1, 1, 1, 1, 1, 1, 1), 1),
        (Shape(1, 2, 1, 2, 0, 4, 8), 0),
        (Shape(1, 0, 1, 2, 8, 4, 8), 1),
        (Shape(1, 2, 0, 2, 8, 4, 8), 1),
        (Shape(1, 2, 1, 0, 8, 4, 8), 1),
    ],
    ids=["one_slot", "no_slot", "no_sequence", "no_head", "no_query"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_the_smallest_buffers(shape, blocks, format):
    layers, b, k, g, c, h, u = shape
    width = {"transposed": (h, u), "plain": (u, h), "packed": (u, 2 * h)}[format]
    arrays = (jnp.zeros((layers, blocks, b, k, *width)), jnp.zeros((layers, blocks, b, k, u, h)))
    storage = da.Storage(arrays[:1] if format == "packed" else arrays, format)
    assert storage.shape == (layers, b, k, c, h)
    new = jnp.ones((b, k, h))
    numbers = {"key_end": jnp.zeros((layers, b, k, c), int), "length": jnp.zeros((layers, b, k), int)}
    out = da.decode_attention(
        jnp.ones((b, k * g, h)), new, 3 * new, storage, **numbers, position=jnp.zeros(b, int), implementation="xla"
    )
    np.testing.assert_array_equal(out, np.full((b, k * g, h), 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale=0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"layer": 2}, "layer=2: the buffer has layers 0 to 1"),
        ({"layer": -1}, "layer=-1"),
        ({"position": np.zeros(2, np.float32)}, "position has dtype float32"),
        ({"length": np.zeros((2, 2, 2), np.float32)}, "length has dtype float32"),
        ({"query": np.zeros((2, 4, 8), np.int32)}, "query has dtype int32"),
        ({"query": np.zeros((2, 3, 8), np.float32)}, "query"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_reason(change, message):
    case = cast(case_of(Shape(2, 2, 2, 2, 16, 8, 8)), np.float32)
    storage = da.Storage.of(jnp.asarray(case.keys), jnp.asarray(case.values), "plain", 16)
    call = case._asdict() | {"storage": storage} | change
    del call["keys"], call["values"]
    with pytest.raises(ValueError, match=message):
        da.decode_attention(**call)


def test_integers_beyond_int32_do_not_wrap_around():
    case = cast(case_of(Shape(1, 1, 1, 1, 8, 4, 8)), np.float32)
    case = case._replace(length=np.full((1, 1, 1), 2**40), key_end=np.full((1, 1, 1, 8), 2**40))
    np.testing.assert_allclose(run.__wrapped__(case, 0, "plain", 8, "xla"), by_definition(case, 0), rtol=1e-5)


def attend_of(module, case: Case, storage, layer=0, **options):
    b, k, _ = case.key.shape
    query = case.query.reshape(b, k, -1, case.query.shape[-1])
    numbers = (jnp.asarray(x) for x in (case.key_end, case.length, case.position, np.int32(layer)))
    return jax.jit(functools.partial(module.attend, scale=0.3, **options))(query, storage, *numbers)


@pytest.mark.parametrize(
    ("module", "format", "options"),
    [(xla, "plain", {}), (pallas_tpu, "packed", {"interpret": True}), (cudnn, "plain", {})],
)
def test_log_sum_exp_and_zeros_where_nothing_is_read(module, format, options, monkeypatch):
    """cuDNN's function is stood in for by jax's own of the same arguments: what is around it is tested."""
    stand_in_for_cudnn(monkeypatch)
    shape = Shape(2, 2, 2, 3, 256, 64, 128)
    case = cast(case_of(shape), np.float32)
    storage = da.Storage.of(jnp.asarray(case.keys), jnp.asarray(case.values), format, shape.u)
    for layer in range(shape.layers):
        out, lse = attend_of(module, case, storage, layer, **options)
        expected, expected_lse = attend_of(reference, case, storage, layer)
        assert out.dtype == lse.dtype == jnp.float32
        nothing = np.isneginf(expected_lse)
        assert nothing[0, 0].all()
        assert nothing.any(axis=-1).sum() == (2 if layer == 0 else 1)
        np.testing.assert_array_equal(np.isneginf(lse), nothing)
        assert not np.asarray(out)[nothing].any()
        np.testing.assert_allclose(out, expected, atol=2e-5)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


def stand_in_for_cudnn(monkeypatch):
    def call(query, keys, values, mask, length, scale):
        options = {"mask": mask, "key_value_seq_lengths": length, "scale": scale, "return_residual": True}
        out, lse = jax.nn.dot_product_attention(query, keys, values, **options, implementation="xla")
        return out, jnp.swapaxes(lse, 1, 2)

    monkeypatch.setattr(cudnn, "_call", call)


def cudnn_arguments():
    shape = Shape(1, 2, 2, 3, 256, 64, 256)
    case = cast(case_of(shape), jnp.bfloat16)
    return case, da.Storage.of(jnp.asarray(case.keys), jnp.asarray(case.values), "plain", shape.u)


def test_cudnn_is_asked_for_lengths_a_mask_and_a_float32_log_sum_exp(monkeypatch):
    monkeypatch.setattr(cudnn._library, "check_cudnn_version", lambda: 91200)
    case, storage = cudnn_arguments()
    b, k, _ = case.key.shape
    query = case.query.reshape(b, k, -1, case.query.shape[-1])
    numbers = (jnp.asarray(x) for x in (case.key_end, case.length, case.position, np.int32(0)))
    cudnn.check(storage)
    traced = jax.jit(functools.partial(cudnn.attend, scale=0.3)).trace(query, storage, *numbers)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert "PADDING" in call
    assert "fmhaScaleBiasSoftmax" in call
    assert "tensor<4x3x1xf32>" in call


def test_without_cudnn_the_reason_is_named():
    case, storage = cudnn_arguments()
    with pytest.raises(NotImplementedError, match="cuDNN"):
        attend_of(cudnn, case, storage)


def test_what_cudnn_cannot_serve_is_refused_with_the_reason(monkeypatch):
    for dtype, h, reason in ((np.float32, 64, "float32"), (jnp.bfloat16, 12, "head dim 12")):
        zeros = jnp.zeros((1, 1, 1, 128, h), dtype)
        with pytest.raises(NotImplementedError, match=reason):
            cudnn.check(da.Storage.of(zeros, zeros, "plain", 128))
    blocks = da.Storage((jnp.zeros((1, 2, 1, 1, 128, 64), jnp.bfloat16),) * 2, "plain")
    with pytest.raises(NotImplementedError, match="2 blocks"):
        cudnn.check(blocks)
    case, storage = cudnn_arguments()
    with pytest.raises(NotImplementedError, match="the query is float32"):
        attend_of(cudnn, case._replace(query=case.query.astype(np.float32)), storage)
    monkeypatch.setattr(cudnn, "_library", None)
    with pytest.raises(NotImplementedError, match="where it is looked for"):
        cudnn.check(storage)


@pytest.mark.parametrize(
    ("u", "h", "dtype", "reason"),
    [
        (128, 64, jnp.float16, "float16"),
        (128, 96, jnp.bfloat16, "head dim 96"),
        (64, 64, jnp.bfloat16, "blocks of 64 slots"),
        (1 << 16, 128, jnp.float32, "vector memory"),
    ],
)
def test_what_the_tpu_kernel_cannot_serve_is_refused_with_the_reason(u, h, dtype, reason):
    storage = da.Storage((jax.ShapeDtypeStruct((1, 1, 1, 1, u, 2 * h), dtype),), "packed")
    with pytest.raises(NotImplementedError, match=reason):
        pallas_tpu.check(storage)


def test_the_default_is_the_first_backend_that_can_serve():
    shape = Shape(1, 1, 1, 2, 16, 8, 8)
    case = cast(case_of(shape), np.float32)
    np.testing.assert_array_equal(run(case, 0, "transposed", 8, None), run(case, 0, "transposed", 8, "xla"))
    with pytest.raises(ValueError, match="implementation='fast'"):
        run(case, 0, "transposed", 8, "fast")
    with pytest.raises(NotImplementedError, match="pallas_tpu: the buffer is plain, it reads packed"):
        run(case, 0, "plain", 8, "pallas_tpu")


@pytest.mark.parametrize(("platform", "format"), [("cpu", "transposed"), ("tpu", "packed"), ("gpu", "plain")])
def test_every_platform_has_its_format(platform, format):
    assert da.storage_format(platform) == format


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda x: x[:, :3]),
        ("query", lambda x: x[..., :4]),
        ("key", lambda x: x[:1]),
        ("value", lambda x: x[..., :4]),
        ("key_end", lambda x: x[0]),
        ("length", lambda x: x[..., None]),
        ("position", lambda x: x[:1]),
    ],
)
def test_a_wrong_shape_is_named(name, change):
    case = case_of(Shape(2, 2, 2, 2, 16, 8, 8))
    with pytest.raises(ValueError, match=f"^{name} "):
        run(case._replace(**{name: change(getattr(case, name))}), 0, "plain", 16, None)


@pytest.mark.parametrize("format", FORMATS)
def test_storage_gives_back_what_it_holds(format):
    shape = Shape(2, 3, 2, 1, 24, 4, 8)
    case = case_of(shape)
    storage = da.Storage.of(jnp.asarray(case.keys), jnp.asarray(case.values), format, shape.u)
    u = shape.c if format == "plain" else shape.u
    assert storage.shape == (shape.layers, shape.b, shape.k, shape.c, shape.h)
    assert (storage.block_size, storage.num_blocks, storage.capacity) == (u, shape.c // u, shape.c)
    for layer in range(shape.layers):
        for got, expected in zip(storage.layer(layer), (case.keys, case.values), strict=True):
            np.testing.assert_array_equal(got, expected[layer].astype(np.float32))
        for number in range(storage.num_blocks):
            slots = slice(number * u, (number + 1) * u)
            keys, values = storage.block(layer, number)
            np.testing.assert_array_equal(keys, np.swapaxes(case.keys[layer, :, :, slots], -1, -2).astype(np.float32))
            np.testing.assert_array_equal(values, case.values[layer, :, :, slots].astype(np.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_put_writes_a_slot_of_every_head_and_nothing_outside(format):
    shape = Shape(2, 2, 2, 1, 24, 4, 8)
    case = cast(case_of(shape), np.float32)
    storage = da.Storage.of(jnp.asarray(case.keys), jnp.asarray(case.values), format, shape.u)
    slot = np.array([[[0, 23], [7, 8]], [[-1, 24], [1000, 15]]], np.int32)
    key, value = np.random.default_rng(1).normal(size=(2, shape.layers, shape.b, shape.k, shape.h)).astype(np.float32)
    written = jax.jit(da.Storage.put)(storage, slot, key, value)
    keys, values = case.keys.copy(), case.values.copy()
    for at in np.ndindex(slot.shape):
        if 0 <= slot[at] < shape.c:
            keys[*at, slot[at]], values[*at, slot[at]] = key[at], value[at]
    for layer in range(shape.layers):
        for got, expected in zip(written.layer(layer), (keys, values), strict=True):
            np.testing.assert_array_equal(got, expected[layer])


def test_storage_refuses_slots_that_fill_no_block():
    zeros = jnp.zeros((1, 1, 1, 20, 4))
    with pytest.raises(ValueError, match="20 slots"):
        da.Storage.of(zeros, zeros, "packed", 8)


def test_four_devices_give_what_one_gives():
    done = run_process(__file__, devices=4)
    assert (done.returncode, done.stdout) == (0, "4 devices\n"), done.stderr


def main():
    """Batch and heads divided, inside ``jax.shard_map``."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shape = Shape(2, 2, 4, 2, 256, 64, 128)
    case = cast(case_of(shape), np.float32)
    row, slots = jax.P("data", "tensor"), jax.P(None, "data", "tensor")
    pallas_tpu.attend = functools.partial(pallas_tpu.attend, interpret=True)

    for format, implementation in (("transposed", "xla"), ("packed", "xla"), ("packed", "pallas_tpu")):

        def attend(query, key, value, storage, key_end, length, position, implementation=implementation):
            numbers = {"key_end": key_end, "length": length, "position": position}
            return da.decode_attention(query, key, value, storage, **numbers, layer=1, implementation=implementation)

        blocks = jax.P(None, None, "data", "tensor")
        specs = (row, row, row, blocks, slots, slots, jax.P("data"))
        storage = da.Storage.of(jnp.asarray(case.keys), jnp.asarray(case.values), format, shape.u)
        # The interpreter forgets along which axes arrays vary; what the kernel says is checked when it is compiled.
        checked = implementation != "pallas_tpu"
        sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=row, check_vma=checked))
        got = sharded(*case[:3], storage, *case[5:])
        error = relative_error(got, expected_of(case, 1))
        assert error < 2e-5, f"{format} {implementation}: {error}"
    print(f"{jax.device_count()} devices")


if __name__ == "__main__":
    main()
