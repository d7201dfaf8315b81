"""The command ``python -m natsjax.evaluate``: perplexity against KV budget, and the report."""

import argparse
from collections.abc import Sequence

from natsjax.evaluate import DEFAULT_CHUNK, DEFAULT_RARE
from natsjax.policies.registry import POLICIES
from natsjax.runtime.cpu_devices import use_cores
from natsjax.runtime.flags import Parser, parse_budgets, run_command


def _parser() -> Parser:
    """Declares the flags."""
    decoded_only = ", ".join(entry.label for entry in POLICIES.values() if "masked" not in entry.modes)
    parser = Parser(
        prog="python -m natsjax.evaluate",
        description="Measures perplexity against KV budget on held-out text and writes WORKDIR/report/: results.jsonl "
        "(one line a setting), pareto.png (the curve), report.html (curve, table, and text colored by role) and "
        "evaluation.json (all of it, for natsjax.report).",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the run to evaluate, as given to train.py, or an export"
    )
    parser.add_checkpoint()
    parser.add_argument(
        "--budgets",
        metavar="F,F,…",
        help="KV fractions to measure at, above 0 and up to 1 (default: eval.budgets of the run's config, or a range "
        "around its nats.kv_budget)",
    )
    parser.add_argument(
        "--baseline_workdir",
        metavar="DIR",
        help="a dense run on the same data and tokenizer, measured beside a run of another kind",
    )
    parser.add_argument(
        "--num_contexts",
        type=int,
        metavar="N",
        help="the most held-out contexts to read (default: eval.num_contexts of the run's config)",
    )
    parser.add_argument(
        "--prepared_dir",
        metavar="DIR",
        help="the folder of the prepared corpus (default: looked for beside the run, and where it was)",
    )
    parser.add_argument(
        "--mode",
        choices=("masked", "decode"),
        default="masked",
        help="masked: whole contexts with masks (the default). decode: chunk by chunk through a KV buffer, which "
        f"measures {decoded_only} too",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=DEFAULT_CHUNK,
        metavar="N",
        help="tokens that --mode=decode reads at once, and the most behind a prompt that SnapKV cut down (%(default)s)",
    )
    parser.add_argument(
        "--slices",
        type=lambda text: text.split(","),
        metavar="KIND,…",
        help="measure every setting on slices of the tokens, too: bigrams (rare bigrams that the document had before, "
        "by distance), long_context (tokens that the dense baseline gains on with its long context)",
    )
    parser.add_argument(
        "--rare",
        type=int,
        default=DEFAULT_RARE,
        metavar="N",
        help="most occurrences in the training text of a bigram that is rare (%(default)s)",
    )
    parser.add_argument(
        "--short_context",
        type=int,
        metavar="N",
        help="tokens of the short context that the long one is compared with (default: an eighth of the context "
        "length)",
    )
    parser.add_argument(
        "--window_workdir",
        metavar="DIR",
        help='a run with trained windows ("sliding" layers) on the same data, which slices are compared with',
    )
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress bars on standard error"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
      UserError: see ``run``.
    """
    flags = _parser().parse_args(argv)
    budgets = None if flags.budgets is None else parse_budgets(flags.budgets)
    # Here: the parser is built before anything slow is imported.
    from natsjax.evaluate.evaluation import run
    from natsjax.evaluate.slices import SliceSettings
    from natsjax.model import sharding
    from natsjax.runs.workdir import Workdir

    slices = None if flags.slices is None else SliceSettings(flags.slices, flags.rare, flags.short_context)
    config = Workdir(flags.workdir).read_config()
    use_cores(lambda count: sharding.fits(config, count, trains=False))
    evaluation = run(
        flags.workdir,
        budgets=budgets,
        baseline_workdir=flags.baseline_workdir,
        prepared_dir=flags.prepared_dir,
        checkpoint=flags.checkpoint,
        progress=flags.progress,
        mode=flags.mode,
        chunk=flags.chunk,
        num_contexts=flags.num_contexts,
        slices=slices,
        window_workdir=flags.window_workdir,
    )
    print(evaluation.summary())


if __name__ == "__main__":
    run_command(main)
