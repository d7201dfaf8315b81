"""The benchmark beside kvpress: our half of it. The other half needs an extra, and checks itself when it runs."""

import re

import decoding
import jax.numpy as jnp
import numpy as np
import pytest
from rival_oracles import NumpyModel, best, keydiff_score

from benchmarks import kvpress as benchmark
from natsjax.errors import UserError

LENGTH, CONTINUED = 20, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = decoding.config(model={"layer_types": "dense", "key_shift": False, "token_shift": False})
    return decoding.make_run(tmp_path_factory.mktemp("kvpress") / "run", config)


def test_a_prompt_is_cut_to_sinks_and_the_newest():
    end = np.asarray(benchmark.CutPrompt(10, 2, 3).key_end(jnp.arange(14)[None], 1))[0, 0]
    for t in range(14):
        kept = range(t + 1) if t < 10 else [0, 1, *range(7, t + 1)]
        assert [s for s in range(t + 1) if end[s] > t] == list(kept)


def test_the_continuation_reads_what_is_kept_of_the_prompt_and_itself(run):
    """Every token of it, against a model in plain numpy; nothing more is evicted."""
    model, tokens = NumpyModel(run.config, run.parameters), decoding.prompts([LENGTH + CONTINUED])[0]
    rows = np.array([tokens[:LENGTH]]), np.array([tokens[LENGTH:]])
    keys = 9
    x = model.embed(tokens[:-1])
    for layer in model.layers:
        query, key, value = model.project(layer, x)
        is_read = np.repeat(np.tri(len(x), dtype=bool)[:, None], 2, axis=1)
        for k in range(2):
            kept = best(keydiff_score(key[:LENGTH, k], range(LENGTH)), range(LENGTH), keys)
            is_read[LENGTH:, k, sorted(set(range(LENGTH)) - set(kept))] = False
        x = model.finish(layer, x, np.einsum("tkgs,skh->tkgh", model.weights(query, key, is_read), value))
    expected = -model.logprobs(x)[np.arange(LENGTH - 1, len(x)), tokens[LENGTH:]]
    once, _ = benchmark.policies(keys, LENGTH, 4, 1e-3)["keydiff"]
    np.testing.assert_allclose(benchmark.nll_of_ours(run, once, *rows)[0], expected, atol=2e-5)


def test_texts_are_beginnings_of_held_out_documents(run):
    contexts = run.data.contexts("validation", run.config.eval.num_contexts)
    found = benchmark.texts(run, 4, 2, most=3)
    assert found.shape == (min(3, len(found)), 6)
    starts = contexts["inputs"][contexts["positions"] == 0]
    assert set(found[:, 0]) <= set(starts)
    with pytest.raises(UserError, match="no held-out piece has 100002 tokens"):
        benchmark.texts(run, 100000, 2, most=3)


def test_the_table_says_where_nothing_was_changed():
    nll = np.full((2, 3), np.log(2.0))
    rows = [
        benchmark.row("knorm", 8, nll, None, nll + 1e-6, nll),
        benchmark.row("h2o", 8, nll, 2 * nll, 2 * nll, None),
        benchmark.row("expected_attention", 8, nll, None, None, None),
    ]
    assert [one["difference"] for one in rows] == [pytest.approx(1e-6), 0, None]
    lines = [re.split(r" *\| *", line)[1:-1] for line in benchmark.table(rows).splitlines()[2:]]
    assert lines == [
        ["knorm", "8", "2.0000", "the same", "2.0000", "1.0e-06", "2.0000"],
        ["h2o", "8", "2.0000", "4.0000", "4.0000", "0.0e+00", ""],
        ["expected_attention", "8", "2.0000", "", "", "", ""],
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keys=300"], "it must be at least 8, and less than --prompt=256"),
        (["--prompt=0"], "it must be at least 1"),
        (["--output=/nowhere"], "there is no such folder"),
    ],
)
def test_mistakes_are_sentences(flags, message):
    with pytest.raises(UserError, match=message):
        benchmark.parse(["--workdir=x", *flags])
