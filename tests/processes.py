"""Processes that tests start: their environment, and Python code that prints lines of JSON."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
SLOW = bool(os.environ.get("NATSJAX_SLOW_TESTS"))
"""Whether pytest was started with ``--slow``."""

_LAUNCHERS = ("SLURM", "OMPI", "PMI", "JAX", "TPU", "KUBERNETES", "XLA_FLAGS")
_OF_CONFTEST = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process with that many CPU devices, which no launcher of clusters has touched."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith(_LAUNCHERS) or name in _OF_CONFTEST}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": path}
    return kept | ({"XLA_FLAGS": " ".join(flags)} if flags else {})


def json_lines(code: str, given: Any = None, *, devices: int) -> list[Any]:
    """Returns what ``code`` prints, a JSON value a line, in a process that reads ``given`` as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(given),
        env=environment(devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
