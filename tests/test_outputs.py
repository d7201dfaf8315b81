"""What a command is told to write: tried before the work, and written wherever it can be."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from processes import ROOT, with_mounts

from natsjax import report, sweep, train
from natsjax.config_fields import real_path
from natsjax.data import Corpus
from natsjax.data.prepare import encode, prepare
from natsjax.errors import UserError
from natsjax.export import folder as export
from natsjax.runs.data import open_data
from natsjax.runs.load import LoadedRun
from natsjax.runs.workdir import Workdir
from natsjax.runtime.files import (
    advice,
    folder_lock,
    make_folder,
    new_folder,
    put_back,
    set_aside,
    try_files,
    try_folder,
    write_file,
    write_text_file,
)
from natsjax.train import loop

command = sys.modules["natsjax.data.prepare.build"]


@pytest.fixture
def texts(tmp_path):
    return tiny.write_texts(tmp_path / "texts", 6)


def make(texts, output):
    return prepare(texts, output, tokenizer="byte", progress=False, workers=1)


def hidden(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    "output",
    ["new", "a/b/c", "empty", "empty/", "link", "dangling", "x/../new", ".", "n" * 250, "~/new", "a\nb", "texts/c"],
)
def test_a_corpus_is_written_wherever_it_can_be(texts, tmp_path, monkeypatch, output):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("home", "x", "empty", "real", "cwd"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("far/away")
    if output == ".":
        monkeypatch.chdir("cwd")
    there = os.path.exists(output) and os.stat(output).st_ino
    corpus = make(texts, output)
    assert Corpus.load(os.path.expanduser(output)).content_hash == corpus.content_hash
    assert corpus.documents("train").ids
    if there:  # a folder that was there is the same one: a mount point, or somebody's current folder
        assert os.stat(output).st_ino == there
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert hidden(tmp_path) == []


def test_a_corpus_beside_a_folder_that_is_not_there_is_found_again(texts, tmp_path):
    corpus = make(texts, tmp_path / "missing/../new")
    assert Corpus.load(tmp_path / "new").content_hash == corpus.content_hash
    assert make(texts, tmp_path / "missing/../new").content_hash == corpus.content_hash


def test_paths_from_a_folder_that_was_removed_are_one_sentence(texts, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for input, output in (("texts", tmp_path / "out"), (texts, "out")):
        with pytest.raises(UserError, match="the current folder is no longer there"):
            make(input, output)


MOUNTS = """
import os, sys
from natsjax.data.prepare import prepare
for output in sys.argv[2:]:
    print(prepare(sys.argv[1], output, tokenizer="byte", progress=False, workers=1).content_hash, flush=True)
    print(sorted(os.listdir(output)), flush=True)
"""


def test_a_corpus_fills_a_mount_point(texts, tmp_path):
    """A disk (with its lost+found), a folder mounted from elsewhere, and a disk in a folder that may not be written."""
    for name in ("disk", "bound", "source", "closed"):
        (tmp_path / name).mkdir()
    mounts = (
        f"cd {tmp_path} && mount -t tmpfs tmpfs disk && mkdir disk/lost+found && mount --bind source bound && "
        "mount -t tmpfs tmpfs closed && mkdir closed/disk && mount -t tmpfs tmpfs closed/disk && "
        "mount -o remount,ro closed"
    )
    run = [*with_mounts(mounts), "-c", MOUNTS, texts, "disk", "bound", "closed/disk"]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = ["corpus.json", "tokenizer", "train", "validation"]
    assert [line for line in done.stdout.splitlines() if "[" in line] == [
        str(sorted([*whole, "lost+found"])),
        str(whole),
        str(whole),
    ]
    assert (tmp_path / "source/corpus.json").exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("texts/0.txt/out", "Not a directory.*a part of that path is a file"),
        ("n" * 300, "File name too long.*name a shorter one"),
        ("caf\udce9", "no UTF-8 to Python; rename it"),
        ("latin", "no UTF-8 to Python; rename it"),
        ("a\0b", "a.*b' is no path: embedded null byte"),
        ("texts/0.txt", "exists and is no prepared corpus"),
        ("texts", "exists and is no prepared corpus"),
        ("", "output is empty"),
        ("loop", "exists and is no prepared corpus"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(texts, tmp_path, monkeypatch, output, says):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin").symlink_to("caf\udce9")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    monkeypatch.setattr(command, "_build", lambda *_: pytest.fail("the work began"))
    with pytest.raises(UserError, match=says):
        make(texts, output and tmp_path / output)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EBUSY, "name a new folder inside it"),
        (errno.EXDEV, "two file systems"),
        (errno.EROFS, "on another one"),
        (errno.EACCES, "permissions"),
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "system's log"),
        (errno.ENOLCK, "locks"),
    ],
)
def test_the_last_step_is_tried_before_the_work(texts, tmp_path, monkeypatch, is_there, number, says):
    if is_there:
        (tmp_path / "out").mkdir()

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(command, "_build", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr(pathlib.Path, "rename", refused)
    with pytest.raises(UserError, match=rf"{os.strerror(number)}.*{says}"):
        make(texts, tmp_path / "out")
    assert hidden(tmp_path) == []
    assert (tmp_path / "out").exists() == is_there


def test_a_library_that_gives_no_number_gets_the_same_advice():
    assert advice(OSError("write failed: No space left on device [x.cc:3]")) == advice(OSError(errno.ENOSPC, "full"))


def test_killed_while_it_is_put_into_a_folder_it_is_no_corpus_and_goes_on(texts, tmp_path, monkeypatch):
    whole = make(texts, tmp_path / "whole").content_hash
    out = tmp_path / "out"
    out.mkdir()
    replace = pathlib.Path.replace

    def killed(path, target):
        if target == out / "validation":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            make(texts, out)
    assert sorted(path.name for path in out.iterdir()) == [".partial", "tokenizer", "train"]
    with pytest.raises(UserError, match="is no prepared corpus"):
        Corpus.load(out)
    monkeypatch.setattr(encode.Encoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert make(texts, out).content_hash == whole
    assert hidden(tmp_path) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/tokenizer").mkdir()  # somebody's, and not what a killed one left
    with pytest.raises(UserError, match="give a folder that is new or empty"):
        make(texts, tmp_path / "taken")


# --------------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """``export`` of a run that is not there; the numbers of an export."""
    config = tiny.config()
    data = open_data(config, Workdir(tmp_path / "run"))
    value = [0.0]

    def loaded(*_, **__):
        value[0] += 1
        return LoadedRun(Workdir(tmp_path / "run"), config, None, {"w": jnp.full(3, value[0])}, 7, data, None)

    monkeypatch.setattr(export, "load", loaded)
    return lambda output: export.export(tmp_path / "run", output).parameters["w"][0]


@pytest.mark.parametrize("output", ["empty", "link", "dangling", ".", "closed"])
def test_an_export_is_written_and_replaced_wherever_it_can_be(exported, tmp_path, monkeypatch, output):
    for name in ("empty", "real", "cwd", "closed"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("away")
    monkeypatch.chdir(tmp_path / "cwd" if output == "." else tmp_path)
    if output == "closed":  # as if it were a mount point
        rename = pathlib.Path.rename

        def busy(path, target):
            if tmp_path / "closed" in (path, target):
                raise OSError(errno.EBUSY, "Device or resource busy")
            return rename(path, target)

        monkeypatch.setattr(pathlib.Path, "rename", busy)
    for _ in range(2):
        exported(output)
        names = sorted(path.name for path in pathlib.Path(output).iterdir())
        assert names == ["checkpoints", "config.json", "data.json", "export.json"]
        assert Workdir(output).read_export()["step"] == 7
    assert (tmp_path / "link").is_symlink()
    assert hidden(tmp_path) == []
    if output == ".":
        assert os.path.samefile(".", tmp_path / "cwd")


def test_an_export_tries_its_output_before_it_reads_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be written: Not a directory; a part of that path is a file"):
        export.export(tmp_path / "run", tmp_path / "file/out")
    with pytest.raises(UserError, match="File name too long"):
        export.export(tmp_path / "run", tmp_path / ("n" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("killed", ["setting aside", "placing", "removing"])
def test_one_that_is_killed_while_it_replaces_another_inside_loses_neither(tmp_path, monkeypatch, killed):
    folder = tmp_path / "out"
    for name, text in (("mark", "old"), ("a", "old"), ("b", "old")):
        make_folder(folder)
        (folder / name).write_text(text)
    stop = {"setting aside": "a", "placing": "c", "removing": None}[killed]
    replace = pathlib.Path.replace

    def stopped(path, target):
        if path.name == stop:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", stopped)
        try:
            with new_folder(folder, "mark", inside=True) as temporary:
                for name in ("mark", "a", "c"):
                    (temporary / name).write_text("new")
                set_aside(folder, "mark")
        except KeyboardInterrupt:
            assert not (folder / "mark").exists()
    put_back(folder, "mark")
    expected = "new" if killed == "removing" else "old"
    assert {(folder / name).read_text() for name in ("mark", "a")} == {expected}
    assert (folder / "b").exists() == (expected == "old")
    assert hidden(folder) == []


def test_the_trial_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "new"):
        with folder_lock(folder):
            try_folder(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


# ---------------------------------------------------------------------------------------------- files and workdirs


def test_files_are_tried_and_written_through_links_and_into_pipes(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    names = ["link", "new/er/file", "n" * 250]
    before = sorted(tmp_path.rglob("*"))
    try_files(tmp_path / name for name in names)
    assert sorted(tmp_path.rglob("*")) == before
    write_file(tmp_path / "link", b"new")
    assert ((tmp_path / "real").read_text(), (tmp_path / "link").is_symlink()) == ("new", True)
    write_file(tmp_path / ("n" * 250), b"x")
    for path, number in (
        (tmp_path, errno.EISDIR),
        (tmp_path / "real/x", errno.ENOTDIR),
        (tmp_path / ("n" * 300), errno.ENAMETOOLONG),
    ):
        with pytest.raises(OSError, match=os.strerror(number)) as found:
            try_files([path])
        assert (found.value.errno, found.value.filename) == (number, str(path))
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text_file(tmp_path / "pipe", "through")
    assert os.read(end, 10) == b"through"
    os.close(end)
    write_file(os.devnull, b"nothing")
    assert pathlib.Path(os.devnull).is_char_device()


@pytest.mark.parametrize("name", ["report", "checkpoints", "tensorboard", "report/report.html"])
def test_a_run_tries_its_workdir_before_it_trains(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, "open_data", lambda *_, **__: pytest.fail("the work began"))
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if name.endswith(".html") else path.touch()
    with pytest.raises(
        UserError, match=rf"--workdir={tmp_path}/run.*{name}.*(file where a folder|a folder by the name)"
    ):
        train.run(tiny.config(), tmp_path / "run")


def test_links_in_a_workdir_may_lead_where_nothing_is_yet(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    workdir = Workdir(tmp_path / "run")
    with workdir.lock():
        workdir.checkpoints.symlink_to(tmp_path / "large/checkpoints")
        workdir.try_writing("checkpoints/", "tensorboard/")
        report.try_report(workdir)
    assert (tmp_path / "large/checkpoints").is_dir()
    assert sorted(path.name for path in (tmp_path / "disk/run").iterdir()) == [".lock", "checkpoints"]


def test_a_workdir_that_cannot_be_is_one_sentence_with_advice(tmp_path):
    (tmp_path / "file").touch()
    for path, says in ((tmp_path / "file", "Not a directory"), (tmp_path / ("n" * 300), "File name too long")):
        with pytest.raises(UserError, match=f"cannot be used: {says}; .*name"):
            train.run(tiny.config(), path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.png").mkdir()
    with pytest.raises(UserError, match=r"sweep\.png cannot be written: Is a directory"):
        sweep.run(tiny.config(), tmp_path / "sweep", kv_budgets=[0.4], progress=False)


def test_a_report_that_may_not_be_written_says_how_to_evaluate_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "checkpoints/5").mkdir(parents=True)

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(
        UserError, match=r"results\.jsonl cannot be written: Read-only .* natsjax\.export\) and evaluate"
    ):
        report.try_report(Workdir(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_text_from_a_folder_that_is_no_utf8_is_prepared_and_read_again(texts, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.rename(texts, odd)
    corpus = make(odd, tmp_path / "out")
    assert corpus.arguments["input"] == str(real_path(odd))
    assert json.loads((tmp_path / "out/corpus.json").read_bytes())["arguments"] == corpus.arguments
    assert make(odd, tmp_path / "out").content_hash == corpus.content_hash
    assert np.all(corpus.documents("train").lengths > 0)
