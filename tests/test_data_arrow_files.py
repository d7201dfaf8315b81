"""Parquet files and saved datasets: every way of storing text, splits, and one sentence for what is damaged."""

import contextlib
import json
import sys

import pytest
from corpora import read, save_dataset, save_splits, save_table, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from natsjax.data import CorpusReader
from natsjax.data.readers import arrow_files
from natsjax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["eins", "zwei — 二 🙂", "", "vier\r\n", "fünf " * 50]


def _table(num_rows=5, **columns):
    return pa.table(columns or {"text": [f"{TEXTS[row % 5]} {row}" for row in range(num_rows)]})


formats = pytest.mark.parametrize("name", ["x.parquet", "x"], ids=["parquet", "dataset"])


@formats
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.binary(),
        pa.large_binary(),
    ],
    ids=str,
)
def test_every_type_of_text_column_reads_alike(tmp_path, name, kind):
    texts = [*TEXTS, None, TEXTS[0]]
    encoded = [None if text is None else text.encode() for text in texts] if "binary" in str(kind) else texts
    column = pa.array(encoded, kind.value_type if pa.types.is_dictionary(kind) else kind)
    column = column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column
    (tmp_path / "in").mkdir()
    save_table(tmp_path / "in" / name, pa.table({"number": range(7), "text": column}))
    reader = CorpusReader(tmp_path / "in")
    found = [(document.id.rpartition(":")[2], document.text) for document in reader]
    assert found == [(str(row + 1), text) for row, text in enumerate(texts) if text]
    assert reader.num_empty == 2


@formats
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array(["a", None, "c"]), ["a", "{}:2", "c"]),
        (pa.array([7, 8, None], pa.uint64()), ["7", "8", "{}:3"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([1.5, 2.5, 3.5]), ["{}:1", "{}:2", "{}:3"]),
        (pa.array([[1], [2], [3]]), ["{}:1", "{}:2", "{}:3"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_ids_are_the_column_of_that_name_else_the_row(tmp_path, name, ids, expected):
    save_table(tmp_path / name, pa.table({"id": ids, "body": ["x", "y", "z"]}))
    reader = CorpusReader(tmp_path / name, text_field="body")
    source = reader.source_names[0]
    assert [document.id for document in reader] == [text.format(source) for text in expected]


@formats
def test_many_batches_keep_their_order(tmp_path, name, monkeypatch):
    monkeypatch.setattr(arrow_files, "_BATCH_ROWS", 3)
    table = _table(100)
    save_table(tmp_path / name, table)
    assert texts_of(tmp_path / name) == table["text"].to_pylist()


def test_shards_are_sources_in_the_datasets_own_order(tmp_path):
    table = _table(10)
    save_dataset(tmp_path / "d", table, num_shards=3, rows_per_batch=2)
    reader = CorpusReader(tmp_path / "d")
    assert reader.source_names == [f"data-0000{shard}-of-00003.arrow" for shard in range(3)]
    assert [document.text for document in reader] == table["text"].to_pylist()
    expected = ["data-00002-of-00003.arrow:1", "data-00002-of-00003.arrow:2"]
    assert [document.id for document in reader.documents_of(2)] == expected


def test_splits_are_train_by_default_and_can_be_named(tmp_path):
    save_splits(tmp_path / "d", train=_table(text=["t"]), validation=_table(text=["v"]))
    assert read(tmp_path / "d") == [("train/data-00000-of-00001.arrow:1", "t")]
    assert read(f"{tmp_path}/d:train") == read(tmp_path / "d")
    assert read(f"{tmp_path}/d:validation") == [("validation/data-00000-of-00001.arrow:1", "v")]
    assert read(tmp_path / "d" / "validation") == [("data-00000-of-00001.arrow:1", "v")]
    with pytest.raises(UserError, match=r"has no split 'test' \(splits found: train, validation\)"):
        CorpusReader(f"{tmp_path}/d:test")
    with pytest.raises(UserError, match=r"asks for the split 'train', but .* is no saved dataset with splits"):
        CorpusReader(f"{tmp_path}:train")
    with pytest.raises(UserError, match=r"nowhere:train' does not exist"):
        CorpusReader(f"{tmp_path}/nowhere:train")
    save_splits(tmp_path / "other", test=_table())
    with pytest.raises(UserError, match=r"has no split 'train' \(splits found: test\).*as in .*other:test"):
        CorpusReader(tmp_path / "other")


def test_a_folder_may_mix_all_kinds(tmp_path):
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "folder:name").mkdir()
    (tmp_path / "folder:name" / "a.txt").write_text("colon")
    pq.write_table(_table(text=["parquet"]), tmp_path / "a.parquet")
    save_dataset(tmp_path / "c", _table(text=["dataset"]))
    (tmp_path / "c" / "cache-1.arrow").write_bytes(b"what `map` leaves beside the shards")
    (tmp_path / "c" / "README.txt").write_text("a part of the dataset's folder, and no document")
    save_splits(tmp_path / "deep" / "d", train=_table(text=["train"]), validation=_table(text=["validation"]))
    assert texts_of(tmp_path) == ["parquet", "text", "dataset", "train", "colon"]
    assert texts_of(tmp_path / "folder:name") == ["colon"]
    before = CorpusReader(tmp_path).signature
    save_dataset(tmp_path / "c", _table(text=["dataset", "longer " * 100]))
    assert CorpusReader(tmp_path).signature != before


_NO_UTF8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])


@formats
@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"body": ["x"], "n": [1]}, r"x.* has no column 'text' \(columns found: body, n\); name the column"),
        ({"text": [1], "body": ["x"]}, r"x.* has no text in .* 'text', whose type is int64 \(columns of text: body\)"),
        ({"text": [["x"]]}, r"whose type is list.* \(columns of text: none\)"),
        ({"text": pa.array([None, None])}, r"is empty: none of its 2 documents has any text"),
        ({"text": pa.array([], pa.string())}, r"is empty: none of its 0 documents has any text"),
        ({"text": pa.array([b"fine", b"\xff"])}, r"x.* is not UTF-8 in row 2"),
        ({"text": _NO_UTF8}, r"x.* is no whole (Parquet file|Arrow stream) \(.*Invalid UTF8"),
    ],
)
def test_bad_columns_get_one_sentence(tmp_path, name, columns, sentence):
    save_table(tmp_path / name, pa.table(columns))
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("state.json", "{", r"state\.json is no valid JSON"),
        ("state.json", "[]", r"state\.json holds a JSON list where an object belongs"),
        ("state.json", "{}", r"state\.json names no data files"),
        ("state.json", '{"_data_files": [3]}', r"state\.json names no data files"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', r"gone\.arrow cannot be read: No such file"),
        ("../dataset_dict.json", "{}", r"dataset_dict\.json holds no list of splits"),
        ("../dataset_dict.json", "[[[", r"dataset_dict\.json is no valid JSON"),
    ],
)
def test_damaged_descriptions_get_one_sentence_and_can_be_skipped(tmp_path, file, content, sentence):
    save_splits(tmp_path / "d", train=_table(text=["bad"]))
    (tmp_path / "d" / "train" / file).write_text(content)
    (tmp_path / "e.txt").write_text("good")
    with pytest.raises(UserError, match=sentence):
        read(tmp_path)
    reader = CorpusReader(tmp_path, skip_bad_files=True)
    assert isinstance(reader.signature, str)
    assert [document.text for document in reader] == ["good"]
    assert len(reader.skipped) == 1


def test_an_indices_mapping_is_refused(tmp_path):
    save_dataset(tmp_path / "d", _table())
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    (tmp_path / "d" / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(UserError, match=r"state\.json names an indices mapping"):
        CorpusReader(tmp_path / "d", skip_bad_files=True)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
@formats
def test_truncated_files_get_one_sentence_and_are_skipped_whole(tmp_path, name, share):
    save_table(tmp_path / name, _table(300))
    (tmp_path / "y.txt").write_text("good")
    file = next(path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".arrow"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(UserError, match=r"is no whole (Parquet file|Arrow stream) \(.*\); correct the file, or set"):
        read(tmp_path)
    assert texts_of(tmp_path, skip_bad_files=True) == ["good"]


def test_a_stream_that_ends_between_two_batches_is_damaged(tmp_path):
    save_dataset(tmp_path / "d", _table(20), rows_per_batch=10)
    file = tmp_path / "d" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"is no whole Arrow stream \(it ends too early\)"):
        read(tmp_path / "d")


@formats
def test_damaged_bytes_never_cause_a_traceback(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("damaged")
    save_table(folder / name, _table(id=[str(row) for row in range(40)], text=["text " * row for row in range(40)]))
    file = next(path for path in folder.rglob("*") if path.suffix in (".parquet", ".arrow"))
    whole = file.read_bytes()

    change = st.tuples(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=8))

    @settings(max_examples=100, deadline=None)
    @given(changes=st.lists(change, min_size=1, max_size=3))
    def check(changes):
        damaged = bytearray(whole)
        for at, new in changes:
            damaged[at : at + len(new)] = new[: len(whole) - at]
        file.write_bytes(damaged)
        with contextlib.suppress(UserError):  # the change may lie where it does not matter
            list(CorpusReader(folder))

    check()


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    pq.write_table(_table(), tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"x\.parquet needs pyarrow, .*pip install 'natsjax\[formats\]'"):
        read(tmp_path, skip_bad_files=True)
