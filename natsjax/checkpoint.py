"""Checkpoints of a run by step, through Orbax: each appears whole or not at all."""

import pathlib
import shutil
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from natsjax.errors import UserError

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
        if not read_only:
            self._remove_unfinished()  # of a killed process: the workdir is locked, so nobody is writing them
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
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore's own errors are ValueErrors
            self._remove_unfinished()
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
        # Onto this process's device, whatever kind of device it was saved from.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises bare exceptions for damaged files
            reason = str(error).split("\n")[0]
            raise UserError(f"the checkpoint of step {step} in {self.folder} cannot be read: {reason}.") from error

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()
