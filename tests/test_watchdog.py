"""The watchdog speaks once for each time that a run is stuck, says where, and never touches it."""

import threading
import time

import pytest

from natsjax.runtime import distributed, watchdog


class Looks:
    """A watchdog, its clock, and what it said."""

    def __init__(self, seconds=100.0):
        self.now, self.said = 0.0, []
        self.watchdog = watchdog.Watchdog(seconds, clock=lambda: self.now, tell=self.said.append)

    def after(self, seconds):
        self.now += seconds
        before = len(self.said)
        self.watchdog.look()
        return self.said[before:]


def test_it_speaks_once_a_stall_and_once_when_it_is_over():
    looks = Looks()
    looks.watchdog.progress("in step 3")
    assert looks.after(99) == []
    (text,) = looks.after(1)
    assert text.startswith("no progress for 100 s while in step 3 (train.hang_timeout_seconds = 100)")
    assert looks.after(100) == []
    assert looks.after(1000) == []
    looks.now += 5
    looks.watchdog.progress("in step 4")
    assert looks.after(10) == ["continued after 1205 s (in step 3)"]
    assert looks.after(50) == []
    (again,) = looks.after(50)
    assert again.startswith("no progress for 110 s while in step 4")


def test_the_stacks_name_every_thread_and_where_it_is():
    ready, over = threading.Event(), threading.Event()

    def sits_here():
        ready.set()
        over.wait()

    thread = threading.Thread(target=sits_here, name="reader")
    thread.start()
    ready.wait()
    try:
        (text,) = Looks().after(100)
    finally:
        over.set()
        thread.join()
    assert "thread reader:\n" in text
    assert "in sits_here" in text
    assert "thread natsjax-watchdog" not in text


def test_each_of_several_processes_says_which_one_it_is(monkeypatch):
    monkeypatch.setattr(distributed, "label", lambda: "process 1 of 4: ")
    looks = Looks()
    assert looks.after(100)[0].startswith("process 1 of 4: no progress for 100 s while starting")
    looks.watchdog.progress()
    assert looks.after(0) == ["process 1 of 4: continued after 100 s (starting)"]


def test_a_real_stall_is_said_while_it_lasts(capfd):
    """By its thread, with the stack of the main one, which is stuck."""
    with watchdog.watching(0.3):
        watchdog.progress("in step 1")
        with watchdog.phase("compiling the step"):
            deadline = time.monotonic() + 20
            said = ""
            while "thread MainThread" not in said:
                assert time.monotonic() < deadline
                time.sleep(0.02)
                said += capfd.readouterr().err
            assert "while compiling the step (train.hang_timeout_seconds = 0.3)" in said
            assert "test_a_real_stall_is_said_while_it_lasts" in said
        while "continued after" not in said:
            assert time.monotonic() < deadline
            watchdog.progress()
            time.sleep(0.01)
            said += capfd.readouterr().err
    assert said.count("no progress") == 1
    assert said.count("(compiling the step)") == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "natsjax-watchdog"]


@pytest.mark.parametrize("seconds", [0, 1000])
def test_phases_end_as_they_began_and_without_a_watchdog_nothing_happens(seconds, capfd):
    with watchdog.watching(seconds):
        with watchdog.phase("preparing the data"):
            watchdog.progress()
            with watchdog.phase("deeper"):
                pass
            assert (watchdog._watchdog and watchdog._watchdog.phase) == ("preparing the data" if seconds else None)
        assert bool([t for t in threading.enumerate() if t.name == "natsjax-watchdog"]) == bool(seconds)
    assert watchdog._watchdog is None
    watchdog.progress("in step 2")
    assert capfd.readouterr().err == ""


def test_a_step_pays_next_to_nothing():
    with watchdog.watching(1000):
        began = time.perf_counter()
        for step in range(10000):
            watchdog.progress(f"in step {step}")
        assert (time.perf_counter() - began) / 10000 < 1e-4  # a tenth of a millisecond; it is less than a microsecond


def test_whoever_takes_items_comes_along(monkeypatch):
    looks = Looks()
    monkeypatch.setattr(watchdog, "_watchdog", looks.watchdog)
    for _ in watchdog.each_is_progress(range(5)):
        assert looks.after(60) == []
    assert looks.after(99) == []
    assert len(looks.after(1)) == 1
