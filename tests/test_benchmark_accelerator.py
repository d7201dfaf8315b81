"""The benchmark for a lent GPU: every phase at its smallest on a CPU, and what fails in one does not stop the next."""

import dataclasses
import functools
import json
import math
import time
import types

import jax
import pytest
from processes import ROOT, json_lines, run

from benchmarks import accelerator, accelerator_checks, isolated, study
from natsjax import UserError, kv_fraction

STUDY = ROOT / "benchmarks" / "studies" / "accelerator.py"
BROKEN = f"""
import runpy
study = runpy.run_path({str(STUDY)!r})
CONFIG, COMMON = study["CONFIG"], study["COMMON"]
REFERENCE = study["REFERENCE"]
ARMS = {{"broken": {{"model.layer_type": "dense"}}, **study["ARMS"]}}
del ARMS["dense"]  # compiles the same program as the trained window
"""


def write_texts(path, count, word):
    lines = [json.dumps({"text": f"{number} " + f"{word} the house of {word}. " * 20}) for number in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The process and the folder of its results."""
    folder = tmp_path_factory.mktemp("accelerator")
    texts = [write_texts(folder / f"{word}.jsonl", 8, word) for word in ("köln", "paris")]
    (folder / "study.py").write_text(BROKEN, encoding="utf-8")
    flags = [f"--input={texts[0]}", f"--validation_input={texts[1]}", f"--study={folder / 'study.py'}"]
    output = folder / "output"
    return run("-m", "benchmarks.accelerator", "--smallest", "--seconds=1000", *flags, f"--output={output}"), output


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_fails_is_one_line_and_does_not_stop_the_rest(done):
    process, output = done
    assert process.returncode == 1, process.stderr
    *lines, last = process.stdout.splitlines()
    (failed,) = [line for line in lines if " failed: " in line]
    assert failed.startswith("training of broken, round 1 failed: arm broken: unknown config field model.layer_type")
    assert last.endswith("s; failed: training of broken, round 1")
    assert process.stdout == (output / accelerator.SUMMARY).read_text(encoding="utf-8")
    assert {path.name for path in output.iterdir()} == set(accelerator.FILES)  # as many as the device tool returns


def test_kernels_are_compared_with_the_oracles(done):
    records = lines_of(done[1] / accelerator.KERNELS)
    groups = {record["group"] for record in records}
    interpreter = jax.__version_info__[:2] >= (0, 11)
    assert groups == {"xla", "decoding"} | ({"pallas_gpu"} if interpreter else set())
    assert ("checks of pallas_gpu skipped: the GPU interpreter needs jax >= 0.11" in done[0].stdout) != interpreter
    assert all(record["within"] for record in records)
    assert all(max(record["errors"].values()) > 0 for record in records)  # else nothing was compared
    roles = [record["errors"] for record in records if record["kind"] == "roles"]
    assert all(list(errors) == list(accelerator_checks.RESULTS) for errors in roles)


def test_times_have_ratios_to_the_rivals(done):
    records = lines_of(done[1] / accelerator.TIMES)
    assert {record["pass"] for record in records} == {"forward", "forward and backward"}
    for record in records:
        (own,) = {"forward", "visible"} & set(record["rounds"])
        pairs = zip(record["rounds"]["jax"], record["rounds"][own], strict=True)
        assert len(record["rounds"]["jax"]) == accelerator.SMALLEST_REPEATS
        assert record["ratios"]["jax"][own] == pytest.approx(sum(x / y for x, y in pairs) / 2)  # median of two
        assert not record["failures"]


def test_arms_are_trained_on_equal_tokens_and_measured_on_the_same_text(done):
    records = lines_of(done[1] / accelerator.TRAINING)
    arms = list(study.read_study(STUDY).arms)[1:]
    assert [record["arm"] for record in records] == arms
    assert len({record["tokens"] for record in records}) == 1
    assert len({(*record["documents"], *record["predicted"]) for record in records}) == 1
    assert records[0]["documents"]
    assert f"Round 1, {records[0]['tokens']:,} tokens each:" in done[0].stdout
    curves = lines_of(done[1] / accelerator.CURVES)
    steps = list(range(1, accelerator.SMALLEST_STEPS + 1))
    assert [(line["arm"], line["step"]) for line in curves] == [(arm, step) for arm in arms for step in steps]


def test_the_second_round_takes_the_time_that_is_left_for_equal_tokens(tmp_path, monkeypatch):
    """Runs are simulated: each takes seconds beside its steps and has a speed; one breaks down."""
    speeds = {"dense": (20.0, 2e6), "broken": (30.0, 1e6), "slow": (30.0, 5e5)}
    clock, trained = [100.0], []

    def call(function, arm, seed, config, workdir, refused, compiled, *, seconds, log):
        beside, speed = speeds[arm]
        tokens = config.train.num_steps * config.train.batch_size * config.data.context_length
        clock[0] += beside + tokens / speed
        if arm == "broken":
            raise isolated.CallFailed("RuntimeError: out of memory", "its traceback")
        trained.append((arm, tokens, config.optimizer.warmup_steps / config.train.num_steps))
        record = {"arm": arm, "seed": seed, "steps": config.train.num_steps, "tokens": tokens, "loss": 5.0}
        record |= {"tokens_per_second": speed, "cpu_seconds": 1.0, "kv_fraction": 1.0, "config": config.to_dict()}
        workdir.mkdir(parents=True)
        record |= {"documents": [0, 1], "nll": [5.0, 6.0], "predicted": [1, 2]}
        (workdir / study.RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
        return True

    monkeypatch.setattr(accelerator, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(isolated, "call", call)
    session = accelerator.Session(accelerator.Output(tmp_path), end=clock[0] + 400, smallest=False)
    arms = dataclasses.replace(study.read_study(STUDY), arms={arm: {} for arm in speeds}, reference="dense")
    accelerator.train_arms(session, arms, [], tmp_path / "runs")
    assert [arm for arm, *_ in trained] == ["dense", "slow"] * 2
    (first, second) = {tokens for _, tokens, _ in trained[:2]}, {tokens for _, tokens, _ in trained[2:]}
    assert len(first) == len(second) == 1
    assert min(second) > 5 * min(first)
    assert 5 < session.seconds_left < 60  # a tenth of what the first round left
    assert [warmup for *_, warmup in trained] == pytest.approx([0.1] * 4, rel=0.01)
    assert "its traceback" in (tmp_path / accelerator.ERRORS).read_text(encoding="utf-8")


def test_without_a_gpu_it_says_so(tmp_path):
    process = run("-m", "benchmarks.accelerator", "--corpus=corpus", f"--output={tmp_path / 'output'}")
    assert process.returncode == 2
    assert process.stderr.startswith("error: there is no GPU: JAX computes on cpu")
    assert (process.stdout, process.stderr.count("\n")) == ("", 1)
    assert not (tmp_path / "output").exists()


def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    with pytest.raises(UserError, match="--output"):
        accelerator.parse(["--corpus=corpus"])
    for flags in ([], ["--input=a"], ["--corpus=corpus", "--input=a", "--validation_input=b"]):
        with pytest.raises(UserError, match="either --corpus, or both"):
            accelerator.parse([*flags, "--output=out"])
    monkeypatch.setenv("OUT", str(tmp_path))
    assert accelerator.parse(["--corpus=corpus"]).output == tmp_path
    (tmp_path / accelerator.TIMES).touch()
    with pytest.raises(UserError, match=r"results of an earlier run \(times.jsonl\)"):
        accelerator.new_output(tmp_path)


def test_the_arms_of_the_study_have_equal_kv():
    arms = study.read_study(STUDY)
    configs = [arms.config_of(arm, 0) for arm in arms.arms]
    window = next(x for x in configs if x.model.layer_types == ("sliding",) or x.model.layer_types == "sliding")
    kept = kv_fraction.window_fraction([window.data.context_length], window.model.sliding_window)
    assert kept == pytest.approx(configs[-1].nats.kv_budget, rel=0.02)
    assert len({x.data.context_length * x.train.batch_size * x.train.num_steps for x in configs}) == 1


def test_a_second_round_for_which_no_time_is_left_has_no_steps():
    run = {"seconds": 20.0, "tokens": 1000, "tokens_per_second": 100.0}
    assert (
        accelerator.affordable_steps([run, run], 50, 21.0) == 1
    )  # 10 seconds beside the steps of each, half a second a step
    assert accelerator.affordable_steps([run, run], 50, 19.0) == 0


def test_a_check_that_fails_is_a_record():
    def broken():
        raise RuntimeError("launch failed")

    def refused():
        raise NotImplementedError("no such chip")

    found = [lambda: {"out": 0.1}, lambda: {"out": math.nan}, broken, refused, lambda: {"out": 0.5}]
    records = []
    listed = [accelerator_checks.Check({"number": number}, 0.2, errors) for number, errors in enumerate(found)]
    assert accelerator_checks.run(listed, records.append, math.inf) == 0
    assert [record.get("within") for record in records] == [True, False, None, None, False]
    assert "RuntimeError: launch failed" in records[2]["failed"]
    assert records[3]["refused"] == "no such chip"
    assert [accelerator_checks.is_close(record, times=5) for record in records] == [True, False, False, False, True]
    assert accelerator_checks.run(listed, records.append, time.monotonic() - 1) == len(found)
    assert len(records) == len(found)


def test_no_check_begins_that_would_end_too_late(monkeypatch):
    clock, durations, records = [0.0], [1.0, 4.0, 3.0, 1.0], []

    def takes(seconds):
        clock[0] += seconds
        return {"out": 0.0}

    monkeypatch.setattr(accelerator_checks, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    listed = [accelerator_checks.Check({}, 1.0, functools.partial(takes, seconds)) for seconds in durations]
    assert accelerator_checks.run(listed, records.append, 11.0) == 1  # at 8 the last one could end at 12
    assert [record["seconds"] for record in records] == durations[:3]


ISOLATED = """
import json, os, pathlib, subprocess, sys, tempfile, time
from jax._src import xla_bridge
from benchmarks import accelerator, isolated

folder = pathlib.Path(tempfile.mkdtemp())
log = folder / "log.txt"

def fine(x):
    print("to the log")
    return x + 1

def raises():
    raise ValueError("two\\nlines")

def crashes():
    os._exit(7)

def hangs():
    child = subprocess.Popen(["sleep", "600"])
    (folder / "pid").write_text(str(child.pid))
    child.wait()

print(json.dumps(isolated.call(fine, 1, seconds=60, log=log)))
for function, seconds in ((raises, 60), (crashes, 60), (hangs, 1)):
    try:
        isolated.call(function, seconds=seconds, log=log)
    except isolated.CallFailed as failure:
        print(json.dumps([str(failure), "in raises" in failure.details]))
for _ in range(100):
    try:  # a zombie is ended, too
        state = pathlib.Path("/proc", (folder / "pid").read_text(), "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        state = "gone"
    if state in ("gone", "Z"):
        break
    time.sleep(0.05)
print(json.dumps(state in ("gone", "Z")))
print(json.dumps(log.read_text()))
print(json.dumps(list(xla_bridge._backends)))
"""


def test_a_call_that_raises_crashes_or_hangs_is_said():
    value, raised, crashed, hung, ended, log, touched = json_lines(ISOLATED, devices=1)
    assert value == 2
    assert raised == ["ValueError: two", True]
    assert crashed == ["its process ended with exit status 7; see log.txt", False]
    assert hung == ["stopped after 1 s", False]
    assert ended
    assert "to the log" in log
    assert not touched  # by importing the benchmark: a process that has a device cannot be forked
