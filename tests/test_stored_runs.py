"""Runs and exports of earlier versions still load, resume and evaluate: ``tests/data/before_renames``.

The folders were written by commit 3623b1a, whose config fields, metrics and rows had other names; ``expected.json`` is
what that commit itself made of two more steps.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

import natsjax
from natsjax import evaluate, report, train
from natsjax.runs.workdir import Workdir

STORED = pathlib.Path(__file__).parent / "data/before_renames"
EXPECTED = json.loads((STORED / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
    """A copy: what is stored stays as it is."""
    return pathlib.Path(shutil.copytree(STORED, tmp_path / "stored"))


def check_rows(rows):
    assert len(rows) == len(EXPECTED["resumed_rows"])
    for row, expected in zip(rows, EXPECTED["resumed_rows"], strict=True):
        assert list(row["setting"].values()) == pytest.approx(list(expected["setting"].values()), abs=2e-3)
        np.testing.assert_allclose(row["kv_fraction"], expected["kv_fraction"], rtol=1e-5)
        np.testing.assert_allclose(row["perplexity"], expected["perplexity"], rtol=1e-4)


def test_an_earlier_run_resumes_as_the_version_that_began_it(folder):
    config = Workdir(folder / "run").read_config()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=8))
    evaluation = train.run(longer, folder / "run")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["step"]: line for line in lines}
    for expected in EXPECTED["resumed_metrics"]:
        for name in ("loss", "cross_entropy", "kv_fraction", "learning_rate"):
            np.testing.assert_allclose(found[expected["step"]][name], expected[name], rtol=1e-5)
    check_rows(evaluation.rows)


@pytest.mark.parametrize("name", ["run", "export"])
def test_an_earlier_folder_loads_and_evaluates(folder, name):
    loaded = natsjax.load(folder / name)
    assert loaded.step == 6
    stored = [json.loads(line) for line in (STORED / "run/report/results.jsonl").read_text().splitlines()]
    evaluation = evaluate.run(folder / name, loaded=loaded, progress=False)
    for row, expected in zip(evaluation.rows, stored, strict=True):
        np.testing.assert_allclose(row["kv_fraction"], expected["kv_fraction"], rtol=1e-5)
        np.testing.assert_allclose(row["perplexity"], expected["perplexity"], rtol=1e-4)


def test_an_earlier_report_is_drawn_again(folder):
    paths = report.rewrite(folder / "run")
    assert [path.name for path in paths] == ["pareto.png", "report.html"]
