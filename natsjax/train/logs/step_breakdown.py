"""Time of a step's forward pass, backward pass and optimizer, from a profile of a few steps early in a run.

The profiler of JAX has the time of each operation of the compiled step, and the program's text the function that each
operation came from: ``jvp`` is in the names of the forward pass, ``transpose`` in those of the backward pass.
"""

import collections
import glob
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax

from natsjax.errors import first_line
from natsjax.runs.metrics import STEP_PHASES
from natsjax.runtime.log import logger
from natsjax.train.step import OPTIMIZER_SCOPE

_WARM_STEPS, _STEPS, _LEAST_STEPS = 10, 3, 50
"""Steps of a start before those that are recorded, those, and the steps that a run must have left to be recorded."""


class StepBreakdown:
    """Recorder of a few steps of a run, in process 0; to be closed.

    Args:
      is_wanted: False to record nothing.
      start: last step that is done.
      num_steps: of the run; a short one is not recorded.
      program: returns the text of the compiled step.

    Attributes:
      fractions: of the time of a step, by ``STEP_PHASES``; empty until it is known.
    """

    def __init__(self, is_wanted: bool, start: int, num_steps: int, program: Callable[[], str]):
        self.fractions: dict[str, float] = {}
        self._program = program
        self._first = start + 1 + _WARM_STEPS
        self._is_wanted = is_wanted and num_steps - start >= _LEAST_STEPS
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # while steps are recorded

    def before(self, step: int, state: Any) -> None:
        """Starts before the first step to be recorded; ends, and reads the record, when the devices did the last."""
        if self._folder is not None and step == self._first + _STEPS:
            jax.block_until_ready(state)
            self._stop(self._folder)
        elif self._is_wanted and step == self._first:
            jax.block_until_ready(state)  # the steps before are no part of it
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            options.host_tracer_level = 1  # at 0 there are no operations of CPUs
            try:
                folder = tempfile.TemporaryDirectory(prefix="natsjax-profile-")
                jax.profiler.start_trace(folder.name, profiler_options=options)
                self._folder = folder
            except (RuntimeError, OSError) as error:
                self._give_up(error)

    def close(self) -> None:
        """Ends a record that is under way."""
        if self._folder is not None:
            self._stop(self._folder)

    def _stop(self, folder: "tempfile.TemporaryDirectory[str]") -> None:
        self._folder = None
        try:
            with folder:
                jax.profiler.stop_trace()
                self.fractions = fractions_by_phase(seconds_by_operation(folder.name), self._program())
        except (RuntimeError, OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_wanted = False
        logger.info(f"the time of a step's parts is not known: {first_line(error)}")


def fractions_by_phase(seconds: Mapping[str, float], program: str) -> dict[str, float]:
    """Sums seconds by operation to fractions by ``STEP_PHASES``; empty where none were recorded.

    Args:
      seconds: by the operation's name in the program.
      program: text of the compiled program.
    """
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = [^\n]*?op_name="([^"]*)"', program, re.MULTILINE)
    phases = {operation: _phase(name) for operation, name in found}
    sums = collections.defaultdict[str, float](float)
    for operation, time in seconds.items():
        sums[phases.get(operation, "other")] += time
    total = sum(sums.values())
    return {phase: sums[phase] / total for phase in STEP_PHASES} if total > 0 else {}


def _phase(op_name: str) -> str:
    if "transpose(" in op_name:
        return "backward"
    if "jvp(" in op_name:
        return "forward"
    return "optimizer" if f"/{OPTIMIZER_SCOPE}/" in op_name else "other"


def seconds_by_operation(folder: str) -> dict[str, float]:
    """Sums the seconds of each operation in a profile, without those of operations inside it.

    Times are those of the threads that started an operation: if it is divided among more, theirs are not seen.

    Raises:
      ValueError: the folder holds no profile, or several.
    """
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    nanoseconds = collections.defaultdict[str, float](float)
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        for line in plane.lines:
            found = ((event.start_ns, event.end_ns, dict(event.stats).get("hlo_op")) for event in line.events)
            events = [(start, end, str(operation)) for start, end, operation in found if operation]
            open_events: list[tuple[float, str]] = []  # (end, operation)
            for start, end, operation in sorted(events, key=lambda e: (e[0], -e[1])):
                while open_events and open_events[-1][0] <= start:
                    open_events.pop()
                if open_events:
                    nanoseconds[open_events[-1][1]] -= min(end, open_events[-1][0]) - start
                nanoseconds[operation] += end - start
                open_events.append((end, operation))
    return {operation: time / 1e9 for operation, time in nanoseconds.items()}
