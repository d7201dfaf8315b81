"""The loop keeps the devices busy, and says where the time went."""

import concurrent.futures
import dataclasses
import signal
import threading
import types

import jax
import numpy as np
import pytest
import tiny

from natsjax import evaluate, train
from natsjax.config import NatsConfig
from natsjax.errors import UserError
from natsjax.model import sharding
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.runtime import distributed, signals, watchdog
from natsjax.runtime.signals import StopRequests
from natsjax.train.held_out import HeldOut
from natsjax.train.logs.wall_time import WallTime
from natsjax.train.loop import _check_budget, _Loop, compilation_cache
from natsjax.train.step import Trainer


class Clock:
    """A time that passes only while the loop sleeps, so that a busy machine changes nothing."""

    def __init__(self):
        self._now, self._moved, self._watched = 0.0, threading.Condition(), []

    def __call__(self):
        return self._now

    def sleep_until(self, end):
        """Of the loop's thread; whoever watches a step that ends meanwhile sees the clock stand at that moment."""
        while self._watched and self._watched[0][0] <= end:
            ready_at, seen = self._watched.pop(0)
            self._set(ready_at)
            seen.result(timeout=60)
        self._set(max(end, self._now))

    def wait_until(self, end):
        """Of another thread."""
        with self._moved:
            assert self._moved.wait_for(lambda: self._now >= end, timeout=60)

    def watch(self, ready_at, seen):
        self._watched.append((ready_at, seen))

    def _set(self, now):
        with self._moved:
            self._now = now
            self._moved.notify_all()


class ClockedWallTime(WallTime):
    def __init__(self, clock):
        super().__init__(clock)
        self._watch = clock.watch

    def when_done(self, result):
        seen = super().when_done(result)
        self._watch(result.ready_at, seen)
        return seen


class Result:
    """A step's loss on a device that does one step after the other."""

    def __init__(self, clock, number, ready_at, log):
        self.ready_at = ready_at
        self._clock, self._number, self._log = clock, number, log

    def block_until_ready(self):
        self._clock.wait_until(self.ready_at)
        return self

    def __array__(self, dtype=None, copy=None):
        self._clock.sleep_until(self.ready_at)
        self._log.append(f"read {self._number}")
        return np.float32(1.0)


class Device:
    """In the place of a ``Trainer``: each step takes so many seconds, and whoever dispatches it does not wait."""

    vocab_size = tiny.VOCAB_SIZE

    def __init__(self, clock, seconds, log):
        self.mesh = sharding.make_mesh(tiny.config().mesh)
        self._clock, self._seconds, self._log, self._busy_until = clock, seconds, log, 0.0

    def put_batch(self, rows):
        self._log.append(f"put {rows}")
        return rows

    def to_save(self, state):
        return state

    def program(self):
        return ""

    def step(self, state, number):
        self._log.append(f"step {number}")
        self._busy_until = max(self._busy_until, self._clock()) + self._seconds
        loss = Result(self._clock, number, self._busy_until, self._log)
        return state, tiny.step_metrics(tiny.config(), loss=loss)


class Checkpoints:
    def __init__(self, clock, seconds=0.0):
        self._clock, self._seconds = clock, seconds

    def save(self, step, state):
        self._clock.sleep_until(self._clock() + self._seconds)

    def wait(self):
        pass


@dataclasses.dataclass
class State:
    step: int = 0


def simulate(tmp_path, *, step_seconds, batch_seconds, save_seconds=0.0, num_steps=12, save_every=1000):
    """``(seconds, last line of metrics, log)`` of the real loop around a device and an input that take so long."""
    log, clock = [], Clock()

    def batches():
        for number in range(1, 1000):
            clock.sleep_until(clock() + batch_seconds)
            yield number

    config = tiny.config(train={"num_steps": num_steps}, checkpoint={"save_every": save_every})
    wall_time = ClockedWallTime(clock)
    device, checkpoints = Device(clock, step_seconds, log), Checkpoints(clock, save_seconds)
    held_out = HeldOut(config, Workdir(tmp_path), None, device, 0)
    loop = _Loop(config, Workdir(tmp_path), device, checkpoints, held_out, 0, wall_time, StopRequests())
    loop.run(State(), batches())
    loop.close()
    wall_time.close()
    return clock(), read_metrics(tmp_path / "metrics.jsonl")[-1], log


def test_the_next_batch_is_on_its_way_before_the_metrics_of_any_running_step_are_read(tmp_path):
    _, _, log = simulate(tmp_path, step_seconds=0.001, batch_seconds=0, num_steps=4, save_every=3)
    expected = ["put 1", "step 1", "put 2", "step 2", "put 3", "read 1", "step 3", "put 4", "read 2"]
    expected += ["read 3", "step 4", "read 4"]  # the third is saved, so it is read before the fourth begins
    assert log == expected


@pytest.mark.parametrize(
    ("times", "seconds", "input_wait", "goodput"),
    [
        # Hidden behind steps that take longer: the first batch and 12 steps; one by one they would take 1.92 s.
        ({"step_seconds": 0.1, "batch_seconds": 0.06}, 1.26, 0.06 / 1.26, 1.2 / 1.26),
        # Of each 0.1 s the device has nothing to do for 0.06.
        ({"step_seconds": 0.04, "batch_seconds": 0.1}, 1.24, (0.1 + 11 * 0.06) / 1.24, 12 * 0.04 / 1.24),
        # Saving that holds the loop up is no step; the last line is written before the last save.
        ({"step_seconds": 0.05, "batch_seconds": 0, "save_seconds": 0.05, "save_every": 1}, 1.2, 0, 0.6 / 1.15),
    ],
)
def test_what_input_and_saving_take(tmp_path, times, seconds, input_wait, goodput):
    found, line, _ = simulate(tmp_path, **times)
    assert (found, line["input_wait"], line["goodput"]) == pytest.approx((seconds, input_wait, goodput))


def test_the_loop_says_what_it_is_doing(tmp_path, monkeypatch):
    """For the watchdog, which would be stuck with it otherwise."""
    heard = []

    class Listening(watchdog.Watchdog):
        def progress(self, phase=None):
            super().progress(phase)
            heard.append(self.phase)

    monkeypatch.setattr(watchdog, "_watchdog", Listening(1000))
    simulate(tmp_path, step_seconds=0.001, batch_seconds=0, num_steps=4, save_every=3)
    phases = [phase for phase, before in zip(heard, [None, *heard], strict=False) if phase != before]
    steps = dict.fromkeys(phase for phase in phases if phase.startswith("in step"))
    assert list(steps) == [f"in step {n}" for n in (1, 2, 3, 4, 5)]
    assert phases.count("waiting for a batch") == 4
    saved = phases.index("saving step 3")
    assert phases[saved - 1] == "in step 4"
    assert phases[-3:] == ["saving step 4", "in step 5", "starting"]


def test_what_counts_as_what():
    now = 0.0
    wall_time = WallTime(lambda: now)
    assert wall_time.fractions() == {"goodput": 0, "input_wait": 0}
    with wall_time.spent_on("compiling"):
        now += 30
    now += 10
    assert wall_time.compiling == 30
    wall_time.begin_steps()

    def wait(seconds, done_at):
        nonlocal now
        step = concurrent.futures.Future()
        if done_at is not None and done_at <= now + seconds:
            step.set_result(done_at)
        with wall_time.waiting_for_input(step):
            now += seconds

    with wall_time.waiting_for_input(None):
        now += 5  # the first batch: nothing runs
    now += 15  # a step
    wait(10, done_at=now + 20)  # hidden
    wait(10, done_at=now + 4)  # 6 of it are not
    wait(10, done_at=now - 3)  # none of it is
    with wall_time.spent_on("saving"):
        now += 10
    assert wall_time.since_start == 100
    assert wall_time.fractions() == {"goodput": pytest.approx(0.29), "input_wait": pytest.approx(0.21)}
    wall_time.close()


def test_a_run_says_when_its_first_step_was_done_and_a_resumed_one_loads_it(
    tmp_path, monkeypatch, capfd, nothing_compiled_before
):
    monkeypatch.setattr(evaluate, "run", lambda *a, **k: None)
    hits, used = [], []
    jax.monitoring.register_event_listener(listener := lambda name, **_: hits.append(name.endswith("/cache_hits")))
    real = _Loop._handle

    def stop_at_2(self, step, metrics, state=None):
        real(self, step, metrics, state)
        used.append(jax.config.jax_compilation_cache_dir)
        if step == 2:
            raise RuntimeError("killed")

    cache = tmp_path / "cache"
    config = tiny.config(
        train={"num_steps": 4, "log_every": 2, "compilation_cache": str(cache)}, checkpoint={"save_every": 1}
    )
    try:
        with monkeypatch.context() as patch:
            patch.setattr(_Loop, "_handle", stop_at_2)
            with pytest.raises(RuntimeError):
                train.run(config, tmp_path / "run")
        assert jax.config.jax_compilation_cache_dir is None
        assert set(used) == {str(cache)}
        assert (steps := set(cache.glob("jit__step*-cache")))
        assert not any(hits)
        first = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
        jax.clear_caches()
        train.run(config, tmp_path / "run")
        assert any(hits)
        assert set(cache.glob("jit__step*-cache")) == steps
    finally:
        jax.monitoring.unregister_event_listener(listener)
    second, third = read_metrics(tmp_path / "run/metrics.jsonl")
    for line in (first, second):
        assert 0 < line["compile_time"] < line["time_to_first_step"]
        assert 0 < line["goodput"] < 1
        assert 0 <= line["input_wait"] < 1
    assert third.keys() == second.keys() - {"compile_time", "time_to_first_step"}
    assert capfd.readouterr().err.count("first step after") == 2


def test_where_the_cache_is(tmp_path, monkeypatch, nothing_compiled_before):
    """``auto`` is none on the CPUs that tests run on; what JAX was told already stands."""
    workdir = Workdir(tmp_path)

    def found(setting):
        with compilation_cache(setting, workdir.compiled):
            return jax.config.jax_compilation_cache_dir

    assert found("auto") is None
    assert found("none") is None
    assert found(str(tmp_path / "mine")) == str(tmp_path / "mine")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert found("auto") == str(tmp_path / "compiled")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of-the-cluster"))
    try:
        assert found("auto") == found("none") == str(tmp_path / "of-the-cluster")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_is_a_sentence_of_process_0(
    tmp_path, monkeypatch, nothing_compiled_before, name
):
    (tmp_path / "file").touch()
    config = tiny.config(train={"compilation_cache": str(tmp_path / name)})
    with pytest.raises(
        UserError,
        match=rf"^train.compilation_cache = {tmp_path / name}: .* is no folder that can be written \([\w ]+\)",
    ):
        train.run(config, tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(distributed, "is_main", lambda: False)  # the others go on to where they wait for it
    with compilation_cache(config.train.compilation_cache, tmp_path / "run"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / name)


def test_the_step_takes_its_state_over():
    """Donated: the new state lies where the old one was."""
    trainer = Trainer(tiny.config(model={"layer_types": "dense"}), tiny.VOCAB_SIZE)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainer.abstract_state()))
    assert trainer.lower().compile().memory_analysis().alias_size_in_bytes == size


class Saving(Checkpoints):
    """Of which the log is told."""

    def __init__(self, clock, log):
        super().__init__(clock)
        self._log = log

    def save(self, step, state):
        self._log.append(f"save {step}")

    def wait(self):
        self._log.append("saved")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leads_to_a_save_within_one_step(tmp_path, capfd, number):
    log, clock = [], Clock()

    class Signalling(Device):
        def step(self, state, step):
            if step == 3:
                signal.raise_signal(number)
            return super().step(state, step)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals.stop_requests() as stop:
        interrupted(tmp_path, Signalling(clock, 0.001, log), Saving(clock, log), clock, stop)
    assert log[-3:] == ["read 3", "save 3", "saved"]
    assert capfd.readouterr().err.endswith(f"{number.name}: saved step 3; run the same command again to resume\n")
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def interrupted(tmp_path, device, saving, clock, stop, start=0):
    wall_time = ClockedWallTime(clock)
    held_out = HeldOut(tiny.config(), Workdir(tmp_path), None, device, start)
    loop = _Loop(tiny.config(), Workdir(tmp_path), device, saving, held_out, start, wall_time, stop)
    with pytest.raises(train.Interrupted):
        loop.run(State(start), iter(range(1, 100)))
    loop.close()
    wall_time.close()


def test_a_signal_during_compilation_leads_to_a_save_before_the_first_step(tmp_path, capfd):
    log, clock = [], Clock()
    with signals.stop_requests() as stop:
        with stop.later("the step is compiled"):
            signal.raise_signal(signal.SIGTERM)
        interrupted(tmp_path, Device(clock, 0.001, log), Saving(clock, log), clock, stop, start=7)
    assert log == ["save 7", "saved"]
    assert capfd.readouterr().err.endswith("SIGTERM: saved step 7; run the same command again to resume\n")


@pytest.mark.parametrize(
    ("nats", "warned"),
    [
        ({"windows": (1, 4), "window": 3}, True),
        ({"windows": (1, 4), "window": 1}, False),  # the shortest of them
        ({"windows": (1, 4), "window": NatsConfig().window}, False),
        ({"window": 3}, False),
    ],
)
def test_a_window_without_effect_is_named_once(nats, warned, caplog):
    config = tiny.config(nats={"initial_roles": (), **nats})
    _check_budget(config, types.SimpleNamespace(piece_lengths=np.array([24])))
    lines = [line for line in caplog.messages if line.startswith("warning")]
    assert lines == ["warning: nats.window = 3 has no effect beside nats.windows = (1, 4)"] * warned
