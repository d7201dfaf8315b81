"""The command ``python -m natsjax.tasks``: retrieval tasks under every policy and KV budget."""

import argparse
from collections.abc import Sequence

from natsjax.runtime.cpu_devices import use_cores
from natsjax.runtime.flags import Parser, parse_budgets, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
      UserError: see ``run``.
    """
    parser = Parser(
        prog="python -m natsjax.tasks",
        description="Asks a run retrieval tasks that are made of its own held-out text, through the KV buffer of "
        "generation, under every policy and budget: needles, associative recall, phonebooks, chains of references, "
        "copying. Prints a table, and adds the rows to WORKDIR/report/tasks.jsonl and the report. What is there "
        "already is not measured again, so that an interrupted command continues.",
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="the run, as given to train.py, or an export")
    parser.add_checkpoint()
    add(
        "--tasks",
        metavar="NAME,…",
        help="needle, needle_multikey, mqar, mqar_overwritten, phonebook, tracking, copy, with numbers as in "
        "mqar:pairs=8+16,length=256 (default: all that fit; of a recall run: recall)",
    )
    add(
        "--budgets",
        metavar="F,F,…",
        help="KV fractions, above 0 and up to 1 (default: eval.budgets of the run's config, or its nats.kv_budget)",
    )
    add("--policies", metavar="NAME,…", help="policies beside full attention, as in natsjax.generate (default: all)")
    add("--num_examples", type=int, default=100, metavar="N", help="of each task (default: 100)")
    add("--seed", type=int, default=0, metavar="N", help="of the examples (default: 0)")
    add(
        "--question",
        choices=("after", "in_prompt"),
        default="after",
        help="after: it is read when keys have been dropped, so that nothing is kept for it (the default). in_prompt: "
        "it ends the prompt, by whose last queries SnapKV and Ada-SnapKV choose; the same for all others",
    )
    add("--batch_size", type=int, metavar="N", help="examples at a time (default: eval.batch_size of the run's config)")
    add(
        "--baseline_workdir",
        metavar="DIR",
        help="a dense run on the same data and tokenizer, which is asked the same",
    )
    add(
        "--prepared_dir",
        metavar="DIR",
        help="the folder of the prepared corpus (default: looked for beside the run, and where it was)",
    )
    add("--show", action="store_true", help="print an example of each task, and measure nothing")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress bars on standard error")
    flags = parser.parse_args(argv)
    budgets = None if flags.budgets is None else parse_budgets(flags.budgets)
    # Here: the parser is built before anything slow is imported.
    from natsjax.model import sharding
    from natsjax.runs.workdir import Workdir
    from natsjax.tasks.evaluation import run, show

    config = Workdir(flags.workdir).read_config()
    use_cores(lambda count: sharding.fits(config, count, trains=False))
    common = {name: getattr(flags, name) for name in ("tasks", "seed", "prepared_dir", "checkpoint")}
    if flags.show:
        print(show(flags.workdir, **common))
        return
    found = run(
        flags.workdir,
        **common,
        budgets=budgets,
        policies=None if flags.policies is None else flags.policies.split(","),
        num_examples=flags.num_examples,
        question=flags.question,
        batch_size=flags.batch_size,
        baseline_workdir=flags.baseline_workdir,
        progress=flags.progress,
    )
    print(found.summary())


if __name__ == "__main__":
    run_command(main)
