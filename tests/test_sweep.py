"""A sweep trains every run once, resumes, and reports what failed; its picture has the numbers of its rows."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import shutil
import signal
import threading
import time
import types

import pytest
import tiny
from processes import Process, has_checkpoint, wait_for

from natsjax import train
from natsjax.errors import UserError
from natsjax.runs.data import open_data
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.runtime.distributed import Interrupted
from natsjax.sweep import __main__ as sweep_command
from natsjax.sweep import sweep
from natsjax.sweep.pareto import draw_pareto, format_pareto, format_runs, pareto_of
from natsjax.sweep.runs import SweepRun, read_record, write_record

BUDGETS = [0.4, 0.6]
NAMES = ["kv_budget=0.4_seed=0", "kv_budget=0.6_seed=0", "kv_budget=0.4_seed=1", "kv_budget=0.6_seed=1"]


def tiny_config(**train):
    """Of few steps, and small in evaluation."""
    return tiny.config(
        train={"num_steps": 3} | train, checkpoint={"save_every": 2}, eval={"budgets": (0.5,), "bootstrap_samples": 10}
    )


def metrics_of(path):
    """What training again would change, by run."""
    return {
        file.parent.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(path.glob("*/metrics.jsonl"))
    }


def lines_of(path):
    return [json.loads(line) for line in (path / "sweep.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The real command, stopped by SIGTERM as it trains, and run again here: ``(folder, Sweep, stopped, gone on)``."""
    tmp_path = tmp_path_factory.mktemp("sweep")
    config = tiny_config(num_steps=300, log_every=1)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save_every=20))
    file, path = tiny.write_config(tmp_path / "experiment.py", config), tmp_path / "front"
    command = ["natsjax.sweep", f"--config={file}", f"--workdir={path}", "--kv_budgets=0.6", "--seeds=1"]
    process = Process("-m", *command)
    wait_for(lambda: any(map(has_checkpoint, path.glob("*"))), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    stopped = types.SimpleNamespace(status=process.returncode, errors=errors, has_lines=(path / "sweep.jsonl").exists())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = sweep_command.main(command)
    before = metrics_of(path)
    found = sweep.run(config, path, kv_budgets=[0.6], seeds=[1])  # all of it is there
    assert metrics_of(path) == before
    return path, found, stopped, types.SimpleNamespace(status=status, out=out.getvalue(), errors=err.getvalue())


@pytest.fixture
def trained(monkeypatch):
    """The runs that are trained, by name: with files and an evaluation as training leaves them, in no time."""
    names = []

    def run(config, path):
        workdir = Workdir(path)
        names.append(workdir.path.name)
        workdir.path.mkdir(parents=True, exist_ok=True)
        workdir.record(config, open_data(config, workdir, progress=False).fingerprint)
        with open(workdir.metrics_file, "a") as file:
            file.write(json.dumps({"step": config.train.num_steps}) + "\n")
        (workdir.checkpoints / str(config.train.num_steps)).mkdir(parents=True, exist_ok=True)
        if config.nats.kv_budget == 0.99 or config.nats.kv_penalty == 0.99:
            raise UserError("the loss at step 3 is nan.")
        dense = {"method": "full", "setting": {}, "budget": None, "kv_fraction": 1.0, "perplexity": 4.0}
        budget = config.nats.kv_budget
        ours = [
            {
                "method": "nats",
                "setting": {"role_bias": role_bias},
                "budget": wanted,
                "kv_fraction": kv,
                "perplexity": 5 + kv,
            }
            for role_bias, wanted, kv in ((0.0, None, 0.7), (-1.5, budget, budget))
        ]
        budget_check = {"role_bias": -1.5, "sampled": 0.6, "argmax": 0.7, "met": True}
        return types.SimpleNamespace(
            rows=[row | {"accuracy": 0.5} for row in ([dense] if not config.model.has_roles else [dense, *ours])],
            budget_check=budget_check if config.model.has_roles else None,
            run_info={"show_accuracy": False, "step": config.train.num_steps},
        )

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(sweep.compare, "compare", lambda workdirs, output, *, title: [])
    return names


# ------------------------------------------------------------------------------------------------------------- results


def test_a_run_is_a_workdir_and_a_line(swept):
    path, found, _, gone_on = swept
    (run,) = found.runs
    assert [run.name] == [line["name"] for line in lines_of(path)] == ["kv_budget=0.6_seed=1"]
    config = Workdir(path / run.name).read_config()
    assert (config.train.seed, config.nats.kv_penalty_mode, config.nats.kv_budget) == (1, "controlled", 0.6)
    assert list(found.paths) == [path / "sweep.jsonl", path / "sweep.png"]
    assert all(file.exists() for file in found.paths)
    assert gone_on.out == found.summary() + "\n"


def test_a_stopped_sweep_says_how_to_go_on_and_goes_on(swept):
    path, found, stopped, gone_on = swept
    assert stopped.status == 130, stopped.errors
    assert "stops with 0 of 1 runs finished; run the same command again to resume" in stopped.errors
    assert not stopped.has_lines
    assert gone_on.status == 0
    assert "resuming from step" in gone_on.errors
    steps = [line["step"] for line in read_metrics(path / found.runs[0].name / "metrics.jsonl")]
    assert steps == list(range(1, 301))
    assert (found.runs[0].step, found.runs[0].seconds) == (300, None)


def test_a_line_is_the_row_of_the_runs_own_evaluation_that_meets_its_budget(swept):
    path, found, _, _ = swept
    for run in found.runs:
        rows = [json.loads(line) for line in (path / run.name / "report/results.jsonl").read_text().splitlines()]
        role_biases = {row["setting"]["role_bias"]: row for row in rows if row["method"] == "nats"}
        row = next(row for row in role_biases.values() if row["budget"] == run.kv_budget)
        for name in ("kv_fraction", "perplexity", "perplexity_low", "perplexity_high", "accuracy"):
            expected = row[name] if row[name] is None else pytest.approx(row[name], rel=1e-9)  # intervals may be none
            assert getattr(run, name) == expected
        assert [point["role_bias"] for point in run.curve] == sorted(role_biases)
        assert run.argmax == role_biases[0.0]["kv_fraction"]
        assert run.met == (abs(run.kv_fraction - run.kv_budget) <= 0.1 * run.kv_budget)
        assert run.best["accuracy"] == max(row["accuracy"] for row in role_biases.values())  # of a task without text


def test_the_tables_have_the_lines_and_their_means(tmp_path, trained):
    found = sweep.run(tiny_config(), tmp_path, kv_budgets=BUDGETS, seeds=[0, 1], progress=False)
    assert [run.name for run in found.runs] == NAMES
    assert not any("," in name for name in NAMES)  # --workdir=A,B,C of other commands
    points = pareto_of(found.runs)
    assert [(point.kv_budget, point.seeds) for point in points] == [(0.4, (0, 1)), (0.6, (0, 1))]
    for point, line in zip(points, lines_of(tmp_path), strict=False):
        assert point.quality == pytest.approx(line["perplexity"])
        assert point.kv_fraction == pytest.approx(line["kv_fraction"])
    text = found.summary()
    assert text.startswith(format_runs(found.runs))
    assert format_pareto(points, is_accuracy=False) in text


def test_the_page_compares_the_runs_that_finished(tmp_path):
    for name in NAMES[:2]:
        (tmp_path / name).mkdir()
        Workdir(tmp_path / name).record(tiny_config(), "f" * 64)
    ended = [made(0.4, 0, 5.0, workdir=tmp_path / NAMES[0]), made(0.6, 0, 5.0, workdir=tmp_path / NAMES[1])]
    failed = made(0.5, 0, 5.0, status="failed", error="it broke.")
    assert tmp_path / "report/report.html" in sweep._write_page([*ended, failed], tmp_path)
    assert sweep._write_page([ended[0], failed], tmp_path) == []


def made(value, seed, perplexity, kv=0.2, kind="kv_budget", **fields):
    """A run that finished, without training one."""
    known = {"kv_budget": None, "kv_penalty": None} | ({} if kind == "dense" else {kind: value})
    curve = (
        () if kind == "dense" else ({"role_bias": 0.0, "budget": None, "kv_fraction": kv, "perplexity": perplexity},)
    )
    values = {
        "name": f"{kind}={value}_seed={seed}",
        "workdir": pathlib.Path("nowhere"),
        "attention": "dense" if kind == "dense" else "nats",
        "status": "finished",
        "perplexity": perplexity,
        "kv_fraction": 1.0 if kind == "dense" else kv,
        "curve": curve,
    }
    return SweepRun(seed=seed, **known, **values | fields)


def test_means_of_perplexity_are_geometric_and_baselines_are_paired_by_seed():
    runs = [
        made(0.1, 0, 10.0, kv=0.1),
        made(0.1, 1, 40.0, kv=0.12),
        made(None, 0, 8.0, kind="dense"),
        made(None, 2, 1000.0, kind="dense"),  # without a partner
        made(0.2, 0, math.nan),
        made(0.2, 1, 1.0, status="failed"),
    ]
    points = pareto_of(runs)
    assert [point.is_dense for point in points] == [False, True]
    assert points[0].quality == pytest.approx(20.0)
    assert points[0].quality_range == (10.0, 40.0)
    assert points[0].kv_fraction == pytest.approx(0.11)
    assert points[0].over_dense == pytest.approx(10 / 8 - 1)
    assert points[0].over_dense_range == pytest.approx((10 / 8 - 1, 10 / 8 - 1))
    assert points[1].over_dense is None
    table = format_pareto(points, is_accuracy=False)
    assert "+25.0 %" in table
    assert "20.00" in table
    assert "+25.0 % [" not in table  # of one pair
    assert len({len(line) for line in table.splitlines()}) == 1


def test_one_seed_has_no_range_and_a_run_without_an_interval_none():
    runs = [made(0.1, 0, 10.0, kv=0.1), *(made(0.2, seed, 10.0 + seed, kv=0.2) for seed in (0, 1))]
    runs += [made(None, seed, 8.0, kind="dense") for seed in (0, 1)]
    one, two, dense = (
        [cell.strip() for cell in line.split("|")[4:-1]]
        for line in format_pareto(pareto_of(runs), False).splitlines()[2:]
    )
    assert one == ["10.00", "-", "-", "+25.0 %"]
    assert two == ["10.49", "10.00", "11.00", "+31.1 % [+25.0, +37.5]"]
    assert dense[:3] == ["8.000", "8.000", "8.000"]
    assert "[" not in format_runs(runs)
    known = dataclasses.replace(runs[0], perplexity_low=9.0, perplexity_high=11.0)
    table = format_runs([known, *runs[1:]])
    assert "perplexity [95 %]" in table
    assert (table.count("10.00 [9.000, 11.00]"), table.count("[")) == (1, 2)


def test_the_picture_holds_the_points_of_the_table(monkeypatch):
    runs = [made(b, seed, 10 + b + seed, kv=b) for b in (0.1, 0.2) for seed in (0, 1)]
    runs += [made(None, 0, 9.0, kind="dense"), made(0.3, 0, 12.0, kv=0.5, met=False)]
    drawn = []
    monkeypatch.setattr("natsjax.report.picture.as_png", lambda figure: drawn.append(figure) or b"png")
    assert draw_pareto(runs, "$a_b$") == b"png"
    axes = drawn[0].axes[0]
    points = sorted((point for point in pareto_of(runs) if not point.is_dense), key=lambda point: point.kv_fraction)
    line = next(line for line in axes.lines if len(line.get_xdata()) == len(points) == 3)
    assert list(line.get_xdata()) == [point.kv_fraction for point in points]
    assert list(line.get_ydata()) == [point.quality for point in points]
    dots = [tuple(offset) for scatter in axes.collections for offset in scatter.get_offsets() if scatter.get_label()]
    assert {(run.kv_fraction, run.perplexity) for run in runs if not run.is_dense} <= set(dots)
    assert any(list(line.get_ydata()) == pytest.approx([9.0, 9.0]) for line in axes.lines)
    low, high = axes.get_ylim()
    assert low < 9.0
    assert high > 12.0
    assert any("missed" in text.get_text() for text in drawn[0].legends[0].get_texts())


def test_a_picture_can_be_drawn_of_any_runs():
    for runs in (
        [],
        [made(0.1, 0, math.inf)],
        [made(1.0, 0, 5.0, kind="kv_penalty")],
        [made(None, 0, 5.0, kind="dense")],
    ):
        assert draw_pareto(runs, "\ud800 $x").startswith(b"\x89PNG")


def test_a_record_is_read_as_it_was_written(tmp_path):
    ended = made(0.4, 0, math.inf, workdir=tmp_path, perplexity_low=math.nan, role_bias=0.5, met=False)
    write_record(ended, tiny_config())
    known, config = read_record(tmp_path)
    assert config == tiny_config()
    assert math.isnan(known.perplexity_low)
    assert dataclasses.replace(known, perplexity_low=1.0) == dataclasses.replace(ended, perplexity_low=1.0)
    of_before = (tmp_path / "sweep.json").read_text()
    for new, old in (("kv_penalty", "kv_price"), ("role_bias", "dial"), ("curve", "front")):
        of_before = of_before.replace(f'"{new}":', f'"{old}":')
    (tmp_path / "sweep.json").write_text(of_before)
    assert repr(read_record(tmp_path)[0]) == repr(known)  # of natsjax 0.1
    for text in ('{"run": {"name": "of something else"}}', "[]", "{", '{"run": {}, "config": {"nats": 3}}'):
        (tmp_path / "sweep.json").write_text(text)
        assert read_record(tmp_path) is None


# -------------------------------------------------------------------------------------------------------------- resume


def test_the_same_sweep_again_trains_nothing_and_more_budgets_train_only_themselves(tmp_path, trained):
    def again(budgets, config=None):
        trained.clear()
        return sweep.run(config or tiny_config(), tmp_path, kv_budgets=budgets, progress=False)

    first = again([0.4])
    assert trained == NAMES[:1]
    before = metrics_of(tmp_path)
    assert again([0.4]).runs == again([0.4], tiny_config(log_every=2)).runs == first.runs
    assert trained == []
    more = again([0.6, 0.4])
    assert trained == [NAMES[1]]
    assert more.runs[1] == first.runs[0]
    assert before.items() <= metrics_of(tmp_path).items()
    assert [line["kv_budget"] for line in lines_of(tmp_path)] == [0.6, 0.4]
    assert again([0.6]).runs == more.runs[:1]  # a shorter list trains nothing and takes nothing away
    assert again([0.4, 0.6]).runs == more.runs[::-1]
    assert trained == []


def test_what_changes_results_trains_on_and_what_may_not_change_is_refused(tmp_path, trained):
    sweep.run(tiny_config(), tmp_path, kv_budgets=BUDGETS, progress=False)
    trained.clear()
    longer = sweep.run(tiny_config(num_steps=4), tmp_path, kv_budgets=BUDGETS, progress=False)
    assert trained == NAMES[:2]
    assert [run.step for run in longer.runs] == [4, 4]
    with pytest.raises(UserError, match=r"kv_budget=0.4_seed=0 .* cannot change on resume: train.batch_size: 4 -> 8"):
        sweep.run(tiny_config(num_steps=4, batch_size=8), tmp_path, kv_budgets=[0.5, 0.4], progress=False)
    assert not (tmp_path / "kv_budget=0.5_seed=0").exists()
    (tmp_path / NAMES[0] / "checkpoints/9").mkdir()  # trained further by somebody else
    trained.clear()
    sweep.run(tiny_config(num_steps=4, seed=3), tmp_path, kv_budgets=BUDGETS, seeds=[0], progress=False)
    assert trained == NAMES[:1]


class Killed(Exception):
    """In the place of kill -9: nothing of a sweep catches it."""


def test_a_sweep_killed_in_the_middle_trains_the_rest(tmp_path, trained, monkeypatch):
    run = train.run

    def killed(config, path):
        if len(trained) == 2:
            raise Killed
        return run(config, path)

    with monkeypatch.context() as patch:
        patch.setattr(train, "run", killed)
        with pytest.raises(Killed):
            sweep.run(tiny_config(), tmp_path, kv_budgets=BUDGETS, seeds=[0, 1], progress=False)
    before = metrics_of(tmp_path)
    assert trained == list(before) == NAMES[:2]
    found = sweep.run(tiny_config(), tmp_path, kv_budgets=BUDGETS, seeds=[0, 1], progress=False)
    assert trained == NAMES == [run.name for run in found.runs]
    assert before.items() <= metrics_of(tmp_path).items()


def test_sigterm_between_trainings_stops_with_a_sentence(tmp_path, monkeypatch, capfd):
    def signalled(config, workdir):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(train, "run", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        sweep.run(tiny_config(), tmp_path, kv_budgets=[0.4], progress=False)
    assert "stops with 0 of 1 runs finished" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_sweep_runs_outside_the_main_thread(tmp_path, trained):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(sweep.run(tiny_config(), tmp_path, kv_budgets=[0.4], progress=False))
    )
    thread.start()
    thread.join()
    assert results[0].runs[0].status == "finished"


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_run_that_fails_is_written_down_and_tried_again_and_the_others_go_on(tmp_path, trained, capfd):
    for _ in range(2):
        trained.clear()
        found = sweep.run(tiny_config(), tmp_path, kv_budgets=[0.99, 0.4], progress=False)
        assert [run.status for run in found.runs] == ["failed", "finished"]
        assert [line["error"] for line in lines_of(tmp_path)] == ["the loss at step 3 is nan.", None]
        assert "failed: kv_budget=0.99_seed=0: the loss at step 3 is nan." in found.summary()
        assert "kv_budget=0.99_seed=0 failed: the loss" in capfd.readouterr().err
        shutil.rmtree(tmp_path / "kv_budget=0.99_seed=0/checkpoints")
    assert trained == ["kv_budget=0.99_seed=0"]


def test_the_exit_status_says_that_a_run_failed(monkeypatch, capsys, tmp_path):
    runs = (made(0.1, 0, 5.0), dataclasses.replace(made(0.2, 0, 5.0), status="failed", error="it broke."))
    for count in (1, 2):
        monkeypatch.setattr("natsjax.sweep.sweep.run", lambda *a, n=count, **k: sweep.Sweep(runs[:n], ()))
        argv = ["sweep", "--config=configs/recall.py", f"--workdir={tmp_path}", "--kv_budgets=0.1,0.2"]
        assert sweep_command.main(argv) == count - 1
    assert "it broke." in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {}, "--kv_budgets=.* or over --kv_penalties=.*; give one of the two"),
        ({}, {"kv_budgets": [0.4], "kv_penalties": [0.1]}, "give one of the two"),
        ({}, {"kv_budgets": []}, "--kv_budgets is empty"),
        ({}, {"kv_budgets": [0.4], "seeds": []}, "--seeds is empty"),
        ({}, {"kv_budgets": [0.4, 0.4]}, r"--kv_budgets names 0\.4 more than once"),
        ({}, {"kv_budgets": [0.4], "seeds": [1, 2, 1]}, "--seeds names 1 more than once"),
        ({}, {"kv_budgets": [0.4], "seeds": [-1]}, "--seeds: -1 is no seed"),
        ({}, {"kv_budgets": [0.4, 1.5]}, r"--kv_budgets: 1\.5 is not a KV fraction"),
        ({}, {"kv_budgets": [math.nan]}, "--kv_budgets: nan is not a KV fraction"),
        ({}, {"kv_penalties": [-0.1]}, r"--kv_penalties: -0\.1 is no KV penalty"),
        ({}, {"kv_budgets": [0.4, 0.05]}, r"= 0\.05: .* no KV fraction is below 0\.\d+"),
        (
            {"model": {"layer_types": "dense"}},
            {"kv_budgets": [0.4]},
            "model.layer_types = dense: no layer learns roles",
        ),
        (
            {"model": {"layer_types": "selective"}},
            {"kv_budgets": [0.4]},
            "nothing to sweep over; train one run",
        ),
        ({"data": {"source": "corpus", "input": "nowhere"}}, {"kv_budgets": [0.4]}, "nowhere"),
        ({"eval": {"budgets": (0.01,)}}, {"kv_budgets": [0.4]}, r"= 0\.01: .* no KV fraction is below"),
        ({"train": {"init_from": "nowhere"}}, {"kv_budgets": [0.4]}, "nowhere holds no run"),
        ({"mesh": {"data": 3, "fsdp": 1}}, {"kv_budgets": [0.4]}, "3"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_training(tmp_path, monkeypatch, changes, arguments, message):
    monkeypatch.setattr(train, "run", lambda *a: pytest.fail("trained"))
    with pytest.raises(UserError, match=message) as error:
        sweep.run(tiny.config(**changes), tmp_path / "front", progress=False, **arguments)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "front").glob("*seed*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv_budgets=0.1,x"], "--kv_budgets=0.1,x: numbers separated by commas"),
        (["--kv_budgets=0.1", "--seeds=0.5"], "--seeds=0.5: integers separated by commas"),
        (["--kv_budget=0.1"], "unknown flag --kv_budget; did you mean --kv_budgets"),
        (["--kv_budgets=0.1", "--config.nats.windw=1"], "did you mean nats.window"),
    ],
)
def test_mistaken_flags(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        sweep_command.main(["sweep", "--config=configs/recall.py", f"--workdir={tmp_path}", *flags])


def test_a_folder_in_use_or_of_a_run_is_refused(tmp_path):
    with Workdir(tmp_path).lock(), pytest.raises(UserError, match="in use by another process"):
        sweep.run(tiny_config(), tmp_path, kv_budgets=[0.4], progress=False)
    Workdir(tmp_path).record(tiny_config(), "a" * 64)
    with pytest.raises(UserError, match="it holds a run; give the sweep a folder of its own"):
        sweep.run(tiny_config(), tmp_path, kv_budgets=[0.4], progress=False)


# -------------------------------------------------------------------------------------- KV penalties, and one corpus


def test_kv_penalties_instead_of_budgets(tmp_path, trained):
    found = sweep.run(tiny_config(), tmp_path, kv_penalties=[0.0, 2.5], progress=False)
    assert trained == [run.name for run in found.runs] == ["kv_penalty=0_seed=0", "kv_penalty=2.5_seed=0"]
    for run in found.runs:
        nats = Workdir(tmp_path / run.name).read_config().nats
        assert (nats.kv_penalty_mode, nats.kv_penalty) == ("fixed", run.kv_penalty)
        assert (run.role_bias, run.met, run.kv_fraction, run.perplexity) == (0.0, None, 0.7, 5.7)
    assert "KV penalty 2.5" in found.summary()


def test_dense_baselines_are_trained_whatever_is_swept(tmp_path, trained):
    budgets = sweep.run(tiny_config(), tmp_path, kv_budgets=BUDGETS, seeds=[0, 1], dense=True, progress=False)
    assert trained == [*NAMES[:2], "dense_seed=0", *NAMES[2:], "dense_seed=1"] == [run.name for run in budgets.runs]
    baseline = budgets.runs[2]
    assert (baseline.attention, baseline.kv_fraction, baseline.perplexity, baseline.role_bias, baseline.curve) == (
        "dense",
        1.0,
        4.0,
        None,
        (),
    )
    points = pareto_of(budgets.runs)
    assert [point.over_dense for point in points] == [pytest.approx(5.4 / 4 - 1), pytest.approx(5.6 / 4 - 1), None]
    trained.clear()
    sweep.run(tiny_config(), tmp_path, kv_penalties=[0.5], seeds=[1, 0], dense=True, progress=False)
    assert trained == ["kv_penalty=0.5_seed=1", "kv_penalty=0.5_seed=0"]  # the dense baselines are those of the budgets


def test_runs_share_a_corpus_that_is_prepared_once(tmp_path, monkeypatch, trained):
    texts = tmp_path / "texts"
    config = dataclasses.replace(tiny_config(), data=tiny.config(data=tiny.corpus(texts)).data)
    monkeypatch.chdir(tmp_path)
    found = sweep.run(config, "front", kv_budgets=[0.4], seeds=[0, 1], progress=False)
    folders = {Workdir(run.workdir).read_config().data.prepared_dir for run in found.runs}
    assert folders == {str(tmp_path / "front/corpus")}
    assert not list((tmp_path / "front").glob("*/corpus"))
    assert len(trained) == 2

    (texts / "another.txt").write_text("a text that came later")  # a sweep goes on with the corpus that it has
    assert sweep.run(config, "front", kv_budgets=[0.4], seeds=[0, 1], progress=False).runs == found.runs
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out_fraction=0.3))
    with pytest.raises(UserError, match=r"cannot change on resume: data.held_out_fraction: 0.2 -> 0.3"):
        sweep.run(other, "front", kv_budgets=[0.4], seeds=[0, 1], progress=False)
