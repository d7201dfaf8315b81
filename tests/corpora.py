"""Small corpora for tests of data: JSON lines, texts read and prepared, and saved datasets."""

import json

from natsjax.data import CorpusReader
from natsjax.data.prepare import prepare


def lines(*records):
    """Returns JSON lines of records, or of texts."""
    records = [{"text": record} if isinstance(record, str) else record for record in records]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(path, **options):
    return [(document.id, document.text) for document in CorpusReader(path, **options)]


def texts_of(path, **options):
    return [text for _, text in read(path, **options)]


def prepared(texts, output, **options):
    """A corpus of bytes, quietly."""
    return prepare(texts, output, **({"tokenizer": "byte", "progress": False, "held_out_fraction": 0.3} | options))


def contents(corpus, split):
    """Decoded texts by id."""
    documents = corpus.documents(split)
    return {name: corpus.tokenizer.decode(documents[index]) for index, name in enumerate(documents.ids)}


def lengths(corpus):
    return [corpus.documents(split).lengths.tolist() for split in ("train", "validation")]


def change_description(corpus, change):
    """Edits corpus.json, for example to that of an older natsjax."""
    path = corpus.folder / "corpus.json"
    description = json.loads(path.read_text("utf-8"))
    change(description)
    path.write_text(json.dumps(description), "utf-8")


def save_dataset(folder, table, num_shards=1, rows_per_batch=1000):
    """What `datasets.Dataset.save_to_disk` writes (compared with datasets 5.2)."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{shard:05d}-of-{num_shards:05d}.arrow" for shard in range(num_shards)]
    size = -(-table.num_rows // max(1, num_shards))
    for shard, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(shard * size, size), max_chunksize=rows_per_batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def save_splits(folder, **tables):
    for split, table in tables.items():
        save_dataset(folder / split, table)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}))


def save_table(path, table):
    """Writes a Parquet file, or the folder of a dataset, by the suffix."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path)
    else:
        save_dataset(path, table)
