"""Studies: arms under the same conditions, trained once, compared document by document."""

import contextlib
import json
import sys
import types

import numpy as np
import pytest
from processes import ROOT

from benchmarks import study
from natsjax import UserError

FILE = f"""
CONFIG = "{ROOT / "configs/smoke.py"}"
COMMON = {{
    "data.source": "recall",
    "model.embed_dim": 8,
    "nats.kv_budget": 0.5,
    "train.num_steps": 2,
    "train.progress": False,
    "train.step_breakdown": False,
    "eval.num_contexts": 8,
}}
ARMS = {{
    "dense": {{"model.layer_types": "dense"}},
    "nats": {{}},
    "window": {{"model.layer_types": "sliding", "model.sliding_window": 8}},
}}
SEEDS = (0, 1)
"""


PREDICTED = np.array([10.0, 20.0, 30.0, 5.0, 8.0, 9.0, 10.0, 30.0, 12.0, 7.0, 25.0, 16.0])


def record(arm, seed, nll):
    return {
        "arm": arm,
        "seed": seed,
        "loss": sum(nll) / sum(PREDICTED),
        "documents": list(range(len(PREDICTED))),
        "nll": list(nll),
        "predicted": list(PREDICTED),
        "kv_fraction": 1.0,
        "tokens_per_second": 100.0,
        "cpu_seconds": 60.0,
    }


def test_runs_are_compared_with_those_of_their_seed():
    gain = np.linspace(0.08, 0.12, len(PREDICTED))
    a = [record("a", seed, (3 - gain + seed) * PREDICTED) for seed in (0, 1)]
    b = [record("b", seed, (3 + seed) * PREDICTED) for seed in (1, 0, 2)]
    ratio, low, high = study.paired_interval(a, b)
    assert ratio == pytest.approx(np.exp(-(gain * PREDICTED).sum() / PREDICTED.sum()), rel=1e-12)
    assert np.exp(-0.12) < low < ratio < high < np.exp(-0.08)


def test_runs_on_other_text_are_not_compared():
    a, b = record("a", 0, PREDICTED), record("b", 0, PREDICTED)
    b["documents"][3] = 99
    with pytest.raises(UserError, match="a and b were measured on different text"):
        study.paired_interval([a], [b])


def test_the_table_has_the_best_arm_first_and_compares_pairs_alone():
    runs = [record("a", 0, 3 * PREDICTED), record("a", 1, 3.5 * PREDICTED), record("b", 0, 2.9 * PREDICTED)]
    lines = study.table(runs, "a").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["b", "a"]
    assert f"{np.exp(-0.1):.4f}" in lines[2]  # the run of seed 1 has no partner
    assert "0.5000" in lines[3]  # range over seeds


def test_budgets_are_shown_as_sampled_and_as_served():
    nats = {"kv_budget": 0.1, "min_kv_penalty": 1e-3}
    found = record("a", 0, PREDICTED) | {
        "config": {"nats": nats},
        "sampled_kv_fraction": 0.11,
        "argmax_kv_fraction": 0.08,
        "kv_penalty": 1e-3,
        "warnings": ["no-global"],
    }
    _, _, line = study.budget_table([record("dense", 0, PREDICTED), found]).splitlines()
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "a",
        "0",
        "10.0%",
        "11.00% (+10.0%)",
        "8.00% (-20.0%)",
        "0.001 (its lower bound)",
        "no-global",
    ]


def test_arms_without_a_common_seed_have_no_ratio():
    runs = [record("a", 0, 3 * PREDICTED), record("b", 1, 2.9 * PREDICTED)]
    assert np.isnan(study.paired_interval(runs[1:], runs[:1])).all()
    first = study.table(runs, "a").splitlines()[2]
    assert first.split("|")[-2].strip() == "-"
    study.table(runs, "none of them")  # the reference has not finished


def with_slices(arm, seed, nll, marks=("m0", "m1", "m2")):
    """A record with a slice of three documents, beside one of all and an empty one."""
    part = np.where(np.arange(len(PREDICTED)) < 10, 2.0, 0.0)
    slices = {
        "names": ["all tokens", "hard", "nothing"],
        "marks": list(marks),
        "nll": [list(nll), list(2 * part * nll / PREDICTED), [0.0] * len(nll)],
        "predicted": [list(PREDICTED), list(part), [0] * len(nll)],
    }
    return record(arm, seed, nll) | {"slices": slices}


def test_there_is_a_table_for_each_slice():
    gain = np.linspace(0.08, 0.12, len(PREDICTED))
    runs = [with_slices("a", 0, 3 * PREDICTED), with_slices("b", 0, (3 - gain) * PREDICTED), record("c", 0, PREDICTED)]
    whole, hard, nothing = study.slice_tables(runs, ["a", "c"]).split("\n\n")
    assert whole.splitlines()[0] == f"all tokens: {int(PREDICTED.sum())} tokens in 12 documents"
    assert hard.splitlines()[0] == "hard: 20 tokens in 10 documents"
    assert nothing == "nothing: 0 tokens in 0 documents"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in hard.splitlines()[1:]]
    assert lines[0] == ["arm", "seeds", "perplexity", "KV", "to a", "to c"]
    assert [line[0] for line in lines[2:]] == ["b", "a"]  # the best first, the one without slices left out
    ratio, low, high = map(float, lines[2][4].replace("[", "").replace("]", "").replace(",", "").split())
    assert ratio == pytest.approx(np.exp(-2 * gain[:10].mean()), abs=1e-4)
    assert np.exp(-2 * gain[9]) < low < ratio < high < np.exp(-2 * gain[0])
    assert lines[2][5] == lines[3][5] == "-"
    runs[1]["slices"]["marks"][1] = "other tokens"
    with pytest.raises(UserError, match="b and a were measured on different text"):
        study.slice_tables(runs[:2], ["a"])


def test_cpu_seconds_are_those_of_all_starts(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    config, workdir = study.read_study(path).config_of("dense", 0), tmp_path / "run"
    clock = iter([0.0, 1000.0, 1012.0, 2000.0, 2000.5])  # the first start ends before there is a run
    monkeypatch.setattr(study, "time", types.SimpleNamespace(process_time=lambda: next(clock)))
    fit = study.train.fit

    def interrupted(*arguments):
        fit(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(study.train, "fit", lambda *_: pytest.fail("no such data"))
    with pytest.raises(pytest.fail.Exception):
        study.run_one("dense", 0, config, workdir)
    assert not workdir.exists()  # nothing has begun
    for trains in (interrupted, fit):
        monkeypatch.setattr(study.train, "fit", trains)
        with contextlib.suppress(KeyboardInterrupt):
            study.run_one("dense", 0, config, workdir)
    assert study.read_record(workdir)["cpu_seconds"] == 12.5


def run(monkeypatch, path, workdir, *flags):
    monkeypatch.setattr(sys, "argv", ["study", f"--study={path}", f"--workdir={workdir}", *flags])
    study.main()


def test_a_study_is_trained_once(tmp_path, monkeypatch, capsys):
    path, workdir = tmp_path / "mine.py", tmp_path / "runs"
    path.write_text(FILE, encoding="utf-8")
    run(monkeypatch, path, workdir, "--seeds=0")
    first = capsys.readouterr().out
    assert {line.split("|")[1].strip() for line in first.splitlines()[2:]} == {"dense", "nats", "window"}
    records = {
        record["arm"]: record for record in map(json.loads, (workdir / study.RESULTS_FILE).read_text().splitlines())
    }
    assert records["dense"]["kv_fraction"] == 1
    assert 0 < records["window"]["kv_fraction"] < 1
    assert records["nats"]["kv_fraction"] == pytest.approx(0.5, rel=0.2)  # by the role bias
    metrics = (workdir / "nats_seed=0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert records["nats"]["sampled_kv_fraction"] == json.loads(metrics[-1])["kv_fraction"]  # the last tenth is a step
    assert 0 < records["nats"]["argmax_kv_fraction"] < 1
    assert {record["steps"] for record in records.values()} == {2}
    assert all(len(record["nll"]) == len(record["documents"]) == 8 for record in records.values())
    assert records["dense"]["loss"] == pytest.approx(
        sum(records["dense"]["nll"]) / sum(records["dense"]["predicted"]), rel=1e-12
    )

    with pytest.raises(UserError, match=r"^--slices=bigrams: associative recall"):
        run(monkeypatch, path, workdir, "--table", "--slices=bigrams")
    run(monkeypatch, path, workdir, "--table", "--slices=long_context", "--short_context=5")
    sliced = capsys.readouterr().out
    assert sliced.startswith(first)
    assert "all tokens: " in sliced
    for record in map(json.loads, (workdir / study.RESULTS_FILE).read_text().splitlines()):
        slices = record["slices"]
        assert slices["names"] == ["all tokens", "long context helps", "long context helps little"]
        assert slices["settings"]["chosen_by"] == "dense_seed=0"
        assert slices["nll"][0] == pytest.approx(record["nll"], rel=1e-9)  # as it was served then
        assert np.array(slices["nll"][1:]).sum(axis=0) == pytest.approx(record["nll"], rel=1e-9)
        assert slices["predicted"][0] == record["predicted"]
    with monkeypatch.context() as patch:  # each is measured once
        patch.setattr(study, "served", lambda *_: pytest.fail("measured again"))
        run(monkeypatch, path, workdir, "--table", "--slices=long_context", "--short_context=5")
        assert capsys.readouterr().out == sliced
    record_file = workdir / "dense_seed=0" / study.RECORD_FILE
    stored = record_file.read_text()
    record_file.write_text(json.dumps(json.loads(stored) | {"nll": [100.0] * 8}))
    with pytest.raises(UserError, match="dense_seed=0 has another loss than when it was trained"):
        run(monkeypatch, path, workdir, "--table", "--slices=long_context", "--short_context=7")
    record_file.write_text(stored)
    record_file.rename(tmp_path / "record")
    with pytest.raises(
        UserError, match=r"^--slices=long_context: .*dense_seed=0 chooses the tokens and has not finished"
    ):
        run(monkeypatch, path, workdir, "--table", "--slices=long_context", "--short_context=6")
    (tmp_path / "record").rename(record_file)

    monkeypatch.setattr(study, "run_one", lambda *_: pytest.fail("trained again"))
    run(monkeypatch, path, workdir, "--seeds=0")
    assert capsys.readouterr().out == first
    run(monkeypatch, path, workdir, "--table")
    assert capsys.readouterr().out == first
    path.write_text(FILE.replace('"model.sliding_window": 8', '"model.sliding_window": 9'), encoding="utf-8")
    with pytest.raises(UserError, match="window_seed=0 has a run of another config"):
        run(monkeypatch, path, workdir, "--seeds=0")


def test_mistakes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.py"
    with pytest.raises(UserError, match="there is no such file"):
        run(monkeypatch, path, tmp_path / "runs")
    path.write_text("ARMS = {}\n", encoding="utf-8")
    with pytest.raises(UserError, match="does not define CONFIG, COMMON"):
        run(monkeypatch, path, tmp_path / "runs")
    path.write_text(FILE, encoding="utf-8")
    with pytest.raises(UserError, match=r"--arms=densse: .*dense, nats, window"):
        run(monkeypatch, path, tmp_path / "runs", "--arms=densse")
    path.write_text(FILE.replace('"model.layer_types": "dense"', '"model.layer_type": "dense"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"arm dense: .*did you mean model.layer_types"):
        run(monkeypatch, path, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
