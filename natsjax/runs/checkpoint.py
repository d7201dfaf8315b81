"""Checkpoints of a run by step, through Orbax: whole or not there, on any mesh and any number of processes.

Saving copies the state off the devices and keeps writing while training continues. What a process that was killed left
unfinished is passed over, and logged.

When a checkpoint is complete, each process adds the checksums of the files that it wrote: ``STEP/SHA256SUMS.RANK``.
They are compared before anything is read, and a checkpoint that is not what was saved is passed over like one that
cannot be read. One without them (an older natsjax wrote it, or a process was killed in the moment between) is read as
it is, and that is logged.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN, PreservationPolicy

from natsjax.data.readers.file_marks import check_folder_no_pointers
from natsjax.errors import UserError, first_line
from natsjax.runtime import checksums
from natsjax.runtime.files import write_text_file
from natsjax.runtime.log import logger

State = TypeVar("State")

SUMS_FILE = "SHA256SUMS"
_ITEM = "default"  # Orbax's name for what is saved; beside it lie files that nothing is read from
_OLD_NAMES = {"log_kv_penalty": "log_price"}  # of arrays in the checkpoints of natsjax 0.1


class Checkpoints:
    """The checkpoints in a folder; with several processes all of them see the same folder and call alike.

    Args:
      folder: made when something is saved.
      max_to_keep: how many to keep; older ones are deleted after a newer one is complete.
      keep_every: those whose step is a multiple of it are never deleted; 0: none.
      read_only: never write or delete anything.

    Attributes:
      best: step of a checkpoint that is kept too, until it is another; to be set before that one is saved.

    Raises:
      UserError: the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        max_to_keep: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.folder = folder
        self.best: int | None = None
        self._read_only = read_only
        self._saving: int | None = None
        self._failed = False
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="natsjax-checkpoint")
        self._finishing: Future[None] | None = None
        # Of a killed process: the workdir is locked, so nobody is writing them.
        unfinished = [] if read_only else self._remove_unfinished()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else self._kept(max_to_keep, keep_every),
            enable_async_checkpointing=not read_only,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
        )
        try:
            with _without_warnings() if read_only else contextlib.nullcontext():
                self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        except OSError as error:
            raise UserError(f"the folder of checkpoints {folder} cannot be made or read: {error.strerror}.") from error
        if unfinished:
            latest = self.latest_step()
            newest = "there is no complete one" if latest is None else f"the newest complete one is of step {latest}"
            logger.info(
                f"the checkpoint of step {', '.join(unfinished)} in {folder} is unfinished: a process was killed while "
                f"it saved; {newest}"
            )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in order."""
        return sorted(step for step in self._manager.all_steps() if step != self._saving)

    def save(self, step: int, state) -> None:
        """Begins to save the state, a pytree of arrays, as that of ``step``; once more is nothing.

        The arrays may be donated or deleted after this.

        Raises:
          UserError: this or the save before it cannot be written; the earlier checkpoints stay as they are.
        """
        self.wait()
        if self.latest_step() == step:
            return
        try:
            self._manager.save(step, args=ocp.args.PyTreeSave(state))
            self._saving = step
            self._finishing = self._finisher.submit(self._finish, step)
        except (OSError, ValueError, RuntimeError) as error:  # TensorStore's own errors are ValueErrors
            raise self._unwritten(step, error) from error

    def wait(self) -> None:
        """Waits for the save in hand.

        Raises:
          UserError: it cannot be written.
        """
        if self._saving is None or self._finishing is None:
            return
        step = self._saving
        try:
            self._finishing.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(step, error) from error
        self._saving = self._finishing = None

    def _finish(self, step: int) -> None:
        """Waits, in a thread of its own, until a checkpoint is complete, and adds the checksums of what is in it."""
        self._manager.wait_until_finished()
        folder = self.folder / str(step)
        rank, mine = jax.process_index(), f"{_ITEM}/ocdbt.process_"
        names = [
            name
            for name in checksums.names_below(folder, _ITEM)
            if (name.startswith(f"{mine}{rank}/") or (rank == 0 and not name.startswith(mine)))
        ]
        try:
            sums = checksums.digests(folder, names)
            write_text_file(folder / f"{SUMS_FILE}.{rank}", checksums.as_text(sums))
        except (OSError, UserError) as error:
            logger.info(f"the checkpoint of step {step} is saved, but its checksums are not: {first_line(error)}")

    def _unwritten(self, step: int, error: Exception) -> UserError:
        self._saving, self._finishing, self._failed = None, None, True
        self._manager.reload()
        self._remove_unfinished()
        last = max((saved for saved in self._manager.all_steps() if saved != step), default=None)
        usable = "there is none yet" if last is None else f"the run can resume from step {last}"
        return UserError(
            f"the checkpoint of step {step} cannot be written to {self.folder}: {_reason(error)}; {usable}."
        )

    def restore(self, abstract: State, step: int | None = None) -> State:
        """Restores the state of a step, or the newest that can be read.

        Args:
          abstract: shapes and dtypes of the state, ``jax.ShapeDtypeStruct``, with shardings where it is to be divided
            among devices (it may have been saved on others); nested dicts may leave out what is not wanted.
          step: of the checkpoint, and no other is read; None: the newest.

        Raises:
          UserError: there is no such checkpoint, or it is not one of such a state and there is no older one.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise UserError(f"{self.folder} holds no complete checkpoint.")
        if step is not None:
            if step not in steps:
                raise UserError(
                    f"{self.folder} holds no checkpoint of step {step}; there are {', '.join(map(str, steps[::-1]))}."
                )
            steps = [step]
        # Without a sharding: onto this process's device, whatever kind of device it was saved from.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), abstract)
        failures: list[UserError] = []
        for step in steps:
            try:
                unverified = self._verify(step)
                state = self._read(step, abstract)
            except Exception as error:  # Orbax raises bare exceptions for damaged files
                why = _why_unreadable(self.folder / str(step), error)
                failure = UserError(f"the checkpoint of step {step} in {self.folder} cannot be read: {why}.")
                failure.__cause__ = error
                failures.append(failure)
                continue
            for failure in failures:
                logger.info(str(failure))
            if unverified:
                logger.info(f"the checkpoint of step {step} in {self.folder} is read without a check: {unverified}")
            if failures:
                logger.info(f"going back to step {step}")
                self._set_aside([later for later in steps if later > step])
            return state
        raise failures[0]

    def _verify(self, step: int) -> str:
        """Compares the files of a checkpoint with their checksums, each process its share of them.

        Returns:
          Why some cannot be compared; empty where all were.

        Raises:
          ValueError: one is not what was saved, or the checksums themselves are damaged.
        """
        folder = self.folder / str(step)
        sums: dict[str, str] = {}
        for file in sorted(folder.glob(f"{SUMS_FILE}.*[0-9]")):
            try:
                sums |= checksums.from_text(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} is damaged; if it is all there is, delete that file to read it") from error
        names = sorted(sums)
        share = names[jax.process_index() :: jax.process_count()]
        damaged = checksums.first_damaged(folder, sums, share)
        place = -1 if damaged is None else names.index(damaged)
        if jax.process_count() > 1:  # all must come to the same step
            place = int(np.max(multihost_utils.process_allgather(np.int32(place))))
        if place >= 0:
            raise ValueError(
                f"{folder / names[place]} is not what was saved (its SHA-256 is another); if it is all there is, "
                f"delete the files {SUMS_FILE}.* in {folder} to read it all the same"
            )
        if not sums:
            return "it has no checksums, as those of an older natsjax, or of a process that was killed as it saved"
        missing = next((name for name in checksums.names_below(folder, _ITEM) if name not in sums), None)
        return "" if missing is None else f"{folder / missing} has no checksum"

    def _read(self, step: int, abstract: Any) -> Any:
        asked = _with_old_names(abstract)
        arguments = ocp.args.PyTreeRestore(
            item=asked,
            restore_args=ocp.checkpoint_utils.construct_restore_args(asked),
            partial_restore=True,
        )
        state = _without_old_names(abstract, self._manager.restore(step, args=arguments))
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
            raise ValueError("it is not one of such a state")  # a partial restore passes over what is not there
        return state

    def _set_aside(self, steps: list[int]) -> None:
        """Renames what cannot be read, so that these steps can be saved anew and nothing is lost."""
        if self._read_only:
            return
        if jax.process_index() == 0:
            for step in steps:
                names = (self.folder / f"{step}.unreadable{number}" for number in ("", *range(2, 1000)))
                (self.folder / str(step)).rename(next(name for name in names if not name.exists()))
        self._manager.reload()

    def _kept(self, last: int, every: int) -> PreservationPolicy:
        policies: list[PreservationPolicy] = [LatestN(last), _KeepBest(self)]
        if every:
            policies.append(EveryNSteps(every))
        return AnyPreservationPolicy(policies)

    def _remove_unfinished(self) -> list[str]:
        """Removes unfinished checkpoints and returns their steps in order, in process 0."""
        paths = list(self.folder.glob("*orbax-checkpoint-tmp*")) if jax.process_index() == 0 else []
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
        # By length before text: the order of numbers, and of any other name that Orbax may begin to use.
        return sorted((path.name.split(".")[0] for path in paths), key=lambda step: (len(step), step))

    def close(self) -> None:
        """Lets go of the folder, when what is being saved is there.

        Raises:
          UserError: it cannot be written, and no other call has reported it.
        """
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            try:
                self._manager.close()
            except (OSError, ValueError, RuntimeError):
                if not self._failed:
                    raise  # else a part of the save that failed, which continued


def _is_renamed(node: Any) -> bool:
    return any(name in _OLD_NAMES for name in getattr(node, "_fields", ()))


def _with_old_names(state: Any) -> Any:
    """Returns a state that also asks for renamed arrays by their old names."""

    def ask(node: Any) -> Any:
        if not _is_renamed(node):
            return node
        fields = node._asdict()
        return fields | {_OLD_NAMES[name]: fields[name] for name in fields if name in _OLD_NAMES}

    return jax.tree.map(ask, state, is_leaf=_is_renamed)


def _without_old_names(state: Any, found: Any) -> Any:
    """Returns what ``_with_old_names`` of a state found, in the form of the state."""

    def take(node: Any, values: Any) -> Any:
        if not _is_renamed(node):
            return values
        is_there = {name: not isinstance(value, jax.ShapeDtypeStruct) for name, value in values.items()}
        return type(node)(
            **{name: values[name if is_there[name] else _OLD_NAMES.get(name, name)] for name in node._fields}
        )

    return jax.tree.map(take, state, found, is_leaf=_is_renamed)


def _why_unreadable(folder: pathlib.Path, error: Exception) -> str:
    """Returns what is wrong with a checkpoint: pointers in the place of its files, or the words of a library."""
    try:
        check_folder_no_pointers(folder)
    except UserError as found:
        return str(found).removesuffix(".")
    return first_line(error)


def _reason(error: Exception) -> str:
    """Returns why something could not be written, in the words of the system where TensorStore quotes them."""
    text = str(error)
    known = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES))
    return next((word for word in known if word in text), first_line(error))


@dataclasses.dataclass
class _KeepBest(PreservationPolicy):
    """Keeps the checkpoint that is the best of ``checkpoints`` at the moment."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints, *, context):
        return [info.step == self.checkpoints.best for info in checkpoints]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences the warning of Orbax that a folder is read-only."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
