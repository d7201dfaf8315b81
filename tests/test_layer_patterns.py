"""Layers of several kinds in one scan: who reads whom, what it costs, training, decoding; other parts of a model."""

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from natsjax import evaluate, kv_fraction
from natsjax.data import piece_lengths
from natsjax.decode.generation import generate
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.masked import measure
from natsjax.model.attention import MaskedAttention, RoleSampling
from natsjax.model.inputs import Batch
from natsjax.model.transformer import init_parameters
from natsjax.policies.interval import FullAttention, SlidingWindow
from natsjax.policies.nats import Nats
from natsjax.train.step import Trainer

WINDOW = 5
MIXED = {"layer_types": "nats,dense,sliding", "sliding_window": WINDOW, "num_layers": 6}


def build(config):
    structure, parameters = init_parameters(config, tiny.VOCAB_SIZE, jax.random.key(0))
    return structure, tiny.spread_scorer(parameters) if config.model.has_roles else parameters


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow), "dots"])
def test_the_scan_over_the_pattern_is_the_layers_one_after_another(remat):
    config = tiny.config(model=MIXED | {"remat": remat})
    structure, parameters = build(config)
    batch, key = tiny.packed_batch(), jax.random.key(3)
    inputs = Batch.from_rows(batch)

    def scanned(parameters):
        logits, roles = nnx.merge(structure, parameters)(inputs, RoleSampling(noise_key=key))
        return jnp.sum(jnp.sin(logits)), roles

    def unrolled(parameters):
        transformer = nnx.merge(structure, parameters)
        block = nnx.graphdef(transformer.blocks)
        x, found = transformer.embed(inputs.inputs), []
        for layer, noise_key in enumerate(jax.random.split(key, 6)):
            state = jax.tree.map(lambda values: values[layer], parameters["blocks"])  # noqa: B023
            kind = ["nats", "dense", "sliding"][layer % 3]
            attend = MaskedAttention(inputs, RoleSampling(noise_key=noise_key), kind)
            x, roles = nnx.merge(block, state)(x, inputs.positions, attend)
            found.append(roles)
        logits = transformer.logits(transformer.final_norm(x))
        return jnp.sum(jnp.sin(logits)), jax.tree.map(lambda *values: jnp.stack(values), *found)

    (total, roles), gradient = jax.jit(jax.value_and_grad(scanned, has_aux=True))(parameters)
    (expected, wanted), right = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(parameters)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_array_equal(roles.ids, wanted.ids)
    np.testing.assert_allclose(roles.lifetime, wanted.lifetime)
    for found, at in zip(jax.tree.leaves(gradient), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(found, at, atol=2e-5)
    # The scorers of layers that learn no roles have nothing to learn.
    used = np.abs(gradient["blocks"]["attention"]["scorer"]["weight"]).reshape(6, -1).max(axis=1) > 0
    assert used.tolist() == [True, False, False] * 2


def test_a_sliding_layer_reads_its_window_and_nothing_else():
    config = tiny.config(model={"layer_types": "sliding", "sliding_window": WINDOW, "num_layers": 1})
    structure, parameters = build(config)
    inputs = Batch.from_rows(tiny.packed_batch())

    def per_query(embedded):
        transformer = nnx.merge(structure, parameters)
        state = jax.tree.map(lambda values: values[0], parameters["blocks"])
        attend = MaskedAttention(inputs, RoleSampling(), "sliding")
        out, _ = nnx.merge(nnx.graphdef(transformer.blocks), state)(embedded, inputs.positions, attend)
        return jnp.sum(jnp.sin(out), axis=-1)

    embedded = jax.random.normal(jax.random.key(2), (3, 24, 16))
    reads = np.abs(jax.jacobian(per_query)(embedded)).max(axis=-1)
    index = np.arange(24)
    for row in range(3):
        t, s = index[:, None], index[None]
        position, end = np.asarray(inputs.positions[row]), np.asarray(inputs.document_end[row])
        visible = (s <= t) & (t - s <= WINDOW) & (s >= t - position[:, None]) & (end[:, None] > 0)
        found = reads[row, :, row] > 0
        np.testing.assert_array_equal((found & ~np.eye(24, dtype=bool))[end > 0], (visible & (s != t))[end > 0])
        assert not reads[row, :, np.arange(3) != row].any()


def test_kv_fraction_counts_all_layers_and_the_smallest_is_reached():
    config = tiny.config(model=MIXED, nats={"initial_roles": (1e-6, 1e-6, 1 - 2e-6), "window": 1})
    trainer = Trainer(config, tiny.VOCAB_SIZE)
    batch = tiny.packed_batch(batch=4)
    _, metrics = trainer.step(trainer.init(), batch)
    smallest = kv_fraction.all_sliding_model_kv_fraction(config, piece_lengths(batch))
    assert float(metrics["kv_fraction"]) == pytest.approx(smallest, rel=1e-5)
    live = np.asarray(metrics["live_keys"]).mean(axis=1)
    assert np.all(live[[1, 4]] > live[[2, 5]])
    assert np.all(live[[2, 5]] > live[[0, 3]])
    np.testing.assert_array_equal(np.asarray(metrics["role_fractions"])[[1, 4], :, 0], 1)
    np.testing.assert_array_equal(np.asarray(metrics["role_fractions"])[[2, 5], :, 2], 1)
    np.testing.assert_array_equal(np.asarray(metrics["scorer_entropy"])[[1, 2, 4, 5]], 0)


PATTERN = decoding.config(
    model={"layer_types": "nats,dense,sliding", "sliding_window": WINDOW, "qk_norm": True, "final_logit_softcap": 3.0}
)
PARAMETERS = decoding.parameters_of(PATTERN)


@pytest.mark.parametrize("policy", [Nats(0.3), FullAttention(), SlidingWindow(8), SlidingWindow(2)], ids=str)
@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_give_the_logits_of_the_masked_forward(policy, chunk):
    rows = decoding.prompts([29, 12])
    expected, _ = decoding.masked_logits(PATTERN, PARAMETERS, rows, policy)
    got, _ = decoding.chunked_logits(decoding.decoder(PATTERN, PARAMETERS, policy), rows, chunk)
    assert decoding.error(got, expected, rows) <= 2e-5


def test_generated_tokens_are_those_of_the_masked_forward():
    rows = decoding.prompts([3, 17, 1])
    found = generate(decoding.decoder(PATTERN, PARAMETERS), rows, max_new_tokens=30)
    assert np.abs(decoding.check_generated(PATTERN, PARAMETERS, rows, found)).max() <= 3  # the cap


def test_a_mixed_run_is_measured_with_masks_as_through_the_buffer(tmp_path):
    config = tiny.config(model=MIXED | {"qk_norm": True, "final_logit_softcap": 5.0}, eval={"num_contexts": 3})
    run = tiny.make_run(tmp_path / "run", config)
    contexts = run.data.contexts("validation", 3)
    for policy in (Nats(0.2), FullAttention(), SlidingWindow(3)):
        masked, decoded = measure(run, contexts, policy), measure_decoding(run, contexts, policy, chunk=5)
        np.testing.assert_allclose(decoded.live_pairs, masked.live_pairs)
        assert decoded.perplexity == pytest.approx(masked.perplexity, rel=1e-4)
    full = measure(run, contexts, FullAttention())
    share = full.live_pairs.mean(axis=1) / full.causal_pairs
    np.testing.assert_allclose(share[[0, 1, 3, 4]], 1)
    assert np.all(share[[2, 5]] < 0.6)


def test_a_mixed_run_is_evaluated_under_its_role_bias(tmp_path):
    config = tiny.config(model=MIXED, nats={"kv_budget": 0.7})
    run = tiny.make_run(tmp_path / "run", config)
    found = evaluate.run(tmp_path / "run", loaded=run, progress=False)
    assert found.budget_check["smallest_possible"] > 1 / 3  # every third layer reads all
    assert {row["method"] for row in found.rows} >= {"nats", "full", "sliding_window"}


def test_fixed_policies_meet_their_budgets_beside_sliding_layers(tmp_path):
    """On the run's own weights; its dense baseline, without such layers, has settings of its own."""
    config = tiny.config(
        model={"layer_types": "nats,sliding", "sliding_window": 8}, nats={"kv_budget": 0.5}, eval={"num_sinks": 2}
    )
    run = tiny.make_run(tmp_path / "run", config)
    baseline = tiny.config(model={"layer_types": "dense"}, nats={"kv_budget": 0.5}, eval={"num_sinks": 2})
    tiny.make_run(tmp_path / "baseline", baseline)
    found = evaluate.run(
        tmp_path / "run", loaded=run, budgets=[0.5, 0.7, 0.95], baseline_workdir=tmp_path / "baseline", progress=False
    )
    fixed = [row for row in found.rows if row["method"] in ("sliding_window", "streaming_llm")]
    assert len(fixed) == 2 * 2 + 2 * 3  # what the layers' windows rule out is left out, and the note says so
    assert any("windows of the model's own layers" in note for note in found.notes)
    for row in fixed:
        assert row["kv_fraction"] == pytest.approx(row["budget"], abs=0.03)


def test_qk_norm_leaves_the_scale_of_queries_and_keys_without_effect():
    config = tiny.config(model={"qk_norm": True})
    structure, parameters = build(config)
    inputs = Batch.from_rows(tiny.packed_batch())
    attention = parameters["blocks"]["attention"]
    louder = parameters | {
        "blocks": parameters["blocks"]
        | {"attention": attention | {"query": 30 * attention["query"], "key": 7 * attention["key"]}}
    }
    logits = [nnx.merge(structure, tree)(inputs)[0] for tree in (parameters, louder)]
    np.testing.assert_allclose(*logits, atol=2e-3)
    assert attention["query_norm"]["scale"].shape == (2, 4)
    plain = tiny.config()
    assert "query_norm" not in build(plain)[1]["blocks"]["attention"]


@pytest.mark.parametrize(
    "layers", [pytest.param({"layer_types": "nats,dense", "num_layers": 4}, marks=pytest.mark.slow), MIXED]
)
def test_a_mixed_model_learns(layers):
    config = tiny.config(
        model=layers, optimizer={"peak_learning_rate": 3e-2}, loss={"z_loss": 1e-3}, train={"num_steps": 40}
    )
    trainer = Trainer(config, tiny.VOCAB_SIZE)
    state, batch, seen = trainer.init(), tiny.packed_batch(batch=4), []
    for _ in range(40):
        state, metrics = trainer.step(state, batch)
        seen.append(float(metrics["cross_entropy"]))
    assert seen[-1] < 0.7 * seen[0]


def test_a_dense_layer_leaves_its_neighbors_their_small_capacities():
    config = decoding.config(model={"layer_types": "nats,dense", "num_layers": 8}, nats={"window": 1})
    decoder = decoding.decoder(config, decoding.always(config, 2))
    found = generate(decoder, decoding.prompts([150]), max_new_tokens=20)
    slots = decoder._layouts[-1].by_layer
    assert np.all(slots[::2] <= 32)
    assert np.all(slots[1::2] >= 170)
    assert found.evicted == 0
