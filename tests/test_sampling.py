"""Tokens are drawn as the definitions of the filters say, compared with a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natsjax.decode.sampling import Sampling, sample
from natsjax.errors import UserError

VOCAB = 7
LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 2.9, -1.0], np.float32)
DRAWS = 4000


def draw(sampling, count=DRAWS, logits=LOGITS, first=0):
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    sequence = jnp.arange(first, first + count, dtype=jnp.int32)
    call = jax.jit(sample, static_argnames="kind")
    return [np.asarray(x) for x in call(rows, sequence, 5 + 0 * sequence, kind=sampling.kind, numbers=sampling.numbers)]


def expected(sampling):
    """Probabilities ``[v]``: each filter works on what the ones before left."""
    order = np.argsort(-LOGITS, kind="stable")
    scaled = LOGITS.astype(np.float64)[order] / sampling.temperature

    def softmax(x):
        x = np.exp(x - x.max())
        return x / x.sum()

    kept = np.ones(VOCAB, bool)
    if sampling.top_k:
        kept[sampling.top_k :] = False
    probability = softmax(np.where(kept, scaled, -np.inf))
    kept &= np.cumsum(probability) - probability < sampling.top_p
    kept[0] = True
    kept &= softmax(scaled) >= sampling.min_p * softmax(scaled)[0] * (1 - 1e-9)
    result = np.zeros(VOCAB)
    result[order] = softmax(np.where(kept, scaled, -np.inf))
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=3),
        Sampling(temperature=1.0, top_k=100),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.5, min_p=0.2),
        Sampling(temperature=1.0, top_k=4, top_p=0.8, min_p=0.1, seed=9),
    ],
    ids=str,
)
def test_draws_have_the_probabilities_of_the_definition(sampling):
    tokens, logprobs = draw(sampling)
    wanted = expected(sampling)
    found = np.bincount(tokens, minlength=VOCAB) / DRAWS
    assert np.all(found[wanted == 0] == 0), "a token was drawn that a filter takes away"
    assert np.abs(found - wanted).max() < 4 * 0.5 / DRAWS**0.5
    plain = LOGITS - np.log(np.exp(LOGITS).sum())
    assert np.allclose(logprobs, plain[tokens], atol=1e-5)


def test_greedy_takes_the_first_of_the_likeliest():
    assert np.all(draw(Sampling(), 3)[0] == 1)
    assert np.all(draw(Sampling(), 3, np.array([0.0, 2.0, 2.0], np.float32))[0] == 1)


@pytest.mark.parametrize("temperature", [1e-6, 1e-29, 1e-38, 1e-46])
def test_very_cold_is_greedy(temperature):
    for filters in ({}, {"top_k": 3}, {"min_p": 0.1}):
        assert np.all(draw(Sampling(temperature=temperature, **filters), 20)[0] == 1)


def test_draws_are_those_of_the_sequence_and_the_seed():
    sampling = Sampling(temperature=2.0)
    tokens = draw(sampling, 50)[0]
    assert np.array_equal(draw(sampling, 20, first=30)[0], tokens[30:])
    assert not np.array_equal(draw(Sampling(temperature=2.0, seed=1), 50)[0], tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"seed": -1},
        {"seed": 2**31},
    ],
    ids=str,
)
def test_mistakes_are_sentences(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name} = "):
        Sampling(**wrong)
