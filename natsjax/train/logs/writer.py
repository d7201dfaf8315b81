"""Writer of a run's metrics to ``metrics.jsonl`` and TensorBoard."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from natsjax.errors import UserError, first_line
from natsjax.runs.workdir import Workdir, read_metrics
from natsjax.runtime.files import append, write_file
from natsjax.runtime.log import logger
from natsjax.train.logs.tensorboard import EventFile


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Flattens values to one float per number and per entry of a (nested) list; lists of words are dropped.

    Example:
      >>> scalars({"loss": 2.0, "live_keys": [[3.0, 4.0]], "warnings": ["no-global"]})
      {'loss': 2.0, 'live_keys/0/0': 3.0, 'live_keys/0/1': 4.0}
    """
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {
        "/".join([name, *map(str, index)]): float(entry)
        for name, array in arrays.items()
        if array.dtype.kind in "biuf"
        for index, entry in np.ndenumerate(array)
    }


class MetricsWriter:
    """Writer of metrics by step; a resumed run first drops the lines beyond its checkpoint.

    Args:
      workdir: of the run.
      start_step: last step that is done.
    """

    def __init__(self, workdir: Workdir, start_step: int):
        self._path, self._events_path = workdir.metrics_file, workdir.tensorboard
        try:
            _drop_after(self._path, start_step)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be read and written: {first_line(error)}.") from error
        try:
            self._events = EventFile(self._events_path, start_step)
        except OSError as error:
            self._file.close()
            raise _unwritten(self._events_path, error) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line of floats, (nested) lists of floats and lists of words; TensorBoard gets its ``scalars``."""
        try:
            append(self._file, (json.dumps({"step": step, **values}) + "\n").encode())
        except OSError as error:
            raise _unwritten(self._path, error) from error
        try:
            self._events.add(step, scalars(values))
        except OSError as error:
            raise _unwritten(self._events_path, error) from error

    def flush(self) -> None:
        """Flushes TensorBoard's buffer, so that a killed process loses no metric from before a checkpoint.

        Raises:
          UserError: the file cannot be written.
        """
        try:
            self._events.flush()
        except OSError as error:
            raise _unwritten(self._events_path, error) from error

    def close(self) -> None:
        """Flushes and closes the files; a failure is only logged, so that it hides no other error."""
        self._file.close()
        try:
            self._events.close()
        except OSError as error:
            logger.info(str(_unwritten(self._events_path, error)))


def _unwritten(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror}; put that right and run the same command again, which resumes "
        "from the newest checkpoint."
    )


def _drop_after(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
