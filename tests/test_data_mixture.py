"""Mixtures of corpora: exact shares, nothing lost or read twice, the same whatever was read before; and their runs."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import natsjax
import natsjax.train
from natsjax import evaluate, export
from natsjax.data import PackedSource, iterate, train_dataset
from natsjax.data.mixture import MixtureSource, load_mixture, mixture_contexts, parse_mixture
from natsjax.data.prepare import prepare
from natsjax.errors import UserError
from natsjax.runs.data import open_data, resolve_length
from natsjax.runs.load import load
from natsjax.runs.workdir import Workdir

LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three small corpora of bytes, whose texts can be told apart."""
    root = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(0)
    for name, documents in (("a", 30), ("b", 12), ("c", 5)):
        (root / name).mkdir()
        for number in range(documents):
            text = name * int(rng.integers(5, 60))
            (root / name / f"{number:02d}.txt").write_text(text)
        prepare(root / name, root / f"{name}.corpus", tokenizer="byte", held_out_fraction=0.3, progress=False)
    return root


def parts(folders, **shares):
    text = ",".join(f"{folders / name}.corpus={weight}" for name, weight in shares.items())
    return load_mixture(text)


def test_weights_become_shares():
    assert parse_mixture("x/y=3, z=1") == [("x/y", 0.75), ("z", 0.25)]
    assert parse_mixture("a=b=1e-3") == [("a=b", 1.0)]


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=3), seed=st.integers(0, 3), begin=st.integers(0, 10**9)
)
def test_streams_are_interleaved_evenly_and_nothing_is_lost(folders, weights, seed, begin):
    mixture = MixtureSource(parts(folders, **dict(zip("abc", weights, strict=False))), context_length=LENGTH, seed=seed)
    places = [mixture.place(index) for index in range(begin, begin + 2000)]
    for number, part in enumerate(mixture.parts):
        own = [index for corpus, index in places if corpus == number]
        assert own == list(range(own[0], own[0] + len(own))) if own else True  # each once, in order
        assert len(own) == pytest.approx(2000 * part.fraction, abs=len(mixture.parts))
    assert [mixture.place(index) for index in range(begin, begin + 20)] == places[:20]


def test_a_context_is_that_of_its_corpus(folders):
    mixture = MixtureSource(parts(folders, a=0.6, b=0.4), context_length=LENGTH, seed=3)
    alone = [PackedSource.from_corpus(p.corpus, context_length=LENGTH, seed=3) for p in mixture.parts]
    offset = mixture.parts[0].corpus.summaries["train"].documents
    for index in range(40):
        number, own = mixture.place(index)
        row, expected = mixture[index], alone[number][own]
        for name in set(row) - {"document_id"}:
            np.testing.assert_array_equal(row[name], expected[name])
        np.testing.assert_array_equal(row["document_id"], expected["document_id"] + number * offset)
        text = mixture.parts[0].corpus.tokenizer.decode(row["inputs"])
        assert set(text) <= {"ab"[number]}


def test_one_corpus_with_any_weight_is_the_corpus(folders):
    mixture = MixtureSource(parts(folders, c=0.3), context_length=LENGTH, seed=1)
    alone = PackedSource.from_corpus(mixture.parts[0].corpus, context_length=LENGTH, seed=1)
    for name, values in mixture.rows(5, 20).items():
        np.testing.assert_array_equal(values, alone.rows(5, 20)[name])
    np.testing.assert_array_equal(
        mixture.piece_lengths()[:-1], alone.piece_lengths()[: len(mixture.piece_lengths()) - 1]
    )


def test_batches_are_a_function_of_the_step_and_processes_share_them(folders):
    mixture = MixtureSource(parts(folders, a=1, b=2, c=1), context_length=LENGTH, seed=0)
    whole = train_dataset(mixture, batch_size=6)
    batches = iterate(whole, 7)
    resumed = [next(batches)["inputs"] for _ in range(3)]
    batches.close()
    halves = [train_dataset(mixture, batch_size=6, rows=rows) for rows in (slice(0, 2), slice(2, 6))]
    for step, batch in enumerate(resumed, start=7):
        np.testing.assert_array_equal(batch, whole[step]["inputs"])
        np.testing.assert_array_equal(batch, np.concatenate([half[step]["inputs"] for half in halves]))


@pytest.mark.parametrize(
    ("shares", "count", "expected"), [((3, 1), 8, (6, 2)), ((1, 1, 1), 4, (2, 1, 1)), ((9, 1), 3, (3, 0))]
)
def test_held_out_contexts_have_the_shares(folders, shares, count, expected):
    mixed = parts(folders, **dict(zip("abc", shares, strict=False)))
    found = mixture_contexts(mixed, "validation", context_length=8, max_contexts=count)
    first, seen = 0, []
    for part in mixed:
        documents = part.corpus.summaries["validation"].documents
        inside = (found["document_id"] >= first) & (found["document_id"] < first + documents)
        seen.append(int(inside[:, 0].sum()))
        first += documents
    assert tuple(seen) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no weight for ''"),
        ("{a}", "has no weight for"),
        ("{a}=", "the weight ''"),
        ("{a}=0", "the weight '0' for .*; a number above 0"),
        ("{a}=-1", "the weight '-1'"),
        ("{a}=nan", "the weight 'nan'"),
        ("{a}=inf,{b}=1", "the weight 'inf'"),
        ("{a}=1,{a}=2", "twice"),
        ("{a}=1,{a}/../a.corpus=2", "twice"),
        ("{a}=1,nowhere=2", "nowhere is no prepared corpus"),
    ],
)
def test_mistakes_are_one_sentence(folders, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_mixture(text.format(a=f"{folders}/a.corpus", b=f"{folders}/b.corpus"))
    assert "\n" not in str(caught.value)


def test_corpora_of_different_tokenizers_do_not_mix(folders, tmp_path):
    prepare(folders / "b", tmp_path / "bpe", vocab_size=260, held_out_fraction=0.3, progress=False)
    with pytest.raises(UserError, match=r"another tokenizer \(bpe of 2\d\d\) than .* \(byte of 258\)"):
        load_mixture(f"{folders}/a.corpus=1,{tmp_path}/bpe=1")


def of_mixture(folders, **groups):
    data = {"source": "corpus", "mixture": f"{folders}/a.corpus=3,{folders}/b.corpus=1", "tokenizer": "byte"}
    return tiny.config(data=data | {"context_length": 24}, **groups)


def test_a_run_on_a_mixture_trains_resumes_evaluates_and_is_exported(folders, tmp_path, capsys):
    config = of_mixture(folders, train={"num_epochs": 0.5, "num_steps": 1})
    natsjax.train.run(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "75 % " in said
    assert "25 % " in said
    assert "0.5" in said
    run = load(tmp_path / "run")
    tokens = sum(source.epoch_tokens for source in run.data.source.sources)
    assert run.step == run.config.train.num_steps == -(-tokens // 2 // (4 * 24)) or run.step == -(-tokens // (8 * 24))
    # Extended by epochs: no complaint about steps, and it goes on.
    longer = of_mixture(folders, train={"num_epochs": 1.0, "num_steps": 1})
    natsjax.train.run(longer, tmp_path / "run")
    said = capsys.readouterr().err
    assert "train.num_epochs: 0.5 -> 1.0" in said
    assert "train.num_steps:" not in said
    assert load(tmp_path / "run").step == pytest.approx(2 * run.step, abs=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "report" / "results.jsonl").read_text().splitlines()]
    assert all(row["num_documents"] > 1 for row in rows)
    other = dataclasses.replace(longer.data, mixture=f"{folders}/a.corpus=1,{folders}/b.corpus=1")
    with pytest.raises(UserError, match=r"data.mixture"):
        natsjax.train.run(dataclasses.replace(longer, data=other), tmp_path / "run")
    workdir = Workdir(tmp_path / "run")
    another = open_data(dataclasses.replace(longer, data=other), workdir)
    with pytest.raises(UserError, match="the data is not what"):
        workdir.compare_data(another.fingerprint)
    exported = export.export(tmp_path / "run", tmp_path / "export")
    assert exported is not None
    found = evaluate.run(tmp_path / "export", progress=False)
    assert found.rows[0]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-6)
    moved = f"{folders}/a.corpus=0.75,{folders}/b.corpus=0.25"
    assert (
        evaluate.run(tmp_path / "export", prepared_dir=moved, progress=False).rows[0]["perplexity"]
        == found.rows[0]["perplexity"]
    )


@pytest.mark.parametrize(
    ("train", "steps"),
    [({"num_tokens": 960}, 10), ({"num_tokens": 961}, 11), ({"num_tokens": 1}, 1), ({"num_steps": 7}, 7)],
)
def test_tokens_become_steps(folders, tmp_path, train, steps):
    config = of_mixture(folders, train=train, optimizer={"warmup_steps": 0})
    data = open_data(config, Workdir(tmp_path))
    assert resolve_length(config, data).train.num_steps == steps


def test_epochs_become_steps_exactly(folders, tmp_path):
    config = of_mixture(folders, train={"num_epochs": 3.0})
    data = open_data(config, Workdir(tmp_path))
    steps = resolve_length(config, data).train.num_steps
    assert (steps - 1) * 96 < 3 * data.epoch_tokens <= steps * 96


def test_lengths_that_cannot_be_are_one_sentence(folders, tmp_path):
    config = of_mixture(folders, train={"num_tokens": 96}, optimizer={"warmup_steps": 5})
    data = open_data(config, Workdir(tmp_path))
    with pytest.raises(UserError, match=r"warmup_steps = 5 is more than the 1 steps that train.num_tokens = 96 makes"):
        resolve_length(config, data)
    recall = tiny.config(train={"num_epochs": 1.0})
    with pytest.raises(UserError, match="has no epochs"):
        resolve_length(recall, open_data(recall, Workdir(tmp_path)))
    with pytest.raises(UserError, match="both set the length of the run"):
        tiny.config(train={"num_epochs": 1.0, "num_tokens": 5})
    with pytest.raises(UserError, match="does not go with it"):
        tiny.config(data={"source": "corpus", "mixture": "a=1", "input": "b"})
