"""Time of a step's forward pass, backward pass and optimizer, and the summary of a run."""

import json
import re

import pytest
import tiny

from natsjax import train
from natsjax.runs.metrics import STEP_PHASES
from natsjax.train.logs import step_breakdown
from natsjax.train.logs.step_breakdown import StepBreakdown, fractions_by_phase


def test_phases_are_read_off_the_names_in_the_program():
    program = """
  %fusion.1 = f32[2] fusion(%a), metadata={op_name="jit(_step)/jvp(while)/body/dot" stack_frame_id=3}
  ROOT %dot.7 = f32[2] dot(%a, %b), metadata={op_name="jit(_step)/transpose(jvp(while))/dot"}
  mul.2 = f32[2] multiply(%a, %b), metadata={op_name="jit(_step)/optimizer/mul"}
  %norm = f32[2] add(%a, %b), metadata={op_name="jit(_step)/add"}
"""
    seconds = {"fusion.1": 2.0, "dot.7": 4.0, "mul.2": 1.0, "norm": 0.5, "copy.9": 0.5}
    found = fractions_by_phase(seconds, program)
    assert found == {"forward": 0.25, "backward": 0.5, "optimizer": 0.125, "other": 0.125}
    assert fractions_by_phase({}, program) == {}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_reports_what_its_steps_took(tmp_path, caplog):
    config = tiny.config(train={"num_steps": 50}, eval={"budgets": (0.5,)})
    train.run(config, tmp_path)
    (line,) = [line for line in lines_of(tmp_path) if "forward_fraction" in line]
    fractions = [line[f"{phase}_fraction"] for phase in STEP_PHASES]
    assert sum(fractions) == pytest.approx(1)
    assert all(fraction > 0 for fraction in fractions)
    (summary,) = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    pattern = (
        r"50 steps of 96 tokens in [\d.]+ s, [\d,]+ tokens/s: \d+ % forward, \d+ % backward, \d+ % optimizer, "
        r"\d+ % other, \d+ % of all time waiting for input; peak memory \d+\.\d\d GB"
    )
    assert re.fullmatch(pattern, summary), summary


def test_a_profile_that_fails_is_no_end_of_the_run(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("another profiler runs")

    monkeypatch.setattr(step_breakdown.jax.profiler, "start_trace", fail)
    recorder = StepBreakdown(True, 0, 100, lambda: "")
    for step in range(1, 20):
        recorder.before(step, ())
    recorder.close()
    assert recorder.fractions == {}
    assert caplog.text.count("the time of a step's parts is not known: another profiler runs") == 1


def test_a_run_that_ends_while_it_is_recorded_leaves_the_profiler_free(monkeypatch):
    calls = []
    monkeypatch.setattr(step_breakdown.jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(step_breakdown.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    recorder = StepBreakdown(True, 0, 100, lambda: "")
    for step in range(1, 12):
        recorder.before(step, ())
    recorder.close()
    recorder.close()
    assert calls == ["start", "stop"]
