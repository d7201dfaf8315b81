"""kill -9 at any point costs the steps since the newest checkpoint and nothing else; SIGTERM nothing at all."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import tiny
from processes import SLOW, Process

from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.train.optimizer import learning_rate
from natsjax.train.step import Trainer

pytestmark = pytest.mark.larger
NUM_KILLS = 20 if SLOW else 2
SEED = int(os.environ.get("KILL_SEED", "0"))
SAVE_EVERY = 12
NUM_STEPS = 240

# Its arguments: a config, a folder, and the phase in which the process gets SIGTERM, or nothing.
PROGRAM = """
import json, os, signal, sys
import jax
from natsjax import evaluate, train
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runtime.flags import run_command
from natsjax.config import Config
from natsjax.train import loop
from natsjax.train.step import Trainer

PHASES = {
    "preparing": (loop, "_open_data"), "compiling": (Trainer, "compile"), "saving": (Checkpoints, "save"),
    "evaluating": (evaluate, "run"),
}

def signalled(real):
    def call(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **keywords)
    return call

values, workdir, phase = sys.argv[1:]
if phase:
    where, name = PHASES[phase]
    setattr(where, name, signalled(getattr(where, name)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
run_command(lambda: train.run(Config.from_dict(json.loads(values)), workdir) and None)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def config(folder):
    return tiny.config(
        data=tiny.corpus(folder / "texts"),
        train={"num_steps": NUM_STEPS},
        checkpoint={"save_every": SAVE_EVERY, "max_to_keep": 2, "keep_every": NUM_STEPS // 2},
        eval={"budgets": (0.4,), "num_contexts": 4, "num_calibration_contexts": 4},
    )


@pytest.fixture(scope="module")
def run(config, folder):
    """Returns ``run(workdir)``, which returns status, seconds and standard error."""

    def run_it(workdir, kill_after=None, signal_in="", num_steps=NUM_STEPS):
        values = config.to_dict()
        values["train"]["num_steps"] = num_steps
        with open(folder / "errors.txt", "w") as errors:
            began = time.monotonic()
            process = Process("-c", PROGRAM, json.dumps(values), workdir.path, signal_in, stderr=errors.fileno())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(kill_after)
            process.kill()
            status, seconds = process.wait(), time.monotonic() - began
            process.close()
        return status, seconds, (folder / "errors.txt").read_text()

    return run_it


@pytest.fixture(scope="module")
def whole(folder, run):
    """Returns a run that was left alone, and its seconds; all that it needs was compiled before."""
    for name in ("warm", "whole"):
        status, seconds, errors = run(Workdir(folder / name))
        assert status == 0, errors
    assert [line[0] for line in numbers(Workdir(folder / "whole"))] == list(range(1, NUM_STEPS + 1))
    return Workdir(folder / "whole"), seconds


def complete(workdir):
    """Returns steps whose checkpoints are complete."""
    return sorted(int(path.name) for path in workdir.checkpoints.glob("*") if path.name.isdigit())


def reached(workdir):
    return max((line["step"] for line in read_metrics(workdir.metrics_file)), default=0)


def where(workdir, said):
    """Returns the phase that a run was killed in, from its standard error and its folder."""
    if "resuming from step" not in said and "training 0." not in said:
        return "preparing"
    if list(workdir.checkpoints.glob("*tmp*")):
        return "saving"
    if NUM_STEPS in complete(workdir):
        return "evaluating"
    return "stepping" if "first step after" in said else "compiling"


def numbers(workdir):
    """Returns the fields of every line that must not depend on interruptions."""
    fields = ("step", "loss", "cross_entropy", "kv_fraction", "kv_penalty", "gradient_norm", "learning_rate")
    return [[line[field] for field in fields] for line in read_metrics(workdir.metrics_file)]


def final_state(workdir, config):
    checkpoints = Checkpoints(workdir.checkpoints, read_only=True)
    assert checkpoints.latest_step() == NUM_STEPS
    state = checkpoints.restore(Trainer(config, 258).abstract_state())
    checkpoints.close()
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def perplexities(workdir):
    rows = (workdir.report / "results.jsonl").read_text().splitlines()
    return [json.loads(row)["perplexity"] for row in rows]


def same(workdir, other, config):
    """Asserts that two finished runs are the same bit for bit."""
    assert numbers(workdir) == numbers(other)
    assert final_state(workdir, config) == final_state(other, config)
    assert perplexities(workdir) == perplexities(other)
    return True


def test_killed_at_random_points_a_run_is_the_one_that_was_left_alone(folder, config, run, whole):
    """Killed runs go on until they are done, and then others begin, so that every phase is met."""
    whole, seconds = whole
    chance = random.Random(SEED)
    delays = [(number + chance.random()) / NUM_KILLS * seconds for number in range(NUM_KILLS)]  # uniform, and spread
    chance.shuffle(delays)
    story = [f"KILL_SEED={SEED}, {seconds:.1f} s uninterrupted"]
    workdir, number_of_runs, resumed_at, kills = Workdir(folder / "run0"), 0, 0, 0
    while delays or complete(workdir):
        delay = delays.pop() if delays else None
        status, _, errors = run(workdir, delay)
        story.append(f"{workdir.path.name}: status {status} {where(workdir, errors)}, step {reached(workdir)}")
        said = "\n".join([*story, errors])
        assert "Traceback" not in errors, said
        if going_on := re.search(r"resuming from step (\d+)", errors):
            assert int(going_on[1]) == resumed_at, said  # the newest complete one of when it was killed
        elif "training 0." in errors:
            assert resumed_at == 0, said
        if status == 0:
            assert same(workdir, whole, config), said
            assert {NUM_STEPS // 2, NUM_STEPS} <= set(complete(workdir)), said
            shutil.rmtree(workdir.path)
            number_of_runs, resumed_at = number_of_runs + 1, 0
            workdir = Workdir(folder / f"run{number_of_runs}")
            if delay is not None:
                delays.append(0.9 * delay)  # it was done before; the next one, from its beginning, will not be
            continue
        assert status == -signal.SIGKILL, said
        kills += 1
        resumed_at = max(complete(workdir), default=0)
        # A save is waited for before the next one begins, so the newest complete one is that or the one before it.
        assert reached(workdir) - resumed_at <= 2 * SAVE_EVERY, said
    print("\n".join(story))
    assert kills == NUM_KILLS
    assert number_of_runs >= 1


def test_sigterm_in_every_phase_is_one_sentence_and_loses_nothing_and_a_finished_run_is_extended(
    folder, config, run, whole
):
    """In one run, which is started again each time: while it prepares, compiles, saves and evaluates."""
    workdir = Workdir(folder / "signalled")
    again = "run the same command again"
    expected = {
        "preparing": (f"SIGTERM: the data was being prepared; {again} to resume", None),
        "compiling": (f"SIGTERM: saved step 0; {again} to resume", 0),
        "saving": (f"SIGTERM: saved step {SAVE_EVERY + 1}; {again} to resume", SAVE_EVERY + 1),
        "evaluating": (f"SIGTERM: all {NUM_STEPS} steps are trained and saved; {again} to evaluate the run", NUM_STEPS),
    }
    for phase, (sentence, saved) in expected.items():
        status, _, errors = run(workdir, signal_in=phase)
        assert status == 130, (phase, errors)
        assert errors.endswith(f"{sentence}\ninterrupted\n"), phase
        assert "Traceback" not in errors
        assert max(complete(workdir), default=None) == saved, phase
    assert not workdir.report.exists()
    status, _, errors = run(workdir)
    assert status == 0, errors
    assert "first step" not in errors  # nothing was left to train
    assert same(workdir, whole[0], config)
    extend(workdir, config, run)


def extend(workdir, config, run):
    """Extends a finished run: metrics continue, the report is of the last step, the new learning rate is logged."""
    longer = NUM_STEPS + SAVE_EVERY + 3
    before, measured = numbers(workdir), perplexities(workdir)
    status, _, errors = run(workdir, num_steps=longer)
    assert status == 0, errors
    assert f"resuming with train.num_steps: {NUM_STEPS} -> {longer}\n" in errors
    assert f"resuming from step {NUM_STEPS}\n" in errors
    end = config.optimizer.final_learning_rate
    rate = float(learning_rate(config.optimizer, longer)(NUM_STEPS))
    assert (
        f"the learning rate's schedule now ends at step {longer} instead of {NUM_STEPS}: at step {NUM_STEPS} it goes "
        f"from {end:.3g} to {rate:.3g}\n"
    ) in errors
    after = numbers(workdir)
    assert after[:NUM_STEPS] == before
    assert [line[0] for line in after] == list(range(1, longer + 1))
    assert after[NUM_STEPS][-1] == pytest.approx(rate, rel=1e-6)
    assert after[-1][-1] < rate
    assert max(complete(workdir)) == longer
    assert workdir.read_config().train.num_steps == longer
    rows = [json.loads(row) for row in (workdir.report / "results.jsonl").read_text().splitlines()]
    assert all(f"step {longer}" in row["weights"] for row in rows)
    assert perplexities(workdir) != measured
