"""Services that metrics are also sent to: Weights & Biases, trackio, MLflow; a resumed run goes on in the same one."""

import concurrent.futures
import contextlib
import importlib.util
import json
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from natsjax.config import Config
from natsjax.errors import UserError, first_line
from natsjax.runs.workdir import Workdir
from natsjax.runtime import watchdog
from natsjax.runtime.files import write_text_file
from natsjax.runtime.log import logger
from natsjax.train.logs.writer import scalars


class TrackedRun(Protocol):
    """A run of a service, which begins, or continues, when it is made; any method may raise any error.

    Attributes:
      record: what finds it again, for the workdir.
      next_step: step after the last one that it has.
    """

    record: Mapping[str, str]
    next_step: int

    def log(self, step: int, values: dict[str, float], warnings: str) -> None:
        """Sends the numbers of a step, by metric, and the names of its warnings, separated by commas."""

    def finish(self) -> None:
        """Waits until everything is sent."""


class _WandbRun(TrackedRun):
    def __init__(self, config: Config, workdir: Workdir, known: Mapping[str, str]):
        import wandb

        self.record = {"id": known.get("id") or _new_id()}
        self._run: Any = wandb.init(
            project=config.train.wandb,
            id=self.record["id"],
            name=_name(workdir),
            resume="allow",
            dir=str(workdir.path),
            config=config.to_dict(),
            settings={"console": "off"},  # a log is no place for the live panel
        )
        self.next_step = int(self._run.step or 0)

    def log(self, step: int, values: dict[str, float], warnings: str) -> None:
        self._run.log({**values, "warnings": warnings}, step=step, commit=True)

    def finish(self) -> None:
        self._run.finish()


class _TrackioRun(TrackedRun):
    def __init__(self, config: Config, workdir: Workdir, known: Mapping[str, str]):
        import trackio

        # It finds a run by its name alone, which two folders may share.
        self.record = {"name": known.get("name") or f"{_name(workdir)}-{_new_id()}"}
        self._trackio: Any = trackio
        with contextlib.redirect_stdout(sys.stderr):
            self._run: Any = trackio.init(
                project=config.train.trackio,
                name=self.record["name"],
                resume="allow",
                config=config.to_dict(),
                embed=False,
            )
        self.next_step = int(self._run._next_step)  # it has no other name

    def log(self, step: int, values: dict[str, float], warnings: str) -> None:
        self._run.log({**values, "warnings": warnings}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()  # that of the run leaves it to be finished once more at exit


class _MlflowRun(TrackedRun):
    """A run of MLflow, which answers requests one by one: a thread waits for it, and training does not."""

    def __init__(self, config: Config, workdir: Workdir, known: Mapping[str, str]):
        import mlflow

        # What the user has set goes first, and may hold a password: only MLflow's own file is remembered.
        place, own = mlflow.get_tracking_uri(), {}
        if not mlflow.is_tracking_uri_set():
            place = known.get("tracking_uri", place)
            own = {"tracking_uri": place}
        self._mlflow: Any = mlflow
        self._client = mlflow.MlflowClient(tracking_uri=place)
        run = self._resumed(known.get("id")) or self._begun(config, workdir)
        self._id = str(run.info.run_id)
        self.record = {"id": self._id} | own
        steps = [metric.step for metric in self._client.get_metric_history(self._id, "loss")]
        self.next_step = max(steps, default=-1) + 1
        self._warnings = run.data.tags.get("warnings", "")
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._error: Exception | None = None

    def _resumed(self, run_id: str | None) -> Any | None:
        """Reopens a run; returns None if there is none yet, or it is not there any more."""
        if run_id is None:
            return None
        try:
            run = self._client.get_run(run_id)
            if run.info.lifecycle_stage == "active":
                self._client.update_run(run_id, status="RUNNING")
                return run
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        logger.info(f"MLflow has no run {run_id} any more; a new one begins")
        return None

    def _begun(self, config: Config, workdir: Workdir) -> Any:
        """Begins a run, with the fields of the config as its parameters."""
        from flax.traverse_util import flatten_dict

        name = config.train.mlflow
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run = self._client.create_run(number, run_name=_name(workdir))
        fields = flatten_dict(config.to_dict(), sep=".")
        parameters = [self._mlflow.entities.Param(name, str(value)) for name, value in fields.items()]
        for part in _parts(parameters, 100):  # what MLflow takes at once
            self._client.log_batch(run.info.run_id, params=part)
        return run

    def log(self, step: int, values: dict[str, float], warnings: str) -> None:
        self._check()
        self._thread.submit(self._send_or_note, step, values, warnings, round(1000 * time.time()))

    def _check(self) -> None:
        """Raises what went wrong in the thread."""
        if self._error is not None:
            raise self._error

    def _send_or_note(self, *line: Any) -> None:
        if self._error is None:  # nothing is sent behind an error
            try:
                self._send(*line)
            except Exception as error:
                self._error = error

    def _send(self, step: int, values: dict[str, float], warnings: str, milliseconds: int) -> None:
        metric = self._mlflow.entities.Metric
        metrics = [metric(_mlflow_name(name, values), value, milliseconds, step) for name, value in values.items()]
        for part in _parts(metrics, 1000):  # what MLflow takes at once
            self._client.log_batch(self._id, metrics=part)
        if warnings != self._warnings:  # a metric is a number
            self._client.set_tag(self._id, "warnings", warnings)
            self._warnings = warnings

    def finish(self) -> None:
        self._thread.shutdown()  # when all is sent
        self._check()
        self._client.set_terminated(self._id)


def _mlflow_name(name: str, values: Mapping[str, float]) -> str:
    """Returns a metric's name, with its parts behind a dot where folders would hold a file and a folder of one name."""
    return name.replace("/", ".") if name.partition("/")[0] in values else name


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _name(workdir: Workdir) -> str:
    return workdir.path.resolve().name


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


class Service(NamedTuple):
    """A service that ``train.NAME`` switches on.

    Attributes:
      name: of the field, the package, the extra of natsjax, and the file in the workdir.
      label: for messages.
      start: begins a run, or continues the one whose ``record`` is given.
    """

    name: str
    label: str
    start: Callable[[Config, Workdir, Mapping[str, str]], TrackedRun]


SERVICES = (
    Service("wandb", "Weights & Biases", _WandbRun),
    Service("trackio", "trackio", _TrackioRun),
    Service("mlflow", "MLflow", _MlflowRun),
)


def chosen_services(config: Config) -> list[Service]:
    """Lists the services that the config switches on."""
    return [service for service in SERVICES if getattr(config.train, service.name)]


def check(config: Config) -> None:
    """Checks, before any work begins, that the services that are switched on are installed.

    Raises:
      UserError: one is not.
    """
    for name, label, _ in chosen_services(config):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.{name} = {getattr(config.train, name)!r}: {label} is not installed; pip install "
                f"'natsjax[{name}]', or leave the field empty."
            )


class Tracker:
    """Writer of metrics to a service; the first error is logged, and training continues without it.

    What finds the run there again is stored in ``NAME.json`` of the workdir. Steps that an interrupted start has sent
    beyond its last checkpoint are not sent again: they come out the same.

    Args:
      service: where they are sent.
      config: of the run.
      workdir: of the run.
    """

    def __init__(self, service: Service, config: Config, workdir: Workdir):
        self._label = service.label
        self._run: TrackedRun | None = None
        file = workdir.path / f"{service.name}.json"
        try:
            known = _read_record(file)
            with watchdog.phase(f"starting {service.label}"):
                self._run = service.start(config, workdir, known)
            if self._run.record != known:
                write_text_file(file, json.dumps(self._run.record) + "\n")
        except Exception as error:  # of the network, the service, its package
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends a line of ``metrics.jsonl``; an array becomes a scalar per entry."""
        if self._run is None or step < self._run.next_step:
            return
        try:
            self._run.log(step, scalars(values), ", ".join(values.get("warnings", ())))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Waits until everything is sent."""
        run, self._run = self._run, None
        if run is not None:
            try:
                with watchdog.phase(f"sending the rest to {self._label}"):
                    run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logger.info(f"{self._label} gets no more metrics of this start ({first_line(error)}); training continues")


def _read_record(file: pathlib.Path) -> dict[str, str]:
    """Reads what finds the run again; {} where there is none yet.

    Raises:
      UserError: the file holds something else.
    """
    if not file.exists():
        return {}
    try:
        return {str(name): str(value) for name, value in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} holds no record of a run; remove it, and the next start begins a new run.") from error
