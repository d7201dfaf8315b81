"""Training of a run, read from its folder: curves, marks on them, commands, settings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from natsjax.config import Config
from natsjax.errors import UserError, first_line
from natsjax.runs.metrics import curves
from natsjax.runs.workdir import HELD_OUT_LOSS, Workdir, read_metrics

_MAX_POINTS = 400  # of a curve: more than a screen shows
_MAX_MARKS = 200


def read_training(workdir: Workdir) -> dict[str, Any] | None:
    """Reads the training curves from ``metrics.jsonl``, thinned to 400 points, and to 400 of those evaluated.

    Returns:
      ``steps`` (ints), ``curves`` (name to values, one per step; a metric that is always 0 or absent is left out),
      ``charts`` (how to draw each of them, ``Metric.chart``) and ``marks`` (``step``, ``kind`` and ``text`` of skipped
      steps and warnings); None if nothing was logged.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        lines = read_metrics(workdir.metrics_file)
        steps = [line["step"] for line in lines]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{workdir.metrics_file} cannot be read: {first_line(error)}.") from error
    if not lines:
        return None
    evaluated = [number for number, line in enumerate(lines) if HELD_OUT_LOSS in line]
    chosen = sorted({*_thinned(range(len(lines))), *_thinned(evaluated)})
    values = {metric.name: [lines[i].get(metric.name) for i in chosen] for metric in curves()}
    return {
        "steps": [steps[i] for i in chosen],
        "curves": {name: curve for name, curve in values.items() if any(curve)},
        "charts": [metric.chart for metric in curves() if any(values[metric.name])],
        "marks": list(_marks(lines))[:_MAX_MARKS],
    }


def _thinned(numbers: Sequence[int]) -> list[int]:
    """Chooses at most ``_MAX_POINTS`` numbers, evenly, the last among them."""
    count = min(len(numbers), _MAX_POINTS)
    return [numbers[(n + 1) * len(numbers) // count - 1] for n in range(count)]


def _marks(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Finds skipped steps (``skipped_steps`` counts them), and each of the ``warnings`` when it first comes."""
    skipped, known = 0, set()
    for line in lines:
        if (now := int(line.get("skipped_steps") or 0)) > skipped:
            many = f"{now - skipped} steps" if now > skipped + 1 else "a step"
            yield {"step": line["step"], "kind": "skipped", "text": f"{many} skipped as a loss spike"}
        skipped = now
        for warning in line.get("warnings") or ():
            if warning not in known:
                known.add(warning)
                yield {"step": line["step"], "kind": "warning", "text": str(warning)}


def read_starts(workdir: Workdir) -> list[dict[str, str]]:
    """Reads how the run was started, each command once: ``command``, ``time`` and ``versions``."""
    if not workdir.starts_file.exists():
        return []
    found: dict[tuple[str, str], dict[str, str]] = {}
    for text in workdir.starts_file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = {name: str(value) for name, value in json.loads(text).items()}
            found.setdefault((line["command"], line["versions"]), line)
        except (ValueError, RecursionError, KeyError, AttributeError):
            continue  # a process was killed while it wrote; the line is a note for people
    return list(found.values())


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Maps the dotted names of a nested config's fields to their values."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def changed_settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists ``field``, ``value`` and ``default`` of the fields that differ from the defaults."""
    defaults = flat_settings(Config().to_dict())
    return [
        {"field": field, "value": value, "default": defaults.get(field)}
        for field, value in flat_settings(settings).items()
        if value != defaults.get(field)
    ]
