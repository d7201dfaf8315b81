"""Slices of the held-out tokens: each definition against loops over the tokens, then whole evaluations."""

import collections
import contextlib
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import tiny
from corpora import prepared

from natsjax import evaluate, report
from natsjax.data import PackedSource
from natsjax.errors import UserError
from natsjax.evaluate import __main__ as evaluate_command
from natsjax.evaluate import dense_baseline
from natsjax.evaluate import slices as slices_module
from natsjax.evaluate.masked import measure, sum_by_slice, token_nll
from natsjax.evaluate.slices import (
    ALL,
    SliceSettings,
    bigram_distance,
    bigram_slices,
    count_bigrams,
    gains,
    mark,
    short_context_nll,
)
from natsjax.policies.interval import FullAttention
from natsjax.report.compare import compare
from natsjax.report.intervals import paired_ratio
from natsjax.runs.data import open_data
from natsjax.runs.workdir import Workdir

T = 80
BOS, EOS = 6, 7


class Documents:
    """Documents of six tokens, some with many repetitions."""

    def __init__(self, lengths, seed=0):
        self.lengths = np.array(lengths, np.int64)
        self.seed = seed

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        return rng.choice(6, self.lengths[index], p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.05]).astype(np.int32)


def all_of(documents):
    return [documents[index] for index in range(len(documents))]


@pytest.fixture(scope="module")
def packed():
    """Six packed contexts of several pieces, the last half padding."""
    documents = Documents([9, 200, 30, 1, 14, 0, 5, 50, 70, 40])
    source = PackedSource(documents, context_length=T, bos_id=BOS, eos_id=EOS, seed=0)
    rows = source.rows(0, 6)
    for name, padding in dict.fromkeys(rows, 0).items() | {("document_id", -1)}:
        rows[name][-1, T // 2 :] = padding
    rows["document_end"][-1] = np.minimum(rows["document_end"][-1], T // 2)
    rows["loss_weight"][-1, T // 2 - 1] = 0
    return rows


def last_begun(contexts, n, t):
    """Distance to the last place in the piece where the same two tokens followed each other; 0: there is none."""
    for back in range(1, contexts["positions"][n, t] + 1):
        if all(contexts[name][n, t - back] == contexts[name][n, t] for name in ("inputs", "targets")):
            return back
    return 0


def test_bigrams_are_divided_as_loops_divide_them(packed):
    training = all_of(Documents([40, 1, 0, 25], seed=1))
    counts = collections.Counter(pair for tokens in training for pair in itertools.pairwise(tokens.tolist()))
    rare = 3
    found = bigram_slices(packed, training, rare)
    buckets = {
        f"rare bigram seen again, {low} to {high} back": (low, high) for low, high in ((1, 32), (33, 64), (65, 79))
    }
    kinds = ["rare bigram seen again", "other bigram seen again", "bigram not seen before"]
    assert list(found) == [kinds[0], *buckets, *kinds[1:]]
    expected = {name: np.zeros_like(members) for name, members in found.items()}
    distances = np.zeros(packed["inputs"].shape, int)
    for n, t in np.argwhere(packed["loss_weight"] > 0):
        back = distances[n, t] = last_begun(packed, n, t)
        is_rare = counts[packed["inputs"][n, t], packed["targets"][n, t]] <= rare
        expected[kinds[2] if not back else kinds[0] if is_rare else kinds[1]][n, t] = True
        for name, (low, high) in buckets.items():
            expected[name][n, t] = is_rare and low <= back <= high
    for name, members in expected.items():
        np.testing.assert_array_equal(found[name], members, err_msg=name)
    assert all(members.any() for name, members in found.items() if "65" not in name)
    np.testing.assert_array_equal(bigram_distance(packed), distances)
    assert distances.max() > 32
    # A partition: each predicted token is in one slice, and the buckets are the rare ones.
    assert sum(found[name].astype(int) for name in kinds).tolist() == (packed["loss_weight"] > 0).astype(int).tolist()
    assert np.array_equal(sum(found[name].astype(int) for name in buckets), found[kinds[0]])


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_bigrams_are_counted_across_the_edges_of_what_is_read_at_once(chunk, monkeypatch):
    monkeypatch.setattr(slices_module, "_CHUNK", chunk)
    training = all_of(Documents([40, 1, 0, 2, 25, 14], seed=2))
    counts = collections.Counter(pair for tokens in training for pair in itertools.pairwise(tokens.tolist()))
    pairs = [(a, b) for a in range(8) for b in range(8)]
    numbers = slices_module._bigrams(*np.array(pairs).T)
    assert count_bigrams(numbers, training).tolist() == [counts[pair] for pair in pairs]
    assert count_bigrams(numbers[:0], training).tolist() == []


def predict_by_hand(rows):
    """A model whose predictions depend on all that it reads: a number in [0, 5) for every target."""
    nll = np.full(rows["inputs"].shape, np.nan)
    for n, t in np.argwhere(rows["document_end"] > 0):
        read = rows["inputs"][n, t - rows["positions"][n, t] : t + 1].tolist()
        nll[n, t] = loss_after(read, rows["targets"][n, t])
    return nll


def loss_after(read, target):
    return math.fmod(sum((k + 1) ** 1.5 * (token + 1) for k, token in enumerate(read)) + target, 5)


@pytest.mark.parametrize("short", [1, 2, 4, 9, 16, 60])
def test_the_short_context_is_the_text_before_cut_off(packed, short):
    stride = max(1, short // 4)
    long_nll = predict_by_hand(packed)
    found = short_context_nll(packed, long_nll, short, predict_by_hand)
    lengths = set()
    for n, t in np.argwhere(packed["loss_weight"] > 0):
        readable = packed["positions"][n, t] + 1
        start = max(readable - short, 0) // stride * stride
        read = packed["inputs"][n, t - readable + 1 + start : t + 1].tolist()
        lengths.add(len(read))
        assert start == 0 or short <= len(read) < short + stride
        assert found[n, t] == loss_after(read, packed["targets"][n, t])
    assert max(lengths) == short + stride - 1
    helps = gains(long_nll, found)
    for n, t in np.argwhere(packed["loss_weight"] > 0):
        long, cut = -long_nll[n, t], -found[n, t]
        assert helps[n, t] == (long - cut > 2 and long > -2)
    assert helps[packed["loss_weight"] > 0].any()


def test_sums_of_a_slice_are_those_of_a_loop(packed):
    rng = np.random.default_rng(0)
    nll = rng.random(packed["inputs"].shape)
    predicted = packed["loss_weight"] > 0
    slices = {"all": predicted, "some": predicted & (rng.random(nll.shape) < 0.3), "none": np.zeros_like(predicted)}
    found = sum_by_slice(packed, nll, slices)
    ids = sorted(set(packed["document_id"][predicted].tolist()))
    for z, members in enumerate(slices.values()):
        for d, document in enumerate(ids):
            here = [(n, t) for n, t in np.argwhere(members) if packed["document_id"][n, t] == document]
            assert found.tokens[d, z] == len(here)
            assert found.nll[d, z] == pytest.approx(sum(nll[n, t] for n, t in here))


# --- Whole evaluations --------------------------------------------------------------------------

SETTINGS = SliceSettings(rare=40, short_context=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs on one corpus of bytes, whose documents repeat names of their own."""
    folder = tmp_path_factory.mktemp("slices")
    texts = folder / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    for number in range(48):
        name = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 4))
        words = rng.choice(["the", "house", name, "was"], 25)
        (texts / f"{number}.txt").write_text(" ".join(words))
    data = {"source": "corpus", "input": str(texts), "tokenizer": "byte", "held_out_fraction": 0.3}
    data |= {"prepared_dir": str(folder / "prepared"), "context_length": 64}
    sizes = {"num_contexts": 24, "batch_size": 8, "budgets": (0.4,), "num_sample_tokens": 4}

    def make(kind, **model):
        config = tiny.config(model={"layer_types": kind, "num_layers": 1, **model}, data=data, eval=sizes)
        return tiny.make_run(folder / kind, config)

    return {kind: make(kind) for kind in ("nats", "dense")} | {"sliding": make("sliding", sliding_window=6)}


@contextlib.contextmanager
def low_thresholds():
    """Untrained weights gain little from anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices_module, "LEAST_GAIN", 0.02)
        patch.setattr(slices_module, "LEAST_LOG_PROBABILITY", -6.0)
        yield


@pytest.fixture(scope="module")
def slices(runs):
    dense = runs["dense"]
    with low_thresholds():
        return SETTINGS.find(runs["nats"], dense.data.contexts("validation", 24), dense)


@pytest.fixture(scope="module")
def evaluations(runs):
    paths = {kind: run.workdir.path for kind, run in runs.items()}
    common = {"baseline_workdir": paths["dense"], "slices": SETTINGS, "progress": False}
    with low_thresholds():
        return {
            "nats": evaluate.run(paths["nats"], window_workdir=paths["sliding"], **common),
            "sliding": evaluate.run(paths["sliding"], **common),
        }


def test_every_row_has_every_slice_and_partitions_add_up(evaluations):
    for row in (row for found in evaluations.values() for row in found.rows):
        values = row["by_slice"]
        assert set(values) == set(report.SLICE_FIELDS)
        at = {name: place for place, name in enumerate(values["slices"])}
        whole = at[ALL]
        assert values["nll_by_document"][whole] == row["by_document"]["nll"]
        assert values["tokens_by_document"][whole] == row["by_document"]["tokens"]
        for parts in (
            ["rare bigram seen again", "other bigram seen again", "bigram not seen before"],
            ["long context helps", "long context helps little"],
        ):
            assert all(values["tokens"][at[name]] > 20 for name in parts)
            assert sum(values["tokens"][at[name]] for name in parts) == row["num_tokens"]
            nll = sum(np.array(values["nll_by_document"][at[name]]) for name in parts)
            np.testing.assert_allclose(nll, row["by_document"]["nll"], rtol=1e-8)
        for place, perplexity in enumerate(values["perplexity"]):
            nll, tokens = sum(values["nll_by_document"][place]), values["tokens"][place]
            assert tokens == sum(values["tokens_by_document"][place])
            assert (perplexity is None) == (tokens == 0)
            assert perplexity is None or perplexity == pytest.approx(np.exp(nll / tokens), rel=1e-4)
        assert values["perplexity_low"][whole] < values["perplexity"][whole] < values["perplexity_high"][whole]


def test_ratios_are_paired_with_the_dense_baseline_and_the_trained_window(runs, evaluations, slices):
    """Against pairs of single slices, of runs that are measured here."""
    contexts = runs["dense"].data.contexts("validation", 24)
    for name, other in (("perplexity_ratio", "dense"), ("window_ratio", "sliding")):
        theirs = measure(runs[other], contexts, FullAttention(), slices=slices).slices
        for row in evaluations["nats"].rows:
            own = row["by_slice"]
            for place, tokens in enumerate(own["tokens_by_document"]):
                assert tokens == theirs.tokens[:, place].tolist()
                if not sum(tokens):
                    assert own[name][place] is None
                    continue
                sides = np.array(own["nll_by_document"][place]), theirs.nll[:, place]
                expected = paired_ratio(*sides, np.array(tokens), num_samples=50, seed=0)
                shown = [own[name + end][place] for end in ("", "_low", "_high")]
                for value, exact in zip(shown, expected, strict=True):
                    is_itself = abs(exact - 1) < 1e-6  # the baseline's own row: no spread but that of rounding
                    assert np.isnan(exact) or is_itself if value is None else value == pytest.approx(exact, rel=1e-4)
        assert own[f"{name}_low"][0] is not None
    (dense,) = (row for row in evaluations["nats"].rows if row["method"] == "full" and "dense" in row["weights"])
    assert set(dense["by_slice"]["perplexity_ratio"]) <= {1.0, None}
    assert evaluations["sliding"].rows[0]["by_slice"]["window_ratio"] is None


def test_the_summary_the_note_and_the_command_tell_of_slices(evaluations):
    found = evaluations["nats"]
    text = found.summary()
    (line,) = (line for line in text.splitlines() if line.startswith("| rare bigram seen again  "))
    assert line.count("[") == 3
    assert "to dense [95 %]" in text
    assert "to window [95 %]" in text
    assert any("at most 40 times in the training split" in note and "8 to 9 tokens" in note for note in found.notes)
    assert any("sliding (sliding, step 7): " in note and " KV, perplexity " in note for note in found.notes)
    assert "--slices=bigrams,long_context --rare=40 --short_context=8 --window_workdir=" in found.run_info["command"]
    assert "to window" not in evaluations["sliding"].summary()


def test_the_slices_are_those_of_the_held_out_text_and_the_training_split(runs, evaluations, slices):
    """Rarity by a loop over the training documents; a long context by a pass over each text alone."""
    dense = runs["dense"]
    contexts = dense.data.contexts("validation", 24)
    (documents,) = dense.data.training_documents()
    counts = collections.Counter()
    for tokens in all_of(documents):
        counts.update(itertools.pairwise(tokens.tolist()))
    members = np.zeros(contexts["inputs"].shape, bool)
    for n, t in np.argwhere(contexts["loss_weight"] > 0):
        pair = int(contexts["inputs"][n, t]), int(contexts["targets"][n, t])
        members[n, t] = last_begun(contexts, n, t) > 0 and counts[pair] <= 40
    np.testing.assert_array_equal(slices["rare bigram seen again"], members)
    for evaluation in evaluations.values():
        assert evaluation.rows[0]["by_slice"]["marks"] == [mark(members) for members in slices.values()]
    assert len({mark(members) for members in slices.values()}) == len(slices)

    predict = lambda rows: token_nll(dense, rows, FullAttention())  # noqa: E731
    found = short_context_nll(contexts, predict(contexts), 8, predict)
    n, t = next(tuple(at) for at in np.argwhere(contexts["positions"] == 41) if contexts["loss_weight"][*at] > 0)
    alone = {name: np.zeros((1, 64), np.int32) for name in ("inputs", "targets", "positions", "document_end")}
    begin = t - 7 - (41 + 1 - 8) % 2  # cuts are two tokens apart
    for name in ("inputs", "targets"):
        alone[name][0, : t + 1 - begin] = contexts[name][n, begin : t + 1]
    alone["positions"][0, : t + 1 - begin] = np.arange(t + 1 - begin)
    alone["document_end"][0, : t + 1 - begin] = t + 1 - begin
    assert found[n, t] == pytest.approx(predict(alone)[0, t - begin], rel=1e-5)


def test_a_comparison_pairs_runs_on_slices(runs, evaluations, tmp_path):
    page = compare([runs[kind].workdir.path for kind in evaluations], tmp_path / "out")[0]
    data = json.loads(page.read_text().partition('id="report-data">')[2].partition("</script>")[0])
    nats, window = (run["rows"] for run in data["runs"])
    for row, own in zip(nats, evaluations["nats"].rows, strict=True):
        assert row["by_slice"]["window_ratio"] == pytest.approx(own["by_slice"]["window_ratio"], rel=2e-5)
        assert row["by_slice"]["perplexity_ratio"] is None  # there is no dense run among them
        assert not {"marks", "nll_by_document"} & set(row["by_slice"])
    assert set(next(row for row in window if row["method"] == "full")["by_slice"]["window_ratio"]) <= {1, None}
    assert any('"the trained window" is sliding' in note for note in data["notes"])


def test_bigrams_of_a_mixture_are_those_of_all_its_corpora(tmp_path):
    corpora = [prepared(tiny.write_texts(tmp_path / name, 4 + n), tmp_path / f"p{n}") for n, name in enumerate("ab")]
    mixture = ",".join(f"{corpus.folder}={n + 1}" for n, corpus in enumerate(corpora))
    data = open_data(
        tiny.config(data={"source": "corpus", "mixture": mixture}), Workdir(tmp_path / "run"), progress=False
    )
    found = [documents[index].tolist() for documents in data.training_documents() for index in range(len(documents))]
    assert found == [tokens.tolist() for corpus in corpora for tokens in all_of(corpus.documents("train"))]


def test_mistakes_are_one_sentence(runs, tmp_path, monkeypatch):
    nats, dense, window = runs.values()
    bigrams, long_context = SliceSettings(("bigrams",)), SliceSettings(("long_context",))
    for make, message in {
        (
            lambda: SliceSettings(("bigram",))
        ): r"^--slices=bigram: there are no such slices; choose bigrams or long_context",
        (lambda: SliceSettings(())): r"^--slices=: there are no such slices",
        (lambda: SliceSettings(rare=-1)): r"^--rare=-1: ",
        (lambda: SliceSettings(short_context=0)): r"^--short_context=0: ",
        (lambda: long_context.check(nats, None)): r"^--slices=long_context: .* dense baseline .*--baseline_workdir",
        (lambda: SliceSettings(short_context=60).check(dense, dense)): r"^--short_context=60: .*choose 32 or less",
    }.items():
        with pytest.raises(UserError, match=message):
            make()
    no_text = dataclasses.replace(nats, data=dataclasses.replace(nats.data, training_documents=None))
    with pytest.raises(UserError, match=r"^--slices=bigrams: .* has no training documents"):
        bigrams.check(no_text, None)
    with pytest.raises(UserError, match=r"^--window_workdir=x: it is compared on slices; give --slices"):
        evaluate.run(nats.workdir.path, loaded=nats, window_workdir="x", progress=False)
    shorter = dataclasses.replace(window.config, data=dataclasses.replace(window.config.data, context_length=32))
    for other, message in (
        (dense, r"^--window_workdir=x: the run has model.layer_types = dense; name one with"),
        (dataclasses.replace(window, config=shorter), r"its data.context_length is 32 instead of 64; name a run on"),
    ):
        monkeypatch.setattr(dense_baseline, "load", lambda workdir, prepared_dir, other=other: other)
        with pytest.raises(UserError, match=message):
            evaluate.run(nats.workdir.path, loaded=nats, slices=bigrams, window_workdir="x", progress=False)
    # The command's flags, up to the first mistake that needs a run.
    flags = ["--slices=bigrams,long_context", "--rare=3", "--short_context=9", "--no-progress"]
    with pytest.raises(UserError, match=r"^--slices=long_context: "):
        evaluate_command.main([f"--workdir={nats.workdir.path}", *flags])
