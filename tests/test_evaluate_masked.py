"""A measured pass: what it counts is counted here pair by pair, what it sums is summed here by hand."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.config import Config
from natsjax.data import ByteTokenizer, PackedSource
from natsjax.evaluate.masked import (
    Measurement,
    chosen_roles,
    live_keys,
    measure,
    sum_by_document,
    sum_by_position,
)
from natsjax.model.inputs import Batch
from natsjax.policies.interval import FullAttention, SlidingWindow, StreamingLLM
from natsjax.policies.nats import Nats, SampledNats
from natsjax.report.intervals import bootstrap_interval, paired_ratio
from natsjax.report.results import MIN_DOCUMENTS
from natsjax.runs.data import RunData
from natsjax.runs.load import LoadedRun
from natsjax.runs.workdir import Workdir
from natsjax.train.step import Trainer

T = 24
WINDOW = 2
POLICIES = [FullAttention(), Nats(), Nats(0.7), SlidingWindow(3), StreamingLLM(2, 1)]


class Documents:
    """A few documents of random bytes."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.int64)

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 256, self.lengths[index]).astype(np.int32)


@pytest.fixture(scope="module")
def contexts():
    """Seven packed contexts; the last one is half padding."""
    tokenizer = ByteTokenizer()
    source = PackedSource(
        Documents([9, 30, 14, 5, 50, 40]), context_length=T, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, seed=0
    )
    rows = source.rows(0, 7)
    for name, padding in dict.fromkeys(rows, 0).items() | {("document_id", -1)}:
        rows[name][-1, T // 2 :] = padding
    rows["document_end"][-1] = np.minimum(rows["document_end"][-1], T // 2)
    rows["loss_weight"][-1, T // 2 - 1] = 0
    return rows


@functools.cache
def make_run(attention="nats", final_noise=1.0):
    """Two layers, two KV heads, scorers that choose every role."""
    config = Config.from_dict(
        {
            "model": {"layer_types": attention, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2}
            | {"head_dim": 4, "mlp_dim": 16},
            "nats": {"window": WINDOW, "final_noise": final_noise},
            "data": {"input": "nothing", "context_length": T},
            "eval": {"batch_size": 3},
        }
    )
    tokenizer = ByteTokenizer()
    trainer = Trainer(config, tokenizer.vocab_size)
    parameters = trainer.init().parameters
    if attention == "nats":
        tiny.spread_scorer(parameters)
    data = RunData(tokenizer, types.SimpleNamespace(), lambda split, count: {}, np.array([8]), "bytes", "0" * 64)
    return LoadedRun(Workdir("unused"), config, trainer.structure, parameters, 0, data, trainer.mesh)


@pytest.fixture(scope="module")
def run():
    return make_run()


def count_live(contexts, is_read):
    """Keys that each query reads, int ``[n, t]``, from ``is_read(n, t, s)`` within documents."""
    live = np.zeros(contexts["inputs"].shape, int)
    for n, ends in enumerate(contexts["document_end"]):
        for s in range(T):
            for t in range(s, int(ends[s])):
                live[n, t] += is_read(n, t, s)
    return live


def nats_reads(roles):
    """``is_read`` from the definition of the roles int ``[n, t]`` of one layer and head."""

    def is_read(n, t, s):
        role = roles[n, s]
        return role == 0 or (role == 1 and not (roles[n, s + 1 : t] == 0).any()) or (role == 2 and t <= s + WINDOW)

    return is_read


def check_counts(found, contexts, live):
    """``live`` int ``[l, k, n, t]``."""
    valid = contexts["document_end"] > 0
    causal = count_live(contexts, lambda n, t, s: True)
    assert found.num_queries == valid.sum()
    assert found.causal_pairs == causal.sum()
    assert found.mean_context == pytest.approx(causal.sum() / valid.sum())
    np.testing.assert_array_equal(found.live_pairs, live.sum(axis=(2, 3)))
    np.testing.assert_array_equal(found.live_max, live.max(axis=(2, 3)))
    np.testing.assert_allclose(found.live_mean, live.sum(axis=(2, 3)) / valid.sum())
    assert found.kv_fraction == pytest.approx(live.sum() / (causal.sum() * live.shape[0] * live.shape[1]))


@pytest.mark.parametrize("role_bias", [0.0, 0.7, -1.0, 50.0, -50.0])
def test_nats_counts_are_those_of_the_roles(run, contexts, role_bias):
    roles = chosen_roles(run, contexts, Nats(role_bias))
    if role_bias == 0:
        assert set(np.unique(roles)) == {0, 1, 2}
    live = np.array(
        [[count_live(contexts, nats_reads(head)) for head in layer] for layer in roles.transpose(1, 2, 0, 3)]
    )
    check_counts(measure(run, contexts, Nats(role_bias)), contexts, live)


@pytest.mark.parametrize(
    ("policy", "reads"),
    [
        (FullAttention(), lambda distance, position: True),
        (SlidingWindow(3), lambda distance, position: distance <= 3),
        (StreamingLLM(2, 1), lambda distance, position: distance <= 1 or position < 2),
    ],
)
@pytest.mark.parametrize("attention", ["nats", "dense"])
def test_interval_counts_are_those_of_the_policy(contexts, policy, reads, attention):
    live = count_live(contexts, lambda n, t, s: reads(t - s, contexts["positions"][n, s]))
    found = measure(make_run(attention), contexts, policy)
    check_counts(found, contexts, np.broadcast_to(live, (2, 2, *live.shape)))
    if policy == FullAttention():
        assert found.kv_fraction == 1


def test_perplexity_bytes_and_accuracy_are_those_of_a_hand_computation(run, contexts):
    logits = np.asarray(run.model(Batch.from_rows(contexts))[0], np.float64)
    found = measure(run, contexts, Nats())
    nll, text_nll, right, size, documents = 0.0, 0.0, 0, 0, {}
    for n, t in np.argwhere(contexts["loss_weight"] > 0):
        target = contexts["targets"][n, t]
        loss = np.log(np.exp(logits[n, t]).sum()) - logits[n, t, target]
        text_nll += loss if target < 256 else 0.0  # EOS is no text
        nll, right, size = nll + loss, right + (logits[n, t].argmax() == target), size + (target < 256)
        documents[contexts["document_id"][n, t]] = documents.get(contexts["document_id"][n, t], 0) + loss
    total = contexts["loss_weight"].sum()
    assert found.perplexity == pytest.approx(np.exp(nll / total), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(text_nll / np.log(2) / size, rel=1e-5)
    assert found.accuracy == pytest.approx(right / total)
    assert found.documents.tokens.sum() == total
    assert found.documents.ids.tolist() == sorted(documents)
    np.testing.assert_allclose(found.documents.nll, [documents[i] for i in sorted(documents)], rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_batch_size_changes_nothing(run, contexts, policy, batch_size):
    config = dataclasses.replace(run.config, eval=dataclasses.replace(run.config.eval, batch_size=batch_size))
    expected = measure(run, contexts, policy)
    found = measure(dataclasses.replace(run, config=config), contexts, policy)
    np.testing.assert_array_equal(found.live_pairs, expected.live_pairs)
    np.testing.assert_array_equal(found.live_max, expected.live_max)
    np.testing.assert_allclose(found.documents.nll, expected.documents.nll, rtol=1e-5)
    np.testing.assert_allclose(found.positions.nll, expected.positions.nll, rtol=1e-5)
    assert found.causal_pairs == expected.causal_pairs


def test_sums_by_position_are_those_of_a_hand_computation(run, contexts):
    logits = np.asarray(run.model(Batch.from_rows(contexts))[0], np.float64)
    found = measure(run, contexts, Nats())
    sums, edges = found.positions, found.positions.edges
    assert edges.tolist() == [1, 2, 3, 4, 6, 8, 11, 16, 23, T + 1]
    ids = found.documents.ids.tolist()
    expected = {name: np.zeros((len(ids), len(edges) - 1)) for name in ("nll", "tokens", "correct")}
    for n, t in np.argwhere(contexts["loss_weight"] > 0):
        # What a prediction can look back at: the tokens of its document up to its own query.
        before = sum(contexts["document_end"][n, s] == contexts["document_end"][n, t] for s in range(t + 1))
        (bucket,) = np.flatnonzero((edges[:-1] <= before) & (before < edges[1:]))
        here, target = (ids.index(contexts["document_id"][n, t]), bucket), contexts["targets"][n, t]
        expected["nll"][here] += np.log(np.exp(logits[n, t]).sum()) - logits[n, t, target]
        expected["tokens"][here] += 1
        expected["correct"][here] += logits[n, t].argmax() == target
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(sums, name), values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(getattr(sums, name).sum(axis=1), getattr(found.documents, name), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5000))
def test_every_position_lies_in_one_bucket(length):
    contexts = {
        "inputs": np.zeros((1, length), np.int32),
        "positions": np.arange(length, dtype=np.int32)[None],
        "document_id": np.zeros((1, length), np.int32),
        "loss_weight": np.ones((1, length), np.float32),
    }
    sums = sum_by_position(contexts, np.ones((1, length)), np.ones((1, length), bool))
    assert (sums.edges[0], sums.edges[-1]) == (1, length + 1)
    np.testing.assert_array_equal(sums.tokens[0], np.diff(sums.edges))
    assert (np.diff(sums.edges) > 0).all()
    assert len(sums.edges) <= 2 * np.log2(length) + 3


def test_sampled_roles_differ_between_seeds_and_batches(run, contexts):
    same = {name: np.repeat(values[:1], 6, axis=0) for name, values in contexts.items()}
    first, again, other = (chosen_roles(run, same, SampledNats(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[:3] != first[3:]).any()


def test_where_the_noise_fades_to_zero_sampled_roles_are_the_most_likely_ones(contexts):
    run = make_run(final_noise=0.0)
    np.testing.assert_array_equal(chosen_roles(run, contexts, SampledNats(1)), chosen_roles(run, contexts, Nats()))


def test_a_dense_model_has_no_roles_to_read(contexts):
    with pytest.raises(ValueError, match="dense attention has none"):
        measure(make_run("dense"), contexts, Nats())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=8, max_size=8), min_size=1, max_size=3))
def test_live_keys_counts(ends):
    index = np.arange(8)
    visible = (index[None, :, None] >= index) & (index[None, :, None] < np.array(ends)[:, None, :])
    np.testing.assert_array_equal(live_keys(jnp.array(ends, jnp.int32)), visible.sum(axis=-1))


def test_bits_per_byte_are_those_of_lm_evaluation_harness():
    """The text's tokens from BOS on over its bytes, without EOS: ``-loglikelihood_rolling / bytes / ln 2`` there."""
    tokenizer = ByteTokenizer()
    text = "köln"  # 5 bytes
    ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
    nll = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 64.0]])
    contexts = {"targets": np.array([ids[1:]]), "loss_weight": np.ones((1, 6)), "document_id": np.zeros((1, 6), int)}
    found = sum_by_document(contexts, nll, nll > 0, tokenizer)
    assert (found.nll, found.text_nll, found.tokens, found.bytes) == (79.0, 15.0, 6.0, 5.0)
    measurement = Measurement(found, None, np.ones((1, 1)), np.ones((1, 1)), 1, 1)
    assert measurement.bits_per_byte == pytest.approx(15 / np.log(2) / 5)
    assert measurement.perplexity == pytest.approx(np.exp(79 / 6))  # the end is predicted, and counts there


DOCUMENTS = st.lists(st.tuples(st.floats(0.1, 5), st.integers(1, 50)), min_size=MIN_DOCUMENTS, max_size=30)


@settings(max_examples=30, deadline=None)
@given(DOCUMENTS, st.integers(0, 3))
def test_the_bootstrap_interval_lies_within_the_documents_and_repeats(documents, seed):
    ratio, tokens = np.array(documents).T
    low, high = bootstrap_interval(ratio * tokens, tokens, num_samples=200, seed=seed)
    if np.isnan(low):  # all alike
        assert np.ptp(ratio) < 1e-3
        return
    assert ratio.min() - 1e-9 <= low <= high <= ratio.max() + 1e-9
    assert (low, high) == bootstrap_interval(ratio * tokens, tokens, num_samples=200, seed=seed)
    scaled = bootstrap_interval(3 * ratio * tokens, tokens, num_samples=200, seed=seed)
    np.testing.assert_allclose(scaled, (3 * low, 3 * high))


@pytest.mark.parametrize(
    ("values", "num_samples", "known"),
    [
        ([6.0], 1000, False),
        ([6.0, 5.0], 1000, False),
        (range(1, MIN_DOCUMENTS), 1000, False),
        (range(1, MIN_DOCUMENTS + 1), 1000, True),
        (range(1, 30), 39, False),
        (range(1, 30), 40, True),
        ([6.0] * 30, 1000, False),  # all alike: 100 % right, or the same text thirty times
    ],
)
def test_where_too_little_is_known_there_is_no_interval(values, num_samples, known):
    values = np.array(values, float)
    low, high = bootstrap_interval(values, np.full(len(values), 4.0), num_samples=num_samples, seed=0)
    assert (low < high) if known else (np.isnan(low) and np.isnan(high))


def test_the_ratio_is_that_of_perplexities_on_the_same_documents():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, 12).astype(float)
    harder = rng.uniform(2, 6, 12) * tokens  # documents differ by far more than methods do
    gain = rng.uniform(0.08, 0.12, 12) * tokens
    ratio, low, high = paired_ratio(harder - gain, harder, tokens, num_samples=2000, seed=1)
    assert ratio == pytest.approx(np.exp(-gain.sum() / tokens.sum()), rel=1e-12)
    assert np.exp(-0.12) < low < ratio < high < np.exp(-0.08)
    # Drawing documents for both at once, written out.
    samples = np.random.default_rng(5).integers(0, 12, (4000, 12))
    theirs, mine = (np.array([nll[of].sum() / tokens[of].sum() for of in samples]) for nll in (harder, harder - gain))
    drawn = np.exp(mine - theirs)
    assert low < np.quantile(drawn, 0.05)
    assert high > np.quantile(drawn, 0.95)


def test_the_bootstrap_interval_of_several_sums_is_that_of_each():
    """A document without tokens in one of them is none there."""
    rng = np.random.default_rng(0)
    numerator, denominator = rng.uniform(1, 2, (15, 3)), rng.integers(1, 4, (15, 3)).astype(float)
    denominator[:5, 0] = 0
    denominator[:6, 1] = 0
    low, high = bootstrap_interval(numerator, denominator, num_samples=100, seed=3)
    for column in (0, 2):
        one = bootstrap_interval(numerator[:, column], denominator[:, column], num_samples=100, seed=3)
        assert (low[column], high[column]) == pytest.approx(one)
    assert np.isnan([low[1], high[1]]).all()


@pytest.mark.parametrize(("count", "least"), [(10, 0.9), (40, 0.9)])
def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says(count, least):
    """95 % of 400 intervals, give or take 2.2 %; plain percentiles of ten documents cover in 88 %."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(400):
        tokens = np.exp(rng.normal(0, 0.5, count))
        low, high = bootstrap_interval(tokens * rng.normal(2.0, 0.3, count), tokens, num_samples=300, seed=seed)
        covered += low <= 2.0 <= high
    assert least <= covered / 400 <= 0.98
