"""Services that metrics are sent to have one run of each workdir, whatever stops it, and never end it.

trackio and MLflow are the real ones, whose files are read with sqlite3; of Weights & Biases there is a stand-in.
"""

import contextlib
import json
import pathlib
import shutil
import sqlite3
import sys
import types

import numpy as np
import pytest
import tiny
from monitors import go, make

from natsjax import train
from natsjax.errors import UserError
from natsjax.runs.workdir import read_metrics
from natsjax.runtime import distributed
from natsjax.train.logs import trackers

SERVICES = [service.name for service in trackers.SERVICES]


class Wandb(types.ModuleType):
    """Stand-in that keeps runs by id, as the service does."""

    def __init__(self):
        super().__init__("wandb")
        self.rows, self.configs, self.starts, self.broken = {}, {}, [], False

    def init(self, **options):
        if self.broken:
            raise ConnectionError("no network")
        self.starts.append(options)
        rows = self.rows.setdefault(options["id"], {})
        self.configs[options["id"]] = options["config"]
        return types.SimpleNamespace(
            step=max(rows, default=-1) + 1, log=lambda values, step, commit: self._log(rows, values, step), finish=int
        )

    def _log(self, rows, values, step):
        if self.broken:
            raise ConnectionError("no network")
        assert step > max(rows, default=-1)
        rows[step] = values

    def runs(self):
        return self.rows

    def config_of(self, run):
        return self.configs[run]


class Trackio:
    """Files of trackio."""

    def __init__(self, folder):
        self.file = folder / "mine.db"

    def runs(self):
        found = {}
        for run, step, values in _rows(self.file, "SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            assert step not in found.setdefault(run, {})
            found[run][step] = json.loads(values)
        return found

    def config_of(self, run):
        (row,) = _rows(self.file, "SELECT config FROM configs WHERE run_name = ?", run)
        return {name: value for name, value in json.loads(row[0]).items() if not name.startswith("_")}


class Mlflow:
    """The database of MLflow."""

    def __init__(self, file):
        self.file = file

    def runs(self):
        found = {}
        for run, step, name, value in _rows(self.file, "SELECT run_uuid, step, key, value FROM metrics ORDER BY step"):
            row = found.setdefault(run, {}).setdefault(step, {})
            assert name not in row
            row[name] = value
        return found

    def config_of(self, run):
        return dict(_rows(self.file, "SELECT key, value FROM params WHERE run_uuid = ?", run))

    def tags_of(self, run):
        return dict(_rows(self.file, "SELECT key, value FROM tags WHERE run_uuid = ?", run))

    def statuses(self):
        return dict(_rows(self.file, "SELECT run_uuid, status FROM runs"))


def _rows(file, query, *values):
    with contextlib.closing(sqlite3.connect(file)) as database:
        return database.execute(query, values).fetchall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="module")
def database(folder):
    """A database of MLflow without runs, which takes it seconds to make."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'natsjax[mlflow]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/empty.db").search_experiments()
    return folder / "empty.db"


def open_service(name, folder, monkeypatch, request):
    if name == "wandb":
        fake = Wandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake
    if name == "trackio":
        # Where it stores runs is asked once, when it is imported.
        (folder / "trackio").mkdir(exist_ok=True)
        monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        pytest.importorskip("trackio", reason="trackio is not installed: pip install 'natsjax[trackio]'")
        (folder / "trackio/mine.db").unlink(missing_ok=True)
        return Trackio(folder / "trackio")
    shutil.copy(request.getfixturevalue("database"), folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    return Mlflow(folder / "mlflow.db")


def run(tmp_path, config, start, end):
    watch = make(tmp_path, config, start)
    go(watch, config, range(start + 1, end + 1))
    watch.close()


@pytest.mark.parametrize("name", SERVICES)
def test_a_resumed_run_continues_the_same_run(name, folder, tmp_path, monkeypatch, request, capfd):
    service = open_service(name, folder, monkeypatch, request)
    config = tiny.config(train={name: "mine"})
    run(tmp_path / "a/run", config, 0, 7)
    run(tmp_path / "a/run", config, 5, 9)
    ((first, rows),) = service.runs().items()
    assert list(rows) == list(range(1, 10))
    written = read_metrics(tmp_path / "a/run/metrics.jsonl")
    joint = "." if name == "mlflow" else "/"  # between a number and its parts
    for line in written[:5]:  # the later ones were written again, with rates of the second start
        row = rows[line["step"]]
        assert row["loss"] == line["loss"]
        assert row["live_keys/1/0"] == line["live_keys"][1][0]
        assert row[f"gradient_norm{joint}mlp"] == line["gradient_norm/mlp"]
        assert all(isinstance(value, float | str) for value in row.values())
        numbers = sum(np.size(value) for field, value in line.items() if field not in ("step", "warnings"))
        assert len(row) == numbers + (name != "mlflow")  # the warnings
    asked = config.to_dict()
    if name == "mlflow":
        assert service.config_of(first)["model.num_layers"] == str(asked["model"]["num_layers"])
        assert service.config_of(first)["data.recall.num_pairs"] == str(asked["data"]["recall"]["num_pairs"])
        assert service.statuses() == {first: "FINISHED"}
    else:
        assert json.dumps(service.config_of(first)) == json.dumps(asked)
    run(tmp_path / "b/run", config, 0, 2)  # another folder of that name is another run
    assert [len(rows) for rows in service.runs().values()] == [9, 2]
    assert capfd.readouterr().out == ""


def test_warnings_are_sent(folder, tmp_path, monkeypatch, request):
    fields = {"unended_locals": np.ones((2, 2))}
    for name in ("wandb", "trackio"):
        service = open_service(name, folder, monkeypatch, request)
        config = tiny.config(train={name: "mine"})
        watch = make(tmp_path / name, config)
        go(watch, config, range(1, 5), **fields)
        watch.close()
        (rows,) = service.runs().values()
        assert ["endless-local" in row["warnings"] for row in rows.values()] == [False, False, True, True]


def test_warnings_are_a_tag_of_mlflow(folder, tmp_path, monkeypatch, request):
    service = open_service("mlflow", folder, monkeypatch, request)
    config = tiny.config(train={"mlflow": "mine"})
    watch = make(tmp_path / "run", config)
    go(watch, config, range(1, 5), unended_locals=np.ones((2, 2)))
    watch.close()
    (number,) = service.runs()
    assert "endless-local" in service.tags_of(number)["warnings"]
    run(tmp_path / "run", config, 4, 6)  # without the reason for it
    assert service.tags_of(number)["warnings"] == ""


@pytest.mark.parametrize("broken_from", [0, 3])
def test_an_error_of_wandb_is_logged_once(broken_from, folder, tmp_path, monkeypatch, request, capfd):
    service = open_service("wandb", folder, monkeypatch, request)
    config = tiny.config(train={"wandb": "mine"})
    service.broken = broken_from == 0
    watch = make(tmp_path, config)
    for step in range(1, 7):
        service.broken |= step == broken_from
        go(watch, config, [step])
    watch.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    assert capfd.readouterr().err.count("gets no more metrics of this start (no network); training continues\n") == 1


def test_an_error_of_mlflow_is_logged_once_and_does_not_hold_training_up(folder, tmp_path, monkeypatch, request, capfd):
    service = open_service("mlflow", folder, monkeypatch, request)
    import mlflow

    sends, config = mlflow.MlflowClient.log_batch, tiny.config(train={"mlflow": "mine"})

    def fail(client, run_id, metrics=(), params=()):
        if any(metric.step == 3 for metric in metrics):
            raise mlflow.MlflowException("the disk\nis full")
        return sends(client, run_id, metrics=metrics, params=params)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail)
    run(tmp_path, config, 0, 6)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    logged = capfd.readouterr().err
    assert logged.count("MLflow gets no more metrics of this start (the disk); training continues\n") == 1
    (rows,) = service.runs().values()
    assert list(rows) == [1, 2]


def test_a_service_that_refuses_the_run_is_logged_once(folder, tmp_path, monkeypatch, request, capfd):
    open_service("trackio", folder, monkeypatch, request)
    config = tiny.config(train={"trackio": "registry-mine"})
    run(tmp_path, config, 0, 3)
    assert capfd.readouterr().err.count("trackio gets no more metrics of this start (") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_mlflows_own_file_is_found_from_any_folder(folder, tmp_path, monkeypatch, request):
    open_service("mlflow", folder, monkeypatch, request)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(request.getfixturevalue("database"), tmp_path / name / "mlflow.db")
    config = tiny.config(train={"mlflow": "mine"})
    monkeypatch.chdir(tmp_path / "a")
    run(tmp_path / "run", config, 0, 3)
    monkeypatch.chdir(tmp_path / "b")
    run(tmp_path / "run", config, 2, 5)
    (rows,) = Mlflow(tmp_path / "a/mlflow.db").runs().values()
    assert list(rows) == [1, 2, 3, 4, 5]
    assert not Mlflow(tmp_path / "b/mlflow.db").runs()
    known = json.loads((tmp_path / "run/mlflow.json").read_text())
    assert known["tracking_uri"] == f"sqlite:///{pathlib.Path(tmp_path).resolve()}/a/mlflow.db"
    # A server is no part of the workdir, and a run that was deleted there is begun anew.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/b/mlflow.db")
    run(tmp_path / "run", config, 4, 6)
    ((number, rows),) = Mlflow(tmp_path / "b/mlflow.db").runs().items()
    assert list(rows) == [5, 6]
    assert json.loads((tmp_path / "run/mlflow.json").read_text()) == {"id": number}


def test_a_damaged_record_begins_no_second_run(folder, tmp_path, monkeypatch, request, capfd):
    service = open_service("wandb", folder, monkeypatch, request)
    config = tiny.config(train={"wandb": "mine"})
    run(tmp_path / "run", config, 0, 2)
    (tmp_path / "run/wandb.json").write_text('["id"]')
    run(tmp_path / "run", config, 2, 4)
    assert "wandb.json holds no record of a run; remove it, and the next start begins" in capfd.readouterr().err
    assert [list(rows) for rows in service.runs().values()] == [[1, 2]]


def test_other_processes_send_nothing(folder, tmp_path, monkeypatch, request):
    service = open_service("wandb", folder, monkeypatch, request)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    config = tiny.config(train={"wandb": "mine"})
    run(tmp_path / "run", config, 0, 2)
    assert not service.starts


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_an_error_before_anything_begins(name, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"^train.{name} = 'mine': .* not installed; pip install 'natsjax\[{name}\]', or"
    ):
        train.run(tiny.config(train={name: "mine"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
