"""The folder of a run: its config, its lock, and the place of everything else in it.

config.json          the resolved config
data.json            what the data was, so that a resumed run cannot continue with other data
starts.jsonl         the command of every start, when it was, and the versions
log.txt              the lines that training printed, with their times
metrics.jsonl        a line of metrics every ``train.log_every`` steps
tensorboard/         the same for TensorBoard
wandb.json, trackio.json, mlflow.json
                     which run of a service ``train.wandb`` and its like send them to; in wandb/ what waits to be sent
profile/             what the JAX profiler recorded (``train.profile``)
checkpoints/         Orbax checkpoints by step
corpus/              the prepared corpus, unless ``data.prepared_dir`` names another place
compiled/            compiled steps, where ``train.compilation_cache`` puts them here
report/              what evaluation wrote

An export (``natsjax.export``) is such a folder too, without what belongs to training: ``config.json``, ``data.json``,
``checkpoints/`` with the parameters of one step, and

export.json          where it came from; what tells an export from a run
tokenizer/           the tokenizer, unless the data is the recall task
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from natsjax.config import FORMER_DEFAULTS, Config
from natsjax.config_fields import check_file_name, differences, real_path
from natsjax.data.readers.file_marks import check_file_no_pointer
from natsjax.errors import UserError, first_line
from natsjax.runtime import checksums
from natsjax.runtime.files import InUseError, advice, lock, make_folder, reason, try_files, write_text_file

EXPORT_FORMAT = 1
HELD_OUT_LOSS = "held_out_cross_entropy"
"""Metric of the steps after which the run was evaluated (``train.eval_every``)."""

_OLD_METRICS = {"kv_price": "kv_penalty"}  # of natsjax 0.1
_TRIED = "tried"


class Workdir:
    """Paths of a run, and its config.

    Args:
      path: the folder; it need not be there yet.

    Raises:
      UserError: its name is no UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str]):
        check_file_name(path)
        self.path = pathlib.Path(os.path.expanduser(path))
        self.config_file = self.path / "config.json"
        self.data_file = self.path / "data.json"
        self.starts_file = self.path / "starts.jsonl"
        self.log_file = self.path / "log.txt"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.checkpoints = self.path / "checkpoints"
        self.corpus = self.path / "corpus"
        self.compiled = self.path / "compiled"
        self.report = self.path / "report"
        self.export_file = self.path / "export.json"
        self.tokenizer = self.path / "tokenizer"

    @property
    def is_export(self) -> bool:
        """True if the folder is an export: parameters to be read and not trained on."""
        return os.path.exists(self.export_file)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the workdir for this process; the system lets go of it however the process ends.

        Raises:
          UserError: another process holds it, or it cannot be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                check_file_name(real_path(self.path))
                make_folder(self.path)
                stack.enter_context(lock(self.path / ".lock"))
            except InUseError as error:
                holder = f" (pid {error})" if str(error) else ""
                raise UserError(
                    f"--workdir={self.path} is in use by another process{holder}; wait for it or choose another folder."
                ) from error
            except OSError as error:
                raise self._unusable(error) from error
            yield

    def try_writing(self, *names: str) -> None:
        """Tries, before long work, what will be written in the end; hold the lock.

        Args:
          names: of folders and files in the workdir, folders with a slash behind them.

        Raises:
          UserError: one of them cannot be written.
        """
        try:
            for name in names:
                path = self.path / name
                if path.is_symlink() and name.endswith("/"):
                    make_folder(path)  # where it leads: not all that writes there makes it
                try_files([path / _TRIED if name.endswith("/") else path])
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        where = str(error.filename or self.path).removesuffix(f"/{_TRIED}")
        what = "" if where == str(self.path) else f"{where}: "
        better = advice(error, may_move=not self.has_checkpoint())  # a run that has begun stays where it is
        return UserError(f"--workdir={self.path} cannot be used: {what}{reason(error)}; {better}.")

    def read_config(self) -> Config:
        """Reads the config that the run was started with.

        Raises:
          UserError: there is no run here, or its config cannot be read.
        """
        try:
            values = json.loads(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} holds no run: there is no {self.config_file.name} in it.") from error
        except (OSError, ValueError, RecursionError) as error:
            check_file_no_pointer(self.config_file)
            raise UserError(f"{self.config_file} cannot be read: {first_line(error)}.") from error
        try:
            return Config.from_stored(values)
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from error

    def with_own_defaults(self, config: Config) -> Config:
        """Returns a config with the former defaults that the run here began with, if it has a checkpoint.

        Who asks for today's default of such a field has asked for nothing: its default has changed since the run began.

        Raises:
          UserError: the config of the run cannot be read.
        """
        earlier, today = self.earlier_config(), Config()
        if earlier is None:
            return config
        for path, former in FORMER_DEFAULTS.items():
            group, name = path.split(".")
            asked, stored, default = (getattr(getattr(x, group), name) for x in (config, earlier, today))
            if asked == default and stored == former:
                fields = dataclasses.replace(getattr(config, group), **{name: former})
                config = dataclasses.replace(config, **{group: fields})
        return config

    def compare_config(self, config: Config) -> list[str]:
        """Compares a config with that of the run that is here, if it has come as far as a checkpoint.

        Returns:
          Lines ``field: old -> new`` of what a resumed run does differently.

        Raises:
          UserError: a field differs that may not change on resume.
        """
        earlier = self.earlier_config()
        if earlier is None:
            return []
        config = self.with_own_defaults(config)
        if config.train.num_tokens or config.train.num_epochs:  # these say the length: the steps follow from them
            train = dataclasses.replace(config.train, num_steps=earlier.train.num_steps)
            config = dataclasses.replace(config, train=train)
        changed, forbidden = differences(earlier, config)
        if forbidden:
            raise UserError(
                f"{self.path} holds a run with another config, and these fields cannot change on resume: "
                f"{'; '.join(forbidden)}; use the old values or another --workdir."
            )
        return changed

    def earlier_config(self) -> Config | None:
        """Reads the config of the run that is here, if that has a checkpoint.

        Raises:
          UserError: it cannot be read.
        """
        return self.read_config() if os.path.exists(self.config_file) and self.has_checkpoint() else None

    def has_checkpoint(self) -> bool:
        """Returns whether a run could be resumed; not where the folder cannot be read."""
        try:
            return any(name.isdigit() for name in os.listdir(self.checkpoints))
        except OSError:
            return False

    def held_out_losses(self) -> dict[int, float]:
        """Reads the held-out loss of each step that was evaluated while the run trained, nats per token.

        Raises:
          UserError: the metrics cannot be read.
        """
        try:
            lines = read_metrics(self.metrics_file)
            return {int(line["step"]): float(line[HELD_OUT_LOSS]) for line in lines if HELD_OUT_LOSS in line}
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise UserError(f"{self.metrics_file} cannot be read: {first_line(error)}.") from error

    def best_step(self) -> int | None:
        """Returns the step of the lowest held-out loss; None if none was evaluated.

        Raises:
          UserError: the metrics cannot be read.
        """
        losses = self.held_out_losses()
        return min(losses, key=losses.__getitem__, default=None)

    def compare_data(self, fingerprint: str, *, to_train: bool = True) -> None:
        """Compares the data with what the run that is here was started with.

        Args:
          fingerprint: of the data.
          to_train: True where the run trains on it; False: it is read, and the data may be named.

        Raises:
          UserError: it is other data.
        """
        if not self.data_file.exists() or not self.has_checkpoint():
            return
        known = self.read_data_fingerprint()
        if known != fingerprint:
            instead = f"(fingerprint {fingerprint[:12]}… instead of {known[:12]}…)"
            if self.is_export or not to_train:
                raise UserError(
                    f"the corpus is not the one that {self.path} was trained on {instead}; give that one as "
                    "--prepared_dir."
                )
            raise UserError(
                f"the data is not what {self.path} was started with {instead}; restore it or use another --workdir."
            )

    def known_fingerprint(self) -> str | None:
        """Reads the fingerprint of the data; returns None where it is not stored.

        Raises:
          UserError: it cannot be read.
        """
        return self.read_data_fingerprint() if os.path.exists(self.data_file) else None

    def read_data_fingerprint(self) -> str:
        """Reads the fingerprint of the data.

        Raises:
          UserError: it is not written here.
        """
        try:
            return str(json.loads(self.data_file.read_text(encoding="utf-8"))["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            check_file_no_pointer(self.data_file)
            raise UserError(f"{self.data_file} cannot be read: {first_line(error)}.") from error

    def read_export(self) -> dict[str, Any]:
        """Reads ``export.json`` (``natsjax.export`` has the fields).

        Raises:
          UserError: it cannot be read, another natsjax wrote it, or a file is not what was exported.
        """
        try:
            values = json.loads(self.export_file.read_text(encoding="utf-8"))
            version = values["format_version"]
            sums = dict(values.get("sha256", {}))  # absent in older exports
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            check_file_no_pointer(self.export_file)
            raise UserError(f"{self.export_file} cannot be read: {first_line(error)}.") from error
        if version != EXPORT_FORMAT:
            raise UserError(
                f"{self.export_file} has format_version {version!r}, and this natsjax reads version {EXPORT_FORMAT}."
            )
        if (damaged := checksums.first_damaged(self.path, sums, sums)) is not None:
            raise UserError(
                f"{self.path / damaged} is not what was exported (it is missing, or its SHA-256 is another); export "
                "the run again."
            )
        return values

    def refuse_export(self) -> None:
        """Refuses to train in an export.

        Raises:
          UserError: the folder is an export.
        """
        if self.is_export:
            raise UserError(
                f"--workdir={self.path} is an export, parameters that no training can resume from; name it as "
                "train.init_from, with a new --workdir."
            )

    def record(self, config: Config, fingerprint: str) -> None:
        """Writes what the run is: called when all checks are passed, so that a mistake leaves no trace."""
        write_text_file(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")
        write_text_file(self.data_file, json.dumps({"fingerprint": fingerprint}) + "\n")

    def record_start(self) -> None:
        """Appends the command that this process was started with, for the report.

        Raises:
          UserError: the file cannot be written.
        """
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "time": now, "versions": versions()}
        try:
            with open(self.starts_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.starts_file} cannot be written: {error.strerror}.") from error


def natsjax_version() -> str:
    """Returns the version of the installed package."""
    return _version("natsjax")


def versions() -> str:
    """Returns the versions that numbers depend on."""
    return f"natsjax {natsjax_version()}, jax {_version('jax')}, Python {platform.python_version()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the lines of ``metrics.jsonl``, under today's names, without a last line that is unfinished."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{_OLD_METRICS.get(name, name): value for name, value in line.items()} for line in found]
