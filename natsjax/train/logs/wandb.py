"""Writer of metrics to Weights & Biases (``train.wandb``); a resumed run continues the same W&B run."""

import importlib.util
import json
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from natsjax.config import Config
from natsjax.errors import UserError
from natsjax.runs.workdir import Workdir
from natsjax.runtime.files import write_text_file
from natsjax.runtime.log import logger
from natsjax.train.logs.writer import scalars


def check(config: Config) -> None:
    """Checks, before any work begins, that Weights & Biases is installed if it is asked for.

    Raises:
      UserError: ``train.wandb`` is set and the package is not installed.
    """
    if config.train.wandb and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb = {config.train.wandb!r} needs Weights & Biases: pip install 'natsjax[wandb]', or leave it "
            "empty."
        )


class WandbWriter:
    """Writer of metrics to W&B; the first error is logged, and training continues without it.

    The run's id is stored in ``wandb.json`` of the workdir. Steps that an interrupted start has sent beyond its last
    checkpoint are not sent again: they come out the same.

    Args:
      config: of the run; ``train.wandb`` names the project.
      workdir: of it.
    """

    def __init__(self, config: Config, workdir: Workdir):
        self._run: Any = None
        try:
            import wandb

            self._run = wandb.init(
                project=config.train.wandb,
                id=_run_id(workdir),
                name=workdir.path.resolve().name,
                resume="allow",
                dir=str(workdir.path),
                config=config.to_dict(),
                settings={"console": "off"},  # a log is no place for the live panel
            )
            self._sent = int(self._run.step or 0)  # the step after the last one sent
        except Exception as error:  # errors of the network, of the service and its own
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends a line of ``metrics.jsonl``; an array becomes a scalar per entry."""
        if self._run is None or step < self._sent:
            return
        try:
            warnings = ", ".join(values.get("warnings", ()))
            self._run.log({**scalars(values), "warnings": warnings}, step=step, commit=True)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Waits until everything is sent."""
        run, self._run = self._run, None
        if run is not None:
            try:
                run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.info(f"Weights & Biases gets no more metrics of this start ({reason}); training continues")


def _run_id(workdir: Workdir) -> str:
    """Reads the id of the run in the workdir, or makes a new one."""
    try:
        return str(json.loads(workdir.wandb_file.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        number = uuid.uuid4().hex[:12]
        write_text_file(workdir.wandb_file, json.dumps({"id": number}) + "\n")
        return number
