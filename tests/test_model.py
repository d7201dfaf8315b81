"""The transformer: causality by gradients, packing, roles under rematerialization, initialization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from natsjax.model import attention, layers, transformer
from natsjax.model.attention import MaskedAttention, RoleSampling
from natsjax.model.inputs import Batch
from natsjax.model.roles import GLOBAL, role_bias_logits
from natsjax.train import losses
from pallas_kernels.nats_attention import NO_END, key_end_from_roles


def build(config, seed=0):
    return transformer.init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def forward(structure, parameters, inputs, choice=None):
    return nnx.merge(structure, parameters)(inputs, choice)


@pytest.mark.parametrize("attention", ["nats", "dense"])
def test_logits_depend_on_earlier_tokens_of_the_same_document_only(attention):
    config = tiny.config(model={"layer_types": attention, "num_layers": 1})
    structure, parameters = build(config)
    batch = tiny.packed_batch()
    inputs = Batch.from_rows(batch)
    _, roles = forward(structure, parameters, inputs)

    def per_query(embedded):  # the only block, on embedded tokens: those have a gradient
        blocks = nnx.merge(structure, parameters).blocks
        block = jax.tree.map(lambda p: p[0], nnx.state(blocks))
        attend = MaskedAttention(inputs, RoleSampling(), attention)
        out, _ = nnx.merge(nnx.graphdef(blocks), block)(embedded, inputs.positions, attend)
        return jnp.abs(out).sum((0, 2))

    embedded = parameters["embedding"][inputs.inputs] * config.model.embed_dim**0.5
    jacobian = np.abs(jax.jit(jax.jacrev(per_query))(embedded)).sum(-1)  # [t, b, s]
    length = inputs.inputs.shape[1]
    t, s = np.arange(length)[:, None], np.arange(length)[None, :]
    for b in range(inputs.inputs.shape[0]):
        if attention == "nats":
            key_end = key_end_from_roles(
                roles.ids[0, b : b + 1].astype(jnp.int32),
                window=config.nats.window,
                document_end=inputs.document_end[b : b + 1],
            )
            alive = (t < np.asarray(key_end)[0, :, None, :]).any(0)
        else:
            alive = t < inputs.document_end[b][None, :]
        np.testing.assert_array_equal(jacobian[:, b] > 0, ((s <= t) & alive) | (s == t))


def test_packed_documents_are_as_if_each_stood_alone():
    config = tiny.config()
    structure, parameters = build(config)
    parameters = tiny.spread_scorer(parameters, 3)
    batch = tiny.packed_batch()
    logits, roles = forward(structure, parameters, Batch.from_rows(batch))
    starts = np.nonzero((batch["positions"][0] == 0) & (batch["document_end"][0] > 0))[0]
    for start in starts:
        end = batch["document_end"][0, start]
        length = end - start
        alone = Batch(
            batch["inputs"][:1, start:end],
            np.arange(length, dtype=np.int32)[None],
            np.full((1, length), length, np.int32),
        )
        expected, alone_roles = forward(structure, parameters, alone)
        np.testing.assert_array_equal(roles.ids[:, :1, :, start:end], alone_roles.ids)
        np.testing.assert_allclose(logits[:1, start:end], expected, atol=2e-5)


def test_first_tokens_are_global_whatever_the_role_bias():
    structure, parameters = build(tiny.config())
    batch = tiny.packed_batch()
    bias = role_bias_logits(-1e6, "global_local")
    _, roles = forward(structure, parameters, Batch.from_rows(batch), RoleSampling(bias=bias))
    first = batch["positions"] == 0
    ids = np.asarray(roles.ids)
    assert (ids[:, first[:, None, :].repeat(2, 1)] == GLOBAL).all()
    assert (ids[:, ~first[:, None, :].repeat(2, 1)] == 2).all()


def test_full_key_ends_make_a_nats_model_attend_to_everything():
    structure, parameters = build(tiny.config())
    dense_structure, _ = build(tiny.config(model={"layer_types": "dense"}))
    inputs = Batch.from_rows(tiny.packed_batch())
    full, roles = forward(structure, parameters, inputs, RoleSampling(key_end=jnp.full((1, 1, 1), NO_END)))
    dense_parameters = jax.tree.map(lambda x: x, parameters)
    del dense_parameters["blocks"]["attention"]["scorer"]
    dense, _ = forward(dense_structure, dense_parameters, inputs)
    np.testing.assert_allclose(full, dense, atol=1e-6)
    np.testing.assert_allclose(roles.lifetime, np.full((2, 2), inputs.causal_pairs))


def gradient(config, parameters, structure, batch, key):
    batch = Batch.from_rows(batch)
    totals = losses.batch_totals(batch)
    return jax.jit(jax.grad(losses.loss, has_aux=True), static_argnums=(1, 2))(
        parameters, structure, config, batch, totals, key, jnp.float32(0.3)
    )


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialization_changes_nothing(remat):
    batch, key = tiny.packed_batch(), jax.random.key(7)
    results = []
    for policy in ("none", remat):
        config = tiny.config(model={"remat": policy})
        structure, parameters = build(config)
        results.append(gradient(config, tiny.spread_scorer(parameters, 3), structure, batch, key))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def token_nll(logits, targets):
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def count_mismatches(monkeypatch, config, policy=None):
    """Roles that the attention's backward sees and that its forward did not choose."""
    seen = []
    real_attention = attention.nats_attention

    @jax.custom_vjp
    def probe(roles):
        return roles

    def backward(roles, gradient):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), roles, ordered=False)
        return (gradient,)

    probe.defvjp(lambda roles: (roles, roles), backward)
    monkeypatch.setattr(
        attention, "nats_attention", lambda q, k, v, roles, **o: real_attention(q, k, v, probe(roles), **o)
    )
    if policy is not None:
        monkeypatch.setattr(transformer, "_remat", lambda function, _: jax.checkpoint(function, policy=policy))
    structure, parameters = build(config)
    batch = tiny.packed_batch(batch=32)

    def loss(parameters):
        choice = RoleSampling(noise_key=jax.random.key(5))
        logits, roles = nnx.merge(structure, parameters)(Batch.from_rows(batch), choice)
        return jnp.sum(token_nll(logits, batch["targets"]) * batch["loss_weight"]), roles.ids

    _, ids = jax.jit(jax.grad(loss, has_aux=True))(tiny.spread_scorer(parameters, 3))
    jax.effects_barrier()
    backward_ids = np.stack([x.argmax(-1) for x in seen])[::-1]  # the backward walks the layers from the last
    assert backward_ids.shape == ids.shape
    return int((backward_ids != np.asarray(ids)).sum())


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_roles_in_the_backward_are_those_of_the_forward(monkeypatch, remat):
    config = tiny.config(model={"dtype": "bfloat16", "remat": remat, "embed_dim": 32, "num_layers": 4})
    assert count_mismatches(monkeypatch, config) == 0


@pytest.mark.parametrize("saved", [True, False])
def test_roles_survive_a_recomputation_that_would_choose_others(monkeypatch, saved):
    """The worst case of rounding: every evaluation chooses anew. Saved, the roles match; else the counter counts."""
    rng = np.random.default_rng(0)

    def another_choice(logits, first):
        shape = jax.ShapeDtypeStruct(logits.shape[:-1], jnp.int8)
        draw = lambda x: rng.integers(0, 3, x.shape[:-1]).astype(np.int8)  # noqa: E731
        return jax.pure_callback(draw, shape, jax.lax.stop_gradient(logits))

    monkeypatch.setattr(attention, "choose_roles", another_choice)
    config = tiny.config(model={"remat": "full"})
    policy = None if saved else jax.checkpoint_policies.nothing_saveable
    mismatches = count_mismatches(monkeypatch, config, policy)
    assert mismatches == 0 if saved else mismatches > 100


def test_initialization_is_scaled_with_fan_in():
    config = tiny.config(model={"embed_dim": 256, "mlp_dim": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32})
    _, parameters = build(config)
    attention, mlp = parameters["blocks"]["attention"], parameters["blocks"]["mlp"]
    residual = (2 * config.model.num_layers) ** -0.5
    for weight, expected in [
        (attention["query"], 256**-0.5),
        (attention["key"], 256**-0.5),
        (attention["value"], 256**-0.5),
        (attention["output"], residual * 256**-0.5),
        (mlp["gate"], 256**-0.5),
        (mlp["down"], residual * 512**-0.5),
    ]:
        assert np.std(weight) == pytest.approx(expected, rel=0.03)
    layers = np.asarray(attention["query"])
    assert not np.allclose(layers[0], layers[1])  # every layer draws its own


def test_roles_at_step_0_have_the_stated_fractions():
    config = tiny.config(nats={"initial_roles": (0.6, 0.3, 0.1)}, data={"context_length": 512})
    structure, parameters = build(config)
    rows = 16
    inputs = Batch(
        np.random.default_rng(0).integers(0, tiny.VOCAB_SIZE, (rows, 512)).astype(np.int32),
        np.tile(np.arange(512, dtype=np.int32), (rows, 1)),
        np.full((rows, 512), 512, np.int32),
    )
    _, roles = forward(structure, parameters, inputs, RoleSampling(noise_key=jax.random.key(0)))
    for layer in np.asarray(roles.ids):
        for head in np.moveaxis(layer, 1, 0):
            np.testing.assert_allclose(np.bincount(head.ravel(), minlength=3) / head.size, (0.6, 0.3, 0.1), atol=0.02)


def test_biases_reach_queries_keys_and_values():
    config = tiny.config(model={"qkv_bias": True})
    structure, parameters = build(config)
    inputs = Batch.from_rows(tiny.packed_batch())

    def total(attention):
        blocks = parameters["blocks"] | {"attention": attention}
        return jnp.sum(jnp.sin(forward(structure, parameters | {"blocks": blocks}, inputs)[0]))

    gradients = jax.grad(total)(parameters["blocks"]["attention"])
    for name in ("query_bias", "key_bias", "value_bias"):
        assert np.abs(gradients[name]).max() > 1e-6, name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_float32_and_logits_too(tie, dtype):
    config = tiny.config(model={"tie_embeddings": tie, "dtype": dtype})
    structure, parameters = build(config)
    logits, _ = forward(structure, parameters, Batch.from_rows(tiny.packed_batch()))
    assert {x.dtype for x in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert ("unembedding" in parameters) != tie


def test_weight_decay_goes_by_role():
    decayed = transformer.model_structure(tiny.config(model={"tie_embeddings": False}), tiny.VOCAB_SIZE).decayed
    block, attention = decayed["blocks"], decayed["blocks"]["attention"]
    assert all((attention["query"], attention["output"], block["mlp"]["down"]))
    exempt = block["attention_norm"]["scale"], attention["scorer"]["weight"], decayed["embedding"]
    assert exempt == (False, False, False)


def test_rotary_logits_depend_on_distance_alone():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda q, k: float(  # noqa: E731
        jnp.sum(layers.rotate(x, jnp.array([[q]]), 100.0) * layers.rotate(y, jnp.array([[k]]), 100.0))
    )
    assert at(7, 3) == pytest.approx(at(104, 100), rel=1e-4)
    assert at(7, 3) != pytest.approx(at(8, 3), rel=1e-2)
