"""Command ``python -m natsjax.report``: draws a report again, or compares several runs."""

from collections.abc import Sequence

from natsjax.errors import UserError
from natsjax.runtime.flags import Parser, run_command, typed_text


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
      UserError: see ``rewrite`` and ``natsjax.report.compare.compare``.
    """
    parser = Parser(
        prog="python -m natsjax.report",
        description="Writes report.html and pareto.png of one run again, from what natsjax.evaluate stored in its "
        "workdir, or compares several runs in one report.html and pareto.png, and in a table. Measures nothing.",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR[,DIR…]", help="the run, or the runs to compare, as given to train.py"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="where a comparison goes (default: report/ in the current folder); one run's report is always in its "
        "workdir",
    )
    parser.add_argument(
        "--title", type=typed_text, default="", metavar="TEXT", help="of a comparison (default: the runs' names)"
    )
    parser.add_argument(
        "--reference",
        metavar="DIR",
        help="the run, one of --workdir, that the others are compared with document by document (default: the first "
        "with dense layers alone)",
    )
    flags = parser.parse_args(argv)
    workdirs = [part for part in flags.workdir.split(",") if part]
    if not workdirs:
        raise UserError(
            f"--workdir = {flags.workdir}: no folder is named; give the folder of a run, or several, with commas."
        )
    # Here: the parser is built before anything slow is imported.
    from natsjax.report.compare import compare, comparison_table
    from natsjax.report.files import rewrite

    if len(workdirs) > 1:
        paths = compare(workdirs, flags.output or "report", title=flags.title, reference=flags.reference)
        if table := comparison_table(workdirs, reference=flags.reference):
            print(f"{table}\n")
    elif given := [name for name in ("output", "title", "reference") if getattr(flags, name)]:
        flag = f"--{given[0]}"
        raise UserError(f"{flag} needs several runs in --workdir; the report of one is report/ in its workdir.")
    else:
        paths = rewrite(workdirs[0])
    for path in paths:
        print(f"wrote {path} ({max(1, round(path.stat().st_size / 1000)):,} kB)")


if __name__ == "__main__":
    run_command(main)
