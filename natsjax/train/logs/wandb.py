"""Metrics to Weights & Biases as well (``train.wandb``); a resumed run goes on in the same W&B run."""

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
from natsjax.train.logs.metrics import scalars


def check(config: Config) -> None:
    """Before any work begins.

    Raises:
      UserError: ``train.wandb`` is set and the package is not installed.
    """
    if config.train.wandb and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb = {config.train.wandb!r} needs Weights & Biases: pip install 'natsjax[wandb]', or leave it "
            "empty."
        )


class WandbWriter:
    """Sends metrics; what goes wrong is said once, and training goes on without.

    The run's id is kept in ``wandb.json`` of the workdir. Steps that an interrupted start has sent already, beyond the
    checkpoint that this one goes on from, are not sent again: they come out the same.

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
                settings={"console": "off"},  # the live panel is nothing for a log
            )
            self._sent = int(self._run.step or 0)  # the step after the last one that is there
        except Exception as error:  # its own kinds, of the network and of the service
            self._give_up(error)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends a line of ``metrics.jsonl``; an array goes as a scalar per entry."""
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
        logger.info(f"Weights & Biases gets no more metrics of this start ({reason}); training goes on")


def _run_id(workdir: Workdir) -> str:
    """Of the run that is here, or a new one."""
    try:
        return str(json.loads(workdir.wandb_file.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        number = uuid.uuid4().hex[:12]
        write_text_file(workdir.wandb_file, json.dumps({"id": number}) + "\n")
        return number
