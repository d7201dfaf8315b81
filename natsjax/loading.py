"""A trained run, ready to be used."""

import dataclasses
import os
from typing import Any

from flax import nnx

from natsjax.checkpoint import Checkpoints
from natsjax.config import Config
from natsjax.errors import UserError
from natsjax.model import Transformer
from natsjax.run_data import RunData, open_data
from natsjax.train_step import Trainer
from natsjax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What a workdir holds.

    Attributes:
      workdir: its folder.
      config: of the run.
      structure: with ``parameters``, what ``nnx.merge`` makes the model of.
      parameters: nested dict of float32 arrays.
      step: optimizer steps that the parameters have had.
      data: what it learned from; ``data.vocabulary`` is the tokenizer.
    """

    workdir: Workdir
    config: Config
    structure: nnx.GraphDef
    parameters: Any
    step: int
    data: RunData

    @property
    def model(self) -> Transformer:
        """The model, ``model(Inputs(…))``."""
        return nnx.merge(self.structure, self.parameters)

    @property
    def tokenizer(self):
        """The tokenizer (or the recall task's vocabulary)."""
        return self.data.vocabulary


def load(path: str | os.PathLike[str], *, progress: bool = False) -> LoadedRun:
    """The newest checkpoint of a run.

    Args:
      path: the workdir.
      progress: show progress where the corpus has to be prepared again.

    Raises:
      UserError: there is no run, no checkpoint, or the data is gone.

    Example:
      >>> run = natsjax.load("runs/quickstart")
      >>> tokens = run.tokenizer.encode("Fellow citizens")
    """
    workdir = Workdir(path)
    config = workdir.read_config()
    if not workdir.has_checkpoint():
        raise UserError(f"{workdir.path} holds no checkpoint yet: train it with train.py first.")
    data = open_data(config, workdir, progress=progress)
    workdir.compare_data(data.fingerprint)
    trainer = Trainer(config, data.vocabulary.vocab_size)
    checkpoints = Checkpoints(workdir.checkpoints, read_only=True)
    try:
        state = checkpoints.restore(trainer.abstract_state())
    finally:
        checkpoints.close()
    return LoadedRun(workdir, config, trainer.structure, state.parameters, int(state.step), data)
