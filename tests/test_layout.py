"""Imports follow the ranks of the design, and importing touches no device."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A row imports lower rows, and within a row only what stands further left.
RANKS = (
    ("errors", "checksums", "outputs", "paths", "settings", "config"),
    ("standard_streams", "process_line", "processes", "watchdog", "signals", "command_line"),
    ("hardware", "program_text", "program_costs", "program_flow"),
    (
        "partition",
        "token_types",
        "data",
        "workdir",
        "event_file",
        "compilation_cache",
        "run_paths",
        "run_data",
        "parts",
        "spikes",
        "optim",
        "checkpoint",
        "metrics",
    ),
    (
        "layers",
        "vocabulary_loss",
        "role_statistics",
        "attention",
        "model",
        "capacity",
        "kv_buffer",
        "kv_allocation",
        "policy_numbers",
        "observing",
        "policies",
    ),
    ("losses", "train_step", "diagnosis", "loading", "initial_parameters", "flops", "planning"),
    ("serving", "decode_step", "sampling", "decode_loop", "decoder", "decode", "planning_decode"),
    ("reporting", "compare", "report"),
    ("measure", "measure_decode", "matching", "twin", "eval_settings", "eval_results", "evaluate", "export", "plan"),
    ("text_stream", "generate_flags", "generate"),
    ("health", "display", "wandb_writer", "monitor", "train"),
    ("sweep_runs", "sweep_front", "sweep"),
)
ORDER = [name for row in RANKS for name in row]


def modules():
    for path in sorted((ROOT / "natsjax").rglob("*.py")):
        yield path, path.relative_to(ROOT / "natsjax").parts[0].removesuffix(".py")


def imported(path):
    """Dotted names that a file imports, ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path, name):
    for target in imported(path):
        parts = target.split(".")
        if parts[0] != "natsjax" or parts[1] == name or name == "__init__":
            continue
        if parts[1] not in ORDER or ORDER.index(parts[1]) > ORDER.index(name):
            yield f"{path.relative_to(ROOT)} imports {target}"


def test_every_module_has_a_rank():
    assert {name for _, name in modules()} - {"__init__"} == set(ORDER)


def test_imports_follow_the_ranks():
    assert [line for path, name in modules() for line in violations(path, name)] == []


def test_the_rule_finds_a_violation(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "bad.py"
    file.write_text("from natsjax import train\n")
    assert list(violations(file, "config")) == ["bad.py imports natsjax.train"]


def test_kernels_import_nothing_of_ours():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        ours = [name for name in imported(path) if name.startswith("natsjax")]
        if path.stem == "autotune":  # a command, and no kernel
            ours = [name for name in ours if not name.startswith("natsjax.command_line")]
        assert not ours, path


def test_files_and_train_py_stay_short():
    for path, _ in modules():
        assert path.read_text().count("\n") <= 410, path
    assert (ROOT / "train.py").read_text().count("\n") <= 40


def test_importing_touches_no_device():
    code = (
        "import natsjax, natsjax.train, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "command",
    [
        "natsjax.data.prepare",
        "natsjax.data.inspect",
        "natsjax.evaluate",
        "natsjax.export",
        "natsjax.generate",
        "natsjax.plan",
        "natsjax.report",
        "natsjax.sweep",
    ],
)
def test_commands_explain_themselves_without_a_warning(command):
    code = [sys.executable, "-W", "error::RuntimeWarning", "-m", command, "--help"]
    run = subprocess.run(code, check=False, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert command in run.stdout
