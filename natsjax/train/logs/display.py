"""Progress of a run on standard error: a live panel on a terminal, plain lines elsewhere.

``natsjax.runs.metrics`` declares which metrics are shown, and how.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from natsjax.config import Config
from natsjax.runs.metrics import METRICS, format_number, panel_metrics
from natsjax.runtime.progress import on_terminal

_SECONDS_BETWEEN_LINES = 10.0  # if standard error is no terminal
_SECONDS_BETWEEN_FRAMES = 0.2
_MARKS = (("█", "red"), ("▓", "yellow"), ("░", "cyan"), ("▒", "green"), ("▚", "magenta"), ("▞", "blue"))
"""How bars show the roles, by number; with more than four windows the marks of SLIDING roles come again."""
_NARROW = 64  # columns: below it, one column of numbers
_OTHER_ROWS = 15  # of the panel and above it, besides those of layers


class Display:
    """Progress of a run on standard error; to be closed.

    Lines that others print to ``sys.stderr`` meanwhile appear above the panel.

    Args:
      config: of the run.
      start: last step that is done.
      shown: False shows nothing.
      title: of the panel.
      clock: seconds, never going back.
    """

    def __init__(
        self,
        config: Config,
        start: int,
        shown: bool,
        title: str = "natsjax",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._start, self._title, self._clock = config, start, title, clock
        self._total = config.train.num_steps
        self._began, self._last = clock(), -math.inf
        self._logged: Mapping[str, Any] | None = None
        terminal = shown and on_terminal()
        self._lines = shown and not terminal
        self._live: Live | None = None
        if terminal:  # a thread that refreshes it is not needed: steps do
            self._live = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False)
            self._live.start()

    def advance(self, step: int) -> None:
        """Updates the progress bar after a step; cheap enough for every step."""
        if self._live is not None and self._logged is not None and self._due(_SECONDS_BETWEEN_FRAMES, step):
            self._draw(self._live, step)

    def update(self, step: int, line: Mapping[str, Any]) -> None:
        """Shows the metrics of a logged step, as in ``metrics.jsonl``."""
        self._logged = line
        if self._live is not None and self._due(_SECONDS_BETWEEN_FRAMES, step):
            self._draw(self._live, step)
        elif self._lines and self._due(_SECONDS_BETWEEN_LINES, step):
            left = self._seconds_left(step)
            print(f"step {step}/{self._total}: {_plain(line)}, {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the last panel as it is, and the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _due(self, seconds: float, step: int) -> bool:
        now = self._clock()
        if now - self._last <= seconds and step != self._total:
            return False
        self._last = now
        return True

    def _seconds_left(self, step: int) -> float:
        return (self._clock() - self._began) / max(1, step - self._start) * (self._total - step)

    def _draw(self, live: Live, step: int) -> None:
        if self._logged is not None:
            size = live.console.size
            left = self._seconds_left(step)
            shown = panel(self._config, self._logged, step, left, self._title, size.width, size.height)
            live.update(shown, refresh=True)


def panel(
    config: Config, line: Mapping[str, Any], step: int, seconds_left: float, title: str, width: int, height: int
) -> RenderableType:
    """Renders the panel of a terminal.

    Args:
      config: of the run.
      line: metrics of the last logged step.
      step: the last one that is done.
      seconds_left: until the end of the run.
      title: of the panel.
      width: columns of the terminal.
      height: lines of it.
    """
    inside = max(10, width - 4)
    parts: list[RenderableType] = [
        _progress(step, config.train.num_steps, seconds_left, inside),
        _numbers(config, line, inside),
    ]
    layers = np.flatnonzero(config.model.is_role_layer()).tolist()
    if layers:
        roles = np.mean(line["role_fractions"], axis=1)[layers]
        parts += [Text(), _role_bars(roles, config.nats.role_names, layers, inside, max(1, height - _OTHER_ROWS))]
    if line.get("warnings"):
        parts.append(Text(f"warnings: {', '.join(line['warnings'])}", style="bold yellow"))
    return Panel(Group(*parts), title=Text(title, overflow="ellipsis", no_wrap=True), title_align="left", width=width)


def _progress(step: int, total: int, seconds_left: float, width: int) -> RenderableType:
    text = f"step {step:,}/{total:,}"
    left = f"{duration(seconds_left)} left" if step < total else "done"
    bar = width - len(text) - len(left) - 4
    row = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [_cell(text, "bold"), *([_cell(left)] if bar >= -2 else [])]
    if bar >= 8:
        cells.insert(1, ProgressBar(total=total, completed=step, width=bar))
    row.add_row(*cells)
    return row


def _numbers(config: Config, line: Mapping[str, Any], width: int) -> RenderableType:
    """Lays out names and numbers, in two columns if there is room."""
    items = [
        (metric.panel[0], format_number(metric.panel[1], line[metric.name]))
        for metric in panel_metrics(config)
        if metric.panel is not None and metric.name in line
    ]
    columns = 2 if width >= _NARROW else 1
    table = Table.grid(padding=(0, 2))
    for first in range(0, len(items), columns):
        cells = []
        for name, number in items[first : first + columns]:
            cells += [_cell(name, "dim"), _cell(number.ljust(16) if columns > 1 else number, "bold")]
        table.add_row(*cells)
    return table


def _cell(text: str, style: str = "") -> Text:
    """Makes a text that is cut rather than wrapped if it is too long."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _role_bars(roles: np.ndarray, names: Sequence[str], layers: Sequence[int], width: int, rows: int) -> RenderableType:
    """Draws a bar for each layer; neighbors share one if there are more layers than lines."""
    legend = Text("roles  ", style="dim")
    for name, (mark, color) in zip(names, _marks(len(names)), strict=True):
        legend.append(f"{mark} ", style=color).append(f"{name}  ")
    legend.truncate(width)
    lines = [legend]
    for chosen in np.array_split(np.arange(len(roles)), min(rows, len(roles))):
        first, last = layers[chosen[0]], layers[chosen[-1]]
        label = f"layer {first}" if first == last else f"layers {first}-{last}"
        lines.append(_bar(label.ljust(14), roles[chosen].mean(0), width))
    return Group(*lines)


def _marks(count: int) -> list[tuple[str, str]]:
    """Returns mark and color of so many roles."""
    first, sliding = _MARKS[:2], _MARKS[2:]
    return [*first, *itertools.islice(itertools.cycle(sliding), count - len(first))]


def _bar(label: str, fractions: np.ndarray, width: int) -> Text:
    text = Text(label, style="dim", no_wrap=True)
    cells = max(4, min(60, width - len(label)))
    edges = np.round(np.cumsum([0.0, *fractions]) / max(1e-9, fractions.sum()) * cells).astype(int)
    for (mark, color), begin, end in zip(_marks(len(fractions)), edges[:-1], edges[1:], strict=True):
        text.append(mark * (end - begin), style=f"not dim {color}")
    return text


def _plain(line: Mapping[str, Any]) -> str:
    """Joins the metrics of a plain line, for a log file."""
    found = [metric for metric in METRICS.values() if metric.line and metric.name in line]
    words = [format_number(metric.line, line[metric.name]) for metric in found]
    if line.get("warnings"):
        words.append(f"warnings: {' '.join(line['warnings'])}")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Formats a number of seconds for people.

    Example:
      >>> duration(7384)
      '2 h 3 min'
    """
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
