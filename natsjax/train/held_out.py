"""Evaluation on held-out text while a run trains: roles as they are served, on the contexts of the last evaluation."""

import math

from natsjax.config import Config
from natsjax.evaluate.masked import measure
from natsjax.policies.interval import FullAttention
from natsjax.policies.nats import Nats
from natsjax.runs.data import RunData
from natsjax.runs.load import LoadedRun
from natsjax.runs.workdir import HELD_OUT_LOSS, Workdir
from natsjax.train.step import Trainer, TrainState


class HeldOut:
    """Held-out loss of a run, and which step had the lowest.

    The program is that of ``natsjax.evaluate``, so that the evaluation after the last step need not compile it again.

    Args:
      config: of the run.
      workdir: of it; ``metrics.jsonl`` has the losses of earlier starts.
      data: of it.
      trainer: of it.
      start: last step that is done.

    Attributes:
      best: step of the lowest loss; None: there is none yet.

    Raises:
      UserError: there is no held-out text, or the earlier losses cannot be read.
    """

    def __init__(self, config: Config, workdir: Workdir, data: RunData, trainer: Trainer, start: int):
        self._config, self._workdir, self._data, self._trainer = config, workdir, data, trainer
        self._every = config.train.eval_every
        self._contexts = data.contexts("validation", config.eval.num_contexts) if self._every else None
        self._policy = Nats() if config.model.has_roles else FullAttention()
        losses = {step: loss for step, loss in workdir.held_out_losses().items() if step <= start}
        self._last = max(losses, default=0)
        self.best = min(losses, key=losses.__getitem__, default=None)
        self._lowest = min(losses.values(), default=math.inf)

    def is_due(self, step: int) -> bool:
        """Returns True for the steps after which the run is evaluated: multiples of ``train.eval_every``, the last."""
        return self._every > 0 and (step % self._every == 0 or step == self._config.train.num_steps)

    def measure(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluates the state after a step; returns metrics by name and updates ``best``."""
        parameters = self._trainer.served_parameters(state)
        trainer = self._trainer
        run = LoadedRun(self._workdir, self._config, trainer.structure, parameters, step, self._data, trainer.mesh)
        assert self._contexts is not None
        found = measure(run, self._contexts, self._policy)
        self._last = step
        if found.cross_entropy < self._lowest:
            self.best, self._lowest = step, found.cross_entropy
        return {
            HELD_OUT_LOSS: found.cross_entropy,
            "held_out_perplexity": found.perplexity,
            "held_out_kv_fraction": found.kv_fraction,
        }

    def should_stop(self) -> bool:
        """Returns True if as many evaluations as ``train.early_stopping_evals`` have not lowered the loss."""
        patience = self._config.train.early_stopping_evals
        return bool(patience and self.best is not None and self._last - self.best >= patience * self._every)

    def summary(self) -> str | None:
        """Returns a sentence about the lowest loss; None if it is that of the last evaluation, or nothing was."""
        if self.best is None or self.best == self._last:
            return None
        kept = self._config.checkpoint.keep_best
        how = "; --checkpoint=best names its checkpoint in evaluate, generate and export" if kept else ""
        return f"the lowest held-out loss, {self._lowest:.4f}, was that of step {self.best}{how}"
