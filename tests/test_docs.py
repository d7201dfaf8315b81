"""Every command has a page; what README.md and docs/ name (flags, fields, files, links) is there."""

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import sys
import typing

import commands
import pytest
from processes import ROOT

from natsjax.config import Config

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [README, ROOT / "CONTRIBUTING.md", *PAGES]
BY_NAME = pytest.mark.parametrize("text", TEXTS, ids=[path.stem for path in TEXTS])


COMMANDS = ["train.py", *commands.COMMANDS]


def page_of(command):
    name = "train" if command == "train.py" else command.rpartition(".")[2]
    return ROOT / "docs" / f"{name}.md"


def main_of(command):
    if command != "train.py":
        return commands.module_of(command).main
    spec = importlib.util.spec_from_file_location("train_command", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def help_of(command, monkeypatch, capsys):
    """What ``--help`` prints."""
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with contextlib.suppress(SystemExit):  # of argparse
        main_of(command)()
    return capsys.readouterr().out


def flags_of(text):
    """Flags that a help text explains, without dashes: of argparse, or of our own."""
    return set(re.findall(r"^  (?:-\w, )?--([a-z]\w*)", text, re.MULTILINE)) - {"help"}


@pytest.fixture
def flags(monkeypatch, capsys):
    """The flags of every command."""
    return {command: flags_of(help_of(command, monkeypatch, capsys)) for command in COMMANDS}


def config_fields(kind=Config, above=""):
    """Every ``group.field``, and the groups within groups."""
    for name, kind_of_field in typing.get_type_hints(kind).items():
        if above:
            yield above + name
        if dataclasses.is_dataclass(kind_of_field):
            yield from config_fields(kind_of_field, f"{above}{name}.")


FLAG = re.compile(r"(?<![\w-])--(?:no-|\[no-\])?([a-z]\w*)")
FIELDS = set(config_fields())
GROUPS = [field.name for field in dataclasses.fields(Config)]


def command_lines(text):
    """``(command, its flags)`` of every command line that a text shows; continued lines as one."""
    text = re.sub(r"\\\n\s*", "", text)
    for found in re.finditer(r"python (?:-m (natsjax\.[\w.]*\w)|(?:\S*/)?(train\.py))([^`\n]*)", text):
        arguments = found[3].partition(" #")[0]
        arguments = re.split(r"&&|\| ", arguments)[0]
        yield found[1] or found[2], FLAG.findall(arguments)


def test_commands_are_found():
    expected = "train.py natsjax.data.prepare natsjax.data.inspect natsjax.evaluate natsjax.export natsjax.generate"
    assert set(COMMANDS) >= {*expected.split(), "natsjax.plan", "natsjax.report", "natsjax.sweep"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_with_all_its_flags(command, monkeypatch, capsys):
    page = page_of(command)
    assert page.is_file(), f"{command} has no {page.relative_to(ROOT)}"
    assert f"](docs/{page.name})" in README.read_text(), f"README.md does not link docs/{page.name}"
    known = flags_of(help_of(command, monkeypatch, capsys))
    assert known, f"{command} --help names no flag"
    missing = known - set(FLAG.findall(page.read_text()))
    assert not missing, f"docs/{page.name} does not name {sorted(missing)}"


def test_every_flag_that_is_named_exists(flags):
    wrong = []
    for path in TEXTS:
        for command, named in command_lines(path.read_text()):
            assert command in COMMANDS, f"{path.name} shows python -m {command}"
            wrong += [f"{path.name}: {command} --{flag}" for flag in named if flag not in flags[command] | {"help"}]
    anywhere = set().union(*flags.values()) | {"help", "logdir"}  # the last is TensorBoard's
    for path in [README, *map(page_of, COMMANDS)]:
        wrong += [f"{path.name}: --{flag}" for flag in FLAG.findall(path.read_text()) if flag not in anywhere]
    assert not wrong


@BY_NAME
def test_every_config_field_that_is_named_exists(text):
    content = text.read_text()
    named = re.findall(r"--config\.([a-z]\w*(?:\.\w+)+)", content)
    group = "|".join(GROUPS)
    named += re.findall(rf"\bconfig\.((?:{group})\.\w+(?:\.\w+)*)", content)
    # What stands alone: no file (train.py), call (train.run(…)), part of a longer name, or pattern (mesh.*).
    alone = re.findall(rf"(?<![\w./])((?:{group})\.[a-z]\w*+(?:\.[a-z]\w*+)?+)(?![\w(/*])", content)
    named += [name for name in alone if name.rpartition(".")[2] not in ("py", "json", "jsonl", "md", "run")]
    shown_mistakes = re.findall(r"unknown config field ([\w.]*\w)", content)
    assert not {name for name in named if name not in FIELDS} - set(shown_mistakes)


def headings(path):
    """Anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@BY_NAME
def test_every_link_leads_somewhere(text):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text.read_text()):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = text.parent / file if file else text
        if not path.exists() or (anchor and anchor not in headings(path)):
            broken.append(target)
    assert not broken


@BY_NAME
def test_every_file_that_is_named_exists(text):
    named = re.findall(
        r"(?<![\w./-])((?:docs|configs|tests|natsjax|pallas_kernels|benchmarks|launch)/[\w/]+\.(?:py|md|png|json|sh|yaml))\b",
        text.read_text(),
    )
    assert not [name for name in named if not (ROOT / name).exists() and "/X." not in name and "/NAME." not in name]


def test_readme_names_every_config():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files <= set(re.findall(r"`(\w+)`", README.read_text()))


def test_readme_says_how_to_test():
    assert "pip install -e '.[test]' && pytest" in README.read_text()
