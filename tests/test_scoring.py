"""What ``generate`` draws has the log-probabilities that ``score`` finds, under every kind of policy."""

import decoding
import numpy as np
import pytest

from natsjax.decode.decoder import DecodeSettings
from natsjax.decode.generation import generate
from natsjax.decode.sampling import Sampling
from natsjax.decode.scoring import score
from natsjax.policies.attention_score import H2O, TOVA, AdaSnapKV, SnapKV
from natsjax.policies.interval import FullAttention, StreamingLLM
from natsjax.policies.key_score import KeyDiff
from natsjax.policies.nats import Nats

ROWS = decoding.prompts([13, 5, 9], seed=3)
POLICIES = {
    "nats": (Nats(), None),
    "full": (FullAttention(), None),
    "streaming": (StreamingLLM(1, 3), None),
    "h2o": (H2O(6, 3), None),
    "snapkv": (SnapKV(6, 3), None),
    "ada_snapkv": (AdaSnapKV(6, 3), None),
    "tova": (TOVA(6), None),
    "keydiff": (KeyDiff(6), None),
    "max_kv": (Nats(), 5),
}


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_drawn_is_scored_alike(name):
    policy, most = POLICIES[name]
    config = decoding.config()
    parameters = decoding.parameters_of(config)
    settings = DecodeSettings(chunk=8, segment=4, block=16, max_kv=most)
    decoder = decoding.decoder(config, parameters, policy, settings)
    drawn = generate(decoder, ROWS, max_new_tokens=[7, 1, 12], sampling=Sampling(temperature=1.0))
    found = score(decoder, ROWS, drawn.tokens)
    for scored, logprobs in zip(found, drawn.logprobs, strict=True):
        np.testing.assert_allclose(scored.logprobs, logprobs, atol=2e-5)
    greedy = generate(decoder, ROWS, max_new_tokens=8)
    assert all(scored.is_likeliest.all() for scored in score(decoder, ROWS, greedy.tokens))
    other = [[*tokens[:-1], (tokens[-1] + 1) % 16] for tokens in greedy.tokens]
    found = score(decoder, ROWS, other)
    assert all(scored.is_likeliest[:-1].all() and not scored.is_likeliest[-1] for scored in found)


def test_the_masked_forward_pass_says_the_same():
    config = decoding.config()
    parameters = decoding.parameters_of(config)
    rows = decoding.prompts([9, 4], seed=5), decoding.prompts([6, 11], seed=6)
    found = score(decoding.decoder(config, parameters), *rows)
    logits, _ = decoding.masked_logits(config, parameters, [a + b for a, b in zip(*rows, strict=True)])
    for scored, prompt, tokens, x in zip(found, *rows, logits.astype(np.float64), strict=True):
        x = x[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
        logprobs = x - np.log(np.exp(x).sum(-1, keepdims=True))
        np.testing.assert_allclose(scored.logprobs, logprobs[np.arange(len(tokens)), tokens], atol=2e-5)
        np.testing.assert_array_equal(scored.is_likeliest, logprobs.argmax(-1) == tokens)


def test_nothing_to_score():
    config = decoding.config()
    found = score(decoding.decoder(config, decoding.parameters_of(config)), [[1, 2], [3]], [[], [4]])
    assert [len(scored.logprobs) for scored in found] == [0, 1]
