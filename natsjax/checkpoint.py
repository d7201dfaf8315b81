"""Checkpoints of a run by step, through Orbax: each appears whole or not at all."""

import logging
import pathlib
from typing import TypeVar

import orbax.checkpoint as ocp

from natsjax.errors import UserError

# Orbax reports every step of a save at INFO and, without a cluster, missing coordination at WARNING.
logging.getLogger("absl").setLevel(logging.ERROR)

State = TypeVar("State")


class Checkpoints:
    """The checkpoints in a folder.

    Args:
      folder: made when something is saved.
      keep_last: how many to keep; older ones are deleted after a newer one is complete.
      read_only: never write or delete anything.
    """

    def __init__(self, folder: pathlib.Path, *, keep_last: int = 1, read_only: bool = False):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep_last,
            enable_async_checkpointing=False,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state) -> None:
        """Saves the state, a pytree of arrays, as that of ``step``; once more is nothing.

        Raises:
          UserError: it cannot be written; the earlier checkpoints stay as they are.
        """
        last = self.latest_step()
        if last == step:
            return
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state))
        except OSError as error:
            usable = "there is none yet" if last is None else f"the run can go on from step {last}"
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {error}; {usable}."
            ) from error

    def restore(self, abstract: State, step: int | None = None) -> State:
        """The state saved as that of ``step`` (the newest, if None).

        Args:
          abstract: shapes and dtypes of the state, ``jax.ShapeDtypeStruct``.
          step: which one.

        Raises:
          UserError: there is no checkpoint, or it is not one of such a state.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.folder} holds no complete checkpoint.")
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"the checkpoint of step {step} in {self.folder} cannot be read: {reason}.") from error

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()
