"""Selective attention: its layers against the definition in loops, and served as trained."""

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from processes import json_lines

from benchmarks import study
from natsjax import evaluate, kv_fraction
from natsjax.decode.decoder import Decoder, DecodeSettings
from natsjax.decode.generation import generate, prefill
from natsjax.errors import UserError
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.masked import measure
from natsjax.model.attention import Attention, MaskedAttention, RoleSampling
from natsjax.model.inputs import Batch
from natsjax.model.selective import least_masked_end
from natsjax.policies.attention_score import H2O, SnapKV
from natsjax.policies.interval import FullAttention, RandomKeys, SlidingWindow, StreamingLLM
from natsjax.policies.numbers import Calibration, OutOfReachError, selective
from natsjax.policies.selective import LeastMasked
from natsjax.report import picture, results
from natsjax.train.step import Trainer
from pallas_kernels.nats_attention import NO_END

MODEL = {"layer_types": "selective"}


def made(**model):
    """The attention of one layer, its arrays for packed documents with padding, and the batch."""
    attention = Attention(tiny.config(model=MODEL | model), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    if model.get("attention_sinks"):
        attention.sink = attention.sink.replace(jnp.asarray(rng.normal(size=(2, 2)), jnp.float32))
    batch = Batch.from_rows(tiny.packed_batch())
    x = jnp.asarray(rng.normal(size=(*batch.inputs.shape, 16)), jnp.float32)
    # Larger than those of a new model, so that masks are as large as they become.
    query, key, value = (2 * y for y in attention.qkv_proj(x, batch.positions))
    return attention, x, (query, key, value), batch


def defined(query, key, value, batch, *, sink=None, num_keys=None):
    """The definition of arXiv:2410.02703 pair by pair, in the dtype of the arrays; documents one after another.

    Returns:
      The result, the masks of every key after every query, and the keys that each query read.
    """
    out, after, read = np.zeros_like(query), {}, {}
    for b in range(len(query)):
        ends, positions = np.asarray(batch.document_end)[b], np.asarray(batch.positions)[b]
        mask, alive = {}, []
        for t in range(query.shape[1]):
            if ends[t] == 0:
                continue
            if positions[t] == 0:
                mask, alive = {}, []
            alive.append(t)
            mask[t] = query.dtype.type(0)
            read[b, t] = list(alive)
            for k, g in np.ndindex(query.shape[2:4]):
                logits = np.array(
                    [query[b, t, k, g] @ key[b, s, k] / np.sqrt(query.shape[-1]) - mask[s] for s in alive]
                )
                weights = np.exp(logits)
                total = weights.sum() + (0 if sink is None else np.exp(sink[k, g]))
                out[b, t, k, g] = sum(w * value[b, s, k] for w, s in zip(weights, alive, strict=True)) / total
            for s in alive:
                selected = query[b, t, 0, 0] @ key[b, s, 0] / np.sqrt(query.shape[-1])
                if s != t and positions[s] > 0 and selected.real > 0:
                    mask[s] = mask[s] + selected
            after[b, t] = dict(mask)
            if num_keys is not None and len(alive) > num_keys:
                others = [s for s in alive if positions[s] > 0]
                alive.remove(max(others, key=lambda s: (mask[s].real, -s)))
    return out, after, read


def reading(attention, x, arrays, batch, **sampling):
    return MaskedAttention(batch, RoleSampling(**sampling), "selective")(attention, x, *arrays)


def in_float64(arrays):
    return tuple(np.asarray(y, np.float64) for y in arrays)


@pytest.mark.parametrize("model", [{}, {"attention_sinks": True}, {"qk_norm": True}, {"num_kv_heads": 4}], ids=str)
def test_the_layer_is_its_definition(model):
    attention, x, arrays, batch = made(**model)
    sink = np.asarray(attention.sink[...], np.float64) if model.get("attention_sinks") else None
    expected, after, _ = defined(*in_float64(arrays), batch, sink=sink)
    got, roles = reading(attention, x, arrays, batch)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert max(max(masks.values()) for masks in after.values()) > 1  # or nothing was tested
    ends = np.broadcast_to(np.asarray(batch.document_end)[:, None], roles.key_end.shape)
    np.testing.assert_array_equal(roles.key_end, ends)


@pytest.mark.parametrize("num_keys", [1, 2, 5, 30])
def test_a_key_is_dropped_by_its_mask_and_for_good(num_keys):
    attention, x, arrays, batch = made()
    expected, _, read = defined(*in_float64(arrays), batch, num_keys=num_keys)
    rule = {"key_end": jnp.int32(NO_END), "num_keys": jnp.int32(num_keys)}
    got, roles = reading(attention, x, arrays, batch, **rule)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    ends = np.asarray(roles.key_end)
    for (b, t), keys in read.items():
        for k in range(ends.shape[1]):
            assert np.flatnonzero((np.arange(24) <= t) & (t < ends[b, k])).tolist() == keys
    assert roles.lifetime.tolist() == [sum(map(len, read.values()))] * 2


def test_of_equal_masks_the_oldest_goes_and_the_first_token_stays():
    ends = least_masked_end(jnp.zeros((1, 6, 6)), jnp.full((1, 6), 6), jnp.arange(6)[None] == 0, 2)
    assert ends.tolist() == [[6, 3, 4, 5, 6, 6]]


def test_gradients_are_those_of_the_definition():
    """By steps into the complex plane, exact to rounding, in float64: every number of query, key and value."""
    _, _, arrays, batch = made()
    rows = [np.asarray(x)[:1, :9] for x in arrays]
    short = Batch(batch.inputs[:1, :9], batch.positions[:1, :9], jnp.minimum(batch.document_end[:1, :9], 9))
    attention = Attention(tiny.config(model=MODEL), nnx.Rngs(0))
    weight = np.random.default_rng(5).normal(size=rows[0].shape)

    def loss(*arrays):
        out, _ = reading(attention, None, arrays, short)
        return jnp.sum(out * weight)

    got = jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, rows))
    moved = [np.asarray(x, np.complex128) for x in rows]
    for x, gradient in zip(moved, got, strict=True):
        expected = np.zeros(x.shape)
        for index in np.ndindex(x.shape):
            x[index] += 1e-30j
            expected[index] = np.sum(defined(*moved, short)[0] * weight).imag / 1e-30
            x[index] = x[index].real
        np.testing.assert_allclose(gradient, expected, atol=3e-5)
        assert (np.abs(expected) > 1e-3).any()


def test_documents_and_the_future_do_not_matter():
    """A document's results are those that it has alone, whatever comes before, behind and in padding."""
    attention, x, arrays, batch = made()
    got, _ = reading(attention, x, arrays, batch)
    positions, ends = np.asarray(batch.positions), np.asarray(batch.document_end)
    for b, start in np.argwhere((positions == 0) & (ends > 0)):
        index = (start + np.arange(24)) % 24  # the document in front, something else behind
        own = np.arange(24) < ends[b, start] - start
        alone = Batch(batch.inputs, np.arange(24)[None], np.where(own, ends[b, start] - start, 0)[None])
        found = reading(attention, None, [y[b : b + 1, index] for y in arrays], alone)[0][0]
        np.testing.assert_allclose(found[own], got[b, index][own], atol=1e-6)
        later = np.arange(24) >= 2
        changed = [jnp.where(later[:, None, None], 1.0, y[b : b + 1, index].reshape(1, 24, -1, 4)) for y in arrays]
        changed = [y.reshape(1, *x.shape[1:]) for x, y in zip(arrays, changed, strict=True)]
        found = reading(attention, None, changed, alone)[0][0]
        np.testing.assert_allclose(found[own & ~later], got[b, index][own & ~later], atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        {"remat": "full", "attention_gate": True, "rope_scaling": "linear", "rope_scaling_factor": 2.0},
        {"layer_types": "selective,dense", "remat": "dots", "dropout": 0.1},
        {"layer_types": "sliding,selective", "sliding_window": 3, "nope": (False, True), "attention_sinks": True},
    ],
    ids=str,
)
def test_a_run_trains(model):
    trainer = Trainer(tiny.config(model=MODEL | model), tiny.VOCAB_SIZE)
    state, batch, losses = trainer.init(), tiny.packed_batch(batch=4), []
    for _ in range(12):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1


def test_the_masking_head_learns_from_what_others_read():
    """Also where its own result is thrown away."""
    attention, x, arrays, batch = made()

    def of_query(query):
        out, _ = reading(attention, x, (query, *arrays[1:]), batch)
        return jnp.sum(jnp.sin(out[:, :, 1]))

    gradient = np.asarray(jax.grad(of_query)(arrays[0]))
    assert np.abs(gradient[:, :, 0, 0]).max() > 1e-3
    np.testing.assert_array_equal(gradient[:, :, 0, 1], 0)


STEPS = """
import json, sys
import jax, numpy as np
import tiny
from natsjax.model import sharding
from natsjax.train.step import Trainer

batch = tiny.packed_batch(batch=4)
for mesh, remat in json.load(sys.stdin):
    model = {"layer_types": "selective", "attention_sinks": True, "remat": remat, "num_kv_heads": 4}
    config = tiny.config(model=model, mesh=mesh)
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    trainer = Trainer(config, tiny.VOCAB_SIZE, sharding.make_mesh(config.mesh, devices))
    state, losses = trainer.init(), []
    for _ in range(3):
        state, metrics = trainer.step(state, batch)
        losses.append([float(metrics[name]) for name in ("loss", "kv_fraction", "gradient_norm")])
    print(json.dumps(losses), flush=True)
"""


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh_and_on_what_is_recomputed():
    one, eight = json_lines(STEPS, [({"fsdp": 1}, "none"), ({"fsdp": 2, "tensor": 4}, "full")], devices=8)
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"layer_types": "selective,nats"}}, '"selective" layers train without a budget, and "nats" layers'),
        ({"mesh": {"context": 2}}, 'mesh.context = 2: "selective" layers read whole sequences'),
        ({"mesh": {"context": -1, "fsdp": 1}}, "mesh.context = -1"),
        ({"data": {"context_length": 4096}}, "data.context_length = 4096: .* contexts of at most 2048"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(groups, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**{"model": MODEL} | groups)


# --- at a budget ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return decoding.make_run(tmp_path_factory.mktemp("selective") / "run", decoding.config(model=MODEL))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    model = {"layer_types": "selective,dense,sliding,selective", "sliding_window": 6, "num_layers": 4}
    return decoding.make_run(tmp_path_factory.mktemp("mixed") / "run", decoding.config(model=MODEL | model))


CONTEXTS = decoding.packed_contexts()


@pytest.mark.parametrize("layers", ["selective", "selective,dense", "sliding,selective,selective"])
@pytest.mark.parametrize("budget", [0.2, 0.55, 0.7])
def test_the_number_of_keys_for_a_budget_is_by_counting(layers, budget):
    config, lengths = tiny.config(model={"layer_types": layers, "num_layers": 6}), np.array([3, 40, 17])
    window = config.model.sliding_window
    positions = np.concatenate([np.arange(length) for length in lengths])
    full = np.sum(positions + 1)

    def fraction(number):
        by_kind = {
            "selective": np.sum(np.minimum(positions, number) + 1),
            "sliding": np.sum(np.minimum(positions, window) + 1),
            "dense": full,
        }
        return np.mean([by_kind[kind] for kind in config.model.layer_types]) / full

    calibration = Calibration(config, lengths)
    if not fraction(1) <= budget <= fraction(40):
        with pytest.raises(OutOfReachError):
            selective(calibration, budget)
        return
    (number,) = selective(calibration, budget).arguments
    assert abs(fraction(number) - budget) <= min(abs(fraction(n) - budget) for n in range(1, 41)) + 1e-12


def test_only_its_own_layers_are_pruned(mixed):
    found = measure(mixed, CONTEXTS, LeastMasked(3))
    assert found.live_max.tolist() == [[4, 4], [found.live_max[1, 0]] * 2, [7, 7], [4, 4]]
    assert found.live_pairs[1].tolist() == [found.causal_pairs] * 2
    assert kv_fraction.live_fraction(mixed.config) == pytest.approx((3 + kv_fraction.window_fraction([24], 6)) / 4)


def test_as_many_keys_as_there_are_change_nothing(run):
    whole, pruned = measure(run, CONTEXTS, FullAttention()), measure(run, CONTEXTS, LeastMasked(24))
    np.testing.assert_array_equal(pruned.documents.nll, whole.documents.nll)
    assert whole.kv_fraction == pruned.kv_fraction == 1
    fewer = measure(run, CONTEXTS, LeastMasked(3))
    assert fewer.kv_fraction == pytest.approx(measure(run, CONTEXTS, SlidingWindow(3)).kv_fraction)
    assert fewer.perplexity != pytest.approx(whole.perplexity, rel=1e-3)


def test_an_evaluation_meets_its_budgets(run, tmp_path):
    found = {
        mode: evaluate.run(run.workdir.path, loaded=run, budgets=[0.3, 0.6], progress=False, mode=mode)
        for mode in ("masked", "decode")
    }
    rows = {mode: [row for row in one.rows if row["method"] == "selective"] for mode, one in found.items()}
    for one, other in zip(*rows.values(), strict=True):
        assert one["kv_fraction"] == pytest.approx(one["budget"], abs=0.06)
        assert (one["setting"], one["kv_fraction"]) == (other["setting"], pytest.approx(other["kv_fraction"]))
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
        assert other["kv_allocated"] < run.config.data.context_length
    assert [row["budget"] for row in rows["masked"]] == [0.3, 0.6]
    for one in found.values():
        assert {row["method"] for row in one.rows} == {"full", "sliding_window", "streaming_llm", "selective"}
    assert "| selective attention " in found["masked"].summary()
    left_out = [note.split(" is left out: ")[0] for note in found["decode"].notes if "its heads keep different" in note]
    assert left_out == ["random keys", "H2O", "SnapKV", "Ada-SnapKV", "key norm", "KeyDiff"]
    (note,) = [note for note in found["decode"].notes if note.startswith("TOVA is left out: ")]
    assert 'it observes attention, and "selective" layers observe their masks instead' in note
    drawn = picture.compared_rows(results.read(run.workdir.report))  # beside other runs
    assert {row["method"] for row in drawn} == {"full", "selective"}


def test_a_study_measures_it_at_the_budget(run):
    found, role_bias = study.served(run)
    assert found.kv_fraction == pytest.approx(run.config.nats.kv_budget, abs=0.03)
    assert role_bias == 0


def test_dense_runs_go_without_it(tmp_path):
    config = decoding.config(model={"layer_types": "dense", "num_layers": 1}, eval={"num_contexts": 2})
    dense = decoding.make_run(tmp_path / "run", config)
    found = evaluate.run(dense.workdir.path, loaded=dense, budgets=[0.5], progress=False)
    assert "selective" not in {row["method"] for row in found.rows}
    assert not any("selective" in note for note in found.notes)
    with pytest.raises(ValueError, match='reads the masks of "selective" layers, and the model has none'):
        measure(dense, CONTEXTS, LeastMasked(3))


def test_policies_that_tell_heads_apart_are_refused(run):
    with pytest.raises(ValueError, match="its heads keep different keys"):
        measure(run, CONTEXTS, RandomKeys(0.3))
    for policy in (RandomKeys(0.3), H2O(4, 2), SnapKV(6, 2)):
        with pytest.raises(UserError, match='those of "selective" layers the same ones'):
            Decoder.of_run(run, policy)


# --- through the buffer ---


@pytest.mark.parametrize("kind", ["run", "mixed"])
@pytest.mark.parametrize(
    "policy", [FullAttention(), SlidingWindow(3), StreamingLLM(1, 2), LeastMasked(1), LeastMasked(4)], ids=str
)
def test_the_buffer_gives_what_the_mask_gives(kind, policy, request):
    """Packed documents and padding, in chunks; token by token where keys are dropped."""
    run = request.getfixturevalue(kind)
    masked, decoded = measure(run, CONTEXTS, policy), measure_decoding(run, CONTEXTS, policy, chunk=5)
    np.testing.assert_allclose(decoded.documents.nll, masked.documents.nll, rtol=1e-4)
    np.testing.assert_array_equal(decoded.live_pairs, masked.live_pairs)
    np.testing.assert_array_equal(decoded.live_max, masked.live_max)


MODELS = {
    "all": MODEL,
    "mixed": {"layer_types": "dense,selective,sliding", "sliding_window": 6, "attention_sinks": True},
    "no rotary embedding": MODEL | {"nope": (False, False, True), "qk_norm": True, "attention_gate": True},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_chunks_of_any_size_give_the_masked_logits(model):
    config = decoding.config(model=model)
    parameters, rows = decoding.parameters_of(config), decoding.prompts([21, 9, 1, 14])
    expected, _ = decoding.masked_logits(config, parameters, rows)
    for chunk in (1, 4):
        got, _ = decoding.chunked_logits(decoding.decoder(config, parameters), rows, chunk)
        assert decoding.error(got, expected, rows) <= 2e-5


@pytest.mark.parametrize("policy", [None, LeastMasked(20)], ids=str)
@pytest.mark.parametrize("model", ["all", "mixed"])
def test_generated_tokens_are_the_likeliest_of_the_masked_model(model, policy):
    """The prompts are shorter than what is kept, so that what is dropped is dropped after a generated token."""
    config = decoding.config(model=MODELS[model])
    # With these numbers tokens vary: of two keys of one repeated token, masked alike, rounding says which one goes.
    parameters, rows = decoding.parameters_of(config, 1), decoding.prompts([3, 17, 9], seed=1)
    decoder = decoding.decoder(config, parameters, policy)
    found = generate(decoder, rows, max_new_tokens=30)
    assert all(len(set(tokens)) > 4 for tokens in found.tokens)
    decoding.check_generated(config, parameters, rows, found, policy)
    if policy is not None:
        layers = 3 if model == "all" else 1
        lost = sum(max(len(row) + 29 - 20, 0) for row in rows)
        assert found.evicted == 2 * layers * lost
        assert [slots < 40 for slots in found.capacities] == [
            kind == "selective" for kind in config.model.all_layer_types
        ]


def test_a_prompt_is_cut_down_to_the_keys_that_it_has_masked_least():
    config = decoding.config(model=MODEL)
    parameters, rows = decoding.parameters_of(config), decoding.prompts([19, 12])
    decoder = decoding.decoder(config, parameters, LeastMasked(5))
    cache, _ = prefill(decoder, rows)
    tokens, lengths = decoding.padded(rows)
    positions = np.broadcast_to(np.arange(19, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, positions, np.where(positions < lengths[:, None], lengths[:, None], 0).astype(np.int32))
    transformer = nnx.merge(decoder.structure, parameters)
    block = nnx.merge(nnx.graphdef(transformer.blocks), jax.tree.map(lambda x: x[0], parameters["blocks"]))
    x = block.attention_norm(transformer.embed(tokens, batch.previous))
    _, after, _ = defined(*in_float64(block.attention.qkv_proj(x, jnp.asarray(positions))), batch)
    group = cache.buffer[0]
    for b, length in enumerate(lengths):
        given = after[b, length - 1]
        kept = sorted([0, *sorted(range(1, length), key=lambda s: (given[s], -s))[:4]])
        for k in range(2):
            live = np.asarray(group.key_end)[0, b, k] > length
            assert np.asarray(group.key_position)[0, b, k][live].tolist() == kept
            found = np.asarray(group.attention_sum)[0, b, k][live]
            np.testing.assert_allclose(found, [given[s] for s in kept], rtol=1e-4, atol=1e-5)
    assert np.asarray(cache.evicted)[0].tolist() == [[14, 14], [7, 7]]


def test_a_hard_limit_goes_by_its_own_rule(run):
    """``max_kv`` is no budget of masks: it evicts the oldest, as in every model."""
    decoder = Decoder.of_run(run, settings=DecodeSettings(chunk=8, max_kv=6))
    found = generate(decoder, decoding.prompts([12]), max_new_tokens=6)
    assert found.evicted > 0
    assert found.kv_live_max <= 7


DECODE = """
import json, sys
import jax
import decoding
from natsjax.decode.generation import generate
from natsjax.policies import LeastMasked

config = decoding.config(model={"layer_types": "selective,dense,selective"})
parameters = jax.device_get(decoding.parameters_of(config))
rows = decoding.prompts([3, 17, 9, 12])
for mesh in json.load(sys.stdin):
    decoder = decoding.decoder(config, parameters, LeastMasked(6), mesh=mesh)
    found = generate(decoder, rows, max_new_tokens=16)
    print(json.dumps([found.tokens, found.logprobs, found.evicted, found.kv_live]), flush=True)
"""


@pytest.mark.slow
def test_decoding_does_not_depend_on_the_mesh():
    one, eight = json_lines(DECODE, [None, {"data": 2, "fsdp": 2, "tensor": 2}], devices=8)
    assert (eight[0], eight[2], eight[3]) == (one[0], one[2], one[3])
    for a, b in zip(eight[1], one[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
