"""Tables of the docs that follow from declarations in the code, written into their pages.

    python -m benchmarks.docs_tables

A page has each table between two comments, ``<!-- table: NAME -->`` and ``<!-- end -->``. ``tests/test_monitor.py``
fails if a page and the declarations differ.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from natsjax.policies.registry import POLICIES
from natsjax.report import fields
from natsjax.report.tasks import TASK_FIELDS
from natsjax.runs.metrics import METRICS
from natsjax.train.logs.warnings import WARNINGS

DOCS = pathlib.Path(__file__).parents[1] / "docs"
_CONFIG_FIELD = re.compile(r"(?<!`)\b(?:nats|optimizer)\.\w+(?: = \w+)?")


def metrics_table() -> str:
    """Formats the metrics of ``metrics.jsonl``."""
    rows = [(f"`{one.name}`", _shape(one.shape), one.unit, one.doc, one.when) for one in METRICS.values()]
    return _table(("metric", "shape", "unit", "description", "on which lines"), rows)


def warnings_table() -> str:
    """Formats the training warnings."""
    rows = [(f"`{name}`", _marked(one.seen), _marked(one.advice)) for name, one in WARNINGS.items()]
    return _table(("warning", "condition", "advice"), rows)


def policies_table() -> str:
    """Formats the policies of ``generate --policy``."""
    modes = {True: "with masks and by decoding", False: "by decoding"}
    rows = [(f"`{one.form}`", one.label, one.summary, modes["masked" in one.modes]) for one in POLICIES.values()]
    return _table(("`--policy`", "policy", "what lives", "`evaluate` measures it"), rows)


def fields_table(declared: Mapping[str, fields.Field]) -> str:
    """Formats fields of ``results.jsonl`` or ``evaluation.json``."""
    ends = {f"{name}_{end}" for name, field in declared.items() if field.interval for end in ("low", "high")}
    rows = []
    for name, field in declared.items():
        if name not in ends:
            names = [f"`{name}`", *([f"`{name}_low`", f"`{name}_high`"] if field.interval else [])]
            rows.append((", ".join(names), _shape(field.shape), field.unit, field.doc))
    return _table(("field", "shape", "unit", "description"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "metrics": metrics_table,
    "warnings": warnings_table,
    "policies": policies_table,
    "rows": lambda: fields_table(fields.ROW_FIELDS),
    "by_position": lambda: fields_table(fields.POSITION_FIELDS),
    "by_slice": lambda: fields_table(fields.SLICE_FIELDS),
    "budget_check": lambda: fields_table(fields.BUDGET_CHECK_FIELDS),
    "samples": lambda: fields_table(fields.SAMPLE_FIELDS),
    "tasks": lambda: fields_table(TASK_FIELDS),
    "run": lambda: fields_table(fields.RUN_FIELDS),
}


def pages() -> dict[pathlib.Path, str]:
    """Renders every page with tables from the present declarations."""
    found = {}
    for name in ("generate.md", "metrics.md", "report.md", "tasks.md"):
        text = (DOCS / name).read_text(encoding="utf-8")
        pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
        found[DOCS / name] = re.sub(pattern, lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text, flags=re.DOTALL)
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shape(axes: str) -> str:
    return f"`[{axes}]`" if axes and axes not in ("names", "object", "any") else axes


def _marked(text: str) -> str:
    """Marks fields of the config as code."""
    return _CONFIG_FIELD.sub(lambda match: f"`{match[0]}`", text)


def main() -> None:
    """Writes the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
