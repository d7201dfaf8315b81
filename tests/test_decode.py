"""The masked forward, prefill in chunks and decoding by token agree; nothing live is lost, what is dead is freed."""

import dataclasses
import gc

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.decode import allocation, loop
from natsjax.decode.buffer import occupancy
from natsjax.decode.decoder import DecodeSettings
from natsjax.decode.generation import generate, prefill, unpad
from natsjax.decode.sampling import Sampling
from natsjax.decode.step import Chunk
from natsjax.errors import UserError
from natsjax.model import layers, transformer
from natsjax.policies.attention_score import H2O, TOVA, AdaSnapKV, SnapKV
from natsjax.policies.interval import FullAttention, RandomKeys, SlidingWindow, StreamingLLM
from natsjax.policies.key_score import KeyDiff, KeyNorm
from natsjax.policies.nats import Nats

TOLERANCE = 2e-5
CONFIG = decoding.config()
PARAMETERS = decoding.parameters_of(CONFIG)
DENSE = decoding.config(model={"layer_types": "dense"})
DENSE_PARAMETERS = decoding.parameters_of(DENSE)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 16, 31, 40]), min_size=2, max_size=2),
    chunk=st.sampled_from([1, 5, 16]),
    pattern=st.sampled_from(["random", "all_global", "all_local", "all_sliding"]),
    seed=st.integers(0, 3),
)
def test_chunks_and_tokens_give_the_logits_of_the_masked_forward(lengths, chunk, pattern, seed):
    rows, parameters = decoding.prompts(lengths, seed), decoding.parameters_of(CONFIG, seed)
    rng = np.random.default_rng(seed)
    shape = (3, len(rows), 2, max(lengths))
    fixed = {"all_global": 0, "all_local": 1, "all_sliding": 2}
    roles = rng.integers(0, 3, shape) if pattern == "random" else np.full(shape, fixed[pattern])
    roles[..., 0] = 0
    expected, _ = decoding.masked_logits(CONFIG, parameters, rows, role_ids=roles.astype(np.int8))
    decoder = decoding.decoder(CONFIG, parameters, settings=decoding.SMALL)
    got, _ = decoding.chunked_logits(decoder, rows, chunk, roles.astype(np.int8))
    assert decoding.error(got, expected, rows) <= TOLERANCE


@pytest.mark.parametrize(
    "policy",
    [Nats(0.3), FullAttention(), SlidingWindow(3), SlidingWindow(0), StreamingLLM(2, 4), RandomKeys(0.3, 2, 5)],
    ids=lambda policy: policy.method,
)
@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_every_static_policy_is_its_mask(policy, chunk):
    rows = decoding.prompts([29, 12])
    expected, _ = decoding.masked_logits(CONFIG, PARAMETERS, rows, policy)
    got, _ = decoding.chunked_logits(decoding.decoder(CONFIG, PARAMETERS, policy), rows, chunk)
    assert decoding.error(got, expected, rows) <= TOLERANCE


class ToyNorm(nnx.Module):
    """Subtracts the mean, divides by the largest magnitude, and has a shift."""

    def __init__(self, width, epsilon):
        self.scale = layers.vector_param(jnp.linspace(0.5, 2, width), (None,), "norm")
        self.shift = layers.vector_param(jnp.linspace(-0.3, 0.3, width), (None,), "norm")

    def __call__(self, x):
        x -= jnp.mean(x, axis=-1, keepdims=True)
        return x / (0.1 + jnp.max(jnp.abs(x), axis=-1, keepdims=True)) * self.scale[...] + self.shift[...]


class ToyMLP(nnx.Module):
    """One matrix and a cosine."""

    def __init__(self, model, rngs):
        d = model.embed_dim
        self.matrix = layers.matrix_param(rngs.params(), (d, d), ("embed", None), d, "mlp")

    def __call__(self, x):
        return jnp.cos(x @ layers.gathered(self.matrix, x.dtype))


def test_another_norm_and_mlp_decode_as_they_train(monkeypatch):
    """Decoding runs the model's own block: what is swapped there needs no change in ``decode``."""
    rows = decoding.prompts([29, 12])
    usual, _ = decoding.masked_logits(CONFIG, PARAMETERS, rows)
    monkeypatch.setattr(transformer, "RMSNorm", ToyNorm)
    monkeypatch.setattr(transformer, "MLP", ToyMLP)
    parameters = decoding.parameters_of(CONFIG)
    assert set(parameters["blocks"]["mlp_norm"]) == {"scale", "shift"}
    expected, _ = decoding.masked_logits(CONFIG, parameters, rows)
    assert decoding.error(usual, expected, rows) > 0.1
    for chunk in (1, 7):
        got, _ = decoding.chunked_logits(decoding.decoder(CONFIG, parameters), rows, chunk)
        assert decoding.error(got, expected, rows) <= TOLERANCE


@pytest.mark.parametrize("attention", ["nats", "dense"])
def test_generated_tokens_are_those_of_the_masked_forward(attention):
    config, parameters = (CONFIG, PARAMETERS) if attention == "nats" else (DENSE, DENSE_PARAMETERS)
    rows = decoding.prompts([3, 17, 1])
    found = generate(decoding.decoder(config, parameters), rows, max_new_tokens=30)
    decoding.check_generated(config, parameters, rows, found)


def test_padding_on_either_side_is_the_same():
    tokens = np.array([[7, 3, 5, 0, 0], [1, 2, 3, 4, 6]])
    right = unpad(tokens, [[1, 1, 1, 0, 0], [1] * 5])
    left = unpad(np.array([[9, 9, 7, 3, 5], [1, 2, 3, 4, 6]]), [[0, 0, 1, 1, 1], [1] * 5])
    decoder = decoding.decoder(CONFIG, PARAMETERS)
    found = [generate(decoder, rows, max_new_tokens=9) for rows in (right, left)]
    assert found[0].tokens == found[1].tokens
    assert found[0].logprobs == found[1].logprobs


def test_a_prompt_is_continued_alike_whatever_stands_beside_it():
    """Also when tokens are drawn: a sequence's draws are its own."""
    rows, sampling = decoding.prompts([5, 23, 1, 12]), Sampling(temperature=1.5, top_k=9, seed=3)
    decoder = decoding.decoder(CONFIG, PARAMETERS)
    together = generate(decoder, rows, max_new_tokens=[12, 3, 20, 1], sampling=sampling)
    assert [len(new) for new in together.tokens] == [12, 3, 20, 1]
    for number, (row, new) in enumerate(zip(rows, together.tokens, strict=True)):
        alone = generate(decoder, [row], max_new_tokens=len(new), sampling=sampling, first_sequence=number)
        assert alone.tokens == [new]
        assert np.allclose(alone.logprobs[0], together.logprobs[number], atol=1e-4)
    other = generate(decoder, rows, max_new_tokens=20, sampling=dataclasses.replace(sampling, seed=4))
    assert other.tokens[2] != together.tokens[2]


@pytest.mark.parametrize("settings", [{"chunk": 3, "block": 32}, {"segment": 1}, {"max_groups": 1}])
def test_how_the_machine_is_used_changes_no_token(settings):
    rows = decoding.prompts([30, 4])
    expected = generate(decoding.decoder(CONFIG, PARAMETERS), rows, max_new_tokens=25)
    used = dataclasses.replace(decoding.SMALL, **settings)
    found = generate(decoding.decoder(CONFIG, PARAMETERS, settings=used), rows, max_new_tokens=25)
    assert found.tokens == expected.tokens
    assert np.allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_a_buffer_that_becomes_too_small_in_the_middle_loses_nothing():
    """Every token GLOBAL: heads overflow again and again, and the text is that of full attention."""
    parameters = decoding.always(CONFIG, 0)
    rows = decoding.prompts([5, 9])
    seen = []
    decoder = decoding.decoder(CONFIG, parameters)
    found = generate(
        decoder, rows, max_new_tokens=60, on_tokens=lambda row, tokens, logprobs: seen.append((row, tokens))
    )
    full = generate(decoding.decoder(CONFIG, parameters, FullAttention()), rows, max_new_tokens=60)
    assert found.transfers >= 2
    assert full.transfers == 0
    assert found.tokens == full.tokens
    assert np.allclose(found.logprobs, full.logprobs, atol=1e-5)
    assert found.evicted == 0
    assert found.kv_live == full.kv_live
    # What was streamed is what came, in order.
    assert [[token for row, tokens in seen if row == n for token in tokens] for n in range(2)] == found.tokens


def test_layers_get_capacities_of_their_own():
    """One layer keeps everything, the others nothing but a window."""
    parameters = decoding.parameters_of(CONFIG, scorer_scale=0.0)
    bias = np.zeros((3, 2, 3), np.float32)
    bias[1, :, 0], bias[0, :, 2], bias[2, :, 2] = 9, 9, 9
    parameters["blocks"]["attention"]["scorer"]["bias"] = jax.numpy.asarray(bias)
    rows = decoding.prompts([60])
    found = generate(decoding.decoder(CONFIG, parameters), rows, max_new_tokens=40)
    assert found.capacities[1] >= 100
    assert found.capacities[0] == found.capacities[2] == 16
    decoding.check_generated(CONFIG, parameters, rows, found)


def test_sliding_tokens_take_constant_memory():
    """100 000 tokens, each of which is read by the next two alone."""
    config = decoding.config(model={"num_layers": 1, "embed_dim": 8, "mlp_dim": 8, "num_heads": 2})
    parameters = decoding.always(config, 2)
    used = DecodeSettings(segment=4096, block=8)
    found = generate(decoding.decoder(config, parameters, settings=used), [[1]], max_new_tokens=100_000)
    assert len(found.tokens[0]) == 100_000
    assert found.capacities == [8]
    assert (found.transfers, found.evicted) == (0, 0)
    assert found.kv_live < 4.01  # itself, two behind it, and the first of the sequence
    assert found.kv_full == 2 * 100_000


def test_max_kv_evicts_by_its_rule_and_counts():
    rows = decoding.prompts([40, 7])
    used = dataclasses.replace(decoding.SMALL, max_kv=6)
    found = generate(decoding.decoder(DENSE, DENSE_PARAMETERS, settings=used), rows, max_new_tokens=20)
    assert found.kv_live <= found.kv_live_max == 7  # and its own
    assert found.capacities == [16] * 3
    heads = 3 * 2
    assert found.evicted == heads * ((40 + 19 - 6) + (7 + 19 - 6))
    # The oldest but the first go: a window of 5 tokens and a sink, as a chunk and a token at a time.
    used = dataclasses.replace(used, eviction="oldest", chunk=1)
    found = generate(decoding.decoder(DENSE, DENSE_PARAMETERS, settings=used), rows, max_new_tokens=20)
    decoding.check_generated(DENSE, DENSE_PARAMETERS, rows, found, StreamingLLM(1, 5))


@pytest.mark.parametrize("eviction", ["soonest_end", "oldest"])
@pytest.mark.parametrize("policy", [Nats(0.5), StreamingLLM(4, 0), StreamingLLM(3, 4)], ids=lambda policy: str(policy))
def test_the_loop_evicts_what_a_chunk_would(policy, eviction):
    """Token by token through the loop, and the same tokens through chunks of one: the same keys stay."""
    used = dataclasses.replace(decoding.SMALL, max_kv=4, eviction=eviction, chunk=1)
    rows = decoding.prompts([9, 2])
    decoder = decoding.decoder(CONFIG, PARAMETERS, policy, used)
    found = generate(decoder, rows, max_new_tokens=25)
    whole = [row + new[:-1] for row, new in zip(rows, found.tokens, strict=True)]  # the last one is not read
    _, cache = decoding.chunked_logits(decoder, whole, 1)
    assert found.evicted == int(np.asarray(cache.evicted).sum())
    again = generate(decoder, [row[:-1] for row in whole[:1]], max_new_tokens=2)
    assert again.tokens[0] == found.tokens[0][-2:]
    assert (found.evicted == 0) == (policy == StreamingLLM(4, 0))


def test_programs_are_few():
    """Prompts whose heads need about alike share what was compiled for the first."""
    decoder = decoding.decoder(CONFIG, PARAMETERS, settings=dataclasses.replace(decoding.SMALL, block=8))
    generate(decoder, decoding.prompts([100] * 4, seed=0), max_new_tokens=6)
    before = loop.decode_segment._cache_size()
    for seed in range(1, 6):
        generate(decoder, decoding.prompts([100] * 4, seed=seed), max_new_tokens=6)
    assert loop.decode_segment._cache_size() - before <= 2


def test_memory_of_a_chunk_grows_with_the_chunk_and_the_slots():
    """Not with their product, nor with the prompt, which the program does not know."""

    def temporaries(chunk, slots):
        decoder = decoding.decoder(CONFIG, PARAMETERS)
        with jax.set_mesh(decoder.mesh):
            buffer = decoder.allocate([3], [slots], 1)
            rows = decoder.put_rows(np.zeros(1))
            part = Chunk(decoder.put(np.zeros((1, chunk)), "batch", "sequence"), rows, rows, rows, rows)
            lowered = loop.read_chunk.lower(
                decoder.parameters, buffer, part, Nats(), structure=decoder.structure, count_live=False
            )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, long, both = temporaries(64, 1024), temporaries(64, 8192), temporaries(512, 8192)
    slot = 2 * 2 * 8 * 4  # bytes of the keys and values of both heads
    assert long - small <= 8 * 7168 * slot
    assert both <= 8 * (8192 + 512) * slot + 512 * 4 * 1024  # scores of a block alone
    assert both < 512 * 8192 * 4 * 4 / 2


def test_a_limit_that_is_never_reached_changes_nothing():
    rows = decoding.prompts([12])
    free = generate(decoding.decoder(CONFIG, PARAMETERS), rows, max_new_tokens=20)
    used = dataclasses.replace(decoding.SMALL, max_kv=1000)
    held = generate(decoding.decoder(CONFIG, PARAMETERS, settings=used), rows, max_new_tokens=20)
    assert (held.tokens, held.evicted) == (free.tokens, 0)


@pytest.mark.parametrize(
    "policy",
    [H2O(6, 3), SnapKV(6, 3), AdaSnapKV(6, 3), TOVA(6), KeyNorm(6), KeyDiff(6)],
    ids=lambda policy: policy.method,
)
def test_observing_policies_keep_their_number(policy):
    rows = decoding.prompts([40, 9])
    found = generate(decoding.decoder(CONFIG, PARAMETERS, policy), rows, max_new_tokens=20)
    assert [len(new) for new in found.tokens] == [20, 20]
    heads = 3 * 2
    if policy.every_token:
        assert found.kv_live <= found.kv_live_max == 7
        assert found.capacities == [16] * 3
        assert found.evicted == heads * (40 + 19 - 6 + 9 + 19 - 6)
    else:  # the prompt alone is cut down
        assert 6 + 19 <= found.kv_live_max <= policy.most_of_a_head(2) + 19
        assert found.kv_live_max == 6 + 19 or policy.method == "ada_snapkv"
        assert found.evicted == heads * (40 - 6 + 9 - 6)


@pytest.mark.parametrize(
    "policy",
    [H2O(500, 100), SnapKV(500, 8), AdaSnapKV(500, 8), TOVA(500), KeyNorm(500), KeyDiff(500)],
    ids=lambda policy: policy.method,
)
def test_observing_policies_with_room_for_all_are_full_attention(policy):
    rows = decoding.prompts([20, 9])
    full = generate(decoding.decoder(CONFIG, PARAMETERS, FullAttention()), rows, max_new_tokens=15)
    found = generate(decoding.decoder(CONFIG, PARAMETERS, policy), rows, max_new_tokens=15)
    assert found.tokens == full.tokens
    assert np.allclose(found.logprobs, full.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [None, FullAttention(), StreamingLLM(2, 4), H2O(6, 3), SnapKV(9, 4), AdaSnapKV(9, 4), KeyDiff(6)],
    ids=lambda x: str(x and x.method),
)
@pytest.mark.parametrize("length", [5, pytest.param(41, marks=pytest.mark.slow)])
def test_a_short_context_takes_no_more_than_full_attention_would_hold(policy, length):
    """With the blocks that are the default; one prompt, for rows of a batch have the slots of the longest."""
    decoder = decoding.decoder(CONFIG, PARAMETERS, policy, DecodeSettings())
    found = generate(decoder, decoding.prompts([length]), max_new_tokens=32)
    assert found.kv_full == 3 * 2 * (length + 31)
    assert found.kv_allocated <= found.kv_full
    assert found.kv_live <= found.kv_live_max <= max(found.capacities) + 1
    assert found.kv_allocated_bytes <= found.kv_full * (2 * 8 * 4 + 3 * 4) + 3 * 2 * (4 + 8 * 4)


def test_one_token_and_a_stop_token_at_once():
    decoder, rows = decoding.decoder(CONFIG, PARAMETERS), decoding.prompts([3, 8])
    one = generate(decoder, rows, max_new_tokens=1)
    assert [len(new) for new in one.tokens] == [1, 1]
    assert np.isnan(one.kv_live)
    stopped = generate(decoder, rows, max_new_tokens=30, stop_tokens=[one.tokens[0][0]])
    assert stopped.tokens[0] == one.tokens[0]
    whole = generate(decoder, rows, max_new_tokens=30).tokens[1]
    stop = one.tokens[0][0]
    assert stopped.tokens[1] == (whole[: whole.index(stop) + 1] if stop in whole else whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[1], []]}, "prompt 2 has no token"),
        ({"prompts": [[1, 99]]}, "prompt 1 has a token outside 0 … 15"),
        ({"prompts": [[-1]]}, "outside"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens=0: it must be 1 or more"),
    ],
)
def test_mistakes_are_sentences(arguments, message):
    with pytest.raises(UserError, match=message):
        generate(decoding.decoder(CONFIG, PARAMETERS), **{"max_new_tokens": 3} | arguments)


def test_wrong_settings_are_sentences():
    """Others are in ``test_generate.py``."""
    with pytest.raises(UserError, match="chunk = 0"):
        DecodeSettings(chunk=0)
    with pytest.raises(UserError, match="dense attention has none"):
        decoding.decoder(DENSE, DENSE_PARAMETERS, Nats(0.5))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30), st.sampled_from([SlidingWindow(0), SlidingWindow(5), StreamingLLM(2, 3), RandomKeys(0.4, 1)])
)
def test_the_slots_of_a_policy_are_known_in_advance(length, policy):
    """By hand: at each query the keys that are still read, its own among them."""
    ends = np.asarray(policy.key_end(np.arange(length, dtype=np.int32)[None], 2)).reshape(-1, length)
    live = [sum(end > t for s, end in enumerate(row) if s <= t) for row in ends for t in range(length)]
    assert policy.most_live(length, 2) == max(live)


def test_bfloat16_stays_close():
    config = decoding.config(model={"dtype": "bfloat16"})
    rows = decoding.prompts([30, 11])
    expected, ids = decoding.masked_logits(config, PARAMETERS, rows)
    for chunk in (1, 8):
        got, _ = decoding.chunked_logits(decoding.decoder(config, PARAMETERS), rows, chunk, ids)
        assert decoding.error(got, expected, rows) <= 0.02


def test_memory_is_what_lives_and_not_what_was_seen():
    """A model that keeps about a tenth of 8192 tokens: what arrays there are, not what a formula says."""
    config = decoding.config(
        model={"num_layers": 4, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "mlp_dim": 16},
        nats={"window": 16},
    )
    parameters = decoding.parameters_of(config)
    # Roles by chance, of which a tenth is GLOBAL.
    scorer = parameters["blocks"]["attention"]["scorer"]
    scorer["weight"] = scorer["weight"].at[..., 1].set(0.0)
    scorer["bias"] = scorer["bias"].at[..., 1].add(-1e4).at[..., 2].add(_bias_for_a_tenth(config, parameters))
    prompt = decoding.prompts([8192])
    decoder = decoding.decoder(config, parameters, settings=DecodeSettings(chunk=1024))
    gc.collect()  # what other tests have left would be missing from what is taken
    before = sum(x.nbytes for x in jax.live_arrays())
    cache, hidden = prefill(decoder, prompt)
    live = np.asarray(occupancy(cache.buffer, cache.num_tokens))
    assert 0.05 < live.mean() / 8192 < 0.15
    cache = decoder.compact(cache, decoder.required_capacity(cache), 4096)
    hidden.delete()
    taken = sum(x.nbytes for x in jax.live_arrays()) - before
    slot = 2 * 64 * 4  # bytes of a key and a value
    dense = 4 * 2 * 8192 * slot
    assert taken <= 1.3 * live.max() * 4 * 2 * slot
    assert taken <= 0.25 * dense
    assert allocation.allocated_bytes(cache.buffer) <= taken


def _bias_for_a_tenth(config, parameters):
    """What SLIDING logits need so that a tenth of random tokens is GLOBAL, about, in every layer and head."""
    best = None
    for bias in np.linspace(0, 40, 21):
        changed = jax.tree.map(lambda x: x, parameters)
        scorer = changed["blocks"]["attention"]["scorer"]
        scorer["bias"] = scorer["bias"].at[..., 1].add(-1e4).at[..., 2].add(bias)
        _, ids = decoding.masked_logits(config, changed, decoding.prompts([512], seed=9))
        share = (ids == 0).mean()
        if best is None or abs(share - 0.1) < abs(best[0] - 0.1):
            best = share, bias
    return float(best[1])
