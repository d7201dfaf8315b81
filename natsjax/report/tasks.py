"""Results of retrieval tasks: their fields, the file that keeps them, the table, and the heat maps of needles.

``natsjax.tasks`` measures them. ``tasks.jsonl`` has a line for each task and setting, of one checkpoint.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from natsjax.errors import UserError, first_line
from natsjax.report.fields import Field, Row, by_name, columns, page_columns
from natsjax.report.results import restored, to_json
from natsjax.report.styles import style_of
from natsjax.report.table import format_rows, format_setting
from natsjax.runtime.files import write_file
from natsjax.runtime.tables import percent

TASKS_FILE = "tasks.jsonl"
PICTURE_FILE = "tasks.png"
_PANELS_IN_A_ROW = 4

TASK_FIELDS = by_name(
    Field("task", "name of the task, as `--tasks` takes it", column="task"),
    Field("family", "kind of task"),
    Field("parameters", "its numbers, all of them", shape="object"),
    Field("method", "policy that decided which keys live", column="method", format="method"),
    Field("setting", "numbers of the policy by name", column="setting", format="setting"),
    Field("weights", "weights that it ran on: those of the run, or of the dense baseline", column="weights", late=True),
    Field(
        "budget", "KV budget of the setting", "fraction", nullable=True, column="budget", format="percent", late=True
    ),
    Field(
        "kv_fraction",
        "keys that the queries of context, question and answer read, over those of full attention; of a policy that "
        "cuts prompts down once, `held_fraction`",
        "fraction",
        column="KV",
        format="percent",
    ),
    Field(
        "held_fraction",
        'keys that live behind the context, before the question comes (with `question` "in_prompt" behind both), over '
        "the tokens read so far, mean over layers and heads",
        "fraction",
        column="held",
        format="percent",
    ),
    Field(
        "ranked",
        "examples whose right answer is the likeliest of the choices",
        "fraction",
        interval="shown",
        column="by rank",
        format="percent",
    ),
    Field(
        "ranked_difference",
        "`ranked` less that of full attention on the same weights, paired by example",
        "fraction",
        interval="shown",
        nullable=True,
        column="rank to full",
        format="percent",
    ),
    Field(
        "generated",
        "examples whose answer greedy generation gives, token by token, with the mark that ends it",
        "fraction",
        interval="shown",
        column="generated",
        format="percent",
    ),
    Field(
        "generated_difference",
        "`generated` less that of full attention on the same weights, paired by example",
        "fraction",
        interval="shown",
        nullable=True,
        column="generated to full",
        format="percent",
    ),
    Field("chance", "`ranked` of a guess", "fraction", column="chance", format="percent", late=True),
    Field("num_examples", "examples", column="examples", format="integer", late=True),
    Field("mean_length", "tokens of context, question and right answer, mean", "tokens"),
    Field("question", '"after": it is read when keys have been dropped; "in_prompt": it is a part of the prompt'),
    Field("seed", "of the examples"),
    Field("step", "steps that the run's weights were trained for", "steps"),
    Field("ranks", "rank of the right answer by example, 1 is the best", shape="n"),
    Field("exact", "whether greedy generation gives the answer, by example", shape="n"),
    Field("depths", "where the asked fact was in the context, by example, from 0 to 1", "fraction", "n"),
    Field(
        "by_depth",
        "`depth`, `ranked`, `generated` and `examples` by asked depth; null where none is asked",
        shape="object",
        nullable=True,
    ),
    interval="95 % interval",
)
"""Fields of a line of ``tasks.jsonl``."""


def read_tasks(folder: Path) -> list[dict[str, Any]]:
    """Reads the rows of a report folder; there may be none.

    Raises:
      UserError: the file cannot be read.
    """
    path = folder / TASKS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        rows = [{name: _value(name, value) for name, value in json.loads(line).items()} for line in lines]
    except (ValueError, RecursionError, AttributeError) as error:
        raise _unreadable(path, error) from error
    for row in rows:
        if missing := [name for name in TASK_FIELDS if name not in row]:
            raise _unreadable(path, f"a line lacks {', '.join(missing)}")
    return rows


def _value(name: str, value: Any) -> Any:
    texts = TASK_FIELDS[name].format in ("text", "method") if name in TASK_FIELDS else True
    return value if texts and not isinstance(value, list | dict) else restored(value)


def _unreadable(path: Path, error: object) -> UserError:
    why = first_line(error) if isinstance(error, Exception) else error
    return UserError(
        f"{path} cannot be read ({why}); remove it, and python -m natsjax.tasks --workdir=… writes it again."
    )


def write_tasks(folder: Path, rows: Sequence[Row]) -> None:
    """Writes the rows in one atomic step.

    Raises:
      OSError: they cannot be written.
    """
    write_file(folder / TASKS_FILE, "".join(to_json(row) + "\n" for row in rows).encode())


def tasks_table(rows: Sequence[Row], layers: Sequence[str] = ()) -> str:
    """Formats rows as a table for the terminal.

    Args:
      rows: of ``tasks.jsonl``.
      layers: types of the run's layers, which name its own roles.
    """
    return format_rows(rows, columns(rows, show_accuracy=False, of=TASK_FIELDS), layers)


def for_page(rows: Sequence[Row], layers: Sequence[str] = ()) -> dict[str, Any] | None:
    """Returns what the page draws of tasks: ``rows``, ``columns`` and ``maps``; None where there are no tasks."""
    if not rows:
        return None
    left_out = ("ranks", "exact", "depths")
    return {
        "rows": [{name: value for name, value in row.items() if name not in left_out} for row in rows],
        "columns": page_columns(rows, show_accuracy=False, of=TASK_FIELDS),
        "maps": heat_maps(rows, layers),
    }


def heat_maps(rows: Sequence[Row], layers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Joins the rows of needles that differ in length alone to maps of depth and length.

    Returns:
      Dicts of ``title``, ``lengths`` and ``depths``, ascending, and ``ranked`` and ``generated``, a list by depth of
      fractions by length, None where nothing was measured.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["by_depth"] is not None:
            others = {name: value for name, value in row["parameters"].items() if name != "length"}
            # The numbers of a policy differ with the length that they were found for, but for those of no budget.
            setting = row["setting"] if row["budget"] is None else None
            key = to_json([row["family"], others, row["weights"], row["method"], row["budget"], setting])
            groups.setdefault(key, []).append(row)
    maps = []
    for members in groups.values():
        members = sorted(members, key=lambda row: row["parameters"]["length"])
        depths = sorted({depth for row in members for depth in row["by_depth"]["depth"]})
        maps.append(
            {
                "title": _map_title(members[0], layers),
                "lengths": [row["parameters"]["length"] for row in members],
                "depths": depths,
                **{
                    name: [[_at(row["by_depth"], name, depth) for row in members] for depth in depths]
                    for name in ("ranked", "generated")
                },
            }
        )
    return maps


def _at(by_depth: Mapping[str, Any], name: str, depth: float) -> float | None:
    return dict(zip(by_depth["depth"], by_depth[name], strict=True)).get(depth)


def _map_title(row: Row, layers: Sequence[str]) -> str:
    name, _, numbers = row["task"].partition(":")
    task = ":".join([name, *filter(None, [",".join(n for n in numbers.split(",") if not n.startswith("length="))])])
    parts = [style_of(row["method"], layers).label]
    parts.append(format_setting(row["setting"]) if row["budget"] is None else f"budget {percent(row['budget'])}")
    return f"{task}: {', '.join(part for part in parts if part != '-')}, {row['weights']}"


def picture(rows: Sequence[Row], layers: Sequence[str] = ()) -> bytes | None:
    """Draws the heat maps as a PNG: colored by the fraction by rank, with that of generation beside it; None: no map.

    Args:
      rows, layers: as in ``tasks_table``.
    """
    maps = heat_maps(rows, layers)
    if not maps:
        return None
    across = min(_PANELS_IN_A_ROW, len(maps))
    down = -(-len(maps) // across)
    figure = Figure(figsize=(3.4 * across + 0.8, 2.9 * down), dpi=150, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    image = None
    for place, axes in enumerate(panels.flat):
        if place >= len(maps):
            axes.set_axis_off()
            continue
        one = maps[place]
        shown = [[float("nan") if value is None else value for value in line] for line in one["ranked"]]
        image = axes.imshow(shown, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(one["title"].replace(", ", "\n", 1), fontsize=7, loc="left", parse_math=False, wrap=True)
        axes.set_xticks(range(len(one["lengths"])), labels=[f"{length:,}" for length in one["lengths"]], fontsize=7)
        axes.set_yticks(range(len(one["depths"])), labels=[f"{depth:.2g}" for depth in one["depths"]], fontsize=7)
        axes.set_xlabel("length, tokens", fontsize=7)
        axes.set_ylabel("depth", fontsize=7)
        for y, line in enumerate(one["ranked"]):
            for x, value in enumerate(line):
                if value is not None:
                    text = f"{100 * value:.0f} / {100 * one['generated'][y][x]:.0f}"
                    ink = "black" if value > 0.5 else "white"
                    axes.text(x, y, text, ha="center", va="center", fontsize=6, color=ink)
    assert image is not None
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.6)
    bar.set_label("right by rank (in the cells: by rank / generated, %)", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
