"""What is slow to import is imported when it is used: importing the package and ``--help`` do without."""

import json
import pathlib
import subprocess
import sys

import pytest
from commands import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
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
    "train.py": HELP.format(name="train.py", run="runpy.run_path('train.py', run_name='__main__')"),
}
CODE |= {name: HELP.format(name=name, run=f"runpy.run_module({name!r}, run_name='__main__')") for name in COMMANDS}


@pytest.mark.parametrize("name", CODE)
def test_nothing_slow_is_imported_before_it_is_needed(name):
    code = f"{CODE[name]}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert set(SLOW) & set(json.loads(run.stdout.splitlines()[-1])) == set()
