"""Several processes on this machine: they join, fail and stop together, and what is wrong is said in one sentence."""

import concurrent.futures
import os
import re
import signal
import socket
import time

import pytest
from processes import Process, free_port, together

from natsjax.errors import UserError
from natsjax.runtime import distributed
from natsjax.runtime.flags import join_processes, train_help

LAUNCHER = re.compile("SLURM|OMPI|PMI|JAX|TPU|KUBERNETES")

# What each process runs: BODY, in the middle of everything that train.py puts around it.
PROGRAM = """
import os, signal, sys, time
import jax
import numpy as np
from jax._src import xla_bridge
from natsjax.runtime import distributed
from natsjax.runtime.flags import join_processes, parse_train_flags, run_command
from natsjax.runtime.log import logger
from natsjax.errors import UserError

def main():
    join_processes(sys.argv)
    me = int(sys.argv[-1].split("=")[1])
    with distributed.fail_together():
        print("joined", flush=True)
        BODY

def sit_in_a_collective():
    from jax.experimental import multihost_utils
    multihost_utils.process_allgather(np.ones(3))

run_command(main)
"""


@pytest.fixture
def start_all():
    """Starts processes that know each other; whatever a test does, none is left over."""
    started = []

    def start_them(count, *arguments):
        started.extend(together(count, *arguments, "--initialization_timeout=60", devices=2))
        return started

    yield start_them
    for process in started:
        process.close()


def program(body):
    return ["-c", PROGRAM.replace("BODY", body.strip().replace("\n", "\n        "))]


def ended(process, timeout=60):
    out, errors = process.communicate(timeout=timeout)
    return process.returncode, out, errors


def test_one_process_alone_does_nothing():
    body = """
logger.info("here")
print(distributed.is_main(), distributed.any_process(True), distributed.any_process(False))
print(jax.distributed.is_initialized())
assert not xla_bridge._backends
"""
    status, out, errors = ended(Process(*program(body), "--process_id=0", "--num_processes=1", devices=2))
    assert (status, errors) == (0, "here\n")
    assert out.split() == ["joined", "True", "True", "False", "False"]


def test_processes_join_and_agree_on_the_call_at_which_to_stop(start_all):
    body = """
print(jax.process_index() == me, jax.process_count(), jax.device_count(), distributed.is_main(), flush=True)
logger.info("said once")
for call in range(1, 400):
    time.sleep(0.01 * (1 + 2 * me))
    if distributed.any_process(me == 1 and call >= 10):
        print("stopped at", call, flush=True)
        raise distributed.Interrupted
"""
    (status0, out0, errors0), (status1, out1, errors1) = map(ended, start_all(2, *program(body)))
    assert (status0, status1) == (130, 130), errors0 + errors1
    assert out0.splitlines()[1] == "True 2 4 True"
    assert out1.splitlines()[1] == "True 2 4 False"
    assert out0.splitlines()[2] == out1.splitlines()[2]
    assert 10 < int(out0.split()[-1]) < 400
    assert "said once\n" in errors0
    assert "interrupted\n" in errors0
    assert not {"said once", "interrupted"} & set(errors1.splitlines())


def test_they_wait_for_each_other_and_without_a_flag_nobody_stops(start_all, tmp_path):
    body = f"""
for number in range(3):
    path = {str(tmp_path)!r} + f"/{{number}}"
    if me == number % 2:
        time.sleep(0.3)
        open(path, "w").close()
    distributed.barrier("the file")
    assert os.path.exists(path)
assert not any(distributed.any_process(False) for call in range(100 + 100 * me))
"""
    assert [(status, errors) for status, _, errors in map(ended, start_all(2, *program(body)))] == [(0, "")] * 2


def test_processes_that_wait_for_different_things_do_not_wait_for_ever(start_all):
    body = """
if me == 1:
    distributed.barrier("the data")
"""
    both = [ended(process) for process in start_all(2, *program(body))]
    assert [status for status, _, _ in both] == [1, 1]
    assert both[0][2] == "error: process 1: it waits for the data and process 0 for the end\n"


def test_who_has_finished_still_waits_and_hears_of_a_failure(start_all):
    body = """
if me == 1:
    time.sleep(2)
    raise UserError("the report cannot be written.")
"""
    (status, _, errors), _ = map(ended, start_all(2, *program(body)))
    assert (status, errors) == (2, "error: process 1: the report cannot be written.\n")


MISTAKE = (
    "raise UserError('the disk is full.')",
    2,
    "error: the disk is full.",
    "error: process {}: the disk is full.",
)
BUG = ("dict()['x']", 1, "KeyError: 'x'", "error: process {}: KeyError: 'x'")
SIGTERM = ("os.kill(os.getpid(), signal.SIGTERM)", 130, "interrupted", "error: process {}: interrupted by SIGTERM")
EXIT = ("sys.exit(7)", 7, "", "error: process {}: exited with status 7")
KILL = ("os.kill(os.getpid(), signal.SIGKILL)", 1, "", "error: process {} of 2 was lost: ")


@pytest.mark.parametrize(
    ("who", "deed", "status", "own", "told"),
    [(0, *MISTAKE), (1, *MISTAKE), (1, *BUG), (0, *SIGTERM), (1, *EXIT), (0, *KILL), (1, *KILL)],
    ids=["mistake-0", "mistake-1", "bug-1", "sigterm-0", "exit-1", "kill-9-0", "kill-9-1"],
)
def test_what_ends_one_process_ends_the_other_with_its_message(start_all, who, deed, status, own, told):
    body = f"""
if me != {who}:
    sit_in_a_collective()
time.sleep(1)
{deed}
"""
    both = start_all(2, *program(body))
    for process in both:
        assert process.stdout.readline() == "joined\n", process.stderr.read()
    joined = time.monotonic()
    lost = "SIGKILL" in deed
    own_status, _, own_errors = ended(both[who], timeout=20)
    other_status, _, other_errors = ended(both[1 - who], timeout=20)
    assert time.monotonic() - joined < 15
    assert own_status == (-signal.SIGKILL if lost else status)
    assert (own_errors.splitlines() or [""])[-1] == own
    if lost and who == 0 and other_status == -signal.SIGABRT:  # JAX's own client was first to see its service gone
        assert "JAX distributed service detected fatal errors" in other_errors
        return
    ours = [line for line in other_errors.splitlines() if line.startswith("error: ")]
    assert (other_status, len(ours)) == (status, 1)
    assert ours[0].startswith(told.format(who))


def test_a_mistake_that_all_make_is_said_once(start_all):
    """As in train.py, where the processes join before anything else is read."""
    body = (
        "parse_train_flags(['train.py', '--config=configs/smoke.py', '--workdir=nowhere', '--config.train.num_step=3'])"
    )
    sentence = "error: unknown config field train.num_step; did you mean train.num_steps.\n"
    both = [ended(process) for process in start_all(2, *program(body))]
    assert [(status, errors) for status, _, errors in both] == [(2, sentence), (2, "")]


def test_a_process_that_never_joins_is_named():
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--coordinator_address={address}", "--num_processes=2", "--initialization_timeout=1", "--process_id=0"]
    status, out, errors = ended(Process(*program("pass"), *flags, devices=2))
    assert (status, out) == (2, "")
    assert errors == f"error: process 1 of 2 did not join within 1 s; is it running and can it reach {address}?\n"


def problems(*places, timeout=1):
    """What ``initialize`` says to processes at ``(num_processes, process_id)``, here threads that never get so far."""
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        joining = [pool.submit(distributed.initialize, address, *place, timeout) for place in places]
        errors = [future.exception() for future in joining]
    assert all(isinstance(error, UserError) for error in errors), errors
    return [str(error).replace(address, "ADDRESS") for error in errors]


def test_everyone_who_waits_hears_who_is_missing():
    sentence = "processes 1 and 3 of 4 did not join within 1 s; are they running and can they reach ADDRESS?"
    assert problems((4, 0), (4, 2)) == [sentence] * 2
    assert problems((20, 0))[0].startswith("processes 1, 2, 3, 4, 5, 6, 7, 8 and 11 more of 20 did not join")


def test_without_process_0_the_others_name_it():
    one, other = problems((3, 1), (3, 2))
    assert one == other
    assert one.startswith("process 0 of 3 did not answer at ADDRESS within 1 s; is it running, and can this machine ")


def test_processes_that_contradict_each_other_are_named():
    assert (
        problems((3, 0), (2, 1), timeout=20)
        == ["process 1 was started with --num_processes=2 and process 0 with 3."] * 2
    )
    assert (
        problems((3, 0), (3, 1), (3, 1), timeout=20)
        == ["two processes were started with --process_id=1; each needs its own."] * 3
    )


def test_strangers_at_the_port_do_not_count():
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        joining = pool.submit(distributed.initialize, address, 2, 0, 3)
        for words in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"[1]\n", b'{"process_id": "one"}\n'):
            time.sleep(0.3)
            with socket.create_connection(("127.0.0.1", int(address.split(":")[1]))) as stranger:
                stranger.sendall(words)
        assert "process 1 of 2 did not join" in str(joining.exception())


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on port {port} .* in use; choose another port"):
            distributed.initialize(f"127.0.0.1:{port}", 2, 0, timeout=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--coordinator_address and --process_id are missing"),
        (["--num_processes=2", "--process_id=0"], "--coordinator_address is missing"),
        (["--process_id=0"], "--coordinator_address and --num_processes are missing"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "must be from 0 to 1"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=-1"], "must be from 0 to 1"),
        (["--coordinator_address=h:1", "--num_processes=0", "--process_id=0"], "at least one process"),
        (["--coordinator_address=host", "--num_processes=2", "--process_id=0"], "'host': HOST:PORT was expected"),
        (["--coordinator_address=h:99999", "--num_processes=2", "--process_id=0"], "HOST:PORT was expected"),
        (["--num_processes=two"], "--num_processes=two"),
        (["--num_processes=1", "--initialization_timeout=0"], "--initialization_timeout=0: "),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(flags, message):
    with pytest.raises(UserError) as error:
        join_processes(["train.py", "--config=configs/smoke.py", *flags])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_lists_the_flags():
    for name in ("config", "workdir", "coordinator_address", "num_processes", "process_id", "initialization_timeout"):
        assert f"\n  --{name}: " in train_help("What it does.")


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (SLURM, ("node007:62055", 2, 1)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"}, ("10.0.0.1:99", 2, 1)),
        (OPEN_MPI, ("10.96.0.1:62624", 4, 3)),
        ({}, None),
        ({"PMI_SIZE": "2"}, "PMI_SIZE = 2, but JAX .* does not detect"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS = h:1, but JAX"),
        (SLURM | {"SLURM_PROCID": "one"}, "looks like a cluster, but JAX cannot tell .* 'one'; give --coordinator"),
    ],
    ids=["slurm", "slurm-alone", "slurm-address", "open-mpi", "nothing", "mpich", "half", "broken"],
)
def test_the_launcher_says_which_process_this_is(monkeypatch, variables, place):
    for name in list(os.environ):
        if LAUNCHER.match(name):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(place, str):
        with pytest.raises(UserError, match=place):
            distributed._place(None, None, None, 1)
        assert distributed._place(None, 1, None, 1) is None
    else:
        assert distributed._place(None, None, None, 1) == place
