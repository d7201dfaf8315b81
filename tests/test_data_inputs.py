"""What an input holds is read or named: links, forms of JSON, compressions, pointers, and libraries' limits."""

import bz2
import gzip
import json
import lzma
import os

import pytest
import zstandard
from corpora import contents, lengths, lines, prepared, save_dataset, save_splits, save_table, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.data import Corpus, CorpusReader, load_tokenizer
from natsjax.data.hold_out import end_held_out
from natsjax.data.prepare import __main__ as prepare_command
from natsjax.data.prepare import build, passes, prepare
from natsjax.data.readers import arrow_files, input_folder, text_files
from natsjax.data.readers.sources import BadFileError
from natsjax.errors import UserError
from natsjax.runs.workdir import Workdir

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def _tallies(reader):
    found = {name: tally for name, tally in (reader.found | reader.left_out).items() if tally.count}
    return {name: (tally.count, tally.names) for name, tally in found.items()}


# --- links ---


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    """`find -L` finds these eight; a document that had two names could get into both splits."""
    folder, other = tmp_path / "in", tmp_path / "other"
    for place, count in ((folder, 3), (other, 5)):
        place.mkdir()
        for number in range(count):
            (place / f"{number}.txt").write_text(f"{place.name} {number}")
    (folder / "more").symlink_to(other)
    expected = [f"in {number}" for number in range(3)] + [f"other {number}" for number in range(5)]
    reader = CorpusReader(folder)
    assert [document.text for document in reader] == expected
    assert reader.source_names[3:] == [f"more/{number}.txt" for number in range(5)]
    assert _tallies(reader) == {"linked": (1, ["more/"])}
    for path, target in (("loop", "."), ("a.txt", "0.txt"), ("more/up", ".."), ("zzz", "more"), ("more/in", "../in")):
        (folder / path).symlink_to(target)
    reader = CorpusReader(folder)
    assert sorted(document.text for document in reader) == expected
    again = ["a.txt", "loop/", "more/in/", "more/up/in/", "more/up/other/", "zzz/"]
    assert sorted(_tallies(reader)["linked_again"][1]) == again


def test_text_that_is_named_as_held_out_is_not_trained_on_in_silence(tmp_path):
    """The habit of nanoGPT's users and of datasets; where nothing is called training text, names mean nothing."""
    for name in ("train.jsonl", "val.jsonl", "test-00000-of-00001.jsonl", "valley.jsonl"):
        (tmp_path / name).write_bytes(lines({"text": name}))
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "x.txt").write_text("x")
    expected = ["test-00000-of-00001.jsonl", "val.jsonl", "validation/"]
    assert _tallies(CorpusReader(tmp_path)) == {"named_held_out": (3, expected)}
    (tmp_path / "train.jsonl").rename(tmp_path / "more.jsonl")
    assert _tallies(CorpusReader(tmp_path)) == {}


def test_a_linked_file_goes_by_the_name_of_the_link(tmp_path):
    """As in the hub's cache, whose files lie under hashes."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "d2a8").write_bytes(lines({"text": "a"}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x.jsonl").symlink_to("../blobs/d2a8")
    assert texts_of(tmp_path) == ["a"]
    (tmp_path / "snapshot" / "y.jsonl").symlink_to("../blobs/d2a8")
    (tmp_path / "blobs" / "e5").write_text("read by no link")
    reader = CorpusReader(tmp_path)
    assert [document.text for document in reader] == ["a"]
    links = {"linked": (1, ["snapshot/x.jsonl"]), "linked_again": (1, ["snapshot/y.jsonl"])}
    assert _tallies(reader) == links | {"other_suffix": (1, ["blobs/e5"])}


@pytest.mark.parametrize("name", ["gone.txt", "gone", "gone.jsonl.zst"])
@pytest.mark.parametrize("target", ["/nowhere/else", "SELF"])
def test_a_link_that_leads_nowhere_is_no_silence(tmp_path, name, target):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / name).symlink_to(name if target == "SELF" else target)
    with pytest.raises(UserError, match=rf"{name} is a link to .*, which cannot be reached: .*; put back what it"):
        texts_of(tmp_path)
    reader = CorpusReader(tmp_path, skip_bad_files=True)
    assert [document.text for document in reader] == ["a"]
    assert _tallies(reader) == {"unreadable": (1, [name])}


def test_a_folder_that_cannot_be_opened_is_no_silence(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(input_folder.os, "scandir", denied)
    with pytest.raises(UserError, match="closed cannot be read: Permission denied; give this user the right"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, skip_bad_files=True) == ["a"]


# --- what is read, and what is named ---


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", lines({"text": "eins"}, {"text": "zwei ü"}, {"text": "drei"})),
        ("X.NDJSON", lines({"text": "eins"}, {"text": "zwei ü"}, {"text": "drei"})),
        ("x.json", lines({"text": "eins"}, {"text": "zwei ü"}, {"text": "drei"})),
        ("x.json", json.dumps([{"text": "eins"}, {"text": "zwei ü"}, {"text": "drei"}]).encode()),
        ("x.json", json.dumps([{"text": "eins"}, {"text": "zwei ü"}, {"text": "drei"}], indent=2).encode("utf-8-sig")),
        ("x.json", b'\n{\n"text":\n"eins"}\n{"text": "zwei \xc3\xbc"} {"text": "drei"}'),
        ("x.Json", json.dumps([{"text": "eins"}, {"text": "zwei ü"}, {"text": "drei"}], indent=1).encode("utf-16")),
        ("x.jsonl", lines({"text": "eins"}, {"text": "zwei ü"}, {"text": "drei"}).decode().encode("utf-32")),
    ],
)
def test_every_form_of_json_in_every_compression(tmp_path, monkeypatch, suffix, name, content):
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", 7)
    half = len(content) // 2
    pack = PACKED[suffix]
    (tmp_path / (name + suffix.upper())).write_bytes(pack(content[:half]) + pack(content[half:]))
    assert texts_of(tmp_path) == ["eins", "zwei ü", "drei"]
    assert texts_of(tmp_path / (name + suffix.upper())) == ["eins", "zwei ü", "drei"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


_RECORDS = st.lists(st.fixed_dictionaries({"text": st.text('ab\\"[]{}, 🙂', min_size=1), "x": _JSON}), max_size=4)


@settings(max_examples=40, deadline=None)
@given(records=_RECORDS, data=st.data())
def test_an_array_is_read_as_the_library_reads_it_whatever_the_pieces(tmp_path_factory, records, data):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps(records, indent=data.draw(st.none() | st.integers(0, 3)), ensure_ascii=False), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK_BYTES", data.draw(st.integers(1, 40)))
        source = input_folder.file_source(path, "x.json", "text", optional=False)
        assert [document.text for document in source.documents()] == [record["text"] for record in records]
        cut = data.draw(st.integers(0, path.stat().st_size - 1))
        path.write_bytes(path.read_bytes()[:cut])
        if cut:
            with pytest.raises(BadFileError):
                list(source.documents())


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson.xz", "x.json", "x.parquet", "x"])
def test_a_null_is_a_document_without_text_in_every_format(tmp_path, name):
    values = ["a", None, "", "b", None, "c"]
    if "json" in name:
        records = [{"text": value, "n": 1} for value in values]
        del records[4]["text"]  # missing in a record is null in a table
        content = json.dumps(records, indent=1).encode() if name.endswith("json") else lines(*records)
        (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith("xz") else content)
    else:
        save_table(tmp_path / name, pa.table({"text": values}))
    for skip in (False, True):
        reader = CorpusReader(tmp_path, skip_bad_files=skip)
        for _ in range(2):  # counted anew in each pass
            assert [document.text for document in reader] == ["a", "b", "c"]
            assert _tallies(reader)["empty"][0] == reader.num_empty == 3
        assert not reader.skipped


def test_the_report_names_all_that_an_input_holds(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text {number}")
    for name in ("empty.txt", "none.jsonl", "README.md", "a.tar.gz", "b.tar.gz", "LICENSE", ".hidden.txt"):
        (folder / name).write_text("")
    (folder / "new\nline.md").write_text("")
    (folder / "white.txt").write_text(" \n")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("x")
    (folder / "settings.json").write_text('{"lr": 3}')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "lfs.txt").write_bytes(LFS)
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (folder / "null.txt").symlink_to("/dev/null")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "more.txt").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("elsewhere")
    prepared(folder / "0.txt", folder / "prepared")
    capsys.readouterr()
    arguments = [f"--input={folder}", f"--output={tmp_path / 'out'}", "--tokenizer=byte", "--no-progress"]
    arguments += ["--held_out_fraction=0.3", "--skip_bad_files"]
    assert prepare_command.main(arguments) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "corpus.json").read_text("utf-8"))["input_report"]["input"]
    assert report == Corpus.load(tmp_path / "out").input_report["input"]
    assert (report.pop("files"), report.pop("documents")) == (8, 5)
    assert report.pop("other_suffix") == {
        "count": 5,
        "names": ["LICENSE", "README.md", "a.tar.gz", "b.tar.gz", "new\nline.md"],
        "kinds": {".md": 2, ".tar.gz": 2, "without a suffix": 1},
    }
    assert {name: (found["count"], found["names"]) for name, found in report.items()} == {
        "linked": (1, ["more.txt"]),
        "empty": (2, ["empty.txt", "white.txt"]),
        "no_documents": (1, ["none.jsonl"]),
        "no_text": (2, ["list.json", "settings.json"]),
        "hidden": (2, [".git/", ".hidden.txt"]),
        "prepared": (1, ["prepared/"]),
        "special": (2, ["null.txt", "pipe.jsonl"]),
        "pointer": (1, ["lfs.txt"]),
        "damaged": (1, ["latin.txt"]),
    }
    for text in (printed.err, printed.out):  # after the scan, and with what was made; the second time too
        assert "of other kinds, not read: 5 (2 .md, 2 .tar.gz, 1 without a suffix): LICENSE, README.md, a." in text
        assert "pointers to files that are kept elsewhere, skipped: 1: lfs.txt" in text
        assert "new\nline" not in text
    assert prepare_command.main(arguments) == 0
    assert capsys.readouterr().out == printed.out


def test_json_with_other_fields_alone_is_an_error_that_names_them(tmp_path):
    (tmp_path / "a.json").write_text('[{"body": "a"}, {"body": "b"}]')
    with pytest.raises(UserError, match=r"a\.json:1 has no field 'text' \(fields found: body\), nor has any other"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, text_field="body") == ["a", "b"]
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": 3}]')  # no settings: it has texts
    with pytest.raises(UserError, match=r"b\.json:2 has no text in field 'text' but a JSON int"):
        texts_of(tmp_path)


def test_other_splits_and_what_lies_in_a_datasets_folder_are_named(tmp_path):
    save_splits(tmp_path / "d", train=pa.table({"text": ["t"]}), test=pa.table({"text": ["v"]}))
    (tmp_path / "d" / "train" / "notes.txt").write_text("n")
    for path, name in ((tmp_path, "d/"), (tmp_path / "d", "")):
        reader = CorpusReader(path)
        assert [document.text for document in reader] == ["t"]
        found = {"other_split": (1, ["d:test"]), "beside_dataset": (1, [f"{name}train/notes.txt"])}
        assert _tallies(reader) == found


def test_an_input_that_is_prepared_or_no_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("some text to train on")
    prepared(tmp_path / "a.txt", tmp_path / "out")
    with pytest.raises(UserError, match=r"is a prepared corpus already; give it to a run as data\.prepared_dir"):
        CorpusReader(tmp_path / "out")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        CorpusReader("/dev/null")
    (tmp_path / "book").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match=r"its name ends with none of \.txt, .* \(and it begins like gzip data\)"):
        CorpusReader(tmp_path / "book")


def test_a_file_is_not_trained_on_and_validated_on(tmp_path):
    (tmp_path / "in" / "val").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "val" / "b.txt").write_text("b")
    with pytest.raises(UserError, match=r"1 of the 1 files of validation_input .*val are in input .* \(b\.txt\)"):
        prepared(tmp_path / "in", tmp_path / "out", validation_input=tmp_path / "in" / "val")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "c.txt").symlink_to("../in/a.txt")
    with pytest.raises(UserError, match=r"\(c\.txt\): a model would be judged on what it was trained on"):
        prepared(tmp_path / "in", tmp_path / "out", validation_input=tmp_path / "val")


# --- pointers and limits ---


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl.gz", "x.parquet", "x.json"])
@pytest.mark.parametrize(
    ("content", "tool"),
    [
        (LFS, "Git LFS to .*`git lfs pull`"),
        (LFS.replace(b"\n", b"\r\n"), "Git LFS"),
        (b"\xef\xbb\xbf" + LFS, "Git LFS"),
        (b"\n" + LFS, "Git LFS"),
        (b"version https://hawser.github.com/spec/v1\next-0-a sha256:b\noid sha256:a\nsize 1", "Git LFS"),
        (b"/annex/objects/SHA256E-s12--ab.txt\n", "git-annex to .*`git annex get`"),
    ],
)
def test_a_pointer_is_no_text_and_no_damage(tmp_path, name, content, tool):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "y.txt").write_text("LFS pointers begin so: " + LFS.decode())
    with pytest.raises(UserError, match=rf"{name} is a pointer of {tool}"):
        texts_of(tmp_path)
    reader = CorpusReader(tmp_path, skip_bad_files=True)
    assert len(list(reader)) == 1
    assert _tallies(reader) == {"pointer": (1, [name])}


def test_links_of_git_annex_and_files_of_dvc_are_pointers(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt.dvc").write_text("outs: [path: a.txt]")  # beside its file: nothing is missing
    assert texts_of(tmp_path) == ["a"]
    (tmp_path / "b.txt.dvc").write_text("outs: [path: b.txt]")
    with pytest.raises(UserError, match=r"b\.txt\.dvc is a pointer of DVC .*`dvc pull`"):
        texts_of(tmp_path)
    (tmp_path / "b.txt.dvc").unlink()
    (tmp_path / "c.txt").symlink_to(".git/annex/objects/w/SHA256E-s1--a.txt/SHA256E-s1--a.txt")
    with pytest.raises(UserError, match=r"c\.txt is a pointer of git-annex"):
        texts_of(tmp_path)


def test_a_file_that_is_given_goes_by_the_name_of_its_link(tmp_path):
    """The suffix says what is in it; files of the hub's cache lie under hashes, those of git-annex may be elsewhere."""
    (tmp_path / "d2a8").write_bytes(lines({"text": "a"}, {"text": "b"}, {"text": "c"}))
    (tmp_path / "x.jsonl").symlink_to("d2a8")
    assert prepared(tmp_path / "x.jsonl", tmp_path / "out").input_report["input"]["documents"] == 3
    (tmp_path / "y.jsonl").symlink_to("gone")
    with pytest.raises(UserError, match=r"y\.jsonl is a link to gone, which cannot be reached: No such file"):
        prepared(tmp_path / "y.jsonl", tmp_path / "none")
    (tmp_path / "z.jsonl").symlink_to(".git/annex/objects/a/b")
    with pytest.raises(UserError, match=r"z\.jsonl is a pointer of git-annex"):
        prepared(tmp_path / "z.jsonl", tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["corpus.json", "tokenizer/natsjax_tokenizer.json", "train/lengths.npy", "train/00000.arrayrecord"]
)
def test_a_corpus_of_pointers_says_so(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"text {number}"} for number in range(9))))
    prepared(tmp_path / "a.jsonl", tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS to .*`git lfs pull`\.$"):
        Corpus.load(tmp_path / "out").documents("train")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", Workdir.read_config),
        ("data.json", Workdir.read_data_fingerprint),
        ("export.json", Workdir.read_export),
    ],
)
def test_a_run_of_pointers_says_so(tmp_path, name, read):
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS to .*`git lfs pull`\.$"):
        read(Workdir(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "x.model", "x.tiktoken"])
def test_a_tokenizer_of_a_pointer_says_so(tmp_path, name):
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS"):
        load_tokenizer(tmp_path / name)


def test_a_saved_dataset_of_pointers_says_so(tmp_path):
    for name in ("data-00000-of-00001.arrow", "state.json"):
        save_dataset(tmp_path / "d", pa.table({"text": ["a"]}))
        (tmp_path / "d" / name).write_bytes(LFS)
        with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS"):
            texts_of(tmp_path / "d")


def _wide_zstd(path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(frame.compress(b'{"text": "a"}') + frame.flush())


def _other_arrow_format(path):
    table = pa.table({"text": ["a"]})
    save_dataset(path, table)
    with pa.OSFile(str(path / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)


def _text_in_runs(path):
    save_dataset(path, pa.table({"text": pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), ["a"])}))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("long_window.jsonl.zst", _wide_zstd),
        ("file_format", _other_arrow_format),
        ("runs", _text_in_runs),
        ("digits.jsonl", lambda path: path.write_text('{"id": %s, "text": "a"}' % ("9" * 5000))),
        ("digits.json", lambda path: path.write_text('[{"n": %s, "text": "a"}]' % ("9" * 5000))),
        ("padded.txt.xz", lambda path: path.write_bytes(lzma.compress(b"") + b"\0" * 8 + lzma.compress(b"a"))),
        ("older.txt.xz", lambda path: path.write_bytes(lzma.compress(b"a", format=lzma.FORMAT_ALONE))),
        ("padded.txt.gz", lambda path: path.write_bytes(gzip.compress(b"") + b"\0" * 512 + gzip.compress(b"a"))),
    ],
)
def test_what_a_library_refuses_or_drops_by_default_is_read(tmp_path, name, write):
    write(tmp_path / name)
    assert texts_of(tmp_path) == ["a"]


def test_the_limits_of_parquet_footers_are_lifted(tmp_path, monkeypatch):
    """By default 100 MB a string, a million a list. Files beyond that take seconds to write: here they are lowered."""
    save_table(tmp_path / "x.parquet", pa.table({"text": ["a"]}))
    assert texts_of(tmp_path) == ["a"]
    names = {"thrift_string_size_limit", "thrift_container_size_limit"}
    limits = arrow_files._limits(pq.ParquetFile)
    assert names <= set(limits)
    assert set(limits.values()) == {2**31 - 1}
    for name in names:
        monkeypatch.setattr(arrow_files, "_limits", lambda opener, name=name: limits | {name: 1})
        with pytest.raises(UserError, match=r"x\.parquet is a Parquet file that pyarrow .* cannot read .*size limit"):
            texts_of(tmp_path)


def _lzo(path):
    pq.write_table(pa.table({"text": ["a"] * 50}), path, compression="snappy")
    data = path.read_bytes()
    assert data.count(b"text\x15\x02\x16") == 1
    path.write_bytes(data.replace(b"text\x15\x02\x16", b"text\x15\x06\x16"))  # the codec's number in the footer


def _with_dictionary(path):
    dictionary = zstandard.train_dictionary(1024, [b"hello %d %d" % (number, 7 * number) for number in range(2000)])
    path.write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(b"hello 1"))


def _bytes(content):
    return lambda path: path.write_bytes(content)


_DEEP = b"[" * 100_000 + b"]" * 100_000
_PAGE = b"<!DOCTYPE html><html>404</html>"


@pytest.mark.parametrize(
    ("name", "write", "sentence", "kind"),
    [
        ("x.parquet", _lzo, "is a Parquet file that pyarrow .* cannot read .*LZO.*; write it again", "unreadable"),
        ("x.parquet", _bytes(b"PARE" + b"\0" * 40), "is an encrypted Parquet file.*write it without", "unreadable"),
        ("x.parquet", _bytes(b"FEA1" + b"\0" * 40), "is a Feather file of version 1, no Parquet file", "unreadable"),
        ("x.parquet", _bytes(b"PAR1" + b"\0" * 40), "is no whole Parquet file .*; correct the file", "damaged"),
        ("x.txt.zst", _with_dictionary, "was compressed with a dictionary, .*`zstd -d -D DICTIONARY`", "unreadable"),
        ("x.jsonl", _bytes(b'{"text": "a", "x": ' + _DEEP + b"}"), "jsonl:1 nests JSON deeper than", "unreadable"),
        ("x.json", _bytes(b'[{"text": "a", "x": ' + _DEEP + b"}]"), "json:1 nests JSON deeper than", "unreadable"),
        ("x.txt", _bytes("Es war einmal".encode("utf-16-le")), "looks like UTF-16 without a byte-", "unreadable"),
        ("x.txt", _bytes(gzip.compress(b"a")), "is not UTF-8: .*begins like gzip data.*; unpack", "unreadable"),
        ("x.txt", _bytes(b"caf\xe9"), "is not UTF-8: byte 0xe9 at offset 3; convert it, as `iconv", "damaged"),
        ("x.txt", _bytes(b"\xff\xfea"), "begins with the byte-order mark of UTF-16 but is not", "damaged"),
        ("x.txt.gz", _bytes(bz2.compress(b"a")), "is no whole gzip file .*begins like bzip2 data", "unreadable"),
        ("x.txt.zst", _bytes(b"Es war einmal"), "begins like plain text: name .* without .zst, or", "unreadable"),
        ("x.txt.gz", _bytes(gzip.compress(b"a") + b"rest"), "is no whole gzip file .*; correct the file", "damaged"),
        ("x.json.xz", _bytes(_PAGE), "begins like an HTML page: .* fetch the file again", "unreadable"),
        ("x.jsonl", _bytes(_PAGE), r"jsonl:1 is no valid JSON: .*like an HTML page\); .* fetch the", "unreadable"),
        ("x.json", _bytes(_PAGE), r"json:1 is no valid JSON: .*like an HTML page\); .* fetch the", "unreadable"),
        ("x.parquet", _bytes(b'<?xml version="1.0"?>\n<Error>'), "is an XML page, no Parquet.*fetch the", "unreadable"),
        ("x.parquet", _bytes(b"text\na\n"), "is plain text, no Parquet file; write it in that", "unreadable"),
        ("x.jsonl", _bytes(b'[\n{"text": "a"}\n]'), "jsonl:1 is no valid JSON: .*or name it .json if", "damaged"),
        ("x.txt.bz2", _bytes(bz2.compress(b"a") * 2 + b"BZh9"), r"no whole bzip2 file \(it ends too", "damaged"),
        ("x.txt.bz2", _bytes(bz2.compress(b"a") + b"rest" * 9), "is no whole bzip2 file", "damaged"),
        ("x.txt.xz", _bytes(lzma.compress(b"a") + lzma.compress(b"b")[:-9]), r"whole xz file \(it ends", "damaged"),
        ("x.jsonl", _bytes(b'{"text": "a"}\n{"text": "b'), "jsonl:2 is no valid JSON", "damaged"),
        ("x.json", _bytes(b'[{"text": "a"}, {"text": "b"}'), "json:2 is no valid JSON: neither a comma", "damaged"),
        ("x.json", _bytes(b'[{"text": "a"},]'), "json:1 is no valid JSON: a comma with nothing", "damaged"),
        ("x.json", _bytes(b'[{"text": "a"}] 3'), "json is no valid JSON: there is more after", "damaged"),
        ("x.json", _bytes(b"["), "json is no valid JSON: its array does not end", "damaged"),
    ],
)
def test_unreadable_files_are_named_by_their_kind(tmp_path, name, write, sentence, kind):
    write(tmp_path / name)
    (tmp_path / "y.txt").write_text("good")
    with pytest.raises(UserError, match=sentence):
        texts_of(tmp_path)
    reader = CorpusReader(tmp_path, skip_bad_files=True)
    assert [document.text for document in reader] == ["good"]
    assert _tallies(reader) == {kind: (1, [name])}


# --- one text ---


@given(text=st.text("ab \n", min_size=1, max_size=80), fraction=st.floats(0.01, 0.99))
def test_a_text_and_its_end(text, fraction):
    if len(text.strip()) < 2:
        return
    (_, beginning), (_, end) = end_held_out("x", text, fraction)
    assert beginning + end == text
    assert beginning.strip()
    assert end.strip()


@pytest.mark.parametrize(
    ("separator", "fraction"), [("\n\n", 0.1), ("\r\n\r\n", 0.25), ("\n", 0.1), (" ", 0.5), ("", 0.3)]
)
def test_the_end_begins_where_something_begins(separator, fraction):
    pieces = [f"piece{number:03d}" + "x" * (number % 7) for number in range(200)]
    text = separator.join(pieces)
    (_, beginning), (_, end) = end_held_out("x", text, fraction)
    assert abs(len(end) / len(text) - fraction) < 0.25 * fraction + 0.02
    assert beginning.endswith(separator)
    if separator:
        assert end.startswith("piece")


@pytest.mark.parametrize("name", ["input.txt", "input.json", "input.parquet", "folder"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_one_text_holds_its_end_out_and_says_so(tmp_path, name, tokenizer, capsys):
    text = "".join(f"Line {number} of a play.\n" for number in range(400))
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "a.txt").write_text(text)
        (path / "empty.txt").write_text("")
    elif name == "input.parquet":
        pq.write_table(pa.table({"text": [text, None]}), path)
    else:
        path.write_text(text if name == "input.txt" else json.dumps({"text": text}, indent=1))
    arguments = [f"--input={path}", f"--output={tmp_path / 'out'}", f"--tokenizer={tokenizer}", "--no-progress"]
    assert prepare_command.main([*arguments, "--vocab_size=270", "--deduplicate"]) == 0
    printed = capsys.readouterr()
    corpus = Corpus.load(tmp_path / "out")
    (beginning,), (end,) = (contents(corpus, split).values() for split in ("train", "validation"))
    assert beginning + end == text
    assert end.startswith("Line ")
    assert len(end) == pytest.approx(0.05 * len(text), rel=0.25)
    said = f"is its only document: the last {len(end):,} of {len(text):,} bytes are held out for validation"
    assert said in printed.out
    assert said in printed.err
    assert corpus.input_report["input"]["held_out_end"]["held_out_bytes"] == len(end)
    assert prepare(path, tmp_path / "out", tokenizer=tokenizer, vocab_size=270, deduplicate=True).tokenizer


def test_one_text_in_parts_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text("To be, or not to be.\n" * 2000)
    first = prepared(tmp_path / "input.txt", tmp_path / "one", workers=1)
    monkeypatch.setattr(passes, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(build, "CHUNK_BYTES", 500)
    monkeypatch.setattr(passes, "CHUNK_BYTES", 500)
    second = prepared(tmp_path / "input.txt", tmp_path / "two", workers=1)
    assert first.content_hash == second.content_hash
    assert first.input_report == second.input_report
    assert sum(map(sum, lengths(second))) == 42_000


def test_a_text_too_short_to_divide_and_ids_that_are_all_the_same(tmp_path):
    (tmp_path / "one.txt").write_text(" a\n")
    with pytest.raises(UserError, match=r"one\.txt is the only document of the input and too short to hold out"):
        prepared(tmp_path / "one.txt", tmp_path / "out")
    (tmp_path / "one.jsonl").write_bytes(lines({"id": 0, "text": "a"}, {"id": 0, "text": "b"}))
    with pytest.raises(UserError, match="has 2 documents and fewer than two with different ids"):
        prepared(tmp_path / "one.jsonl", tmp_path / "out")


def test_copies_of_one_text_are_one_text(tmp_path):
    text = "".join(f"Line {number} of the text.\n" for number in range(40))
    (tmp_path / "a.jsonl").write_bytes(lines(*[{"text": text}] * 3))
    (tmp_path / "b.txt").write_text(text)
    corpus = prepared(tmp_path, tmp_path / "out", deduplicate=True)
    assert corpus.dropped["duplicate"] == 3
    report = corpus.input_report["input"]["held_out_end"]
    assert (report["document"], report["bytes"]) == ("a.jsonl:1", len(text))
    assert lengths(corpus) == [[len(text) - report["held_out_bytes"]], [report["held_out_bytes"]]]


def test_an_input_without_text_names_what_it_holds(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(UserError, match=r"no \.txt, .* or \.parquet file .*1 files of other kinds \(a\.csv\)"):
        CorpusReader(tmp_path)
