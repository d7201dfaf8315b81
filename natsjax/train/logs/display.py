"""What a run shows of its steps: a live panel on a terminal, now and then a plain line elsewhere, or nothing."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0  # where standard error is no terminal
_SECONDS_BETWEEN_FRAMES = 0.2
_ROLES = (("GLOBAL", "█", "red"), ("LOCAL", "▓", "yellow"), ("SLIDING", "░", "cyan"))
_NARROW = 64  # columns: below it, one column of numbers
_OTHER_ROWS = 14  # of the panel and above it, besides those of layers


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is shown of a logged step.

    Attributes:
      step: its number, from 1.
      loss: nats per token, with the KV penalty.
      perplexity: of the batch.
      kv_fraction: of the batch.
      tokens_per_second: since the logged step before.
      kv_budget: that a controlled KV penalty aims at now; None: nothing is aimed at.
      kv_penalty: None: there are no roles.
      mfu: None: not known.
      roles: ``[layers, 3]``, shares of tokens, of the layers that learn roles; None: there are none.
      layers: the numbers of these layers.
      warnings: names of the active ones.
    """

    step: int
    loss: float
    perplexity: float
    kv_fraction: float
    tokens_per_second: float
    kv_budget: float | None = None
    kv_penalty: float | None = None
    mfu: float | None = None
    roles: np.ndarray | None = None
    layers: Sequence[int] = ()
    warnings: Sequence[str] = ()


class Display:
    """Shows where a run is, on standard error; to be closed.

    Lines that others print to ``sys.stderr`` meanwhile (the logger, say) come above the panel.

    Args:
      total: steps of the run.
      start: the step that it goes on from.
      shown: False shows nothing.
      title: of the panel.
      clock: seconds, never going back.
    """

    def __init__(
        self, total: int, start: int, shown: bool, title: str = "natsjax", clock: Callable[[], float] = time.monotonic
    ):
        self._total, self._start, self._title, self._clock = total, start, title, clock
        self._began, self._last = clock(), -math.inf
        self._logged: Shown | None = None
        terminal = shown and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._lines = shown and not terminal
        self._live: Live | None = None
        if terminal:  # a thread that refreshes it is not needed: steps do
            self._live = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False)
            self._live.start()

    def advance(self, step: int) -> None:
        """A step is done; cheap enough for each of them."""
        if self._live is not None and self._logged is not None and self._due(_SECONDS_BETWEEN_FRAMES, step):
            self._draw(self._live, step)

    def update(self, shown: Shown) -> None:
        """Shows a logged step."""
        self._logged = shown
        if self._live is not None and self._due(_SECONDS_BETWEEN_FRAMES, shown.step):
            self._draw(self._live, shown.step)
        elif self._lines and self._due(_SECONDS_BETWEEN_LINES, shown.step):
            left = self._seconds_left(shown.step)
            print(f"step {shown.step}/{self._total}: {_line(shown)}, {left:.0f} s left", file=sys.stderr, flush=True)

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
            live.update(
                panel(self._logged, step, self._total, self._seconds_left(step), self._title, size.width, size.height),
                refresh=True,
            )


def panel(
    shown: Shown, step: int, total: int, seconds_left: float, title: str, width: int, height: int
) -> RenderableType:
    """The panel of a terminal.

    Args:
      shown: the last logged step.
      step: the last one that is done.
      total: steps of the run.
      seconds_left: until its end.
      title: of the panel.
      width: columns of the terminal.
      height: lines of it.
    """
    inside = max(10, width - 4)
    parts: list[RenderableType] = [_progress(step, total, seconds_left, inside), _numbers(shown, inside)]
    if shown.roles is not None and len(shown.roles):
        parts += [Text(), _role_bars(shown.roles, shown.layers, inside, max(1, height - _OTHER_ROWS))]
    if shown.warnings:
        parts.append(Text(f"warnings: {', '.join(shown.warnings)}", style="bold yellow"))
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


def _numbers(shown: Shown, width: int) -> RenderableType:
    """Names and numbers, in two columns where there is room."""
    budget = "" if shown.kv_budget is None else f" of {100 * shown.kv_budget:.1f} %"
    items = [
        ("loss", f"{shown.loss:.4f}"),
        ("KV / budget" if budget else "KV", f"{100 * shown.kv_fraction:.1f} %{budget}"),
        ("perplexity", f"{shown.perplexity:.4g}"),
    ]
    if shown.kv_penalty is not None:
        items.append(("KV penalty", f"{shown.kv_penalty:.4g}"))
    items.append(("tokens/s", f"{shown.tokens_per_second:,.0f}"))
    if shown.mfu is not None:
        items.append(("MFU", f"{100 * shown.mfu:.1f} %"))
    columns = 2 if width >= _NARROW else 1
    table = Table.grid(padding=(0, 2))
    for first in range(0, len(items), columns):
        cells = []
        for name, number in items[first : first + columns]:
            cells += [_cell(name, "dim"), _cell(number.ljust(16) if columns > 1 else number, "bold")]
        table.add_row(*cells)
    return table


def _cell(text: str, style: str = "") -> Text:
    """Cut rather than wrapped where it is too long."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _role_bars(roles: np.ndarray, layers: Sequence[int], width: int, rows: int) -> RenderableType:
    """A bar for each layer; neighbours share one where there are more layers than lines."""
    legend = Text("roles  ", style="dim")
    for name, mark, color in _ROLES:
        legend.append(f"{mark} ", style=color).append(f"{name}  ")
    legend.truncate(width)
    lines = [legend]
    for chosen in np.array_split(np.arange(len(roles)), min(rows, len(roles))):
        first, last = layers[chosen[0]], layers[chosen[-1]]
        label = f"layer {first}" if first == last else f"layers {first}-{last}"
        lines.append(_bar(label.ljust(14), roles[chosen].mean(0), width))
    return Group(*lines)


def _bar(label: str, shares: np.ndarray, width: int) -> Text:
    text = Text(label, style="dim", no_wrap=True)
    cells = max(4, min(60, width - len(label)))
    edges = np.round(np.cumsum([0.0, *shares]) / max(1e-9, shares.sum()) * cells).astype(int)
    for (_, mark, color), begin, end in zip(_ROLES, edges[:-1], edges[1:], strict=True):
        text.append(mark * (end - begin), style=f"not dim {color}")
    return text


def _line(shown: Shown) -> str:
    """For a log file."""
    warnings = f", warnings: {' '.join(shown.warnings)}" if shown.warnings else ""
    return (
        f"loss {shown.loss:.3f}, perplexity {shown.perplexity:.4g}, KV {100 * shown.kv_fraction:.1f} %, "
        f"{shown.tokens_per_second:,.0f} tokens/s{warnings}"
    )


def duration(seconds: float) -> str:
    """For people.

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
