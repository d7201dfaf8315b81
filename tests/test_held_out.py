"""Held-out loss while a run trains: metrics, best checkpoint, early stopping, saving by time, --checkpoint."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

import natsjax
from natsjax import evaluate, generate, train
from natsjax.errors import UserError
from natsjax.evaluate.masked import measure
from natsjax.export.folder import export
from natsjax.report.training import read_training
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.workdir import HELD_OUT_LOSS, Workdir
from natsjax.train import held_out


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def config_of(num_steps=6, **groups):
    own = {"train": {"num_steps": num_steps, "eval_every": 2, "log_every": 3}, "eval": {"budgets": (0.5,)}}
    own["checkpoint"] = {"save_every": 100, "max_to_keep": 1}
    for group, values in groups.items():
        own.setdefault(group, {}).update(values)
    return tiny.config(**own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 6 steps, evaluated every 2, whose held-out loss was lowest at step 4."""
    folder = tmp_path_factory.mktemp("held_out") / "run"
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, [4.0, 3.0, 3.5])
        train.run(config_of(train={"log_every": 1}), folder)
    return folder


def scripted(patch, losses):
    """Lets evaluations between steps find these losses, one after the other."""
    given = iter(losses)

    def found(run, contexts, policy):
        result = measure(run, contexts, policy)
        factor = next(given) / result.cross_entropy
        sums = dataclasses.replace(result.documents, nll=factor * result.documents.nll)
        return dataclasses.replace(result, documents=sums)

    patch.setattr(held_out, "measure", found)


def test_the_metrics_are_those_of_the_evaluation(tmp_path):
    evaluation = train.run(config_of(num_steps=4), tmp_path)
    lines = {line["step"]: line for line in lines_of(tmp_path)}
    assert [step for step, line in lines.items() if "held_out_cross_entropy" in line] == [2, 4]
    assert sorted(lines) == [2, 3, 4]  # log_every = 3, the steps evaluated, the last
    (row,) = [row for row in evaluation.rows if row["setting"] == {"role_bias": 0.0}]
    assert lines[4]["held_out_perplexity"] == pytest.approx(row["perplexity"], rel=1e-9)
    assert lines[4]["held_out_kv_fraction"] == pytest.approx(row["kv_fraction"], rel=1e-9)
    assert lines[4]["held_out_cross_entropy"] == pytest.approx(np.log(row["perplexity"]), rel=1e-9)
    training = read_training(Workdir(tmp_path))
    assert training is not None
    assert [value is not None for value in training["curves"]["held_out_perplexity"]] == [True, False, True]
    assert "held-out perplexity" in [chart["title"] for chart in training["charts"]]


def test_no_evaluation_is_thinned_out_of_the_reports_curve(tmp_path):
    evaluated = {HELD_OUT_LOSS: 2.2, "held_out_perplexity": 9.0}
    lines = [{"step": step, "loss": 2.0} | (evaluated if step % 97 == 0 else {}) for step in range(1, 4001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = read_training(Workdir(tmp_path))
    assert training is not None
    found = [s for s, v in zip(training["steps"], training["curves"]["held_out_perplexity"], strict=True) if v]
    assert found == list(range(97, 4001, 97))
    assert len(training["steps"]) <= 400 + len(found)


def test_evaluating_changes_nothing_of_the_training(folder, tmp_path):
    train.run(config_of(train={"log_every": 1, "eval_every": 0}), tmp_path)
    ours, others = ([line["loss"] for line in lines_of(path)] for path in (folder, tmp_path))
    assert ours == others


def test_a_dense_run_is_evaluated_too(tmp_path):
    train.run(config_of(num_steps=2, model={"layer_types": "dense"}), tmp_path)
    assert lines_of(tmp_path)[-1]["held_out_kv_fraction"] == 1


def test_the_best_checkpoint_is_kept_beside_the_newest(folder):
    assert Checkpoints(folder / "checkpoints", read_only=True).steps() == [4, 6]
    assert natsjax.load(folder).step == 6
    assert natsjax.load(folder, checkpoint="best").step == 4
    assert natsjax.load(folder, checkpoint=4).step == 4
    assert natsjax.load(folder, checkpoint="6").step == 6


def test_commands_take_a_checkpoint(folder, tmp_path):
    assert export(folder, tmp_path / "best", checkpoint="best").step == 4
    rows = evaluate.run(folder, checkpoint="best", progress=False).rows
    exported = evaluate.run(tmp_path / "best", progress=False).rows
    assert [row["perplexity"] for row in rows] == [row["perplexity"] for row in exported]
    ids = [[0, 1, 2]]
    best, newest = (
        generate.run(folder, ids, max_new_tokens=3, checkpoint=checkpoint).batches[0].logprobs
        for checkpoint in ("best", "newest")
    )
    assert not np.allclose(best[0], newest[0])


def test_the_report_names_the_checkpoint_in_its_command(folder):
    evaluation = evaluate.run(folder, checkpoint="best", progress=False)
    assert "--checkpoint=best" in evaluation.run_info["command"]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [(5, r"holds no checkpoint of step 5; there are 4, 6\."), ("last", "newest, best or a step was expected")],
)
def test_a_checkpoint_that_is_not_there_is_one_sentence(folder, checkpoint, message):
    with pytest.raises(UserError, match=message):
        natsjax.load(folder, checkpoint=checkpoint)


def test_best_needs_a_held_out_loss(tmp_path):
    run = tmp_path / "run"
    tiny.make_run(run, config_of(train={"eval_every": 0}))
    with pytest.raises(UserError, match=r"--checkpoint=best: .* has no held-out loss by step; train with train.eval"):
        natsjax.load(run, checkpoint="best")


def test_training_stops_early_and_does_not_go_on_when_run_again(tmp_path, monkeypatch, caplog):
    config = config_of(num_steps=20, train={"early_stopping_evals": 2})
    scripted(monkeypatch, [4.0, 3.0, 3.5, 3.2])
    train.run(config, tmp_path)
    assert natsjax.load(tmp_path).step == 8
    assert natsjax.load(tmp_path, checkpoint="best").step == 4
    assert "stopping at step 8: 2 evaluations did not lower the held-out loss" in caplog.text
    assert "the lowest held-out loss, 3.0000, was that of step 4; --checkpoint=best" in caplog.text
    train.run(config, tmp_path)
    assert natsjax.load(tmp_path).step == 8
    scripted(monkeypatch, [3.1, 2.0])  # more patience: it goes on, and knows what came before
    longer = dataclasses.replace(config.train, early_stopping_evals=3, num_steps=12)
    train.run(dataclasses.replace(config, train=longer), tmp_path)
    assert natsjax.load(tmp_path).step == 10


def test_a_resumed_run_still_knows_its_best_checkpoint(tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, 4.0, 3.5, 3.4])
    train.run(config_of(num_steps=4), tmp_path)
    train.run(config_of(num_steps=8), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [2, 8]


def test_without_keep_best_only_the_newest_stay(tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, 4.0])
    train.run(config_of(num_steps=4, checkpoint={"keep_best": False}), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4]


def test_minutes_save_too(tmp_path, monkeypatch):
    """Every step takes a minute by this clock."""
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("natsjax.train.loop.time.monotonic", lambda: next(clock))
    config = config_of(
        train={"eval_every": 0, "log_every": 1}, checkpoint={"save_every_minutes": 2.5, "max_to_keep": 9}
    )
    train.run(config, tmp_path)
    found = Checkpoints(tmp_path / "checkpoints", read_only=True).steps()
    assert found[-1] == 6
    assert 1 < len(found) < 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"eval_every": 0, "early_stopping_evals": 2}}, "train.eval_every is 0"),
        (
            {"train": {"early_stopping_evals": 2}, "checkpoint": {"keep_best": False}},
            "it needs checkpoint.keep_best = True",
        ),
    ],
)
def test_early_stopping_needs_what_it_stops_by(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(**changes)
