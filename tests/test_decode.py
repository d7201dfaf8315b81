"""Decoding: the masked forward pass, prefill in chunks, and token-by-token decoding give the same logits; nothing live
is lost; what is dead is freed."""

import dataclasses

import decoding
import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax import kv_buffer
from natsjax.decode import generate, prefill, unpad
from natsjax.decoder import DecodeSettings, most_live
from natsjax.errors import UserError
from natsjax.policies import (
    H2O,
    FullAttention,
    Nats,
    RandomKeys,
    SlidingWindow,
    SnapKV,
    StreamingLLM,
)
from natsjax.sampling import Sampling

TOLERANCE = 2e-5
CONFIG = decoding.config()
PARAMETERS = decoding.parameters_of(CONFIG)
DENSE = decoding.config(model={"attention": "dense"})
DENSE_PARAMETERS = decoding.parameters_of(DENSE)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    chunk=st.sampled_from([1, 5, 8, 64]),
    block=st.sampled_from([8, 16]),
    pattern=st.sampled_from(["random", "all_global", "all_local", "all_sliding"]),
    seed=st.integers(0, 3),
)
def test_chunks_and_tokens_give_the_logits_of_the_masked_forward(lengths, chunk, block, pattern, seed):
    rows, parameters = decoding.prompts(lengths, seed), decoding.parameters_of(CONFIG, seed)
    rng = np.random.default_rng(seed)
    shape = (3, len(rows), 2, max(lengths))
    fixed = {"all_global": 0, "all_local": 1, "all_sliding": 2}
    roles = rng.integers(0, 3, shape) if pattern == "random" else np.full(shape, fixed[pattern])
    roles[..., 0] = 0
    expected, _ = decoding.masked_logits(CONFIG, parameters, rows, role_ids=roles.astype(np.int8))
    decoder = decoding.decoder(CONFIG, parameters, settings=dataclasses.replace(decoding.SMALL, block=block))
    got, _ = decoding.chunked_logits(decoder, rows, chunk, roles.astype(np.int8))
    assert decoding.error(got, expected, rows) <= TOLERANCE


@pytest.mark.parametrize(
    "policy",
    [Nats(0.3), FullAttention(), SlidingWindow(3), SlidingWindow(0), StreamingLLM(2, 4), RandomKeys(0.3, 2, 5)],
    ids=lambda policy: policy.method,
)
@pytest.mark.parametrize("chunk", [1, 7])
def test_every_static_policy_is_its_mask(policy, chunk):
    rows = decoding.prompts([29, 12])
    expected, _ = decoding.masked_logits(CONFIG, PARAMETERS, rows, policy)
    got, _ = decoding.chunked_logits(decoding.decoder(CONFIG, PARAMETERS, policy), rows, chunk)
    assert decoding.error(got, expected, rows) <= TOLERANCE


@pytest.mark.parametrize("attention", ["nats", "dense"])
def test_generated_tokens_are_those_of_the_masked_forward(attention):
    """Through the loop: every token is the likeliest one, with the log-probability of the masked forward."""
    config, parameters = (CONFIG, PARAMETERS) if attention == "nats" else (DENSE, DENSE_PARAMETERS)
    rows = decoding.prompts([3, 17, 1])
    found = generate(decoding.decoder(config, parameters), rows, max_new_tokens=30)
    whole = [row + new for row, new in zip(rows, found.tokens, strict=True)]
    logits, _ = decoding.masked_logits(config, parameters, whole)
    for row, new, logprobs, x in zip(rows, found.tokens, found.logprobs, logits, strict=True):
        x = x[len(row) - 1 : len(row) + 29].astype(np.float64)
        x -= np.log(np.exp(x).sum(-1, keepdims=True))
        assert np.abs(x[np.arange(30), new] - logprobs).max() <= TOLERANCE * np.abs(logits).max()
        assert np.all(x.max(-1) - x[np.arange(30), new] <= 1e-4)
