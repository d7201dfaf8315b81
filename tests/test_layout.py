"""Imports follow the ranks of the packages, touch no device, and what is slow to import is imported when it is used."""

import ast
import graphlib
import json
import subprocess
import sys

import pytest
from commands import COMMANDS
from processes import ROOT

RANKS = (
    {"errors"},
    {"config_fields"},
    {"config_checks"},
    {"config"},
    {"kv_fraction"},
    {"runtime"},
    {"data", "model"},
    {"policies"},
    {"runs"},
    {"decode"},
    {"report"},
    {"evaluate"},
    {"train"},
    {"interop"},
    {"generate", "plan", "sweep", "export", "import_model", "tasks"},
    {"lm_eval", "serve"},
)
"""A package imports packages of rows above its own, and none of its own row."""
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
COMMAND_PARTS = ("natsjax.data.inspect", "natsjax.data.prepare.__main__")
"""Parts of ``data`` that are commands, and may import everything."""


def modules(root=ROOT):
    """Files by dotted name; a package's is its ``__init__``'s."""
    for path in sorted((root / "natsjax").rglob("*.py")):
        yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def imported(path, known):
    """Modules that a file imports when it is imported itself, ``from a import b`` as ``a.b`` where that is a module."""
    for node in executed(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module


def executed(tree):
    """Nodes of a module, without those that only a type checker reads."""
    for node in tree.body if isinstance(tree, ast.Module) else ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from executed(node)


def rank_of(name):
    """Of a module, as far as packages say it; None for the package ``natsjax`` itself."""
    parts = name.split(".")
    if parts[-1] == "__main__" or name.startswith(COMMAND_PARTS):
        return len(RANKS)
    return RANK.get(parts[1]) if len(parts) > 1 else None


def violations(root=ROOT):
    known = dict(modules(root))
    for name, path in known.items():
        if (own := rank_of(name)) is None:
            continue
        for target in imported(path, known):
            if not target.startswith("natsjax.") or target.split(".")[1] == name.split(".")[1]:
                continue
            if (theirs := rank_of(target)) is None or theirs >= own:
                yield f"{name} imports {target}"


def test_every_module_has_a_rank():
    assert {name.split(".")[1] for name, _ in modules() if "." in name} == set(RANK)


def test_imports_follow_the_ranks():
    assert list(violations()) == []


def test_imports_inside_a_package_are_free_of_cycles():
    known = dict(modules())
    graph = {name: {target for target in imported(path, known) if target in known} for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_no_command_is_imported():
    known = dict(modules())
    commands = {name for name in known if name.endswith(".__main__")}
    assert [name for name, path in known.items() if commands & set(imported(path, known))] == []


@pytest.mark.parametrize("line", ["from natsjax import train", "import natsjax.train", "from natsjax.train import run"])
def test_the_rule_finds_a_violation(tmp_path, line):
    for name in ("model/__init__", "model/layers", "train/__init__"):
        (tmp_path / "natsjax" / name).with_suffix(".py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "natsjax" / name).with_suffix(".py").write_text(line if name == "model/layers" else "")
    assert list(violations(tmp_path)) == ["natsjax.model.layers imports natsjax.train"]


def test_kernels_import_nothing_of_ours():
    known = dict(modules())
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        ours = [name for name in imported(path, known) if name.startswith("natsjax")]
        if path.stem == "autotune":  # a command, and no kernel
            ours = [name for name in ours if name != "natsjax.runtime.flags"]
        assert not ours, path


def test_importing_touches_no_device():
    code = (
        "import natsjax, natsjax.train, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves_without_a_warning(command):
    code = [sys.executable, "-W", "error::RuntimeWarning", "-m", command, "--help"]
    run = subprocess.run(code, check=False, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert command in run.stdout


SLOW = ("jax", "flax", "optax", "orbax", "grain", "array_record", "matplotlib", "scipy", "tensorboardX")
HELP = """
import contextlib, io, runpy, sys
sys.argv = [{name!r}, "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    {run}
assert "--" in out.getvalue()
"""
CODE = {
    "import natsjax": "import natsjax",
    "the registry": "import natsjax.policies.registry, natsjax.policies.budgets, natsjax.report.styles",
    "train.py": HELP.format(name="train.py", run="runpy.run_path('train.py', run_name='__main__')"),
}
CODE |= {name: HELP.format(name=name, run=f"runpy.run_module({name!r}, run_name='__main__')") for name in COMMANDS}


@pytest.mark.parametrize("name", CODE)
def test_nothing_slow_is_imported_before_it_is_needed(name):
    code = f"{CODE[name]}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert set(SLOW) & set(json.loads(run.stdout.splitlines()[-1])) == set()
