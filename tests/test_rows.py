"""Sequences that come and go in the rows of one loop: each is what it would be alone, and leaves nothing behind."""

import dataclasses

import decoding
import jax
import numpy as np
import pytest
import rival_oracles
from processes import json_lines

from natsjax.decode.decoder import DecodeSettings
from natsjax.decode.rows import MAX_LIKELIEST, RowRequest, Rows
from natsjax.decode.sampling import Sampling, sample
from natsjax.errors import UserError
from natsjax.policies.attention_score import H2O, TOVA, AdaSnapKV, SnapKV
from natsjax.policies.interval import FullAttention, StreamingLLM
from natsjax.policies.key_score import KeyNorm
from natsjax.policies.nats import Nats
from natsjax.policies.selective import LeastMasked

CONFIG = decoding.config()
PARAMETERS = decoding.parameters_of(CONFIG)
MOST = 96
ONE_SIZE = DecodeSettings(chunk=32, segment=4, block=MOST + 1)  # compiled once
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=1.3, top_p=0.8, seed=2),
    Sampling(temperature=0.7, top_k=3, min_p=0.05, seed=3),
]


def requests_of(seed=0, count=12, samplings=SAMPLINGS):
    """Prompts of all lengths, beyond a chunk too; every rule of sampling; some with stop tokens."""
    rng = np.random.default_rng(seed)
    prompts = decoding.prompts(rng.integers(1, 40, count).tolist(), seed)
    return [
        RowRequest(
            tuple(prompt),
            int(rng.integers(1, 50)),
            samplings[n % len(samplings)],
            sequence=int(rng.integers(0, 5)),
            stop_tokens=(3, 5, 7) if n % 5 == 4 else (),
        )
        for n, prompt in enumerate(prompts)
    ]


def serve(rows, requests, cancel=None, seed=0):
    """Gives requests rows as these become free, one or two a turn: tokens and log-probabilities of each.

    ``cancel`` maps the number of a request to the tokens after which it is released.
    """
    rng = np.random.default_rng(seed)
    waiting = list(enumerate(requests))
    number_of, found = {}, {n: ([], [], []) for n in range(len(requests))}
    while waiting or rows.num_busy:
        for _ in range(int(rng.integers(1, 3))):
            if waiting and rows.num_free:
                n, request = waiting.pop(0)
                number_of[rows.begin(request)] = n
        for drawn in rows.advance(prompt_tokens=int(rng.integers(1, 64))):
            n = number_of[drawn.row]
            for values, new in zip(found[n], (drawn.tokens, drawn.logprobs, drawn.likeliest), strict=True):
                values.extend(new)
            if cancel and n in cancel and len(found[n][0]) >= cancel[n]:
                rows.release(drawn.row)
    return found


def masked(prompts, policy, config=CONFIG, parameters=PARAMETERS):
    """float64 log-probabilities and float32 logits ``[b, t, v]`` by the forward pass with masks, in one piece."""
    logits, _ = decoding.masked_logits(config, parameters, [row + [0] * (MOST - len(row)) for row in prompts], policy)
    x = logits.astype(np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True)), logits


draw = jax.jit(sample, static_argnames="kind")


@pytest.mark.parametrize("policy", [Nats(0.3), FullAttention(), StreamingLLM(2, 6)], ids=lambda policy: policy.method)
def test_each_sequence_is_drawn_from_its_own_masked_forward(policy):
    """Whoever shares the loop, however prompts and segments interleave, and whoever is cancelled in between."""
    rows, requests = Rows(decoding.decoder(CONFIG, PARAMETERS, policy, ONE_SIZE), 3, MOST), requests_of()
    cancel = {4: 1, 6: 5}
    found = serve(rows, requests, cancel)
    whole = [[*request.prompt, *found[n][0]] for n, request in enumerate(requests)]
    expected, logits = masked(whole, policy)
    for n, request in enumerate(requests):
        tokens, logprobs, _ = found[n]
        at = np.arange(len(request.prompt), len(whole[n]))
        rule = request.sampling
        number = np.full(len(at), request.sequence)
        drawn, _ = draw(logits[n, at - 1], number, at, kind=rule.kind, numbers=rule.numbers)
        assert tokens == drawn.tolist(), n
        np.testing.assert_allclose(logprobs, expected[n, at - 1, tokens], atol=1e-4)
        assert not set(tokens[:-1]) & set(request.stop_tokens)
        if n not in cancel:
            assert len(tokens) == request.max_new_tokens or tokens[-1] in request.stop_tokens
        else:
            assert cancel[n] <= len(tokens) < request.max_new_tokens
    assert rows.num_busy == rows.live == 0
    assert rows.allocated == (0, 0)


EVICTING = {
    "max_kv": Nats(0.0),
    "h2o": H2O(8, 4),
    "tova": TOVA(8),
    "knorm": KeyNorm(8),
    "snapkv": SnapKV(6, 4),
    "ada_snapkv": AdaSnapKV(6, 4),
    "least_masked": LeastMasked(8),
}
BY_TOKEN = {"h2o": rival_oracles.h2o, "tova": rival_oracles.tova, "knorm": rival_oracles.key_norm}


@pytest.mark.parametrize("name", EVICTING)
def test_where_keys_are_evicted_each_sequence_is_drawn_from_its_own_oracle(name):
    """By a budget or by the attention that they receive, in plain numpy; by masks, where no prompt is cut down."""
    policy = EVICTING[name]
    settings = dataclasses.replace(ONE_SIZE, max_kv=7 if name == "max_kv" else None)
    config, parameters = CONFIG, PARAMETERS
    if policy.needs_selective:  # in two of three layers, the other one keeps all
        config = decoding.config(model={"layer_types": ("selective", "dense", "selective")})
        parameters = decoding.parameters_of(config)
    prompts = decoding.prompts([8, 3, 6, 8] if policy.needs_selective else [40, 40, 33, 40], seed=1)
    rule = Sampling(temperature=1.0, seed=4)
    requests = [RowRequest(tuple(prompt), 24, rule, sequence=n) for n, prompt in enumerate(prompts)]
    rows = Rows(decoding.decoder(config, parameters, policy, settings), 2, MOST)
    found, num_evicted = serve(rows, requests), 0
    model = rival_oracles.NumpyModel(config, parameters)
    for n, prompt in enumerate(prompts):
        tokens, read = found[n][0], [*prompt, *found[n][0][:-1]]
        if name == "max_kv":
            parts = [32, len(prompt) - 32, *[1] * 23]
            expected, lost = rival_oracles.limited(model, read, parts, 7)
        elif name in BY_TOKEN:
            expected, held = BY_TOKEN[name](model, read, *policy.setting.values(), len(prompt))
            lost = sum(len(read) - len(head) for layer in held for head in layer)
        elif name.endswith("snapkv"):
            whole, _ = rival_oracles.h2o(model, prompt, len(prompt), 0)  # no key goes
            behind, kept = rival_oracles.snapkv(model, read, len(prompt), *policy.setting.values())
            expected = np.concatenate([whole, behind])
            lost = sum(len(prompt) - len(head) for layer in kept for head in layer)
        else:
            expected = masked([read], policy, config, parameters)[0][0]
            lost = 2 * 2 * (len(read) - 8)
        at = np.arange(len(prompt), len(prompt) + 24)
        expected, num_evicted = expected[at - 1], num_evicted + lost
        drawn, _ = draw(np.float32(expected), np.full(24, n), at, kind=rule.kind, numbers=rule.numbers)
        assert tokens == drawn.tolist(), n
        np.testing.assert_allclose(found[n][1], expected[np.arange(24), tokens], atol=1e-4)
    assert rows.evicted == num_evicted > 0
    assert rows.allocated == (0, 0)


def test_the_buffer_grows_with_what_sequences_keep():
    """Roles are known when they are drawn: the loop stops where a head is full, and goes on in a larger buffer."""
    parameters = decoding.always(CONFIG, 0)
    decoder = decoding.decoder(CONFIG, parameters, settings=DecodeSettings(chunk=32, segment=4, block=16))
    rows = Rows(decoder, 2, MOST)
    found = serve(rows, [RowRequest((1, 2), 60), RowRequest((3,), 5), RowRequest((5,), 5)])
    assert rows.transfers > 0
    logits, _ = decoding.masked_logits(CONFIG, parameters, [[1, 2, *found[0][0]]])
    assert found[0][0] == logits[0, 1:-1].argmax(-1).tolist()


def test_greedy_tokens_are_the_likeliest_of_the_masked_forward():
    """The oracle is the forward pass with masks, in one piece, whose logits are normalized in float64."""
    decoder = decoding.decoder(CONFIG, PARAMETERS, settings=ONE_SIZE)
    requests = [
        RowRequest(request.prompt, request.max_new_tokens, num_likeliest=3, scores_prompt=True)
        for request in requests_of(1, 6, [Sampling()])
    ]
    rows, scored = Rows(decoder, 2, MOST), {}
    waiting = list(requests)
    while waiting or rows.num_busy:
        if waiting and rows.num_free:
            row = rows.begin(waiting.pop(0))
            scored[row] = ([], [], [])
        for drawn in rows.advance():
            assert drawn.of_prompt == (len(scored[drawn.row][0]) < len(drawn.row.request.prompt) - 1)
            for values, new in zip(scored[drawn.row], (drawn.tokens, drawn.logprobs, drawn.likeliest), strict=True):
                values.extend(new)
    whole = [[row.request.prompt[0], *tokens] for row, (tokens, _, _) in scored.items()]
    expected, _ = masked(whole, Nats())
    for x, (row, (tokens, logprobs, likeliest)) in zip(expected, scored.items(), strict=True):
        prompt = list(row.request.prompt)
        assert tokens[: len(prompt) - 1] == prompt[1:]
        assert len(tokens) == len(prompt) - 1 + row.request.max_new_tokens
        np.testing.assert_allclose(logprobs, x[np.arange(len(tokens)), tokens], atol=1e-4)
        for step, best in enumerate(likeliest):
            np.testing.assert_allclose(list(best.values()), np.sort(x[step])[::-1][:3], atol=1e-4)
            np.testing.assert_allclose(list(best.values()), x[step][list(best)], atol=1e-4)
        new = np.arange(len(prompt) - 1, len(tokens))
        assert np.all(x[new].max(-1) - x[new, np.array(tokens)[new]] <= 1e-4)


def test_a_released_row_frees_its_keys_and_a_long_one_its_slots():
    decoder = decoding.decoder(CONFIG, PARAMETERS, FullAttention(), DecodeSettings(chunk=64, segment=4, block=16))
    rows = Rows(decoder, 2, 512)
    heads = CONFIG.model.num_layers * CONFIG.model.num_kv_heads
    long = rows.begin(RowRequest(tuple(decoding.prompts([300])[0]), 200))
    short = rows.begin(RowRequest((1, 2, 3), 60))
    while not short.live:
        rows.advance(1000)
    both = rows.live
    assert both >= heads * 303
    slots, size = rows.allocated
    assert slots == heads * 2 * 512
    assert size > 0
    rows.release(long)
    rows.release(long)  # nothing happens twice
    assert (long.is_done, rows.num_free) == (True, 1)
    for _ in range(4):
        rows.advance()
    assert not short.is_done
    assert rows.live == heads * (2 + short.num_drawn), "the keys of its prompt and of all tokens but the last"
    assert rows.allocated[0] < slots / 4
    rows.release(short)
    rows.advance()
    assert (rows.live, rows.allocated, rows.num_free) == (0, (0, 0), 2)


def test_a_prompt_can_be_released_while_it_is_read():
    decoder = decoding.decoder(CONFIG, PARAMETERS, settings=ONE_SIZE)
    rows = Rows(decoder, 1, MOST)
    row = rows.begin(RowRequest(tuple(decoding.prompts([90])[0]), 1))
    assert rows.advance(1) == []
    assert rows.allocated[0] > 0
    rows.release(row)
    assert (rows.advance(), rows.allocated, rows.num_busy) == ([], (0, 0), 0)


def test_a_prompt_alone():
    decoder = decoding.decoder(CONFIG, PARAMETERS, settings=ONE_SIZE)
    rows = Rows(decoder, 1, MOST)
    row = rows.begin(RowRequest((1, 2, 3), 0, scores_prompt=True, num_likeliest=MAX_LIKELIEST))
    of_prompt, end = rows.advance()
    assert (of_prompt.tokens, of_prompt.of_prompt, len(of_prompt.likeliest[0])) == ([2, 3], True, MAX_LIKELIEST)
    assert (end.tokens, end.row, row.is_done, rows.num_busy) == ([], row, True, 0)


def test_logits_that_are_no_numbers_end_their_row_alone():
    parameters = {**PARAMETERS, "embedding": PARAMETERS["embedding"].at[5].set(np.nan)}
    decoder = decoding.decoder(CONFIG, parameters, settings=ONE_SIZE)
    rows = Rows(decoder, 2, MOST)
    bad, good = rows.begin(RowRequest((1, 5), 4)), rows.begin(RowRequest((1, 2), 9))
    while rows.num_busy:
        rows.advance()
    assert "not numbers (NaN)" in bad.error
    assert (bad.num_drawn, good.num_drawn, good.error) == (0, 9, None)
    scored, good = rows.begin(RowRequest((1, 5, 2), 0, scores_prompt=True)), rows.begin(RowRequest((1, 2), 2))
    found = [drawn for _ in range(4) for drawn in rows.advance(1000)]
    assert [(drawn.tokens, drawn.is_last) for drawn in found if drawn.row is scored] == [([], True)]
    assert "not numbers (NaN)" in scored.error
    assert (good.num_drawn, rows.num_busy) == (2, 0)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (RowRequest((), 1), "no token"),
        (RowRequest((99,), 1), "outside 0 … 15"),
        (RowRequest((1,) * 90, 9), "at most 96"),
    ],
)
def test_mistakes_are_sentences(request_, sentence):
    rows = Rows(decoding.decoder(CONFIG, PARAMETERS), 1, MOST)
    with pytest.raises(UserError, match=sentence):
        rows.begin(request_)
    assert rows.num_free == 1


ON_DEVICES = """
import json, sys
import jax
import decoding, test_rows
from natsjax.decode.rows import Rows

parameters = jax.device_get(test_rows.PARAMETERS)
for mesh in json.load(sys.stdin):
    decoder = decoding.decoder(test_rows.CONFIG, parameters, settings=test_rows.ONE_SIZE, mesh=mesh)
    rows = Rows(decoder, 3, test_rows.MOST)
    found = test_rows.serve(rows, test_rows.requests_of(2, 7))
    print(json.dumps({"rows": rows.num_rows, "tokens": [found[n][0] for n in range(7)]}), flush=True)
"""


@pytest.mark.larger
def test_rows_on_several_devices():
    """Each device reads the prompts of its own rows."""
    one, four = json_lines(ON_DEVICES, [None, {"data": 2, "tensor": 2}], devices=4)
    assert (one["rows"], four["rows"]) == (3, 4)
    assert one["tokens"] == four["tokens"]
    assert sum(map(len, one["tokens"])) > 50
