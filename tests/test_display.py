"""A live panel on a terminal, plain lines in a file, nothing where nothing is wanted."""

import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import numpy as np
import pytest
from rich.console import Console

from natsjax.train.logs.display import Display, Shown, duration, panel

ROOT = pathlib.Path(__file__).parents[1]
ROLES = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
SHOWN = Shown(20, 2.5, 12.18, 0.31, 12345.6, 0.3, 0.125, 0.42, ROLES, (0, 3), ("no-global",))
SCRIPT = """
import numpy as np
from natsjax.runtime.log import logger
from natsjax.train.logs.display import Display, Shown
roles = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
display = Display(40, 0, {shown})
for step in (10, 20, 30, 40):
    display.advance(step - 1)
    display.update(Shown(step, 2.5, 12.18, 0.31, 12345.6, 0.3, 0.125, None, roles, (0, 1), ("no-global",)))
    logger.info(f"said at {{step}}")
display.close()
"""


def rendered(shown, step=20, total=40, width=80, height=24, **options):
    console = Console(width=width, height=height, file=open(os.devnull, "w"), record=True, **options)  # noqa: SIM115
    console.print(panel(shown, step, total, 75.0, "a run", width, height))
    console.file.close()
    return console.export_text().splitlines()


def on_a_terminal(script, columns=80, lines=24, **environment):
    """What the script writes to a terminal, with its control characters."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env=env | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:  # it is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, text.decode()
    return text.decode()


def test_the_panel_says_it_all():
    text = "\n".join(rendered(SHOWN))
    for part in (
        "step 20/40",
        "75 s left",
        "2.5000",
        "12.18",
        "31.0 % of 30.0 %",
        "0.125",
        "12,346",
        "42.0 %",
        "a run",
    ):
        assert part in text
    assert "warnings: no-global" in text
    layer0, layer3 = (next(row for row in text.splitlines() if f"layer {n}" in row) for n in (0, 3))
    assert layer0.count("█") == 2 * layer0.count("▓") == 2 * layer0.count("░") > 0
    assert layer3.count("█") == layer3.count("▓") == 0 < layer3.count("░")


def test_what_is_not_there_is_not_shown():
    text = "\n".join(rendered(Shown(20, 2.5, 12.18, 1.0, 12345.6)))
    for part in ("budget", "price", "MFU", "layer", "warnings"):
        assert part not in text


@pytest.mark.parametrize("width", [20, 40, 63, 80, 200])
@pytest.mark.parametrize("height", [8, 24])
def test_it_fits(width, height):
    many = np.tile(ROLES, (40, 1))
    shown = Shown(20, 2.5, 12.18, 0.31, 12345.6, 0.3, 0.125, 0.42, many, range(80), ())
    rows = rendered(shown, width=width, height=height)
    assert max(map(len, rows)) <= width
    assert len(rows) <= max(height, 14)
    if width >= 40:
        assert [row for row in rows if "layers 0-" in row]
        assert any("-79" in row for row in rows)
        assert any("step 20/40" in row for row in rows)


def test_a_terminal_gets_a_panel_below_what_is_said():
    text = on_a_terminal(SCRIPT.format(shown=True))
    assert "\x1b[" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.rindex("said at 40") < plain.rindex("step 40/40")
    assert [f"said at {step}" in plain for step in (10, 20, 30, 40)] == [True] * 4
    assert plain.rstrip().endswith("╯")


def test_no_color_has_no_colors():
    text = on_a_terminal(SCRIPT.format(shown=True), NO_COLOR="1")
    codes = {code for found in re.findall(r"\x1b\[([0-9;]*)m", text) for code in found.split(";")}
    assert not [code for code in codes if code.isdigit() and 30 <= int(code) <= 107]
    assert "step 40/40" in text


def test_a_dumb_terminal_and_a_file_get_plain_lines(capsys, monkeypatch):
    line = r"loss 2\.500, perplexity 12\.18, KV 31\.0 %, 12,346 tokens/s, warnings: no-global, \d+ s left"
    for is_terminal, variable, value in ((True, "TERM", "dumb"), (False, "FORCE_COLOR", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            patch.setattr(sys.stderr, "isatty", lambda known=is_terminal: known)
            exec(SCRIPT.format(shown=True), {})
        assert re.fullmatch(
            rf"step 10/40: {line}\nsaid at 10\nsaid at 20\nsaid at 30\nstep 40/40: {line}\nsaid at 40\n",
            capsys.readouterr().err,
        )


def test_nothing_is_shown_where_nothing_is_wanted(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    exec(SCRIPT.format(shown=False), {})
    assert capsys.readouterr().err == "said at 10\nsaid at 20\nsaid at 30\nsaid at 40\n"


def test_lines_come_now_and_then(capsys):
    now = 0.0
    display = Display(100, 50, True, clock=lambda: now)
    for step in range(51, 101):
        now += 1.5
        display.update(Shown(step, 2.5, 12.18, 0.31, 100.0))
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [51, 58, 65, 72, 79, 86, 93, 100]
    assert lines[1].endswith("KV 31.0 %, 100 tokens/s, 63 s left")


def test_durations():
    found = [duration(seconds) for seconds in (0.4, 75, 150, 5900, 7384, 200000)]
    assert found == ["0 s", "75 s", "2 min", "98 min", "2 h 3 min", "2 d 8 h"]
