"""What the command shows of a context is what the context holds."""

import json

import pytest

from natsjax.config import Config, DataConfig, TrainConfig
from natsjax.data import Corpus, PackedSource, evaluation_contexts
from natsjax.data.inspect import __main__ as command
from natsjax.data.inspect.examples import visible
from natsjax.data.prepare import prepare

SEED, CONTEXT_LENGTH, BATCH_SIZE = 3, 48, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two prepared corpora, `a` and `b`, and runs of them."""
    folder = tmp_path_factory.mktemp("inspect")
    for name in "ab":
        lines = [json.dumps({"text": f"{name}{number} naïve\x1b\n" * (1 + number % 9)}) for number in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
        prepare(folder / f"{name}.jsonl", folder / name, tokenizer="byte", held_out_fraction=0.2, progress=False)
    data = {
        "run": {"input": "a.jsonl"},
        "elsewhere": {"prepared_dir": str(folder / "b")},
        "mixed": {"mixture": f"{folder / 'a'}=1,{folder / 'b'}=2"},
        "recall": {"source": "recall"},
    }
    for name, fields in data.items():
        config = Config(
            data=DataConfig(**fields, context_length=CONTEXT_LENGTH),
            train=TrainConfig(seed=SEED, batch_size=BATCH_SIZE),
        )
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "run" / "corpus").symlink_to(folder / "a")
    return folder


@pytest.fixture
def shown(capsys):
    """Calls the command and returns what it prints."""

    def call(*arguments, status=0):
        assert command.main([str(argument) for argument in arguments]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return call


def _pieces_hold(example, row, corpus, split):
    documents = corpus.documents(split)
    tokens = [token for piece in example["pieces"] for token in piece["tokens"]]
    length = example["tokens"]
    assert length + example["padding"] == len(row["inputs"])
    fields = {"id": "inputs", "target": "targets", "loss_weight": "loss_weight", "position": "positions"}
    for name, field in fields.items():
        assert [token[name] for token in tokens] == row[field][:length].tolist()
    assert example["learned"] == row["loss_weight"].sum()
    for piece in example["pieces"]:
        framed = [corpus.tokenizer.bos_id, *documents[piece["document"]].tolist(), corpus.tokenizer.eos_id]
        ids = [token["id"] for token in piece["tokens"]]
        places = [0] if piece["begins_document"] else range(len(framed))
        begin = next(place for place in places if framed[place : place + len(ids)] == ids)
        assert framed[begin : begin + len(ids)] == ids
        assert piece["ends_document"] == (begin + len(ids) == len(framed))
        assert piece["id"] == documents.ids[piece["document"]]
        assert piece["text"] == corpus.tokenizer.decode(ids)


def test_training_contexts_are_those_of_the_run(folder, shown):
    corpus = Corpus.load(folder / "a")
    source = PackedSource.from_corpus(corpus, context_length=CONTEXT_LENGTH, seed=SEED)
    step, row = 5, 2
    for flags in (
        [f"--workdir={folder / 'run'}", f"--step={step}", f"--row={row}"],
        [f"--workdir={folder / 'run'}", f"--context={step * BATCH_SIZE + row}"],
        [
            *(f"--prepared_dir={folder / 'a'}", f"--context_length={CONTEXT_LENGTH}", f"--seed={SEED}"),
            *(f"--batch_size={BATCH_SIZE}", f"--step={step}", f"--row={row}"),
        ],
    ):
        example = json.loads(shown(*flags, "--json"))
        assert (example["context"], example["step"], example["row"]) == (step * BATCH_SIZE + row, step, row)
        _pieces_hold(example, source[step * BATCH_SIZE + row], corpus, "train")


@pytest.mark.parametrize("shuffle", ["contexts", "documents"])
def test_the_documents_of_a_batch_are_counted(folder, shown, tmp_path, shuffle):
    """Of a run of an older natsjax, whose config.json says nothing of an order, documents alone are shuffled."""
    config = json.loads((folder / "elsewhere" / "config.json").read_text())
    if shuffle == "documents":
        del config["data"]["shuffle"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = PackedSource.from_corpus(
        Corpus.load(folder / "b"), context_length=CONTEXT_LENGTH, seed=SEED, shuffle=shuffle
    )
    for step in (0, 3):
        ids = source.rows(step * BATCH_SIZE, BATCH_SIZE)["document_id"]
        example = json.loads(shown(f"--workdir={tmp_path}", f"--step={step}", "--json"))
        assert example["documents_in_batch"] == len(set(ids.ravel().tolist()))
    assert f"documents in batch {example['documents_in_batch']}:" in shown(f"--workdir={tmp_path}", "--step=3")
    other = "documents" if shuffle == "contexts" else "contexts"
    flags = [f"--prepared_dir={folder / 'b'}", f"--context_length={CONTEXT_LENGTH}", f"--seed={SEED}", "--json"]
    same, different = (shown(*flags, "--context=7", f"--shuffle={way}") for way in (shuffle, other))
    assert json.loads(same)["pieces"][0]["document"] == source[7]["document_id"][0]
    assert json.loads(same)["pieces"] != json.loads(different)["pieces"]


def test_validation_contexts_are_the_evaluated_slice(folder, shown):
    corpus = Corpus.load(folder / "b")
    contexts = evaluation_contexts(
        corpus, "validation", context_length=CONTEXT_LENGTH, max_contexts=Config().eval.num_contexts
    )
    last = len(contexts["inputs"]) - 1
    flags = [f"--workdir={folder / 'elsewhere'}", "--split=validation"]
    example = json.loads(shown(*flags, f"--context={last}", "--json"))
    assert example["padding"] > 0
    _pieces_hold(example, {name: values[last] for name, values in contexts.items()}, corpus, "validation")
    assert f"has {last + 1} contexts, 0 to {last}" in shown(*flags, f"--context={last + 1}", status=2)
    assert "--step=0 is about training" in shown(*flags, "--step=0", status=2)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_mixture_names_the_corpus_and_its_documents(folder, shown, split):
    seen = set()
    flags = [f"--workdir={folder / 'mixed'}", f"--split={split}", "--json"]
    for index in (0, 1, 2, 3, 14):
        example = json.loads(shown(*flags, f"--context={index}"))
        name = example["corpus"][-1]
        seen.add(name)
        for piece in example["pieces"]:
            assert piece["id"].startswith(f"{name}.jsonl:")
            line = f"{name}{int(piece['id'].split(':')[1]) - 1} naïve\x1b\n"
            assert piece["text"].strip("\ufffd") in line * 9
    assert seen == {"a", "b"}
    assert "--prepared_dir" not in shown(f"--prepared_dir={folder / 'a'}=1,{folder / 'b'}=2", "--context_length=16")


def test_the_text_shows_tokens_pieces_and_what_is_not_learned(folder, shown):
    flags = [f"--workdir={folder / 'run'}", "--step=1"]
    example = json.loads(shown(*flags, "--json"))
    text = shown(*flags)
    assert text.count("-- piece ") == len(example["pieces"]) > 1
    body = text.split("\n", 2)[2]
    for number, piece in enumerate(example["pieces"], 1):
        title = f"-- piece {number} of {len(example['pieces'])}: tokens {piece['begin']} to {piece['end'] - 1}, "
        assert title in body
        expected = "".join(f"|{visible(token['text'])}{'°' * (not token['loss_weight'])}" for token in piece["tokens"])
        assert f"\n{expected}|\n" in body
    assert "|⟨eos⟩°|" in body
    assert "|⟨bos⟩|" in body
    assert "\x1b" not in text


def test_recall_has_no_documents(folder, shown):
    example = json.loads(shown(f"--workdir={folder / 'recall'}", "--json"))
    assert (example["tokens"], example["pieces"][0]["end"]) == (CONTEXT_LENGTH, CONTEXT_LENGTH)
    assert "id" not in example["pieces"][0]
    assert "°|" in shown(f"--workdir={folder / 'recall'}", "--split=validation")


def test_mistakes_are_one_sentence(folder, shown):
    corpus = f"--prepared_dir={folder / 'a'}"
    for flags, sentence in (
        ([], "nothing to inspect"),
        ([f"--workdir={folder / 'gone'}"], "holds no run"),
        ([f"--prepared_dir={folder / 'gone'}"], "is no prepared corpus"),
        ([corpus, "--row=32"], "--row=32: a step has 32 rows"),
        ([corpus, "--row=-1"], "--row=-1: it must be at least 0"),
        ([corpus, "--context_length=0"], "--context_length=0: it must be at least 1"),
        ([corpus, "--context=3", "--row=1"], "leave --step and --row out"),
        (["--config=configs/none.py"], "there is no such file"),
    ):
        said = shown(*flags, status=2)
        assert said.startswith("error: ")
        assert sentence in said
        assert said.count("\n") == 1
