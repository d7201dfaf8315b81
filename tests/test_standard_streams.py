"""Commands print to any encoding, and to what cannot be written to any more; their results do not depend on it."""

import ast
import errno
import io
import json
import os
import pty
import subprocess
import sys

import pytest
from processes import ROOT
from rich.console import Console

from natsjax import UserError, evaluate
from natsjax.config import Config
from natsjax.data import ByteTokenizer
from natsjax.data.corpus import Corpus
from natsjax.data.inspect import __main__ as inspect_command
from natsjax.data.prepare import prepare
from natsjax.evaluate import __main__ as evaluate_command
from natsjax.generate.text_stream import Printer
from natsjax.runs.workdir import Workdir
from natsjax.runtime import standard_streams
from natsjax.runtime.flags import run_command
from natsjax.runtime.log import logger
from natsjax.train.logs.display import panel

TEXT = "±10 % köln là 日本語 🙂 \udcff\n"


def stream_to(descriptor, encoding="utf-8", **options):
    """As Python opens its own."""
    return io.TextIOWrapper(open(descriptor, "wb"), encoding=encoding, **options)


def status_of(main):
    try:
        run_command(main)
    except SystemExit as end:
        return end.code
    return 0


# --- encodings ---


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8", "utf-16"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_every_character_is_printed_or_replaced(encoding, name, tmp_path, monkeypatch):
    file = tmp_path / "out"
    monkeypatch.setattr(sys, name, stream_to(file, encoding))
    assert status_of(lambda: print(TEXT, end="", file=getattr(sys, name))) == 0
    getattr(sys, name).flush()
    shown = file.read_bytes().decode(encoding)
    plain = TEXT.encode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")
    assert shown.endswith(" \\udcff\n")
    for word, instead in zip(TEXT.split(), [r"+-10", "%", r"k\xf6ln", r"l\xe0", r"\u65e5\u672c\u8a9e"], strict=False):
        assert (word if word.encode(encoding, "ignore").decode(encoding) == word else instead) in shown, plain


def test_memory_in_another_encoding_is_printed_to(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert status_of(lambda: print("±")) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"+-\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16", None])
def test_json_stays_json(encoding, tmp_path, monkeypatch):
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory if encoding is None else stream_to(tmp_path / "out", encoding))
    for value in ("ö日", "\udcff"):
        assert status_of(lambda: standard_streams.print_json([value])) == 0  # noqa: B023
    sys.stdout.flush()
    text = memory.getvalue() if encoding is None else (tmp_path / "out").read_bytes().decode(encoding)
    assert [json.loads(line) for line in text.splitlines()] == [["ö日"], ["\udcff"]]
    assert ("ö" in text) == (encoding in ("utf-8", None))


def test_the_panel_of_a_run_keeps_its_shape_in_ascii(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream_to(tmp_path / "err", "ascii"))
    groups = {"data": {"source": "recall"}, "model": {"num_layers": 1}, "train": {"num_steps": 40}}
    config = Config.from_dict(groups | {"optimizer": {"warmup_steps": 0}})
    line = {"loss": 2.5, "perplexity": 12.18, "role_fractions": [[[0.5, 0.25, 0.25]]], "warnings": ["no-global"]}

    def show():
        Console(stderr=True, width=80).print(panel(config, line, 20, 75.0, "läuf", 80, 24))

    assert status_of(show) == 0
    sys.stderr.flush()
    top, *lines = (tmp_path / "err").read_text("ascii").splitlines()
    assert r"l\xe4uf" in top
    assert {len(line) for line in lines} == {80}
    bar = next(line for line in lines if "layer 0" in line)
    assert "###" in bar
    assert bar.count("#") == 2 * bar.count(".")


def test_generated_text_and_its_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream_to(tmp_path / "out", "ascii"))

    def show():
        printer = Printer(sys.stdout, ByteTokenizer(), [[*"kö".encode()]], set(), 2, echo=True)
        printer.begin()
        printer.add(0, [*"é".encode()])

    assert status_of(show) == 0
    assert (tmp_path / "out").read_text("ascii") == "k\\xf6\\xe9\n"


# --- what cannot be written to ---


@pytest.fixture
def closed_pipe():
    """The end that is written to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("line_buffering", [False, True])
def test_a_closed_pipe_ends_nothing(closed_pipe, monkeypatch, tmp_path, capfd, line_buffering):
    monkeypatch.setattr(sys, "stdout", stream_to(closed_pipe, line_buffering=line_buffering))

    def work():
        for _ in range(3):
            print("x" * 100_000, flush=True)
        (tmp_path / "result").write_text("done")

    assert status_of(work) == 0
    assert (tmp_path / "result").read_text() == "done"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", [None, 0, 1, 2])
def test_a_full_disk_is_reported_at_the_end(monkeypatch, capsys, status):
    monkeypatch.setattr(sys, "stdout", stream_to("/dev/full"))
    done = []

    def work():
        print("lost", flush=True)
        done.append("all")
        return status

    assert status_of(work) == (status or 1)
    assert done == ["all"]
    said = "error: not all could be written to standard output: No space left on device.\n"
    assert capsys.readouterr().err == ("" if status else said)


def test_help_on_a_full_disk(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", stream_to("/dev/full"))
    assert status_of(lambda: evaluate_command.main(["--help"])) == 1
    assert "No space left" in capsys.readouterr().err


def test_errors_that_cannot_be_told_keep_their_status(monkeypatch, closed_pipe):
    def mistake():
        raise UserError("it is wrong.")

    for stream in (stream_to("/dev/full"), stream_to(closed_pipe), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert status_of(mistake) == 2


def test_a_log_line_that_is_lost_costs_nothing(monkeypatch, tmp_path):
    file = tmp_path / "log"
    monkeypatch.setattr(sys, "stderr", stream_to(file, line_buffering=True))
    with standard_streams.guarded():
        descriptor = sys.stderr.buffer.raw
        logger.info("one")
        full = OSError(errno.ENOSPC, "No space left on device")
        descriptor.lose(full)  # the disk has room again later
        logger.info("three")
        descriptor.lose(BrokenPipeError(errno.EPIPE, "Broken pipe"))
        logger.info("nobody reads this")
    assert file.read_text() == "one\nthree\n"


def test_a_terminal_that_was_closed_ends_nothing(monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stderr", stream_to(theirs, line_buffering=True))
    with standard_streams.guarded():
        assert sys.stderr.isatty()
        os.close(ours)
        for _ in range(2):
            logger.info("step 1")
        assert sys.stderr.buffer.raw.lost.errno == errno.EIO
        assert sys.stderr.buffer.raw.reader_gone


def test_a_terminal_that_does_not_block_gets_everything(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    monkeypatch.setattr(sys, "stdout", stream_to(writing))
    code = "import sys, time; time.sleep(0.2); print(len(sys.stdin.buffer.read()))"
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=reading, stdout=subprocess.PIPE)
    os.close(reading)
    assert status_of(lambda: print("x" * 300_000)) == 0
    os.close(writing)
    monkeypatch.undo()
    assert int(reader.communicate()[0]) == 300_001


@pytest.mark.parametrize("is_full", [False, True])
def test_text_for_nobody_is_not_drawn(is_full, closed_pipe, monkeypatch):
    """But for a file it is."""
    monkeypatch.setattr(sys, "stdout", stream_to("/dev/full" if is_full else closed_pipe))
    done = []

    def draw(kept):
        printer = Printer(sys.stdout, ByteTokenizer(), [[65]], set(), 100, echo=True, kept=kept)
        printer.begin()
        for _ in range(3):
            printer.add(0, [65])
        done.append(kept)

    assert status_of(lambda: draw(False)) == is_full
    assert status_of(lambda: draw(True)) == is_full
    assert done == [True]


# --- commands ---


def test_an_evaluation_is_shown_in_ascii(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream_to(tmp_path / "out", "ascii"))
    budget_check = {"kv_budget": 0.3, "sampled": 0.3, "argmax": 0.3, "biased": 0.3, "role_bias": 0.1, "tolerance": 0.1}
    budget_check |= {"met": True, "smallest_possible": 0.1}
    evaluation = evaluate.Evaluation(
        [], budget_check, [], {"show_accuracy": False, "layers": ["nats"]}, [tmp_path / "läuf"], ["nöte"]
    )
    assert status_of(lambda: print(evaluation.summary())) == 0
    shown = (tmp_path / "out").read_text("ascii")
    assert "(+-10 % allowed)" in shown
    assert shown.endswith("l\\xe4uf\n")


def test_closed_from_the_beginning():
    """The descriptors are taken, so that no file that is opened gets them and what C libraries log."""
    code = (
        "import os\nfrom natsjax.runtime.flags import run_command\n"
        "def main():\n    print('lost')\n    assert os.open('/dev/null', os.O_RDONLY) > 2\nrun_command(main)"
    )
    command = f'exec "{sys.executable}" -c "$0" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, code], cwd=ROOT, check=False).returncode == 0


def test_the_reader_of_a_real_pipe_goes():
    """Nothing on standard error, not even from Python's own end."""
    code = (
        "import time\nfrom natsjax.runtime.flags import run_command\n"
        "run_command(lambda: [print(line, flush=time.sleep(0.05) is None) for line in range(4)] and None)"
    )
    command = f'("{sys.executable}" -c "$0"; echo $? >&3) 3>&2 | head -n 1'
    done = subprocess.run(["sh", "-c", command, code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "0\n")


def test_inspect_prints_json_in_ascii(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", stream_to(tmp_path / "out", "ascii"))
    arguments = [f"--config={ROOT / 'configs/recall.py'}", "--json"]
    assert status_of(lambda: inspect_command.main(arguments)) == 0
    assert json.loads((tmp_path / "out").read_text("ascii"))["pieces"][0]["tokens"][0]["text"] == "⟨bos⟩"


# --- files ---


def test_names_of_folders_are_utf_8(tmp_path):
    """Orbax and ArrayRecord take no other."""
    odd = tmp_path / os.fsdecode(b"l\xe4uf")
    for open_it in (Workdir, Corpus.load, lambda folder: prepare(tmp_path, folder)):
        with pytest.raises(UserError, match=r"l\\udce4uf: its full name is no UTF-8"):
            open_it(odd)


def unspecified_encodings(source):
    """Lines that open text in whatever encoding the locale has."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        words = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        is_text = name in ("read_text", "write_text") or (
            name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile")
            and not any(isinstance(word, str) and "b" in word and len(word) <= 3 for word in words)
        )
        if name in ("TemporaryFile", "NamedTemporaryFile") and "mode" not in given:
            is_text = False  # bytes by default
        if name == "open" and isinstance(node.func, ast.Attribute) and len(node.args) == 1 and not words:
            is_text = False  # a class's own, or os.open
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name == "open" and (owner == "os" or owner[:1].isupper()):
            is_text = False
        if (is_text or ("text" in given & {"text", "universal_newlines"} and name in ("run", "Popen"))) and (
            "encoding" not in given
        ):
            yield node.lineno


def test_text_files_are_utf_8_in_every_locale():
    paths = [ROOT / "train.py"]
    for folder in ("natsjax", "pallas_kernels", "benchmarks", "configs"):
        paths += (ROOT / folder).rglob("*.py")
    assert not [f"{path}:{line}" for path in paths for line in unspecified_encodings(path.read_text("utf-8"))]


def test_the_rule_finds_them():
    bad = "open(p)\nopen(p, 'w')\np.open('a')\np.read_text()\nsubprocess.run(c, text=True)\nwith p.open(): pass\n"
    good = "open(p, 'rb')\nos.open(p, 1)\nT.open(p)\nT.open(p, as_before=True)\np.read_text(encoding='utf-8')\n"
    good += "p.open('wb')\nopen(f, mode='rb')\n"
    assert list(unspecified_encodings(bad)) == [1, 2, 3, 4, 5, 6]
    assert not list(unspecified_encodings(good))
