"""A live panel on a terminal, plain lines in a file, nothing where nothing is wanted."""

import os
import pty
import re
import struct
import sys
import termios
from fcntl import ioctl

import numpy as np
import pytest
from processes import Process
from rich.console import Console

from natsjax.config import Config
from natsjax.train.logs.display import Display, duration, panel

LINE = {
    "loss": 2.5,
    "perplexity": 12.18,
    "kv_fraction": 0.31,
    "kv_budget": 0.3,
    "kv_penalty": 0.125,
    "tokens_per_second": 12345.6,
    "mfu": 0.42,
    "role_fractions": [[[0.5, 0.25, 0.25]], *[[[0.0, 0.0, 1.0]]] * 3],
    "warnings": ["no-global"],
}
CONFIG = {
    "data": {"source": "recall"},
    "optimizer": {"warmup_steps": 0},
    "model": {"num_layers": 4, "layer_types": "nats,dense,sliding,nats"},
    "train": {"num_steps": 40},
}
SCRIPT = f"""
from natsjax.config import Config
from natsjax.runtime.log import logger
from natsjax.train.logs.display import Display
display = Display(Config.from_dict({CONFIG}), 0, SHOWN)
for step in (10, 20, 30, 40):
    display.advance(step - 1)
    display.update(step, {LINE})
    logger.info(f"said at {{step}}")
display.close()
"""


def config_of(**groups):
    return Config.from_dict({group: CONFIG.get(group, {}) | groups.get(group, {}) for group in CONFIG | groups})


def rendered(line, config, step=20, width=80, height=24, **options):
    console = Console(width=width, height=height, file=open(os.devnull, "w"), record=True, **options)  # noqa: SIM115
    console.print(panel(config, line, step, 75.0, "a run", width, height))
    console.file.close()
    return console.export_text().splitlines()


def on_a_terminal(script, columns=80, lines=24, **environment):
    """Returns the output of the script on a terminal, with its control characters."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    env = dict.fromkeys(("COLUMNS", "LINES", "NO_COLOR")) | {"TERM": "xterm-256color"} | environment
    process = Process("-c", script, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
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


def test_the_panel_has_every_number():
    text = "\n".join(rendered(LINE, config_of()))
    shown = ("step 20/40", "75 s left", "2.5000", "12.18", "31.0 %", "30.0 %", "0.125", "12,346", "42.0 %", "a run")
    for part in shown:
        assert part in text
    assert "warnings: no-global" in text
    layer0, layer3 = (next(row for row in text.splitlines() if f"layer {n}" in row) for n in (0, 3))
    assert layer0.count("█") == 2 * layer0.count("▓") == 2 * layer0.count("░") > 0
    assert layer3.count("█") == layer3.count("▓") == 0 < layer3.count("░")
    assert "layer 1" not in text


def test_what_a_run_does_not_have_is_not_shown():
    line = {name: value for name, value in LINE.items() if name not in ("mfu", "warnings")}
    text = "\n".join(rendered(line, config_of(model={"layer_types": "dense"})))
    for part in ("budget", "penalty", "MFU", "layer", "warnings"):
        assert part not in text
    fixed = "\n".join(rendered(LINE, config_of(nats={"kv_penalty_mode": "fixed"})))
    assert ("KV penalty" in fixed, "KV budget" in fixed) == (True, False)


@pytest.mark.parametrize("width", [20, 40, 63, 80, 200])
@pytest.mark.parametrize("height", [8, 24])
def test_it_fits(width, height):
    config = config_of(model={"num_layers": 80, "layer_types": "nats"})
    many = LINE | {"role_fractions": np.tile(LINE["role_fractions"], (20, 1, 1)), "warnings": []}
    rows = rendered(many, config, width=width, height=height)
    assert max(map(len, rows)) <= width
    assert len(rows) <= max(height, 15)
    if width >= 40:
        assert [row for row in rows if "layers 0-" in row]
        assert any("-79" in row for row in rows)
        assert any("step 20/40" in row for row in rows)


def test_a_terminal_gets_a_panel_below_what_is_said():
    text = on_a_terminal(SCRIPT.replace("SHOWN", "True"))
    assert "\x1b[" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.rindex("said at 40") < plain.rindex("step 40/40")
    assert [f"said at {step}" in plain for step in (10, 20, 30, 40)] == [True] * 4
    assert plain.rstrip().endswith("╯")


def test_no_color_has_no_colors():
    text = on_a_terminal(SCRIPT.replace("SHOWN", "True"), NO_COLOR="1")
    codes = {code for found in re.findall(r"\x1b\[([0-9;]*)m", text) for code in found.split(";")}
    assert not [code for code in codes if code.isdigit() and 30 <= int(code) <= 107]
    assert "step 40/40" in text


def test_a_dumb_terminal_and_a_file_get_plain_lines(capsys, monkeypatch):
    line = r"loss 2\.500, perplexity 12\.18, KV 31\.0 %, 12,346 tokens/s, warnings: no-global, \d+ s left"
    for is_terminal, variable, value in ((True, "TERM", "dumb"), (False, "FORCE_COLOR", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            patch.setattr(sys.stderr, "isatty", lambda known=is_terminal: known)
            exec(SCRIPT.replace("SHOWN", "True"), {})
        assert re.fullmatch(
            rf"step 10/40: {line}\nsaid at 10\nsaid at 20\nsaid at 30\nstep 40/40: {line}\nsaid at 40\n",
            capsys.readouterr().err,
        )


def test_nothing_is_shown_where_nothing_is_wanted(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    exec(SCRIPT.replace("SHOWN", "False"), {})
    assert capsys.readouterr().err == "said at 10\nsaid at 20\nsaid at 30\nsaid at 40\n"


def test_lines_come_now_and_then(capsys):
    now = 0.0
    display = Display(config_of(train={"num_steps": 100}), 50, True, clock=lambda: now)
    for step in range(51, 101):
        now += 1.5
        display.update(step, {"loss": 2.5, "kv_fraction": 0.31, "tokens_per_second": 100.0})
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [51, 58, 65, 72, 79, 86, 93, 100]
    assert lines[1].endswith("KV 31.0 %, 100 tokens/s, 63 s left")


def test_durations():
    found = [duration(seconds) for seconds in (0.4, 75, 150, 5900, 7384, 200000)]
    assert found == ["0 s", "75 s", "2 min", "98 min", "2 h 3 min", "2 d 8 h"]
