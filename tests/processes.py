"""Processes that tests start: fresh ones, and ones forked from a warm process, which has imported everything."""

import atexit
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SLOW = bool(os.environ.get("NATSJAX_SLOW_TESTS"))
"""Whether pytest was started with ``--slow``."""

_LAUNCHERS = ("SLURM", "OMPI", "PMI", "JAX", "TPU", "KUBERNETES", "XLA_FLAGS")
_OF_CONFTEST = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)
# Forks twice for each request: the child that runs what is asked for as Python would, and one that waits for it. The
# warm process touches no device and starts no thread, or its forks could not.
_WARM = """
import gc, importlib, json, os, pkgutil, runpy, signal, socket, sys, types
import jax, matplotlib.pyplot, natsjax, tensorboardX

for package in (natsjax, importlib.import_module("pallas_kernels")):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        # lm-evaluation-harness and PyTorch may not be installed, and are large.
        others = "natsjax.lm_eval.", "natsjax.interop.modeling_natsjax"
        if not found.name.endswith("__main__") and not found.name.startswith(others):
            importlib.import_module(found.name)

def forked():
    "Returns the request, in the child that is to serve it."
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        _, descriptors, *_ = socket.recv_fds(requests, 1, 4)
        if not descriptors:
            os._exit(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            answers = socket.socket(fileno=descriptors.pop()).makefile("rw")
            request = json.loads(answers.readline())
            pid = os.fork()
            if pid == 0:
                for target, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, target)
            for descriptor in descriptors:
                os.close(descriptor)
            if pid == 0:
                return request
            for descriptor in range(3):
                os.close(descriptor)
            print(pid, file=answers, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)

gc.freeze()
request = forked()
os.chdir(request["cwd"])
for name, value in request["environment"].items():
    os.environ.pop(name, None) if value is None else os.environ.update({name: value})
jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))
for number, name in enumerate(("stdin", "stdout", "stderr")):  # what is cached of the warm process's is another file's
    like, lines = getattr(sys, name), number == 2 or os.isatty(number)
    options = {"encoding": like.encoding, "errors": like.errors, "buffering": 1 if lines else -1}
    stream = open(number, "w" if number else "r", closefd=False, **options)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
sys.orig_argv = [sys.executable, *request["words"]]
kind, *sys.argv = request["words"]
if kind == "-c":
    code, sys.argv[0] = sys.argv[0], "-c"
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
elif kind == "-m":
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, kind)
    runpy.run_path(kind, run_name="__main__")
"""


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process with that many CPU devices, which no launcher of clusters has touched."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith(_LAUNCHERS) or name in _OF_CONFTEST}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": path}
    return kept | ({"XLA_FLAGS": " ".join(flags)} if flags else {})


@functools.cache
def _warm() -> socket.socket:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", _WARM, str(theirs.fileno())],
        cwd=ROOT,
        env=environment(1),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


class Process:
    """Python with ``words`` (``-c CODE``, ``-m MODULE`` or a file, and arguments), forked from the warm process.

    Like ``subprocess.Popen`` with pipes and text, unless ``stdin``, ``stdout`` or ``stderr`` are descriptors.
    """

    def __init__(self, *words, devices=1, env=None, cwd=ROOT, stdin=None, stdout=None, stderr=None):
        self.returncode, self._answer = None, ""
        files, descriptors, passed = [], [], []
        for given, mode in ((stdin, "w"), (stdout, "r"), (stderr, "r")):
            here, there = (None, given) if given is not None else os.pipe()[:: -1 if mode == "w" else 1]
            files.append(None if here is None else os.fdopen(here, mode, encoding="utf-8"))
            descriptors.append(there)
            passed += [there] if given is None else []
        self.stdin, self.stdout, self.stderr = files
        self._answers, answers = socket.socketpair()
        socket.send_fds(_warm(), [b"x"], [*descriptors, answers.fileno()])
        answers.close()
        for descriptor in passed:
            os.close(descriptor)
        request = {"words": [str(word) for word in words], "cwd": str(cwd)}
        request["environment"] = {"JAX_NUM_CPU_DEVICES": str(devices)} | (env or {})
        self._answers.sendall(f"{json.dumps(request)}\n".encode())
        self.pid = self._next(None)

    def _next(self, timeout):
        end = None if timeout is None else time.monotonic() + timeout
        while "\n" not in self._answer:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([self._answers], [], [], left)[0]:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            received = self._answers.recv(100).decode()
            assert received, "the warm process has ended"
            self._answer += received
        line, _, self._answer = self._answer.partition("\n")
        return int(line)

    def wait(self, timeout=None):
        if self.returncode is None:
            self.returncode = self._next(timeout)
            self._answers.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout=900 if SLOW else 300):
        """Returns standard output and standard error, as text; kills the process where it takes too long."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            outputs = [file and pool.submit(file.read) for file in (self.stdout, self.stderr)]
            if self.stdin:
                with contextlib.suppress(BrokenPipeError), self.stdin:
                    self.stdin.write(input or "")
            try:
                self.wait(timeout)
            finally:
                self.kill()
        texts = [output and output.result() for output in outputs]
        self.close()
        return tuple(texts)

    def close(self):
        """Ends the process, if it has not, and closes its pipes."""
        self.kill()
        self.wait()
        for file in filter(None, (self.stdin, self.stdout, self.stderr)):
            file.close()


def run(*words, input=None, **options) -> subprocess.CompletedProcess:
    """Runs a ``Process`` to its end."""
    process = Process(*words, **options)
    out, errors = process.communicate(input)
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


def together(count: int, *words, **options) -> list[Process]:
    """Starts processes that know each other by the flags of ``distributed``; one alone has no such flags."""
    flags = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"] if count > 1 else []
    return [Process(*words, *flags, *[f"--process_id={n}"] * len(flags[:1]), **options) for n in range(count)]


def wait_for(what, *running: Process) -> None:
    """Waits until something is true of processes, none of which may end before."""
    deadline = time.monotonic() + 240
    while not what():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in running), [process.communicate()[1] for process in running]
        time.sleep(0.01)


def has_checkpoint(workdir: pathlib.Path) -> bool:
    return any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))  # others are unfinished saves


def with_mounts(mounts: str) -> list[str]:
    """Returns the words of a Python that sees these mounts, which are gone with it; skips where nobody may mount."""
    words = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*words, mounts], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no filesystem can be mounted here: {error}")
    return [*words, f'{mounts} && exec "$0" "$@"', sys.executable]


def json_lines(code: str, given: Any = None, *, devices: int) -> list[Any]:
    """Returns what ``code`` prints, a JSON value a line, in a process that reads ``given`` as JSON."""
    done = run("-c", code, input=json.dumps(given), devices=devices)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
