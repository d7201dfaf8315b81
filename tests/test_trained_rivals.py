"""Rivals of learned roles that are trained in: their layers against their own definitions, and served as trained."""

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from processes import json_lines
from scipy.special import expit

from natsjax import kv_fraction
from natsjax.errors import UserError
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.masked import measure
from natsjax.model import head_roles
from natsjax.model.attention import Attention, MaskedAttention, RoleSampling
from natsjax.model.gated import gated_attention, gates
from natsjax.model.inputs import Batch
from natsjax.policies.nats import Nats
from natsjax.train.step import Trainer

WINDOW = 2  # of tiny's SLIDING tokens
RIVALS = ("gated", "head_roles")


def made(kind, **model):
    """The attention of one layer with a scorer that is not constant, its arrays for a packed batch, and the batch."""
    config = tiny.config(model={"layer_types": kind, **model}, nats={"initial_roles": ()})
    attention = Attention(config, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    scorer = attention.scorer
    if kind == "gated":
        scorer.weight = scorer.weight.replace(jnp.asarray(rng.normal(size=scorer.weight.shape), jnp.float32))
    scorer.bias = scorer.bias.replace(jnp.asarray(rng.normal(size=scorer.bias.shape), jnp.float32))
    if model.get("attention_sinks"):
        attention.sink = attention.sink.replace(jnp.asarray(rng.normal(size=(2, 2)), jnp.float32))
    batch = Batch.from_rows(tiny.packed_batch())
    x = jnp.asarray(rng.normal(size=(*batch.inputs.shape, 16)), jnp.float32)
    return attention, x, attention.qkv_proj(x, batch.positions), batch


def softmax_reading(query, key, value, weight_of, batch, sink=None):
    """``[b, t, k, g, h]`` in float64 by loops; ``weight_of(b, t, k, s)`` multiplies the exponential of a pair."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out, ends = np.zeros(query.shape), np.asarray(batch.document_end)
    for b, t, k, g in np.ndindex(query.shape[:4]):
        keys = [s for s in range(t + 1) if t < ends[b, s]]
        weights = np.array([np.exp(query[b, t, k, g] @ key[b, s, k] * 0.5) * weight_of(b, t, k, s) for s in keys])
        total = weights.sum() + (0 if sink is None else np.exp(sink[k, g]))
        if keys:
            out[b, t, k, g] = sum(w * value[b, s, k] for w, s in zip(weights, keys, strict=True)) / total
    return out


@pytest.mark.parametrize("sinks", [False, True])
def test_a_gate_adds_its_logarithm_to_logits_beyond_the_window(sinks):
    attention, x, (query, key, value), batch = made("gated", attention_sinks=sinks)
    sampling = RoleSampling(noise_key=jax.random.key(1), temperature=jnp.float32(0.5))
    got, roles = MaskedAttention(batch, sampling, "gated")(attention, x, query, key, value)
    scorer = attention.scorer
    logits = np.einsum("bsd,dkr->bksr", x, scorer.weight[...]) + np.asarray(scorer.bias[...])[:, None]
    gate = expit((logits[..., 0] - logits[..., 2]) / 0.5)
    gate = np.where(np.asarray(batch.is_first)[:, None], 1, gate)
    sink = np.asarray(attention.sink[...], np.float64) if sinks else None
    expected = softmax_reading(
        query, key, value, lambda b, t, k, s: 1 if t <= s + WINDOW else gate[b, k, s], batch, sink
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(roles.ids, np.where(gate > 0.5, 0, 2))
    # The penalty is that of the roles that would be served.
    far = np.maximum(np.asarray(batch.document_end) - np.arange(24), 0)[:, None]
    np.testing.assert_array_equal(roles.lifetime, np.where(gate > 0.5, far, np.minimum(far, WINDOW + 1)).sum((0, 2)))


def test_a_window_without_end_is_full_attention():
    _, _, (query, key, value), batch = made("gated")
    end, gate = batch.document_end, jnp.full((*batch.document_end.shape[:1], 2, batch.document_end.shape[1]), 0.3)
    near, far = (gated_attention(query, key, value, gate, window=x, document_end=end) for x in (24, 2**31 - 1))
    np.testing.assert_array_equal(near, far)


@pytest.mark.parametrize("kind", RIVALS)
def test_a_run_begins_halfway_to_its_budget(kind):
    nats = {"initial_roles": (), "kv_budget": 0.35, "window": 4}
    config = tiny.config(model={"layer_types": kind}, nats=nats, data={"context_length": 256})
    bias = np.asarray(Attention(config, nnx.Rngs(0)).scorer.bias[0], np.float64)
    odds = bias[0] - bias[2]
    share = float(head_roles.probability_of_full(jnp.float32(odds))) if kind == "head_roles" else expit(odds)
    found = kv_fraction.random_kv_fraction([256], [4], (share, 0.0, 1 - share))
    assert found == pytest.approx((0.35 + kv_fraction.all_sliding_kv_fraction([256], 4)) / 2, rel=1e-3)
    ramp = tiny.config(model={"layer_types": kind}, nats={"initial_roles": (), "budget_ramp_steps": 5})
    assert kv_fraction.roles_at_start(ramp) == pytest.approx((0.5, 0.0, 0.5))


@pytest.mark.parametrize("kind", RIVALS)
def test_given_fractions_are_of_the_roles_that_there_are(kind):
    for given in ((0.2, 0.8), (0.15, 0.25, 0.6)):
        config = tiny.config(model={"layer_types": kind}, nats={"initial_roles": given})
        assert kv_fraction.roles_at_start(config) == pytest.approx((0.2, 0.0, 0.8))
        bias = np.asarray(Attention(config, nnx.Rngs(0)).scorer.bias[0])
        odds = bias[0] - bias[2]
        share = float(head_roles.probability_of_full(odds)) if kind == "head_roles" else expit(odds)
        assert share == pytest.approx(0.2, rel=1e-5)
    for given in ((0.2, 0.7), (0.5, 0.2, 0.2), (1.0,), (0.25,) * 4):
        with pytest.raises(UserError, match="two fractions must add up to 1, one for each of GLOBAL, SLIDING"):
            tiny.config(model={"layer_types": kind}, nats={"initial_roles": given})
    with pytest.raises(UserError, match="three fractions must add up to 1, one for each of GLOBAL, LOCAL, SLIDING"):
        tiny.config(nats={"initial_roles": (0.2, 0.8)})


def test_open_and_shut_gates_are_full_attention_and_a_window():
    _, _, (query, key, value), batch = made("gated")
    end = batch.document_end
    for given, weight_of in ((1.0, lambda *_: 1), (1e-38, lambda b, t, k, s: t <= s + WINDOW)):
        gate = jnp.full((*end.shape[:1], 2, end.shape[1]), given)
        got = gated_attention(query, key, value, gate, window=WINDOW, document_end=end)
        np.testing.assert_allclose(got, softmax_reading(query, key, value, weight_of, batch), atol=1e-5)


def test_gates_are_open_at_first_tokens_and_never_quite_shut():
    logits = jnp.array([[[[0.0, -1e9, 300.0], [1.0, -1e9, 1.0], [0.0, -1e9, 300.0]]]])
    found = np.asarray(gates(logits, jnp.array([[True, False, False]]), 1.0))
    np.testing.assert_allclose(found, [[[1.0, 0.5, np.finfo(np.float32).tiny]]])


def test_a_head_mixes_both_readings_by_a_draw_from_the_hard_concrete_distribution():
    attention, x, (query, key, value), batch = made("head_roles")
    noise = jax.random.key(3)
    got, roles = MaskedAttention(batch, RoleSampling(noise_key=noise), "head_roles")(attention, x, query, key, value)
    bias = np.asarray(attention.scorer.bias[...], np.float64)
    log_alpha = bias[:, 0] - bias[:, 2]
    uniform = np.asarray(jax.random.uniform(noise, (2,), minval=1e-6, maxval=1 - 1e-6), np.float64)
    concrete = expit((np.log(uniform) - np.log(1 - uniform) + log_alpha) * 1.5)  # arXiv:1712.01312, equations 10, 11
    drawn = np.clip(concrete * 1.2 - 0.1, 0, 1)
    first = np.asarray(batch.is_first)
    full = softmax_reading(query, key, value, lambda *_: 1, batch)
    near = softmax_reading(query, key, value, lambda b, t, k, s: first[b, s] or t <= s + WINDOW, batch)
    mixed = drawn[:, None, None]
    np.testing.assert_allclose(got, mixed * full + (1 - mixed) * near, atol=1e-5)
    np.testing.assert_array_equal(
        roles.ids, np.where(first[:, None] | (log_alpha > 0)[:, None], 0, 2) * np.ones((1, 1, first.shape[1]), int)
    )
    # The penalty is the expected number of pairs, by the distribution's own probability of being above 0.
    pairs = [np.zeros(2), np.zeros(2)]
    for b, s in np.argwhere(np.asarray(batch.document_end) > 0):
        far = int(batch.document_end[b, s]) - s
        pairs[0] += far
        pairs[1] += far if first[b, s] else min(far, WINDOW + 1)
    probability = expit(log_alpha - 2 / 3 * np.log(0.1 / 1.1))
    np.testing.assert_allclose(roles.lifetime, probability * pairs[0] + (1 - probability) * pairs[1], rtol=1e-5)


def test_draws_are_0_or_1_with_the_stated_probabilities():
    drawn = np.asarray(head_roles.hard_concrete(jnp.full(200_000, 0.7), jax.random.key(0)))
    assert (drawn > 0).mean() == pytest.approx(float(head_roles.probability_of_full(jnp.float32(0.7))), abs=5e-3)
    assert (drawn == 1).mean() > 0.2
    assert (drawn == 0).mean() > 0.05


@pytest.mark.parametrize("kind", RIVALS)
def test_the_scorer_learns_from_the_loss_and_from_the_penalty(kind):
    """Every parameter of the scorer but LOCAL's takes part."""
    attention, x, arrays, batch = made(kind)
    graph, state = nnx.split(attention)

    def of_parameters(state, part):
        attend = MaskedAttention(batch, RoleSampling(noise_key=jax.random.key(1)), kind)
        out, roles = attend(nnx.merge(graph, state), x, *arrays)
        return jnp.sum(jnp.sin(out)) if part == "loss" else jnp.sum(roles.lifetime)

    for part in ("loss", "penalty"):
        gradient = nnx.to_pure_dict(jax.grad(of_parameters)(state, part))["scorer"]
        for values in gradient.values():
            assert (np.abs(values[..., [0, 2]]) > 1e-7).all()
            np.testing.assert_array_equal(values[..., 1], 0)


@pytest.mark.parametrize("kind", RIVALS)
def test_a_run_trains_and_is_served_by_the_roles_of_its_gates(kind, tmp_path):
    config = tiny.config(model={"layer_types": f"{kind},sliding", "sliding_window": 3}, nats={"initial_roles": ()})
    trainer = Trainer(config, tiny.VOCAB_SIZE)
    state, batch = trainer.init(), tiny.packed_batch(batch=4)
    losses = []
    for _ in range(12):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert np.asarray(metrics["role_fractions"])[..., 1].max() == 0  # no LOCAL
    parameters = jax.device_get(state.parameters)
    scorer, rng = parameters["blocks"]["attention"]["scorer"], np.random.default_rng(1)
    for name, values in scorer.items():  # gates of both kinds, heads of both
        scorer[name] = rng.normal(size=values.shape).astype(np.float32)
    scorer["bias"][0, :, 0] = scorer["bias"][0, :, 2] + [2.0, -1.0]
    run = decoding.make_run(tmp_path / "run", config, parameters)
    contexts = run.data.contexts("validation", 3)
    fractions = []
    for policy in (Nats(-5.0), Nats(0.0), Nats(5.0)):
        masked, through = measure(run, contexts, policy), measure_decoding(run, contexts, policy, chunk=5)
        np.testing.assert_allclose(through.live_pairs, masked.live_pairs)
        assert through.perplexity == pytest.approx(masked.perplexity, rel=1e-4)
        fractions.append(masked.kv_fraction)
    assert np.diff(fractions).min() > 0.05


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"layer_types": "nats,gated"}}, "nats and gated layers learn roles in different ways"),
        ({"nats": {"windows": (1, 2), "initial_roles": ()}}, '"gated" layers have one window'),
        ({"mesh": {"context": 2}}, 'mesh.context = 2: "gated" layers read whole sequences'),
    ],
)
def test_what_they_cannot_do_is_one_sentence(groups, message):
    with pytest.raises(UserError, match=message):
        tiny.config(**{"model": {"layer_types": "gated"}} | groups)


STEPS = """
import json, sys
import jax, numpy as np
import tiny
from natsjax.model import sharding
from natsjax.train.step import Trainer

batch = tiny.packed_batch(batch=4)
for kind, mesh, remat in json.load(sys.stdin):
    model = {"layer_types": kind, "attention_sinks": True, "remat": remat}
    config = tiny.config(model=model, nats={"initial_roles": ()}, mesh=mesh)
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
    ways = (({"fsdp": 1}, "none"), ({"fsdp": 2, "tensor": 2}, "full"))
    found = json_lines(STEPS, [(kind, *way) for kind in RIVALS for way in ways], devices=4)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[3], found[2], rtol=1e-5)
