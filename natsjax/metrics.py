"""Where a run's numbers go: ``metrics.jsonl``, TensorBoard, and a line that moves on the terminal."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from natsjax.errors import UserError
from natsjax.workdir import Workdir

_SECONDS_BETWEEN_LINES = 10.0  # where standard error is no terminal


def perplexity(cross_entropy: float) -> float:
    """``exp`` of nats per token, infinite where it overflows."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


class MetricsWriter:
    """Writes metrics by step; a resumed run first drops what an interrupted one wrote beyond its checkpoint.

    Args:
      workdir: of the run.
      start_step: the step that the run goes on from.
    """

    def __init__(self, workdir: Workdir, start_step: int):
        self._path = workdir.metrics_file
        try:
            _drop_after(self._path, start_step)
            self._file = open(self._path, "a")  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be read and written: {error}.") from error
        self._tensorboard = SummaryWriter(str(workdir.tensorboard), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes floats and (nested) lists of floats; a list goes to TensorBoard as a scalar per entry."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}.") from error
        for name, value in values.items():
            for index, entry in np.ndenumerate(np.asarray(value)):
                path = "/".join([name, *map(str, index)]) if index else name
                self._tensorboard.add_scalar(path, float(entry), step)

    def flush(self) -> None:
        """Writes out what TensorBoard buffers, so that a killed process loses nothing from before a checkpoint."""
        self._tensorboard.flush()

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that a killed process left unfinished is passed over."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)


class Progress:
    """Step, loss, perplexity, KV fraction, tokens/s and time left: a bar on a terminal, now and then a line elsewhere.

    Args:
      total: steps of the run.
      start: the step that it goes on from.
      shown: False shows nothing.
    """

    def __init__(self, total: int, start: int, shown: bool):
        self._total, self._start, self._began = total, start, time.monotonic()
        self._step = start
        self._bar = (
            tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
            if (shown and sys.stderr.isatty())
            else None
        )
        self._lines = shown and self._bar is None
        self._last_line = -math.inf

    def update(
        self, step: int, loss: float, cross_entropy: float, kv_fraction: float, tokens_per_second: float
    ) -> None:
        """Shows where the run is."""
        text = (
            f"loss {loss:.3f}, perplexity {perplexity(cross_entropy):.4g}, KV {100 * kv_fraction:.1f} %, "
            f"{tokens_per_second:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._step)
        elif self._lines and (time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = time.monotonic()
            spent = self._last_line - self._began
            left = spent / max(1, step - self._start) * (self._total - step)
            print(f"step {step}/{self._total}: {text}, {left:.0f} s left", file=sys.stderr, flush=True)
        self._step = step

    def close(self) -> None:
        """Leaves the line as it is."""
        if self._bar is not None:
            self._bar.close()
