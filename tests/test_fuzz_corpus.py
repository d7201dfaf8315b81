"""Fuzzed corpora: folders of good, damaged and strange files through ``prepare``, and what can be read of the result.

Each ends as a corpus that holds just the texts that went in, or as one clear sentence with nothing left behind.
"""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import pathlib
import tempfile
from collections import Counter

import hypothesis
import numpy as np
import pytest
import zstandard
from fuzzing import assert_one_sentence, cases
from hypothesis import strategies as st

from natsjax.data import Corpus, PackedSource, evaluation_contexts
from natsjax.data.prepare import prepare
from natsjax.errors import UserError

# --- texts ---

_STRANGE = ["", " ", "\n", "\r\n", "\t \n", "\0", "a\0b", "\ufeff", "a\r\nb\r", "\u2028", "\x85", "e\u0301", "🦆" * 9]
_STRANGE += ["x", "one line\nand no end", "word " * 40, "\x1b[0m", "\ufffd", "\U0010ffff", "<bos>", "⟨eos⟩", "Ġ"]
_STRANGE += ["x" * 70_000]
TEXTS = st.one_of(
    st.sampled_from(_STRANGE),
    st.text(max_size=30),
    st.text("ab \n", max_size=60),
    st.integers(0, 999).map(lambda number: f"document {number} of words and words"),
)


@dataclasses.dataclass(frozen=True)
class Content:
    """Bytes of a file, and the texts in it; None where they cannot be read.

    ``skippable``: whether such a file is one that ``skip_bad_files`` leaves out.
    """

    data: bytes
    texts: tuple[str, ...] | None
    skippable: bool = True


def _text_content(draw) -> Content:
    if draw(st.integers(0, 24)):
        text = draw(TEXTS)
        return Content(text.encode(), (text.removeprefix("\ufeff"),))
    return Content(
        draw(st.sampled_from([b"\xff", b"a\xc3", b"\xff\xfea", b"\xed\xa0\x80", b"x" * 5000 + b"\xe9"])), None
    )


# What is no JSON, or no Unicode; what is JSON and no text; what is a document without text if others have some.
_BAD_LINES = ["{", '{"text": "\\ud800"}', '{"id": "\\udfff", "text": "a"}', "[" * 99_999, "{'text': 'a'}", "\0"]
_BAD_LINES += ["x" * 9000, '{"text": "a"} {"text": "b"}', '{"text": "a",}']
_WRONG_LINES = ["[1]", "3", "null", '"text"', '{"text": 3}', '{"text": ["a"]}', '{"text": NaN}']
_LINES_WITHOUT = ["{}", '{"a b": "c"}', json.dumps({f"field {n}": n for n in range(300)})]
_LINES_WITHOUT += [json.dumps({"k" * 9000: 1, "\n\x1b[31m": 2})]
_FINE_LINES = {'{"text": null}': "", '{"n": ' + "9" * 5000 + ', "text": "a"}': "a"}
IDENTITIES = st.sampled_from([None, 0, 7, -1, 10**30, "a", "", "x.txt", "\n", "🦆", True, 1.5, ["a"], {}, "i" * 3000])


def _lines_content(draw) -> Content:
    """JSON lines."""
    lines, texts = [], []
    for _ in range(draw(st.integers(0, 5))):
        text = draw(TEXTS)
        record = {"text": text, **({"id": draw(IDENTITIES)} if draw(st.booleans()) else {}), **draw(_EXTRA)}
        lines.append(json.dumps(record, ensure_ascii=draw(st.booleans())).encode())
        texts.append(text)
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from([b"", b" ", b"\t"])))
    damage = draw(st.integers(0, 24))
    among = {0: _BAD_LINES, 1: _WRONG_LINES, 2: _LINES_WITHOUT, 3: list(_FINE_LINES)}.get(damage)
    if among is not None:
        line = draw(st.sampled_from(among))
        lines.insert(draw(st.integers(0, len(lines))), line.encode("utf-8"))
        texts += [_FINE_LINES[line]] if damage == 3 else []
    if damage == 4:
        lines.append(b'{"text": "\xff"}')
    is_bad = damage in (0, 1, 4) or (damage == 2 and not texts)
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    data = end.join(lines) + draw(st.sampled_from([b"", end]))
    mark = draw(st.sampled_from([b""] * 5 + ["\ufeff".encode()]))
    return Content(mark + data, None if is_bad else tuple(texts), skippable=damage in (0, 4))


def _json_content(draw) -> Content:
    """An array of records, or one record."""
    texts = [draw(TEXTS) for _ in range(draw(st.integers(0, 4)))]
    records = [{"n": [1], "text": text} for text in texts]
    value = records[0] if len(records) == 1 and draw(st.booleans()) else records
    data = json.dumps(value, indent=draw(st.sampled_from([None, 1]))).encode()
    if draw(st.integers(0, 19)) == 0:
        return Content(data[: draw(st.integers(1, len(data) - 1))], None)
    return Content(data, tuple(texts))


_EXTRA = st.sampled_from([{}, {}, {"meta": {"deep": [[[1]]]}}, {"n": 1e999}, {"ümlaut": None}])


def _packed(draw, content: Content, pack) -> Content:
    """Compressed, in one part or two, and now and then cut off, or with something behind it."""
    half = draw(st.integers(0, len(content.data)))
    whole = pack(content.data[:half]) + pack(content.data[half:]) if draw(st.booleans()) else pack(content.data)
    match draw(st.integers(0, 19)):
        case 0:
            return Content(whole[: draw(st.integers(1, len(whole) - 1))], None)
        case 1:
            return Content(draw(st.sampled_from([b"x", b"no archive at all", whole + b"rest", b"\0" * 40])), None)
    return Content(whole, content.texts, content.skippable)


def _parquet_content(draw) -> Content:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [draw(TEXTS) for _ in range(draw(st.integers(0, 4)))]
    column = arrow.array(texts, draw(st.sampled_from([arrow.string(), arrow.large_string()])))
    what = draw(st.integers(0, 19))
    if what == 0:
        column = draw(
            st.sampled_from([arrow.array([1]), arrow.array([["a"]]), arrow.array([{"a": 1}]), arrow.array([1.5, None])])
        )
    names = ["other"] if what == 1 else ["text"]
    sink = io.BytesIO()
    parquet.write_table(arrow.table([column], names), sink, compression=draw(st.sampled_from(["none", "zstd", "gzip"])))
    data = sink.getvalue()
    if what == 2:
        return Content(data[: draw(st.integers(0, len(data) - 1))], None)
    if what == 3:
        place = draw(st.integers(0, len(data) - 1))  # anything may come of a changed byte, but no traceback
        return Content(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :], None, skippable=False)
    return Content(data, None if what < 2 else tuple(texts), skippable=what > 1)


KINDS = {
    ".txt": _text_content,
    ".jsonl": _lines_content,
    ".jsonl.zst": lambda draw: _packed(draw, _lines_content(draw), zstandard.compress),
    ".jsonl.gz": lambda draw: _packed(draw, _lines_content(draw), gzip.compress),
    ".txt.gz": lambda draw: _packed(draw, _text_content(draw), gzip.compress),
    ".ndjson.xz": lambda draw: _packed(draw, _lines_content(draw), lzma.compress),
    ".txt.bz2": lambda draw: _packed(draw, _text_content(draw), bz2.compress),
    ".json": _json_content,
    ".parquet": _parquet_content,
    ".md": _text_content,
}
_STEMS = [b"a", b"b", b"two words", "ü".encode(), b"\xff\xfe", b".hidden", b"-x", b"new\nline", b"a.txt", b"x" * 200]
_STEMS += [b"'", b"%"]
_FOLDERS = [b"", b"", b"", b"sub/", b"sub/deeper/", b"\xc3/", b"folder.txt/"]


@st.composite
def inputs(draw, most=6):
    """Files by path, links and folders by path, and whether the input is one file."""
    files = {}
    for _ in range(draw(st.integers(0 if draw(st.integers(0, 9)) == 0 else 2, most))):
        suffix = draw(st.sampled_from([*[".txt"] * 6, *[".jsonl"] * 3, *KINDS]))
        name = draw(st.sampled_from(_FOLDERS)) + draw(st.sampled_from(_STEMS))
        ending = suffix.upper() if draw(st.integers(0, 9)) == 0 else suffix
        files[name + ending.encode()] = KINDS[suffix](draw)
    names = st.sampled_from([b"loop.txt", b"loop", b"gone.jsonl", b"again.txt", b"sub/up"])
    targets = st.sampled_from([b".", b"loop.txt", b"nowhere", b"..", b"/dev/null"])
    return files, draw(st.dictionaries(names, targets, max_size=1))


def write(folder: pathlib.Path, files, links) -> list[Content]:
    """Writes them, and returns what a reader of the folder should find."""
    folder.mkdir()
    found = []
    for name, content in files.items():
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content.data)
        if not name.lower().endswith(b".md") and not os.path.basename(name).startswith(b"."):
            found.append(content)
    for name, target in links.items():
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
        if not os.path.exists(path):
            found.append(Content(b"", None))
    return found


# --- arguments ---

_TYPICAL = {"tokenizer": "byte", "held_out_fraction": 0.3, "vocab_size": 270}
_ARGUMENTS = {
    "tokenizer": st.sampled_from(["byte", "byte", "byte", "bpe", "bpe", "", "no/such/folder", "\0", "x.model", "."]),
    "vocab_size": st.sampled_from([258, 259, 270, 5000, 257, 0, -1, 2**31, 10**30]),
    "held_out_fraction": st.sampled_from([0.3, 0.5, 1e-9, 1 - 1e-9, 0.0, 1.0, -1.0, float("nan"), float("inf")]),
    "text_field": st.sampled_from(["text", "text", "text", "", "a b", "\0", "\ud800", "x" * 3000]),
    "skip_bad_files": st.booleans(),
    "seed": st.sampled_from([0, 1, -1, 2**70]),
    "documents_per_shard": st.sampled_from([1, 2, 16384, 0, -1, 10**30]),
    "deduplicate": st.booleans(),
}
_QUIET = {"workers": 1, "progress": False}


@st.composite
def arguments(draw):
    """Draws arguments of ``prepare``: most are typical, some are strange."""
    changed = {name: draw(values) for name, values in _ARGUMENTS.items() if draw(st.integers(0, 19)) == 0}
    return _TYPICAL | changed


def assert_holds(corpus: Corpus, expected: list[Content], options) -> None:
    """The corpus holds the texts that went in, whole and once each, and its counts are right."""
    texts = Counter(text for content in expected for text in content.texts or () if text.strip())
    if options.get("deduplicate"):
        texts = Counter(dict.fromkeys(texts, 1))
    found: Counter[str] = Counter()
    for split, summary in corpus.summaries.items():
        documents = corpus.documents(split)
        assert summary.documents == len(documents) == len(documents.ids) > 0
        assert summary.tokens == documents.lengths.sum()
        mine = [corpus.tokenizer.decode(documents[index]) for index in range(len(documents))]
        assert summary.bytes == sum(len(text.encode()) for text in mine)
        found.update(mine)
    if "held_out_end" in corpus.input_report["input"]:  # there is one document, and found are its parts
        halves = [corpus.tokenizer.decode(corpus.documents(split)[0]) for split in ("train", "validation")]
        found = Counter(["".join(halves)])
    assert found == texts


def assert_readable(corpus: Corpus, context_length: int) -> None:
    """Training rows and evaluation contexts of any length can be had, but where there is nothing to predict."""
    source = PackedSource.from_corpus(corpus, context_length=context_length, seed=0)
    rows = source.rows(0, 3)
    again = PackedSource.from_corpus(corpus, context_length=context_length, seed=0).rows(0, 3)
    for name, values in rows.items():
        assert values.shape == (3, context_length)
        np.testing.assert_array_equal(values, again[name])
    assert 0 <= rows["inputs"].min() <= rows["inputs"].max() < corpus.tokenizer.vocab_size
    assert source.piece_lengths().sum() == source.epoch_tokens
    for split in corpus.summaries:
        try:
            held = evaluation_contexts(corpus, split, context_length=context_length, max_contexts=3)
        except UserError as error:
            assert_one_sentence(error, names=split)
        else:
            assert held["loss_weight"].any()


@cases("corpus")
@hypothesis.given(
    inputs(), arguments(), st.one_of(st.none(), st.none(), inputs(most=3)), st.sampled_from([1, 2, 7, 64]), st.data()
)
def test_corpora(texts, options, held_out, context_length, data):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        expected = write(folder / "in", *texts)
        given = folder / "in"
        if held_out is not None:
            validation = data.draw(st.sampled_from(["held out", "held out", "in", "nowhere", "in/../in"]))
            others = write(folder / "held out", *held_out)
            expected += others if validation == "held out" else []
            options = options | {"validation_input": folder / validation}
        before = sorted(os.listdir(os.fsencode(folder)))
        try:
            corpus = prepare(given, folder / "out", **options, **_QUIET)
        except UserError as error:
            hypothesis.event("refused")
            # The path of a file may be long, and what was given is named.
            text = str(error).replace(str(folder), "…").replace("x" * 200, "…")
            assert_one_sentence(text)
            assert sorted(os.listdir(os.fsencode(folder))) == before, "something was left behind"
            return
        hypothesis.event("prepared")
        assert sorted(os.listdir(os.fsencode(folder))) == sorted([*before, b"out"])
        bad = [content for content in expected if content.texts is None]
        if not any(content.texts is None and not content.skippable for content in bad):
            assert options.get("skip_bad_files") or not bad, "a file that cannot be read was passed over"
            assert_holds(corpus, expected, options)
        assert_readable(corpus, context_length)
        # A second time: the same corpus, at once.
        assert prepare(given, folder / "out", **options, **_QUIET).content_hash == corpus.content_hash
