"""Copies are left out once, and the statistics of a corpus are those of its content."""

import numpy as np
import pytest
from corpora import change_description, contents, lines, prepared

from natsjax.data import Corpus, PackedSource
from natsjax.data.prepare import __main__ as command
from natsjax.data.prepare.statistics import all_sliding_kv_fractions, describe, length_quantiles
from natsjax.errors import UserError


def _written(path, texts):
    path.write_bytes(lines(*texts))
    return path


def _ids(corpus, split):
    return list(corpus.documents(split).ids)


def test_only_the_first_copy_stays(tmp_path):
    texts = [f"text {number % 13}" for number in range(40)] + ["text 3 ", "text"]
    texts[5] = "  "
    path = _written(tmp_path / "a.jsonl", texts)
    corpus = prepared(path, tmp_path / "out", deduplicate=True)
    firsts = {text: f"a.jsonl:{number}" for number, text in reversed(list(enumerate(texts, 1))) if text.strip()}
    train, validation = _ids(corpus, "train"), _ids(corpus, "validation")
    assert sorted(train + validation) == sorted(firsts.values())
    assert train == sorted(train, key=lambda name: int(name.split(":")[1]))  # the order of the input
    assert corpus.dropped == {"empty": 1, "duplicate": len(texts) - 1 - len(firsts)}
    assert Corpus.load(tmp_path / "out").dropped == corpus.dropped
    assert f"left out: {corpus.dropped['duplicate']} exact copies, 1 documents without text" in "\n".join(
        describe(corpus)
    )
    with_copies = prepared(path, tmp_path / "copies")
    assert with_copies.dropped == {"empty": 1, "duplicate": 0}
    assert sum(summary.documents for summary in with_copies.summaries.values()) == len(texts) - 1
    with pytest.raises(UserError, match="deduplicate is False there and True here"):
        prepared(path, tmp_path / "copies", deduplicate=True)


def test_corpora_of_an_older_natsjax_are_what_they_were(tmp_path):
    """Before there were copies to leave out, reports on the input, and checksums."""
    path = _written(tmp_path / "a.jsonl", ["a", "b", "b", *(f"text {number}" for number in range(9))])
    corpus = prepared(path, tmp_path / "out")

    def change(description):
        del description["arguments"]["deduplicate"]
        for field in ("dropped", "input_report", "sha256"):
            del description[field]

    change_description(corpus, change)
    again = prepared(path, tmp_path / "out")
    assert (again.content_hash, again.dropped, again.input_report, again.sums) == (corpus.content_hash, {}, {}, {})
    for split in ("train", "validation"):
        assert contents(again, split) == contents(corpus, split)
    with pytest.raises(UserError, match="deduplicate is False there"):
        prepared(path, tmp_path / "out", deduplicate=True)


def test_training_text_is_not_validated_on(tmp_path):
    path = _written(tmp_path / "a.jsonl", ["a", "b", "b", "c"])
    other = _written(tmp_path / "b.jsonl", ["d", "b", "e", "d"])
    corpus = prepared(path, tmp_path / "out", validation_input=other, deduplicate=True)
    assert _ids(corpus, "train") == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert _ids(corpus, "validation") == ["b.jsonl:1", "b.jsonl:3"]
    assert corpus.dropped["duplicate"] == 3
    _written(other, ["c", "b"])
    with pytest.raises(UserError, match="validation_input has no document left: each of its 2 documents is also in"):
        prepared(path, tmp_path / "none", validation_input=other, deduplicate=True)
    _written(path, ["a", "a"])
    with pytest.raises(UserError, match="is the only document of the input and too short"):
        prepared(path, tmp_path / "none", deduplicate=True)


def test_quantiles_are_lengths_that_so_many_documents_do_not_exceed():
    lengths = np.array([5, 1, 9, 3, 7] * 40 + [1000])
    quantiles = length_quantiles(lengths)
    assert list(quantiles) == ["p10", "p50", "p90", "p99", "max"]
    for name, value in quantiles.items():
        share = 1.0 if name == "max" else int(name[1:]) / 100
        assert value in lengths
        assert (lengths <= value).mean() >= share
        assert (lengths < value).mean() < share


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, ["p50", "max"]),
        (4, ["p50", "max"]),
        (5, ["p10", "p50", "p90", "max"]),
        (49, ["p10", "p50", "p90", "max"]),
        (50, ["p10", "p50", "p90", "p99", "max"]),
    ],
)
def test_a_percentile_that_is_the_longest_under_another_name_is_left_out(count, names):
    assert list(length_quantiles(np.arange(1, count + 1))) == names


def _smallest(rows, window):
    """By its definition, query by query: what a context holds, over what dense attention holds."""
    kept = dense = 0
    for position in rows["positions"][rows["document_end"] > 0].tolist():
        kept += min(position, window + 1) + (position > window)
        dense += position + 1
        kept += position <= window
    return kept / dense


@pytest.mark.parametrize(("context_length", "window"), [(64, 4), (64, 16), (32, 4)])
def test_the_smallest_kv_fraction_is_that_of_its_definition(tmp_path, context_length, window):
    random = np.random.default_rng(0)
    texts = [f"{number} " + "x" * int(random.integers(1, 150)) for number in range(60)]
    corpus = prepared(_written(tmp_path / "a.jsonl", texts), tmp_path / "out")
    source = PackedSource.from_corpus(corpus, context_length=context_length, seed=0)
    rows = source.rows(0, source.epoch_tokens // context_length)
    table = all_sliding_kv_fractions(corpus, context_lengths=(32, 64, 1 << 20), windows=(4, 16, 64))
    assert {context: list(row) for context, row in table.items()} == {32: [4, 16], 64: [4, 16]}
    # The last context of the epoch, which is not whole, is left out here.
    assert table[context_length][window] == pytest.approx(_smallest(rows, window), rel=0.01)


def test_the_command_prints_the_table_where_it_makes_sense(tmp_path, capsys):
    path = _written(tmp_path / "a.jsonl", [f"{number} " + "words " * 30 for number in range(10)])
    arguments = [f"--input={path}", f"--output={tmp_path / 'out'}", "--tokenizer=byte", "--no-progress"]
    assert command.main([*arguments, "--deduplicate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    corpus = Corpus.load(tmp_path / "out")
    fractions = all_sliding_kv_fractions(corpus)
    shown = {int(line.split()[0]): line.split()[1:] for line in lines if line.split()[0].isdecimal()}
    assert list(shown) == list(fractions) == [256, 1024]
    assert shown[256] == [*(f"{fractions[256][window]:.4f}" for window in (4, 16, 64)), "-"]
    assert any("tokens in a document: p10 " in line for line in lines)
    short = _written(tmp_path / "b.jsonl", ["a", "b"])
    assert command.main([f"--input={short}", f"--output={tmp_path / 'short'}", "--tokenizer=byte"]) == 0
    assert "no table of KV fractions" in capsys.readouterr().out
