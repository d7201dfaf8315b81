"""Rivals against their own definition: tables of scores and choices, and whole models in plain numpy.

The tables' choices were made by the official code (github.com/FasterDecoding/SnapKV, ``update_kv`` with ``maxpool`` and
a kernel of 7; github.com/FMInference/H2O, ``H2OKVCache_LayerWise``), fed with these scores. Those of TOVA, key norm,
KeyDiff and Ada-KV were made by hand, from the definitions in their papers.
"""

import dataclasses
import functools

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rival_oracles import NumpyModel, ada_budgets, h2o, key_diff, key_norm, keydiff_score, snapkv, tova

from natsjax.decode import allocation, buffer
from natsjax.decode.buffer import UNTIL_GLOBAL, NewKeys
from natsjax.decode.generation import prefill
from natsjax.evaluate.decoded import measure_decoding
from natsjax.evaluate.masked import measure
from natsjax.policies.attention_score import H2O, TOVA, AdaSnapKV, SnapKV
from natsjax.policies.interval import FullAttention, RandomKeys, StreamingLLM
from natsjax.policies.key_score import KeyDiff, KeyNorm
from natsjax.policies.numbers import fraction_for_budget
from pallas_kernels.nats_attention import NO_END

CONFIG = decoding.config(model={"layer_types": "dense"})
PARAMETERS = decoding.parameters_of(CONFIG)
MODEL = NumpyModel(CONFIG, PARAMETERS)


def keys_of(heads, positions, attention_sum, seen=None, *, keys=None, forgets=None):
    """Keys of one layer and row on their way into the buffer: ``attention_sum [k, t]``, ``keys [k, t, 4]``."""
    shape = (1, 1, heads, len(positions))
    wide = jnp.zeros((*shape, 4)) if keys is None else jnp.asarray(keys, jnp.float32)[None, None]
    attention_sum = jnp.asarray(attention_sum, jnp.float32).reshape(shape)
    return NewKeys(
        wide,
        wide,
        jnp.broadcast_to(jnp.asarray(positions, jnp.int32), shape),
        jnp.full(shape, NO_END),
        jnp.full(shape[:3], UNTIL_GLOBAL),
        attention_sum,
        None if seen is None else jnp.asarray(seen, jnp.float32)[None, None],
        None if forgets is None else jnp.full(shape[:3], forgets),
    )


def buffer_of(heads, slots):
    sizes = {"batch": 1, "num_kv_heads": heads, "head_dim": 4, "dtype": "float32", "block": slots}
    return allocation.empty([1], [slots], **sizes, format="transposed", adds_up=True)[0]


def held(group, at):
    """Positions that each head of the first row holds, by slot."""
    pairs = zip(np.asarray(group.key_position)[0, 0], np.asarray(group.key_end)[0, 0], strict=True)
    return [position[end > at].tolist() for position, end in pairs]


def kept_of_prompt(policy, attention_sum):
    """What the heads keep of a prompt whose keys received this, ``attention_sum [k, s]``; free slots hold anything."""
    length = np.shape(attention_sum)[1]
    attention_sum = np.pad(np.asarray(attention_sum, np.float32), ((0, 0), (0, 3)), constant_values=9)[None]
    position = np.broadcast_to(np.arange(length + 3, dtype=np.int32), attention_sum.shape)
    end = np.where(position < length, NO_END, length).astype(np.int32)
    arrays = policy.scores(*map(jnp.asarray, (position, end, attention_sum)), jnp.full((1, 1, 1), length))
    result = []
    for first, second in zip(*(np.asarray(x)[0, :, :length] for x in arrays), strict=True):
        leaves = np.lexsort((second, first))[: max(length - policy.num_keys, 0)]
        result.append(sorted(set(range(length)) - set(leaves.tolist())))
    return result


@pytest.mark.parametrize(
    ("keys", "observed", "scores", "kept"),
    [
        (
            6,
            2,
            [
                [0.30, 0.05, 0.10, 0.05, 0.05, 0.02, 0.01, 0.03, 0.02, 0.01, 0.60, 0.70],
                [0.02, 0.05, 0.01, 0.04, 0.03, 0.20, 0.02, 0.01, 0.06, 0.40, 0.90, 0.10],
            ],
            [[0, 1, 2, 3, 10, 11], [6, 7, 8, 9, 10, 11]],
        ),
        (
            9,
            2,
            [
                [0.05, 0.04, 0.03, 0.06, 0.02, 0.40, 0.02, 0.01, 0.02, 0.03, 0.80, 0.90],
                [0.20, 0.05, 0.02, 0.03, 0.01, 0.02, 0.01, 0.02, 0.03, 0.04, 0.50, 0.99],
            ],
            [[2, 3, 4, 5, 6, 7, 8, 10, 11], [0, 1, 2, 3, 4, 8, 9, 10, 11]],
        ),
        # Where the best seven are alike the original takes any; here the newest. The window's own scores are nothing.
        (
            5,
            2,
            [[0.1, 0.1, 0.9, *[0.1] * 7, 2.0, 3.0], [*[0.1] * 10, 2.0, 3.0]],
            [[3, 4, 5, 10, 11], [7, 8, 9, 10, 11]],
        ),
        (12, 2, [[0.5] * 12], [[*range(12)]]),  # a prompt within the budget
        (30, 20, [[0.5] * 12], [[*range(12)]]),  # within the observation window
        (13, 11, [[0.5] * 12], [[*range(12)]]),
    ],
)
def test_snapkv_drops_the_window_and_pools_the_rest(keys, observed, scores, kept):
    assert kept_of_prompt(SnapKV(keys, observed), scores) == kept


def test_snapkv_knows_neighbors_by_their_age():
    """Slots in any order, free ones with anything in them: the choice is the same."""
    rng = np.random.default_rng(0)
    policy, at = SnapKV(9, 3), jnp.full((1, 1, 1), 16)
    attention_sum, ends = rng.random(20).astype(np.float32), np.where(np.arange(20) < 16, NO_END, 16)
    attention_sum[16:] = 9

    def order(slots):
        arrays = (x[slots][None, None] for x in (np.arange(20, dtype=np.int32), ends.astype(np.int32), attention_sum))
        first = np.asarray(policy.scores(*map(jnp.asarray, arrays), at)[0])[0, 0]
        return first[np.argsort(slots)][:16].tolist()

    shuffled = rng.permutation(20)
    assert order(shuffled) == order(np.arange(20))
    assert order(shuffled)[:13] == [attention_sum[:13][max(0, s - 3) : s + 4].max() for s in range(13)]


def test_h2o_adds_up_and_evicts_as_its_code():
    """A prompt of six tokens, then four more: what slots received of each, and what was kept."""
    policy, limit = H2O(4, 2), jnp.int32(4)
    prompt = [[1.98, 2.39, 0.41, 1.01, 0.06, 0.14], [1.48, 1.38, 2.08, 0.23, 0.64, 0.19]]
    assert kept_of_prompt(policy, prompt) == [[0, 1, 4, 5], [0, 2, 4, 5]]
    write = jax.jit(buffer.write_chunk)
    group, evicted = write(buffer_of(2, 6), keys_of(2, range(6), prompt), jnp.array([6]), policy, limit)
    assert held(group, 6) == [[0, 1, 4, 5], [0, 2, 4, 5]]
    assert np.all(np.asarray(evicted) == 2)
    steps = [
        ([[0.16, 0.02, 0.79, 0.01, 0.01], [0.01, 0.9, 0.06, 0.02, 0.01]], [[0, 1, 5, 6], [0, 2, 5, 6]]),
        ([[0.39, 0.02, 0.01, 0.57, 0.02], [0.03, 0.06, 0.02, 0.05, 0.84]], [[0, 1, 6, 7], [0, 2, 6, 7]]),
        ([[0.02, 0.05, 2.71, 0.41, 0.31], [0.55, 0.13, 0.13, 0.08, 0.12]], [[0, 6, 7, 8], [0, 2, 7, 8]]),
        ([[0.03, 0.01, 0.02, 0.89, 0.05], [0.0, 0.79, 2.4, 0.0, 0.15]], [[0, 6, 8, 9], [2, 7, 8, 9]]),
    ]
    for token, (weights, kept) in enumerate(steps, 6):
        weights = np.array(weights)
        seen = np.pad(weights[:, :4], ((0, 0), (0, 2)))
        new = keys_of(2, [token], weights[:, 4], seen)
        group, _ = write(group, new, jnp.array([token + 1]), policy, limit)
        assert held(group, token + 1) == kept


def test_h2o_lets_the_oldest_of_those_alike_go():
    assert kept_of_prompt(H2O(4, 2), [[0.5] * 6, [0.5, 0.5, 0.4, 0.4, 0.1, 0.1]]) == [[2, 3, 4, 5], [0, 1, 4, 5]]


def test_tova_looks_at_the_last_query_alone():
    """Over all heads; its own key is one of those that may go, and what earlier queries looked at is forgotten."""
    policy, limit = TOVA(4), jnp.int32(4)
    last = [[0.10, 0.30, 0.05, 0.20, 0.15, 0.20], [0.30, 0.02, 0.28, 0.10, 0.20, 0.10]]
    joined = np.broadcast_to(np.sum(last, axis=0), (2, 6))  # 0.40 0.32 0.33 0.30 0.35 0.30
    write = jax.jit(buffer.write_chunk)
    group, _ = write(buffer_of(2, 6), keys_of(2, range(6), joined), jnp.array([6]), policy, limit)
    assert held(group, 6) == [[0, 1, 2, 4]] * 2
    steps = [
        ([0.05, 0.60, 0.50, 0.45, 0.40], [1, 2, 4, 6]),  # the first of all, though it had the most before
        ([0.50, 0.60, 0.55, 0.20, 0.15], [1, 2, 4, 6]),  # its own key
        ([0.50, 0.10, 0.55, 0.40, 0.45], [1, 4, 6, 8]),
    ]
    for token, (weights, kept) in enumerate(steps, 6):
        seen = np.pad(weights[:4], (0, 2))
        new = keys_of(2, [token], [[weights[4]]] * 2, [seen] * 2, forgets=True)
        group, _ = write(group, new, jnp.array([token + 1]), policy, limit)
        assert held(group, token + 1) == [kept] * 2


def along(degrees, length=1.0):
    """Keys of these directions in a plane, ``[t, 4]``."""
    angle = np.radians(degrees)
    flat = np.multiply(length, [np.cos(angle), np.sin(angle)]).T
    return np.pad(flat, ((0, 0), (0, 2)))


def test_key_norm_keeps_the_short_keys():
    """Each head its own; of equal ones the oldest goes, and a long new key goes at once."""
    keys = [along([0] * 5, [3, 1, 2, 5, 4]), along([0, 90, 180, 270, 30], [2, 2, 1, 3, 2])]
    policy, limit = KeyNorm(3), jnp.int32(3)
    write = jax.jit(buffer.write_chunk)
    group, _ = write(buffer_of(2, 6), keys_of(2, range(5), np.zeros((2, 5)), keys=keys), jnp.array([5]), policy, limit)
    assert held(group, 5) == [[0, 1, 2], [1, 2, 4]]
    new = keys_of(2, [5], np.zeros((2, 1)), keys=[along([7], 2.5), along([7], 2.1)])
    group, _ = write(group, new, jnp.array([6]), policy, limit)
    assert held(group, 6) == [[1, 2, 5], [1, 2, 4]]


def test_key_diff_keeps_what_is_least_like_the_mean_direction():
    """Lengths count for nothing; after a key has gone the mean is another."""
    keys = [along([0, 10, 20, 90], [9, 1, 1, 1]), along([0, 180, 5, -5])]
    # Mean directions: 27.4 degrees (of the sum 2.925, 1.516), and 0.
    policy = KeyDiff(2)
    assert np.argsort(keydiff_score(keys[0], range(4))).tolist() == [2, 1, 0, 3]
    write = jax.jit(buffer.write_chunk)
    new = keys_of(2, range(4), np.zeros((2, 4)), keys=keys)
    group, _ = write(buffer_of(2, 6), new, jnp.array([4]), policy, jnp.int32(2))
    assert held(group, 4) == [[0, 3], [1, 3]]
    # 0, 90 and 100 have theirs at 67.4, and 0 is the farthest now; 180, -5 and 150 at 154.6, near the new key.
    new = keys_of(2, [4], np.zeros((2, 1)), keys=[along([100]), along([150])])
    group, _ = write(group, new, jnp.array([5]), policy, jnp.int32(2))
    assert held(group, 5) == [[0, 4], [1, 3]]


@pytest.mark.parametrize(
    ("votes", "base", "safeguard", "budgets"),
    [
        # Of the eight with the most votes: six and two.
        ([[9, 8, 7, 6, 5, 4, 0, 0], [4.5, 3.5, 1, 1, 1, 1, 1, 1]], 4, 0.0, [6, 2]),
        ([[9, 8, 7, 6, 5, 4, 0, 0], [4.5, 3.5, 1, 1, 1, 1, 1, 1]], 4, 0.2, [6, 2]),  # 5.6 and 2.4
        ([[9, 8, 7, 6, 5, 4, 0, 0], [4.5, 3.5, 1, 1, 1, 1, 1, 1]], 4, 0.5, [5, 3]),
        ([[9, 8, 7, 6, 5, 4, 0, 0], [4.5, 3.5, 1, 1, 1, 1, 1, 1]], 4, 1.0, [4, 4]),
        # Nine, none and three: 8.0, 0.8 and 3.2.
        ([[9] * 9 + [0], [0.1] * 10, [5, 5, 5, *[0.2] * 7]], 4, 0.2, [8, 1, 3]),
        # Ten, one and one: 8.8, 1.6 and 1.6; the official code rounds to 13 keys, here there are 12.
        ([[9] * 10, [5, *[0.1] * 9], [5, *[0.1] * 9]], 4, 0.2, [9, 2, 1]),
        # All alike: the newest of every head, and the first head's before.
        ([[1] * 5, [1] * 5], 3, 0.0, [3, 3]),
    ],
)
def test_ada_kv_gives_more_to_heads_with_more_votes(votes, base, safeguard, budgets):
    assert ada_budgets(votes, base, safeguard) == budgets
    observed, heads, length = 2, len(votes), len(votes[0])
    policy = AdaSnapKV(base + observed, observed, safeguard)
    is_live = jnp.ones((1, heads, length + observed + 1), bool).at[..., -1].set(False)  # and a free slot
    first = jnp.pad(jnp.asarray(votes, jnp.float32), ((0, 0), (0, observed + 1)), constant_values=jnp.inf)[None]
    age = jnp.broadcast_to(jnp.arange(first.shape[-1]), first.shape)
    found = policy.head_budgets((first, age), is_live, jnp.int32(0))
    assert (np.asarray(found)[0] - observed).tolist() == budgets
    assert max(budgets) + observed <= policy.most_of_a_head(heads)


HEAD_BUDGETS = jax.jit(lambda policy, *arrays: policy.head_budgets(*arrays))


@pytest.mark.parametrize("num_keys", [12, 2**29, 2**40])
@pytest.mark.parametrize("safeguard", [0.0, 0.2])
def test_ada_kv_with_room_for_all_keys_keeps_them(num_keys, safeguard):
    """However much room that is: the keys of all heads together are counted within int32."""
    votes = jnp.asarray(np.random.default_rng(0).random((1, 8, 10)), jnp.float32)
    age = jnp.broadcast_to(jnp.arange(10), votes.shape)
    budgets = HEAD_BUDGETS(AdaSnapKV(num_keys, 2, safeguard), (votes, age), jnp.ones(votes.shape, bool), jnp.int32(0))
    assert np.all(np.asarray(budgets) >= 10)


@pytest.mark.parametrize(
    ("policy", "chunk"),
    [
        (H2O(6, 3), 3),
        (H2O(6, 3), 32),
        (SnapKV(9, 4), 3),
        (AdaSnapKV(9, 4), 3),
        (AdaSnapKV(9, 4, 0.0), 32),
        (TOVA(6), 3),
        (KeyNorm(6), 32),
        (KeyDiff(6), 3),
    ],
    ids=str,
)
def test_a_prompt_is_seen_whole_before_a_key_goes(policy, chunk):
    """Head by head, with grouped queries, in rows of other lengths, whatever the chunk."""
    rows = decoding.prompts([21, 5, 14])
    settings = dataclasses.replace(decoding.SMALL, chunk=chunk)
    cache, _ = prefill(decoding.decoder(CONFIG, PARAMETERS, policy, settings), rows)
    for number, row in enumerate(rows):
        if policy.every_token:
            _, kept = ORACLES[policy.method](MODEL, row, *policy.setting.values(), prompt=len(row))
        else:
            _, kept = snapkv(MODEL, row, len(row), *policy.setting.values())
        position, end = (
            np.concatenate([np.asarray(x)[:, number] for x in arrays])
            for arrays in zip(*((group.key_position, group.key_end) for group in cache.buffer), strict=True)
        )
        for layer, head in np.ndindex(3, 2):
            live = end[layer, head] > len(row)
            assert sorted(position[layer, head][live].tolist()) == kept[layer][head], (number, layer, head)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return decoding.make_run(tmp_path_factory.mktemp("rivals") / "run", CONFIG, PARAMETERS)


def by_document(contexts, logprobs):
    """Negative log-likelihood of each context's predicted tokens; ``logprobs(tokens) -> [t, v]`` of a document."""
    total = np.zeros(len(contexts["inputs"]))
    starts = (contexts["positions"] == 0) & (contexts["document_end"] > 0)
    for row, start in zip(*np.nonzero(starts), strict=True):
        piece = slice(start, contexts["document_end"][row, start])
        targets, weight = contexts["targets"][row, piece], contexts["loss_weight"][row, piece]
        found = logprobs(contexts["inputs"][row, piece])
        total[row] -= np.sum(found[np.arange(len(targets)), targets] * weight)
    return total


CONTEXTS = decoding.packed_contexts(30)
ORACLES = {"h2o": h2o, "tova": tova, "knorm": key_norm, "keydiff": key_diff}


def policy_is_full(run, policy):
    """With room for all keys."""
    full = measure(run, CONTEXTS, FullAttention())
    return abs(measure_decoding(run, CONTEXTS, policy, chunk=5).perplexity / full.perplexity - 1) < 1e-4


@pytest.mark.parametrize(
    ("full", "policy"),
    [(H2O(500, 2), H2O(5, 2)), (TOVA(500), TOVA(5)), (KeyNorm(500), KeyNorm(5)), (KeyDiff(500), KeyDiff(5))],
    ids=lambda policy: policy.method,
)
def test_they_are_measured_token_by_token(run, full, policy):
    """Packed documents of several lengths; nothing depends on how many tokens are read at once."""
    assert policy_is_full(run, full)
    found = measure_decoding(run, CONTEXTS, policy, chunk=7)
    oracle = functools.partial(ORACLES[policy.method], MODEL)
    expected = by_document(CONTEXTS, lambda tokens: oracle(tokens, *policy.setting.values())[0])
    assert np.allclose(found.documents.nll, expected, rtol=1e-4)
    positions = CONTEXTS["positions"][CONTEXTS["document_end"] > 0]
    assert np.all(found.live_pairs == np.sum(np.minimum(5, positions) + 1))
    assert np.all(found.live_max == 6)


@pytest.mark.parametrize(
    ("full", "policy"),
    [(SnapKV(500, 2), SnapKV(6, 3)), (AdaSnapKV(500, 2), AdaSnapKV(6, 3))],
    ids=lambda policy: policy.method,
)
def test_snapkv_is_measured_behind_prompts_that_it_has_seen_whole(run, full, policy):
    assert policy_is_full(run, full)

    def logprobs(tokens, chunk):
        numbers = policy.setting.values()
        parts = [snapkv(MODEL, tokens[: b + chunk], b, *numbers)[0] for b in range(0, len(tokens), chunk)]
        return np.concatenate(parts)

    positions = CONTEXTS["positions"][CONTEXTS["document_end"] > 0]
    for chunk in (1, 4):
        found = measure_decoding(run, CONTEXTS, policy, chunk=chunk)
        expected = by_document(CONTEXTS, functools.partial(logprobs, chunk=chunk))
        assert np.allclose(found.documents.nll, expected, rtol=1e-4)
        begin = positions // chunk * chunk
        pairs = np.sum(np.minimum(6, begin) + positions - begin + 1)
        assert np.all(found.live_pairs.sum(axis=1) == 2 * pairs)  # the heads of a layer together
        assert policy.method == "ada_snapkv" or np.all(found.live_pairs == pairs)
        assert np.all(found.allocated <= policy.most_of_a_head(2) + chunk + 15)


def test_streaming_llm_holds_what_its_cache_holds():
    """Between two tokens: the sinks and the newest, ``start_size + recent_size`` in all."""
    sinks, recent, length = 3, 4, 20
    end = np.asarray(StreamingLLM(sinks, recent).key_end(jnp.arange(length)[None], 1))[0, 0]
    cache = []
    for t in range(length):
        assert [s for s in range(t + 1) if end[s] > t] == [*cache, t]
        cache.append(t)
        if len(cache) > sinks + recent:
            cache = cache[:sinks] + cache[-recent:]
    assert len(cache) == sinks + recent


@pytest.mark.parametrize("layers", [(None,), (None, 6), (3, None)])
@pytest.mark.parametrize("heads", [1, 4])
def test_random_keys_meet_their_number(layers, heads):
    """With the very draws, in pieces of any length: within one key of a head."""
    lengths = np.random.default_rng(0).integers(1, 120, 40)
    positions = np.arange(lengths.max(), dtype=np.int32)[None]
    causal = np.sum(lengths * (lengths + 1) // 2)

    def fraction(policy):
        ends = np.asarray(policy.key_end(positions, heads), np.int64)[0]
        total = 0
        for own in layers:
            for length in lengths:
                reach = length if own is None else own + 1
                total += np.sum(np.minimum(np.minimum(ends[:, :length], length) - positions[0, :length], reach))
        return total / heads / len(layers) / causal

    for seed in (0, 1):
        draws = np.asarray(RandomKeys(0.0, seed=seed).samples(positions, heads))[0]
        for budget in (0.25, 0.35, 0.45):
            share, window = fraction_for_budget(lengths, budget, 4, layers, draws)
            assert abs(fraction(RandomKeys(share, window, seed)) - budget) <= 0.5 * len(lengths) * 120 / causal / heads
