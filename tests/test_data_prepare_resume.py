"""Preparing a corpus with several processes, interrupted anywhere: bit by bit the same corpus."""

import errno
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from natsjax.data.prepare import build as command
from natsjax.data.prepare import passes, prepare
from natsjax.data.prepare.parts import PartialFolder, read_part, write_part
from natsjax.data.prepare.split_writer import SplitWriter
from natsjax.data.prepare.worker_pool import WorkerPool, finished
from natsjax.errors import UserError
from natsjax.runtime import progress

CHUNK_BYTES = 4000


@pytest.fixture
def texts(tmp_path):
    """JSON lines and text files: 130 documents in 12 files, a bad file, empty documents and copies among them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"file {number}: " + "naïve words, " * (9 * number + 1), "utf-8")
    records = [{"text": f"line {number % 50}: " + "of words " * (number % 50)} for number in range(120)]
    records[7]["text"] = " "
    (folder / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    (folder / "bad.txt").write_bytes(b"\xff")
    return folder


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _options(**options):
    common = {"tokenizer": "bpe", "vocab_size": 300, "held_out_fraction": 0.2, "skip_bad_files": True}
    return common | {"deduplicate": True, "documents_per_shard": 20, "progress": False} | options


@pytest.fixture
def whole(texts, tmp_path, monkeypatch):
    """Files of the corpus, made by one process without an interruption, and with the text in one chunk."""
    prepare(texts, tmp_path / "whole", workers=1, **_options())
    monkeypatch.setattr(command, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(passes, "CHUNK_BYTES", CHUNK_BYTES)
    return _files(tmp_path / "whole")


def test_several_processes_make_the_same(texts, tmp_path, whole, monkeypatch, caplog):
    monkeypatch.setattr(passes, "PARALLEL_BYTES", 1)
    with caplog.at_level(logging.INFO):
        prepare(texts, tmp_path / "one", workers=1, **_options())
        assert "Skipped: " in caplog.text
        caplog.clear()
        prepare(texts, tmp_path / "three", workers=3, **_options())
    assert "bad.txt is not UTF-8" in caplog.text
    assert "documents without text: 1: lines.jsonl:8" in caplog.text
    assert _files(tmp_path / "one") == _files(tmp_path / "three") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "texts", "three", "whole"]


# Kills run number n at its n-th look at a file in the output's folder, until a run comes to its end. Processes are
# forked before there is any thread.
_KILLED = f"""
import os, signal, sys
from natsjax.data.prepare import build, passes, prepare
folder, step, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
build.CHUNK_BYTES = passes.CHUNK_BYTES = {CHUNK_BYTES}
passes.PARALLEL_BYTES = 1
runs = 0
while True:
    runs += 1
    child = os.fork()
    if child == 0:
        left = runs * step
        def count(event, arguments):
            global left
            if any(str(argument).startswith((folder + "/out", folder + "/.out")) for argument in arguments[:2]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        prepare(folder + "/texts", folder + "/out", workers=1, **options)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
print(runs)
"""


@pytest.mark.parametrize("step", [1, 7])
def test_killed_anywhere_and_run_again(texts, tmp_path, whole, step):
    code = [sys.executable, "-c", _KILLED, str(tmp_path), str(step), repr(_options())]
    run = subprocess.run(code, check=True, capture_output=True, text=True)
    assert int(run.stdout) > (20 if step == 1 else 5)  # it was killed that often
    assert _files(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts", "whole"]


_SLOW = f"""
import sys, time
from natsjax.data.prepare import build, encode, passes
from natsjax.data.prepare.__main__ import main
build.CHUNK_BYTES = passes.CHUNK_BYTES = {CHUNK_BYTES}
passes.PARALLEL_BYTES = 1
write_part = encode.write_part
def slow(path, arrays):
    write_part(path, arrays)
    print("part", flush=True)
    time.sleep(60)
encode.write_part = slow
sys.exit(main(sys.argv[1:]))
"""


def _interrupt(code, folder, line, number):
    """Runs the command in slow code, interrupts it when it prints a line, and returns its flags."""
    flags = [f"--{name}={value}" for name, value in _options().items() if not isinstance(value, bool)]
    flags += ["--workers=1", "--skip_bad_files", "--deduplicate", "--no-progress"]
    flags += [f"--input={folder / 'texts'}", f"--output={folder / 'out'}"]
    command = [sys.executable, "-c", code, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == f"{line}\n"
        run.send_signal(number)
        _, errors = run.communicate(timeout=20)  # left alone it would take more than a minute
    assert run.returncode == 130
    said = "what is done is kept; run the same command again to resume"
    assert errors.splitlines()[-1] == f"{signal.Signals(number).name}: {said}"
    assert "Traceback" not in errors
    return flags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_that_it_can_go_on(texts, tmp_path, whole, number, caplog):
    _interrupt(_SLOW, tmp_path, "part", number)
    with caplog.at_level(logging.INFO):
        prepare(texts, tmp_path / "out", **_options())
    assert "1 of " in caplog.text
    assert _files(tmp_path / "out") == whole


_SLOW_TRAINING = """
import sys, time
from natsjax.data.prepare import passes
from natsjax.data.prepare.__main__ import main
passes.PARALLEL_BYTES = 1  # so that the scan is kept
documents_from = passes.documents_from
def slow(*arguments):
    for document in documents_from(*arguments):
        print("document", flush=True)
        time.sleep(1)
        yield document
passes.documents_from = slow
sys.exit(main(sys.argv[1:]))
"""


def test_training_a_tokenizer_hears_of_signals(texts, tmp_path, whole):
    flags = _interrupt(_SLOW_TRAINING, tmp_path, "document", signal.SIGINT)
    again = [sys.executable, "-m", "natsjax.data.prepare", *flags]
    run = subprocess.run(again, capture_output=True, text=True)
    assert run.returncode == 0
    assert f"Resuming with what an interrupted run left in {tmp_path / '.out.partial'}" in run.stderr.splitlines()
    assert _files(tmp_path / "out") == whole


_ORPHANS = """
import sys, time
from natsjax.data.prepare.worker_pool import WorkerPool
if __name__ == "__main__":
    with WorkerPool(1, time.sleep, (0,)) as pool:
        from os import getpid
        print(pool.submit(eval, ["__import__('os').getpid()"])[0].result(), flush=True)
        pool.submit(time.sleep, [60])
        time.sleep(60)
"""


def test_workers_end_with_their_parent():
    with subprocess.Popen([sys.executable, "-c", _ORPHANS], stdout=subprocess.PIPE, text=True) as run:
        worker = int(run.stdout.readline())
        assert pathlib.Path(f"/proc/{worker}").exists()
        run.kill()
    for _ in range(100):
        try:
            state = pathlib.Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead, and not yet collected by whoever inherited it
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def test_a_worker_that_dies_is_named_and_parts_are_kept(tmp_path):
    partial = PartialFolder(tmp_path / "out", "request")

    def work():
        with partial, WorkerPool(1, time.sleep, (0,)) as pool:
            write_part(partial.part("first"), {"a": np.arange(3)})
            list(finished(pool.submit(os._exit, [1]), 0.1))

    with pytest.raises(UserError, match=r"a worker process of prepare ended .* resumes from what is done"):
        work()
    assert read_part(partial.part("first"))["a"].tolist() == [0, 1, 2]


def test_a_disk_that_becomes_full_keeps_what_is_done(texts, tmp_path, whole, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "add", full)
        with pytest.raises(UserError, match=r"No space left .* is kept in .*\.out\.partial: make room"):
            prepare(texts, tmp_path / "out", **_options())
    assert not (tmp_path / ".out.partial" / "corpus").exists()  # shards make room for what comes first
    prepare(texts, tmp_path / "out", **_options())
    assert _files(tmp_path / "out") == whole


@pytest.mark.parametrize("change", ["request", "text"])
def test_parts_of_something_else_are_thrown_away(texts, tmp_path, whole, monkeypatch, caplog, change):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "_assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(texts, tmp_path / "out", **_options())
    assert list((tmp_path / ".out.partial").glob("*.npz"))
    options = _options(seed=1) if change == "request" else _options()
    if change == "text":
        (texts / "new.txt").write_text("one more", "utf-8")
    with caplog.at_level(logging.INFO):
        prepare(texts, tmp_path / "out", **options)
    assert f"Throwing away {tmp_path / '.out.partial'}" in caplog.text
    prepare(texts, tmp_path / "fresh", **options)
    assert _files(tmp_path / "out") == _files(tmp_path / "fresh") != whole
    assert not (tmp_path / ".out.partial").exists()


def test_text_that_changes_meanwhile_is_noticed(texts, tmp_path, monkeypatch):
    scan = passes.Preparation.scan

    def scan_and_change(self):
        found = scan(self)
        (texts / "5.txt").write_text("another text", "utf-8")
        return found

    monkeypatch.setattr(passes.Preparation, "scan", scan_and_change)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(texts, tmp_path / "out", **_options(tokenizer="byte"))
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_workers_below_zero_are_refused(texts, tmp_path):
    with pytest.raises(UserError, match="workers = -1: it must be"):
        prepare(texts, tmp_path / "out", **_options(workers=-1))


def test_lines_say_how_long_it_takes_yet(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    seconds = iter([0.0, 5.0, 20.0])
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    with progress.Progress("Encoding", shown=True, documents=30, num_bytes=4_000_000) as shown:
        shown.add(10, 1_000_000)
        shown.add(10, 2_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "Encoding: 10 of 30 documents, 1.0 of 4.0 MB, 0.2 MB/s, 15 s left",
        "Encoding: 20 of 30 documents, 3.0 of 4.0 MB, 0.1 MB/s, 7 s left",
    ]
