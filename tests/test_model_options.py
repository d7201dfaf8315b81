"""Choices of ``ModelConfig`` against their definitions; all of them at once with masks, in chunks, in training."""

import dataclasses
import math

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import natsjax
from natsjax import export
from natsjax.config import Config
from natsjax.errors import UserError
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.masked import measure
from natsjax.model import layers
from natsjax.model.attention import Attention, MaskedAttention, RoleSampling
from natsjax.model.inputs import Batch
from natsjax.model.transformer import Block, init_parameters, model_structure
from natsjax.policies.attention_score import H2O
from natsjax.policies.interval import FullAttention, SlidingWindow
from natsjax.policies.nats import Nats, SampledNats
from natsjax.train import losses
from natsjax.train.step import Trainer
from pallas_kernels.nats_attention import key_end_from_roles

ALL = {
    "layer_types": "nats,dense,sliding",
    "sliding_window": 5,
    "num_layers": 6,
    "nope": (False, True),
    "activation": "geglu",
    "key_shift": True,
    "token_shift": True,
    "embedding_scale": 3.0,
    "zero_init_output": True,
    "attention_gate": True,
    "attention_sinks": True,
    "dropout": 0.2,
    "rope_scaling": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_original_context": 64,
    "param_dtype": "bfloat16",
}
OTHERS = ALL | {
    "activation": "squared_relu",
    "rope_scaling": "linear",
    "rope_original_context": 0,
    "nope": (),
    "param_dtype": "float32",
}
FEW = {"layer_types": "nats,sliding", "num_layers": 2}
"""Changes of ``ALL`` that make the pattern short: what is differentiated compiles for seconds a layer of it."""
WINDOW = 2  # of tiny's SLIDING tokens


def build(**model):
    config = tiny.config(model=model)
    structure, parameters = init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(0))
    return config, structure, stirred(parameters)


def stirred(parameters, seed=1):
    """Random numbers where a model starts with constants: scorers, sinks, and outputs that start at zero."""
    blocks = parameters["blocks"]
    attention, keys = blocks["attention"], iter(jax.random.split(jax.random.key(seed), 4))

    def draw(x, scale):
        return (scale * jax.random.normal(next(keys), x.shape)).astype(x.dtype)

    if "scorer" in attention:
        attention["scorer"]["weight"] = draw(attention["scorer"]["weight"], 1.0)
    if "sink" in attention:
        attention["sink"] = draw(attention["sink"], 1.5)
    for group, name in ((attention, "output"), (blocks["mlp"], "down")):
        if not np.asarray(group[name], np.float32).any():
            group[name] = draw(group[name], 0.2)
    return parameters


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


# --- all at once ---

LADDER = {"windows": (1, 6), "initial_roles": ()}
"""Of ``tiny.config(nats=…)``: two SLIDING roles."""
ALL_AT_ONCE = {"all": (ALL, LADDER), "others": (OTHERS, {})}


@pytest.fixture(scope="module", params=["all", "others"])
def decoded(request):
    """A config, parameters, prompts, roles, and the logits of the masked forward."""
    model, nats = ALL_AT_ONCE[request.param]
    config = decoding.config(model=model, nats=nats)
    parameters = stirred(decoding.parameters_of(config))
    rows = decoding.prompts([29, 12])
    roles = np.random.default_rng(5).integers(0, config.nats.num_roles, (6, 2, 2, 29)).astype(np.int8)
    roles[..., 0] = 0
    expected, _ = decoding.masked_logits(config, parameters, rows, role_ids=roles)
    return config, parameters, rows, roles, expected


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_and_tokens_give_the_logits_of_the_masked_forward(decoded, chunk):
    config, parameters, rows, roles, expected = decoded
    got, _ = decoding.chunked_logits(decoding.decoder(config, parameters), rows, chunk, roles)
    assert decoding.error(got, expected, rows) <= 2e-5


def test_fixed_policies_are_their_masks():
    config = decoding.config(model=ALL)
    parameters, rows = stirred(decoding.parameters_of(config)), decoding.prompts([29, 12])
    for policy in (FullAttention(), SlidingWindow(3)):
        expected, _ = decoding.masked_logits(config, parameters, rows, policy)
        got, _ = decoding.chunked_logits(decoding.decoder(config, parameters, policy), rows, 7)
        assert decoding.error(got, expected, rows) <= 2e-5
    # One that observes attention and keeps everything is full attention.
    expected, _ = decoding.masked_logits(config, parameters, rows, FullAttention())
    got, _ = decoding.chunked_logits(decoding.decoder(config, parameters, H2O(100, 50)), rows, 7)
    assert decoding.error(got, expected, rows) <= 2e-5


def test_gradients_do_not_depend_on_what_is_recomputed():
    """Dropout too: a recomputed forward draws what the first one drew."""
    batch, found = Batch.from_rows(tiny.packed_batch()), []
    for remat in ("none", "full", "dots"):
        config, structure, parameters = build(**ALL | FEW | {"remat": remat, "param_dtype": "float32"})
        arguments = (batch, losses.batch_totals(batch), jax.random.key(7), jnp.float32(0.3))
        gradient = jax.jit(jax.value_and_grad(losses.loss, has_aux=True), static_argnums=(1, 2))
        found.append(gradient(parameters, structure, config, *arguments))
    for other in found[1:]:
        for x, y in zip(*map(jax.tree.leaves, (found[0], other)), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4)
    gradients = found[0][1]["blocks"]["attention"]
    for name in ("gate", "sink"):
        assert (np.abs(gradients[name]).reshape(2, -1).max(axis=1) > 1e-6).all(), name


def test_the_scan_over_both_patterns_is_the_layers_one_after_another():
    config, structure, parameters = build(**ALL)
    assert len(config.model.layer_period) == 6
    inputs = Batch.from_rows(tiny.packed_batch())

    def unrolled(parameters):
        transformer = nnx.merge(structure, parameters)
        x = transformer.embed(inputs.inputs, inputs.previous)
        for layer in range(6):
            state = jax.tree.map(lambda values: values[layer], parameters["blocks"])  # noqa: B023
            block = nnx.merge(nnx.graphdef(transformer.blocks), state)
            attend = MaskedAttention(inputs, RoleSampling(), ["nats", "dense", "sliding"][layer % 3])
            # A bool that is data, as in decoding.
            x, _ = block(x, inputs.positions, attend, is_rotary=jnp.array(layer % 2 == 0))
        return transformer.logits(transformer.final_norm(x))

    scanned = jax.jit(lambda parameters: nnx.merge(structure, parameters)(inputs)[0])(parameters)
    np.testing.assert_allclose(scanned, jax.jit(unrolled)(parameters), atol=2e-5 * np.abs(scanned).max())


def test_an_export_is_the_run_and_evaluates_through_the_buffer_as_with_masks(tmp_path):
    run = tiny.make_run(tmp_path / "run", tiny.config(model=ALL, nats=LADDER, eval={"num_contexts": 3}))
    run = dataclasses.replace(run, parameters=stirred(run.parameters))
    contexts = run.data.contexts("validation", 3)
    for policy in (Nats(0.2), FullAttention()):
        masked, through = measure(run, contexts, policy), measure_decoding(run, contexts, policy, chunk=5)
        np.testing.assert_allclose(through.live_pairs, masked.live_pairs)
        assert through.perplexity == pytest.approx(masked.perplexity, rel=1e-4)
    # Sampled roles have a noise key as in training, and no dropout.
    without = Config.from_dict(run.config.to_dict() | {"model": run.config.to_dict()["model"] | {"dropout": 0.0}})
    other = dataclasses.replace(run, structure=model_structure(without, tiny.VOCAB_SIZE).structure)
    sampled = [measure(each, contexts, SampledNats(1)).perplexity for each in (run, other)]
    assert sampled[0] == sampled[1]
    stored = natsjax.load(tmp_path / "run")
    for dtype in export.DTYPES:
        export.export(tmp_path / "run", tmp_path / dtype, dtype=dtype)
        loaded = natsjax.load(tmp_path / dtype)
        assert loaded.config.model == run.config.model
        exact = dtype == "float32"  # bfloat16 rounds what stays float32 in a run, the scorer say
        for x, y in zip(*(jax.tree.leaves(r.parameters) for r in (stored, loaded)), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=0 if exact else 4e-3)


def test_defaults_are_stored_configs_that_lack_the_fields():
    values = tiny.config().to_dict()
    for name in ALL.keys() - {"layer_types", "sliding_window", "num_layers"}:
        del values["model"][name]
    assert Config.from_stored(values) == tiny.config()


# --- activation ---


def test_activations_are_their_definitions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    erf = np.vectorize(math.erf)
    definitions = {
        "swiglu": lambda gate, up: gate * sigmoid(gate) * up,
        "geglu": lambda gate, up: gate * (1 + erf(gate / math.sqrt(2))) / 2 * up,
        "squared_relu": lambda _, up: np.maximum(up, 0) ** 2,
    }
    for activation, hidden in definitions.items():
        mlp = layers.MLP(tiny.config(model={"activation": activation}).model, nnx.Rngs(0))
        weights = {name: np.asarray(w, np.float64) for name, w in nnx.to_pure_dict(nnx.state(mlp)).items()}
        assert set(weights) == {"up", "down"} | ({"gate"} if activation != "squared_relu" else set())
        gate = x @ weights["gate"] if "gate" in weights else None
        np.testing.assert_allclose(mlp(x), hidden(gate, x @ weights["up"]) @ weights["down"], atol=1e-5)


# --- sizes at the start ---


def test_the_embedding_scale_multiplies_the_table():
    _, structure, parameters = build(embedding_scale=3.0)
    tokens = tiny.packed_batch()["inputs"]
    table = np.asarray(parameters["embedding"])
    np.testing.assert_allclose(nnx.merge(structure, parameters).embed(tokens), 3 * table[tokens], rtol=1e-6)
    _, structure, _ = build()
    np.testing.assert_allclose(nnx.merge(structure, parameters).embed(tokens), 4 * table[tokens], rtol=1e-6)


def test_the_token_shift_adds_the_token_before_in_the_document():
    _, structure, parameters = build(token_shift=True, embedding_scale=3.0)
    np.testing.assert_array_equal(parameters["shift"], np.full(16, 0.5, np.float32))
    parameters["shift"] = jax.random.normal(jax.random.key(3), (16,))
    batch = tiny.packed_batch()
    x = nnx.merge(structure, parameters).embed(batch["inputs"], Batch.from_rows(batch).previous)
    table, shift = (np.asarray(parameters[name], np.float64) for name in ("embedding", "shift"))
    for row, tokens in enumerate(batch["inputs"]):
        for t, token in enumerate(tokens):
            expected = table[token]
            if batch["positions"][row, t] > 0:
                expected = expected + shift * table[tokens[t - 1]]
            np.testing.assert_allclose(x[row, t], 3 * expected, rtol=1e-6, atol=1e-6)


def test_the_key_shift_mixes_in_the_key_before_in_the_document():
    config = tiny.config(model={"key_shift": True, "qkv_bias": True})
    layer, batch = Attention(config, nnx.Rngs(0)), Batch.from_rows(tiny.packed_batch())
    np.testing.assert_allclose(layer.key_shift[...], np.broadcast_to([[0.95], [0.05]], (2, 4)))
    layer.key_shift = layer.key_shift.replace(jax.random.normal(jax.random.key(3), (2, 4)))
    x, before = np.random.default_rng(0).normal(size=(*batch.inputs.shape, 16)), np.ones((3, 2, 4))
    weight, bias, fraction = (np.asarray(y[...], np.float64) for y in (layer.key, layer.key_bias, layer.key_shift))
    plain = np.einsum("btd,dkh->btkh", x, weight) + bias
    positions = np.array(batch.positions)
    positions[1] += 5  # of a chunk, which has tokens before it
    for first in (None, before):
        given = None if first is None else jnp.asarray(first, jnp.float32)
        _, key, _ = layer.qkv_proj(jnp.asarray(x, jnp.float32), positions, before=given, is_rotary=False)
        for row, t in np.ndindex(positions.shape):
            previous = plain[row, t - 1] if t else np.zeros((2, 4)) if first is None else first[row]
            previous = previous if positions[row, t] else 0
            expected = (1 - fraction) * plain[row, t] + fraction * previous
            np.testing.assert_allclose(key[row, t], expected, rtol=1e-5, atol=1e-5)


def test_one_kv_head_shifts_half_of_its_keys():
    parameters = build(key_shift=True, num_heads=1, num_kv_heads=1)[2]
    np.testing.assert_array_equal(parameters["blocks"]["attention"]["key_shift"], np.full((2, 1, 4), 0.5))


def test_a_model_whose_outputs_start_at_zero_starts_as_its_embedding():
    config = tiny.config(model={"zero_init_output": True})
    structure, parameters = init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(0))
    model, batch = nnx.merge(structure, parameters), Batch.from_rows(tiny.packed_batch())
    x, _ = model.hidden(batch)
    np.testing.assert_array_equal(x, model.final_norm(model.embed(batch.inputs)))
    plain = init_parameters(tiny.config(), tiny.VOCAB_SIZE, jax.random.key(0))[1]
    for group, name in (("attention", "output"), ("mlp", "down")):
        assert not np.asarray(parameters["blocks"][group].pop(name)).any()
        assert np.asarray(plain["blocks"][group].pop(name)).any()
    jax.tree.map(np.testing.assert_array_equal, parameters, plain)  # all else is drawn alike


# --- attention ---


def test_the_gate_is_a_sigmoid_of_the_layers_input_for_each_number():
    config = tiny.config(model={"attention_gate": True})
    attention = Attention(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, read = rng.normal(size=(2, 5, 16)).astype(np.float32), rng.normal(size=(2, 5, 2, 2, 4)).astype(np.float32)
    got, _ = attention(x, np.zeros((2, 5), np.int32), lambda *_: (jnp.asarray(read), None))
    gate, output = (np.asarray(p[...], np.float64) for p in (attention.gate, attention.output))
    expected = np.einsum("btkgh,kghd->btd", read * sigmoid(np.einsum("btd,dkgh->btkgh", x, gate)), output)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.std(gate) == pytest.approx(16**-0.5, rel=0.2)


@pytest.mark.parametrize("kind", ["nats", "dense", "sliding"])
def test_a_sink_is_one_more_logit_whose_value_is_zero(kind):
    config = tiny.config(model={"layer_types": kind, "sliding_window": 3, "attention_sinks": True})
    attention = Attention(config, nnx.Rngs(0))
    np.testing.assert_array_equal(attention.sink[...], np.zeros((2, 2)))
    rng = np.random.default_rng(0)
    sink = rng.normal(size=(2, 2))
    attention.sink = attention.sink.replace(jnp.asarray(sink, jnp.float32))
    batch = Batch.from_rows(tiny.packed_batch())
    b, length = batch.inputs.shape
    x = rng.normal(size=(b, length, 16)).astype(np.float32)
    query, key, value = (np.asarray(y, np.float64) for y in attention.qkv_proj(x, batch.positions))
    roles = rng.integers(0, 3, (b, 2, length)).astype(np.int8)
    roles[np.broadcast_to(np.asarray(batch.is_first)[:, None], roles.shape)] = 0
    attend = MaskedAttention(batch, RoleSampling(role_ids=jnp.asarray(roles)), kind)
    got, _ = attend(attention, x, *(jnp.asarray(y, jnp.float32) for y in (query, key, value)))

    end = np.asarray(batch.document_end)[:, None]
    if kind == "nats":
        end = np.asarray(key_end_from_roles(roles, window=WINDOW, document_end=batch.document_end))
    elif kind == "sliding":
        end = np.minimum(end, np.arange(length) + 4)
    t = np.arange(length)[:, None]
    is_read = ((np.arange(length) <= t) & (t < end[:, :, None]))[:, :, None]
    weights = np.where(is_read, np.exp(np.einsum("btkgh,bskh->bkgts", query, key) / 2), 0)
    weights /= weights.sum(-1, keepdims=True) + np.exp(sink)[..., None, None]
    np.testing.assert_allclose(got, np.einsum("bkgts,bskh->btkgh", weights, value), atol=1e-5)


# --- dropout ---


def test_dropout_sets_numbers_to_zero_and_divides_the_others():
    x = jax.random.normal(jax.random.key(0), (4, 50, 16)) + 5
    y = np.asarray(layers.dropout(x, jax.random.key(1), 0.25))
    kept = y != 0
    assert kept.mean() == pytest.approx(0.75, abs=0.02)
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / 0.75, rtol=1e-6)
    assert layers.dropout(x.astype(jnp.bfloat16), jax.random.key(1), 0.25).dtype == jnp.bfloat16


def test_a_block_drops_both_results_before_they_are_added():
    config = tiny.config(model={"dropout": 0.5})
    block = Block(config, nnx.Rngs(0))
    batch = Batch.from_rows(tiny.packed_batch())
    x, key = jax.random.normal(jax.random.key(0), (3, 24, 16)), jax.random.key(2)
    attend = MaskedAttention(batch, RoleSampling(), "nats")
    got, _ = block(x, batch.positions, attend, dropout_key=key)
    out, _ = block.attention(block.attention_norm(x), batch.positions, attend)
    keys = jax.random.split(key)
    middle = x + layers.dropout(out, keys[0], 0.5)
    np.testing.assert_allclose(got, middle + layers.dropout(block.mlp(block.mlp_norm(middle)), keys[1], 0.5), atol=1e-5)
    assert np.abs(got - block(x, batch.positions, attend)[0]).max() > 0.1


def test_dropout_is_for_training_and_leaves_the_noise_of_roles():
    batch, sampling = Batch.from_rows(tiny.packed_batch()), RoleSampling(noise_key=jax.random.key(3))
    config = tiny.config(model={"dropout": 0.5})
    structure, parameters = init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(0))  # scorers without weights
    model = nnx.merge(structure, parameters)
    plain = nnx.merge(init_parameters(tiny.config(), tiny.VOCAB_SIZE, jax.random.key(0))[0], parameters)
    x, roles = plain.hidden(batch, sampling, is_training=True)
    np.testing.assert_array_equal(x, model.hidden(batch, sampling)[0])
    np.testing.assert_array_equal(x, plain.hidden(batch, sampling)[0])
    dropped, same = model.hidden(batch, sampling, is_training=True)
    np.testing.assert_array_equal(roles.ids, same.ids)
    assert np.abs(dropped - x).max() > 0.5
    np.testing.assert_array_equal(dropped, model.hidden(batch, sampling, is_training=True)[0])
    other = model.hidden(batch, RoleSampling(noise_key=jax.random.key(4)), is_training=True)[0]
    assert np.abs(dropped - other).max() > 0.5
    np.testing.assert_array_equal(model.hidden(batch, is_training=True)[0], model.hidden(batch)[0])


def test_all_options_train_and_go_on_bit_for_bit_from_a_state():
    config = tiny.config(
        model=ALL | FEW, train={"gradient_accumulation_steps": 2}, optimizer={"peak_learning_rate": 3e-2}
    )
    trainer, batch = Trainer(config, tiny.VOCAB_SIZE), tiny.packed_batch(batch=4)
    state, seen, kept = trainer.init(), [], None
    kinds = [x.dtype for x in jax.tree.leaves(state)]
    for step in range(20):
        if step == 17:
            kept = jax.device_get(state)
        state, metrics = trainer.step(state, batch)
        seen.append(float(metrics["cross_entropy"]))
    assert np.mean(seen[-5:]) < 0.8 * seen[0]
    assert [x.dtype for x in jax.tree.leaves(state)] == kinds
    assert metrics["gradient_norm/mlp"].dtype == jnp.float32
    again = jax.device_put(kept, trainer.shardings)
    for _ in range(3):
        again, metrics = trainer.step(again, batch)
    assert float(metrics["cross_entropy"]) == seen[-1]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (state, again)))


# --- positions ---


def definition_of_yarn(size, base, factor, original):
    """Frequencies and the root of 1/t of arXiv:2309.00071, definitions 1 and 2, with its constants for Llama."""
    found = []
    for pair in range(size // 2):
        frequency = base ** (-2 * pair / size)
        wavelength = 2 * math.pi / frequency
        r = original / wavelength
        gamma = 0 if r < 1 else 1 if r > 32 else (r - 1) / (32 - 1)
        found.append((1 - gamma) * frequency / factor + gamma * frequency)
    return np.array(found), 0.1 * math.log(factor) + 1


@pytest.mark.parametrize(("factor", "original"), [(8.0, 4096), (1.0, 64), (2.5, 100), (32.0, 16)])
def test_yarn_is_the_papers_definition(factor, original):
    fields = {"rope_scaling": "yarn", "rope_scaling_factor": factor, "rope_original_context": original}
    model = tiny.config(model=fields | {"head_dim": 64}).model
    frequency = 10000.0 ** (-np.arange(32, dtype=np.float32) / 32)
    expected, size = definition_of_yarn(64, 10000.0, factor, original)
    np.testing.assert_allclose(layers.scaled_frequencies(frequency, model), expected, rtol=2e-6)
    assert layers.rotary_size(model) == pytest.approx(size)
    if factor == 1:
        np.testing.assert_allclose(expected, frequency, rtol=1e-6)


@pytest.mark.parametrize(("factor", "original", "low", "high"), [(8.0, 8192, 1.0, 4.0), (3.0, 60, 0.5, 6.0)])
def test_llama_3_scaling_is_its_definition(factor, original, low, high):
    """By wavelengths, in double precision, as Llama 3.1's published code has it."""
    fields = {"rope_scaling": "llama3", "rope_scaling_factor": factor, "rope_original_context": original}
    model = tiny.config(model=fields | {"rope_turns": () if (low, high) == (1, 4) else (low, high)}).model
    frequency = 500.0 ** (-np.arange(32) / 32)
    expected = []
    for each in frequency:
        wavelength = 2 * math.pi / each
        smooth = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            expected.append(each)
        elif wavelength > original / low:
            expected.append(each / factor)
        else:
            expected.append((1 - smooth) * each / factor + smooth * each)
    found = layers.scaled_frequencies(frequency.astype(np.float32), model)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert layers.rotary_size(model) == 1


@pytest.mark.parametrize(
    ("size", "base", "factor", "original", "turns"),
    [(64, 10000.0, 8.0, 4096, ()), (16, 20.0, 4.0, 32, (0.5, 4.0)), (4, 500.0, 2.0, 9, ()), (8, 5.0, 3.0, 10**6, ())],
)
def test_the_ramp_by_pairs_is_that_of_yarns_code(size, base, factor, original, turns):
    """The number of the pair that makes r turns in the original context solves ``context · base^(-2i/h) = 2π r``."""
    fields = {"rope_scaling": "yarn", "rope_scaling_factor": factor, "rope_original_context": original}
    fields |= {"rope_ramp": "pairs", "head_dim": size, "rope_theta": base, "rope_turns": turns}
    model = tiny.config(model=fields | {"rope_attention_factor": 1.25}).model
    slow, fast = turns or (1.0, 32.0)
    first, last = (
        size / 2 * (math.log(original) - math.log(2 * math.pi * each)) / math.log(base) for each in (fast, slow)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
    frequency = base ** (-np.arange(size // 2) / (size // 2))
    divided = [min(max((pair - first) / ((last - first) or 0.001), 0), 1) for pair in range(size // 2)]
    expected = [each / factor * part + each * (1 - part) for each, part in zip(frequency, divided, strict=True)]
    found = layers.scaled_frequencies(frequency.astype(np.float32), model)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert layers.rotary_size(model) == 1.25


def test_scaled_positions_reach_queries_and_keys():
    positions = np.arange(6, dtype=np.int32)[None] * 7
    x = np.random.default_rng(0).normal(size=(1, 6, 16)).astype(np.float32)

    def turned(**fields):
        query, key, value = Attention(tiny.config(model=fields), nnx.Rngs(0)).qkv_proj(x, positions)
        return np.asarray(query, np.float64), np.asarray(key, np.float64), value

    def expected(y, frequency, size):
        angle = positions[0, :, None] * frequency
        sin, cos = (f(angle).reshape(1, 6, *(1,) * (y.ndim - 3), 2) for f in (np.sin, np.cos))
        left, right = y[..., :2], y[..., 2:]
        return size * np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)

    usual = np.array([1.0, 0.01])
    yarn, size = definition_of_yarn(4, 10000.0, 4.0, 64)
    attention = Attention(tiny.config(), nnx.Rngs(0))
    plain = [np.asarray(y, np.float64) for y in attention.qkv_proj(x, positions, is_rotary=False)]
    for fields, frequency, factor in (
        ({}, usual, 1),
        ({"rope_scaling": "linear", "rope_scaling_factor": 4.0}, usual / 4, 1),
        ({"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_original_context": 64}, yarn, size),
    ):
        *found, value = turned(**fields)
        np.testing.assert_array_equal(plain[2], value)
        for got, y in zip(found, plain[:2], strict=True):
            np.testing.assert_allclose(got, expected(y, frequency, factor), atol=2e-5)


def test_layers_without_positions_do_not_see_them():
    """Two readings of the tokens whose positions differ in scale: no layer of the second model can tell."""
    batch = Batch.from_rows(tiny.packed_batch())
    far = batch._replace(positions=batch.positions * 3)
    for nope, is_alike in (((False, True), False), ((True,), True), ((True, True), True), ((), False)):
        config, structure, parameters = build(nope=nope, layer_types="dense")
        assert config.model.all_rotary == tuple(not without for without in (nope or (False,)) * 2)[:2]
        near, other = (nnx.merge(structure, parameters)(each)[0] for each in (batch, far))
        assert np.array_equal(near, other) == is_alike


# --- dtypes ---


def test_parameters_are_stored_in_their_dtype_but_for_scorer_norms_and_sinks():
    fields = {"param_dtype": "bfloat16", "qkv_bias": True, "attention_sinks": True, "attention_gate": True}
    config = tiny.config(model=fields | {"qk_norm": True, "tie_embeddings": False})
    structure, parameters = init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(0))
    wide = {"scale", "sink", "scorer"}
    for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]:
        names = {key.key for key in path}
        assert leaf.dtype == (jnp.float32 if names & wide else jnp.bfloat16), path
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="float32"))
    _, exact = init_parameters(full, tiny.VOCAB_SIZE, jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), parameters, exact)
    logits, roles = nnx.merge(structure, parameters)(Batch.from_rows(tiny.packed_batch()))
    assert logits.dtype == roles.lifetime.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_keeps_wide_what_the_forward_pass_keeps_wide(dtype):
    config = decoding.config(model=ALL | {"dtype": dtype})
    held = decoding.decoder(config, decoding.parameters_of(config)).parameters
    attention = held["blocks"]["attention"]
    assert attention["sink"].dtype == attention["scorer"]["bias"].dtype == held["final_norm"]["scale"].dtype
    assert attention["sink"].dtype == jnp.float32
    assert attention["gate"].dtype == held["embedding"].dtype == jnp.dtype(dtype)


# --- what does not fit ---

YARN = {"rope_scaling": "yarn", "rope_scaling_factor": 2.0, "rope_original_context": 64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "gelu"}, "model.activation = 'gelu': one of 'swiglu', 'geglu', 'squared_relu' was expected"),
        ({"dropout": 1.0}, "model.dropout = 1.0: it must be at most 0.99."),
        ({"embedding_scale": -1.0}, "model.embedding_scale = -1.0: it must be at least 0."),
        ({"rope_scaling": "yarn", "rope_scaling_factor": 2.0}, "model.rope_original_context = 0: .* set it."),
        ({"rope_scaling_factor": 2.0}, "model.rope_scaling_factor = 2.0: .* has no use for it; set that to linear"),
        ({"rope_scaling": "linear", "rope_scaling_factor": 0.5}, "rope_scaling_factor = 0.5: it must be at least 1."),
        ({"rope_scaling": "linear", "rope_original_context": 9}, "rope_original_context = 9: only .* leave it at 0."),
        ({"rope_turns": (1.0, 4.0)}, r"model.rope_turns = \(1.0, 4.0\): only model.rope_scaling"),
        (
            YARN | {"rope_turns": (4.0, 1.0)},
            r"model.rope_turns = \(4.0, 1.0\): two numbers were expected, the larger one last",
        ),
        (YARN | {"rope_turns": (0.0, 1.0)}, r"model.rope_turns = \(0.0, 1.0\): two numbers were expected"),
        (YARN | {"rope_scaling": "llama3", "rope_ramp": "pairs"}, "model.rope_ramp = pairs: only .* leave it at turns"),
        ({"rope_attention_factor": 1.2}, "model.rope_attention_factor = 1.2: only model.rope_scaling"),
        ({"rope_scaling": "ntk"}, "model.rope_scaling = 'ntk': one of 'none', 'linear', 'yarn', 'llama3' was expected"),
        ({"nope": (True, False, True)}, r"model.nope = .*: model.num_layers = 2 is not a multiple of its 3 layers."),
        ({"nope": (1, 0)}, r"model.nope = 1 \(int\): bool was expected."),
        ({"nope": "true,maybe"}, "model.nope = 'maybe'"),
        ({"param_dtype": "float16"}, "model.param_dtype = 'float16': one of 'float32', 'bfloat16' was expected"),
        ({"attention_sinks": 1}, r"model.attention_sinks = 1 \(int\): bool was expected."),
    ],
)
def test_what_does_not_fit_is_a_sentence(fields, message):
    with pytest.raises(UserError, match=message):
        tiny.config(model=fields)


def test_patterns_of_bools_are_written_as_words():
    for words in ("false,true", ("false,true",), ["False", "true"], (False, True)):
        assert tiny.config(model={"nope": words}).model.nope == (False, True)
    assert tiny.config(model={"nope": "true"}).model.nope == (True,)
