"""Fuzzed command lines: every command ends with status 0, or with one line that says what is wrong, and no traceback.

The commands and their flags are found in the package: a new one is fuzzed as soon as it is there.
"""

import contextlib
import functools
import io
import json
import pathlib
import re
import shutil
import tempfile

import hypothesis
import pytest
import tiny
from commands import COMMANDS, module_of
from fuzzing import assert_one_sentence, cases
from hypothesis import strategies as st
from processes import ROOT

from natsjax.runtime.flags import run_command


@pytest.fixture(autouse=True)
def a_server_stops_at_once(monkeypatch):
    """Ends ``natsjax.serve`` when it would begin to wait for requests, which it may do on some of these lines."""

    async def serve(self, sockets=None):
        pass

    monkeypatch.setattr("uvicorn.Server.serve", serve)


def run(command, arguments):
    """``(status, output, error output)`` of a command, run in this process as it would run in its own."""
    module = module_of(command)
    # Commands that take their flags from absl count the program's name.
    argv = ["program", *arguments] if "flags.FlagValues" in pathlib.Path(module.__file__).read_text() else arguments
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            run_command(lambda: module.main(argv))
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


@functools.cache
def flags_of(command):
    """The flags that ``--help`` names."""
    _, out, err = run(command, ["--help"])
    return sorted(set(re.findall(r"--(?:no-)?([a-z]\w+)", out + err)) - {"help", "config"})


def test_there_are_commands_with_flags():
    for command in COMMANDS:  # which test_docs.py knows to be found
        assert len(flags_of(command)) > 2, command


# --- folders that a command may be given ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with a checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "good"
    tiny.make_run(folder, tiny.config())
    return folder


def _changed(name, change):
    """Does something to a file of a copy of the run."""

    def damage(folder):
        change(folder / name)

    return damage


def _edit_config(**fields):
    def damage(folder):
        values = json.loads((folder / "config.json").read_text())
        values["model"] |= fields
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def _truncate_checkpoint(folder):
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "no config": _changed("config.json", pathlib.Path.unlink),
    "empty config": _changed("config.json", lambda path: path.write_text("")),
    "config of another kind": _changed("config.json", lambda path: path.write_text("[1]")),
    "binary config": _changed("config.json", lambda path: path.write_bytes(b"\xff\0")),
    "config is a folder": _changed("config.json", lambda path: (path.unlink(), path.mkdir())),
    "deep config": _changed("config.json", lambda path: path.write_text("[" * 99_999)),
    "unknown field": _edit_config(embd_dim=3),
    "wrong value": _edit_config(embed_dim="wide"),
    "other sizes": _edit_config(embed_dim=8),
    "no data": _changed("data.json", pathlib.Path.unlink),
    "broken data": _changed("data.json", lambda path: path.write_text('{"fingerprint"')),
    "other data": _changed("data.json", lambda path: path.write_text('{"fingerprint": 3}')),
    "no checkpoint": _changed("checkpoints", shutil.rmtree),
    "empty checkpoints": _changed("checkpoints", lambda path: (shutil.rmtree(path), path.mkdir())),
    "checkpoints is a file": _changed("checkpoints", lambda path: (shutil.rmtree(path), path.write_text("x"))),
    "empty checkpoint": _changed("checkpoints", lambda path: (shutil.rmtree(path), (path / "7").mkdir(parents=True))),
    "damaged checkpoint": _truncate_checkpoint,
    "broken export": _changed("export.json", lambda path: path.write_text("{")),
    "export of the future": _changed("export.json", lambda path: path.write_text('{"format_version": 99}')),
    "broken results": _changed(
        "report", lambda path: (path.mkdir(), (path / "results.jsonl").write_text('{"method": 1}\n{'))
    ),
    "broken metrics": _changed("metrics.jsonl", lambda path: path.write_bytes(b'{"step": 1}\nnot json\n\xff')),
}
HARMLESS = {"broken metrics", "broken results", "no data", "broken data", "other data"}
CONFIG_DAMAGES = {name for name in DAMAGES if "config" in name} | {"unknown field", "wrong value"}
"""Damages that a command refuses which reads the config and the text alone."""
_PLACES = ["nowhere", "file", "empty", "", "\0", "a\nb", "x" * 5000, "-", "../..", "/dev/null", "/proc/nowhere"]
_WORDS = ["", "0", "-1", "1.5", "nan", "inf", "1e999", "9" * 30, "9" * 5000, "words", ",", "0,0", "a=1", "\0", "\n"]
_WORDS += ["ü", "%s"]


@st.composite
def command_lines(draw, command):
    """A damaged run, and flags of which at least one is wrong; ``@`` stands for the folder where all of it lies."""
    words = {
        name: draw(st.sampled_from(_WORDS)) for name in draw(st.lists(st.sampled_from(flags_of(command)), max_size=3))
    }
    places = st.one_of(st.sampled_from([f"@/{name}" for name in _PLACES]), st.sampled_from(_PLACES[3:]))
    damage = draw(st.sampled_from(sorted(DAMAGES)))
    for name in flags_of(command):
        if re.fullmatch("workdirs?|.*_workdir|input|output|prepared_dir", name) and draw(st.integers(0, 9)):
            words[name] = draw(st.one_of(st.just("@/damaged"), places)) if name != "output" else "@/output"
    if draw(st.booleans()):
        words["config"] = draw(
            st.sampled_from(["@/file", "@/empty", "nowhere.py", str(ROOT / "configs/recall.py"), ""])
        )
    for name in ("topology", "kv_budgets"):  # what would be long work
        if name in words:
            words[name] = draw(st.sampled_from(_WORDS))
    arguments = [f"--{name}={value}" for name, value in words.items()]
    for odd in draw(
        st.lists(st.sampled_from(["--nonsense", "--nonsense=1", "word", "--", "-x", "--work", ""]), max_size=1)
    ):
        arguments.insert(draw(st.integers(0, len(arguments))), odd)
    if arguments and draw(st.integers(0, 9)) == 0:
        arguments[-1] = arguments[-1].partition("=")[0]
    return arguments, damage


def assert_explained(status, out, err):
    assert status in (0, 1, 2), (status, err)
    # Python's own report of what Orbax leaves behind of the other reads, when the first of a damaged checkpoint failed:
    # it comes whenever garbage is collected, in whichever command that is.
    err = re.sub(r"Exception ignored in.*?^\w*(Exception|Error)\b[^\n]*\n?", "", err, flags=re.DOTALL | re.MULTILINE)
    assert "Traceback" not in out + err
    if status == 2:
        said = [line for line in err.splitlines() if re.match(r"([\w.\- ]+: )?error: ", line)]
        assert len(said) == 1, err
        if said[0].startswith("error: "):  # argparse words its own
            assert_one_sentence(re.sub(r"/[\w/.-]*\w|x{1000,}|9{1000,}", "…", said[0].removeprefix("error: ")))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines(command, run_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))

    @cases("commands")
    @hypothesis.given(command_lines(command))
    def fuzz(case):
        arguments, damage = case
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "empty").mkdir()
            (folder / "file").write_text("text")
            shutil.copytree(run_folder, folder / "damaged")
            DAMAGES[damage](folder / "damaged")
            with contextlib.chdir(folder):
                status, out, err = run(command, [word.replace("@", name) for word in arguments])
        assert_explained(status, out, err)

    fuzz()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "natsjax.plan"])
def test_damaged_runs(command, damage, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if damage in HARMLESS and command in ("natsjax.evaluate", "natsjax.generate", "natsjax.tasks"):
        pytest.skip("what they do not read: they would do their work")
    damaged = tmp_path / "damaged"
    shutil.copytree(run_folder, damaged)
    DAMAGES[damage](damaged)
    words = {"workdir": damaged, "output": tmp_path / "output", "prompt_tokens": "0,1", "input": damaged}
    arguments = [f"--{name}={words[name]}" for name in flags_of(command) if name in words]
    if command == "natsjax.sweep":
        arguments.append(f"--config={ROOT / 'configs/recall.py'}:nonsense")
    status, out, err = run(command, arguments)
    assert_explained(status, out, err)
    reads = CONFIG_DAMAGES if command == "natsjax.data.inspect" else DAMAGES.keys() - HARMLESS
    assert status == 2 or damage not in reads or command.endswith("prepare"), f"{command} took a run with {damage}"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_takes_a_path_that_holds_a_nul(command):
    for flag in flags_of(command):
        status, out, err = run(command, [f"--{flag}=\0"])
        assert status != 0, flag
        assert_explained(status, out, err)
