"""TensorBoard event files, written in the calling thread, so that an error is raised at once.

``tensorboardX.SummaryWriter`` writes from a thread of its own. On a full disk this thread ends, and the run hangs as
soon as its queue is full. The class here writes the same records through the same library's ``RecordWriter``.
"""

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

_SECONDS_BETWEEN_FLUSHES = 30.0


class EventFile:
    """New file of scalars in a folder; TensorBoard reads all files of a folder as one run.

    Args:
      folder: created if it is missing.
      start_step: last step that is done; TensorBoard drops later steps of earlier files.

    Raises:
      OSError: the file cannot be created; ``add`` and ``flush`` raise it too, and close the file.
    """

    def __init__(self, folder: pathlib.Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard orders files by name, and reads those with "tfevents" in it.
        name = f"events.out.tfevents.{time.time_ns() // 1000:020d}.{socket.gethostname()}.{os.getpid()}"
        self._writer: RecordWriter | None = RecordWriter(str(folder / name))
        self._flushed = time.monotonic()
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._put(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds numbers of a step; they reach the file within half a minute, or at ``flush``."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._put(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Writes the buffer to the disk."""
        if self._writer is None:
            return
        try:
            self._writer.flush()
        except OSError:
            self._give_up()
            raise
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes the buffer and closes the file."""
        self.flush()
        self._give_up()

    def _put(self, event: Event) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(event.SerializeToString())
        except OSError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Closes the file without another try to write."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
