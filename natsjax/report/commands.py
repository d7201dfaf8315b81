"""Commands that lead to a report, for its page."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from natsjax.report.results import Results


def evaluate_command(workdir: str | os.PathLike[str], *flags: str) -> str:
    """Returns the command that evaluates a run, with further flags."""
    return shlex.join(["python", "-m", "natsjax.evaluate", f"--workdir={os.fspath(workdir)}", *flags])


def report_command(workdirs: Sequence[str | os.PathLike[str]], reference: str | os.PathLike[str] | None = None) -> str:
    """Returns the command that draws the report of a run again, or of several, compared with one of them."""
    flags = [f"--workdir={','.join(os.fspath(path) for path in workdirs)}"]
    if reference is not None:
        flags.append(f"--reference={os.fspath(reference)}")
    return shlex.join(["python", "-m", "natsjax.report", *flags])


def training_commands(starts: Sequence[Mapping[str, str]], name: str = "") -> list[dict[str, str]]:
    """Lists the commands that trained a run: ``title``, ``command``, ``note``.

    Args:
      starts: of the run (``training.read_starts``).
      name: of the run, if there are several.
    """
    commands = []
    for number, start in enumerate(starts):
        title = "Trained with" if number == 0 else "then with"
        commands.append(
            {
                "title": f"{name}: {title.lower()}" if name else title,
                "command": start["command"],
                "note": f"{start.get('time', '')} · {start['versions']}",
            }
        )
    return commands


def run_commands(results: Results, starts: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Lists the commands that train, evaluate, draw and use a run: ``title``, ``command``, ``note``."""
    run: Mapping[str, Any] = results.run
    workdir = run["workdir"]
    unknown = "not known, as the workdir has no starts.jsonl; the settings below are all that differs from the defaults"
    commands = training_commands(starts) or [{"title": "Trained with", "command": "", "note": unknown}]
    commands.append(
        {"title": "Evaluated with", "command": run["command"], "note": f"{run['created']} · {run['versions']}"}
    )
    commands.append({"title": "Drawn again with", "command": report_command([workdir]), "note": "measures nothing"})
    generate = ["python", "-m", "natsjax.generate", f"--workdir={workdir}", "--prompt=…"]
    if results.budget_check is not None:
        generate.append(f"--role_bias={results.budget_check['role_bias']:g}")
    note = "with the role bias of the budget" if results.budget_check is not None else ""
    commands.append({"title": "Continues text with", "command": " ".join(map(_quoted, generate)), "note": note})
    return commands


def _quoted(word: str) -> str:
    return word if word == "--prompt=…" else shlex.quote(word)
