"""A first signal is honoured where nothing is lost, a second one at once; afterwards all is as it was."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import ROOT

from natsjax.errors import UserError
from natsjax.runtime import distributed, signals
from natsjax.runtime.distributed import Interrupted

NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@NUMBERS
def test_a_block_that_may_be_left_is_left_at_once(number, capfd):
    handlers = [signal.getsignal(known) for known in signals.SIGNALS]
    reached = []

    def run():
        with signals.stop_requests() as stop, stop.at_once("outside"), stop.at_once("run it again"):
            signal.raise_signal(number)
            reached.append("not left")

    with pytest.raises(Interrupted):
        run()
    assert reached == []
    assert capfd.readouterr().err == f"{number.name}: run it again\n"
    assert [signal.getsignal(known) for known in signals.SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "natsjax-signals"]


def test_a_run_that_has_stopped_waits_for_nothing(capfd):
    """Not for what the blocks around the one that stopped it wait for, however long they take to be left."""

    def run():
        with signals.stop_requests() as stop, stop.later("the step is compiled"):
            try:
                with stop.later("the step is done"):
                    signal.raise_signal(signal.SIGTERM)
                    raise Interrupted
            finally:
                time.sleep(signals._TELL_AFTER + 0.5)

    with pytest.raises(Interrupted):
        run()
    assert capfd.readouterr().err == ""


@NUMBERS
def test_elsewhere_it_is_noted_and_the_next_such_block_is_not_begun(number, capfd):
    reached = []

    def run():
        with signals.stop_requests() as stop, stop.at_once("outside"):
            with stop.later("the step is done"):
                assert stop.requested is None
                signal.raise_signal(number)
                reached.append(stop.requested)
            with stop.at_once("evaluate it with the same command"):
                reached.append("begun")

    with pytest.raises(Interrupted):
        run()
    assert reached == [number.name]
    assert capfd.readouterr().err == f"{number.name}: evaluate it with the same command\n"


@NUMBERS
def test_a_signal_during_a_collection_of_garbage_is_not_swallowed(number, capfd, monkeypatch):
    """Where Python would only print what a handler raises; JAX has a callback there."""
    calls = []

    def callback(phase, info):
        if len(calls) < 3:
            calls.append(phase)
            signal.raise_signal(number) if len(calls) == 1 else time.sleep(0.1)  # the echo comes here once more

    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    began = time.monotonic()

    def run():
        with signals.stop_requests() as stop, stop.at_once("run it again"):
            for _ in range(2):
                gc.collect()
            time.sleep(10)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(Interrupted):
            run()
    finally:
        gc.callbacks.remove(callback)
    assert time.monotonic() - began < 5
    assert len(calls) == 3
    assert not unraisable
    assert capfd.readouterr().err == f"{number.name}: run it again\n"


def test_a_request_that_was_swallowed_is_not_forgotten(capfd):
    def run():
        with signals.stop_requests() as stop, stop.at_once("run it again"), contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)  # whoever calls a destructor or a C callback suppresses it likewise

    with pytest.raises(Interrupted):
        run()
    assert capfd.readouterr().err == "SIGTERM: run it again\n"


def test_several_processes_are_told(monkeypatch):
    """``Interrupted`` is what all raise together; one alone fails, and ``fail_together`` tells the others."""
    monkeypatch.setattr(distributed, "label", lambda: "process 1 of 2: ")
    with pytest.raises(KeyboardInterrupt, match="SIGTERM") as error, signals.stop_requests() as stop, stop.at_once(""):
        signal.raise_signal(signal.SIGTERM)
    assert not isinstance(error.value, Interrupted)


def test_no_handlers_outside_the_main_thread():
    handlers = []

    def other():
        with signals.stop_requests() as stop, stop.at_once("never said"):
            handlers.extend([signal.getsignal(signal.SIGTERM), stop.requested])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert handlers == [before, None]


PROGRAM = """
import ctypes, os, signal, sys, time
from natsjax.runtime import signals
with signals.stop_requests() as stop:
    with stop.later("the step is compiled"):
        print("here", flush=True)
        BODY
    print(stop.requested, flush=True)
"""
# A call that keeps the main thread away from Python as XLA's compiler does (a signal does not end it).
BUSY = "ctypes.CDLL(None).system(b'exec sleep 8 >/dev/null 2>&1')"


def start(body):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM.replace("BODY", body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    return process


def test_a_first_signal_is_answered_and_a_second_one_ends_a_process_that_is_busy_elsewhere():
    process = start(BUSY)
    process.send_signal(signal.SIGTERM)
    answer = process.stderr.readline()
    assert answer == "stopping as soon as the step is compiled; a second signal ends the run at once\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 3
    assert (process.returncode, out) == (130, "")
    assert errors.startswith("a second SIGTERM: ended at once")
    assert errors.count("\n") == 1


def test_a_signal_that_comes_twice_at_once_is_one():
    """As from timeout(1), which sends it to the process and to its group."""
    process = start("while not stop.requested: time.sleep(0.01)\n        time.sleep(0.2)")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (0, "SIGTERM\n", "")


def test_what_a_forked_process_gets_is_not_the_runs():
    body = """
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(3)
        time.sleep(0.2)
        for _ in range(2):
            os.kill(child, signal.SIGTERM)
            time.sleep(0.6)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    process = start(body.strip())
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (0, f"{-signal.SIGTERM}\nNone\n", "")


def test_handlers_of_before_come_back_after_the_interruption_of_a_caller():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with signals.stop_requests() as stop, stop.later("it is done"):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_work_gives_back_what_it_returns_and_raises():
    assert signals.interruptible(lambda: 7) == 7
    with pytest.raises(UserError, match="nothing there"):
        signals.interruptible(lambda: (_ for _ in ()).throw(UserError("nothing there")))
    found = []
    worker = threading.Thread(target=lambda: found.append(signals.interruptible(threading.current_thread)))
    worker.start()
    worker.join()
    assert found == [worker]  # no signal is heard there, and nothing is gained by another thread


@NUMBERS
def test_work_is_left_at_a_signal_and_puts_things_in_order(number):
    seen = []

    def work():
        try:
            signal.pthread_kill(threading.main_thread().ident, number)
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            seen.append("left")
            raise

    left = pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name)
    with left, signals.stop_requests() as stop, stop.at_once("run it again"):
        signals.interruptible(work)
    assert seen == ["left"]


def test_work_inside_a_library_is_abandoned_and_the_process_can_end_without_it(monkeypatch):
    monkeypatch.setattr(signals, "_GRACE", 0.05)
    monkeypatch.setattr(signals, "_abandoned", [])
    comes_back, ended = threading.Event(), []
    monkeypatch.setattr(distributed, "end", lambda error, status: ended.append(status))

    def work():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        comes_back.wait(30)  # as deaf as a library: what is raised here is raised when it returns

    with pytest.raises(KeyboardInterrupt), signals.stop_requests() as stop, stop.at_once("run it again"):
        signals.interruptible(work)
    signals.end_if_abandoned(130)
    assert ended == [130]
    comes_back.set()
    signals._abandoned[0].join()
    signals.end_if_abandoned(130)
    assert ended == [130]
