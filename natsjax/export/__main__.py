"""The command ``python -m natsjax.export``: parameters in a folder of their own."""

from collections.abc import Sequence

from natsjax.export import DTYPES, FORMATS
from natsjax.runtime.flags import Parser, run_command
from natsjax.runtime.log import logger


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
      UserError: see ``export``.
    """
    parser = Parser(
        prog="python -m natsjax.export",
        description="Writes the parameters of a run's checkpoint, with its config and tokenizer, to one folder "
        "that can be moved, and that natsjax.load, natsjax.evaluate and train.init_from read, or transformers.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run, as given to train.py; or an export")
    parser.add_checkpoint()
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="the folder to write; an export that is there is replaced"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="natsjax",
        help="hf: a Hugging Face folder, for transformers (default: natsjax)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the numbers in the folder (default: float32)"
    )
    parser.add_argument(
        "--prepared_dir",
        metavar="DIR",
        help="where the prepared corpus is now (default: looked for beside the run, and where it was)",
    )
    flags = parser.parse_args(argv)
    from natsjax.export.folder import export  # here: --help needs nothing slow
    from natsjax.export.hf import export_hf
    from natsjax.runs.export import num_parameters

    options = {"dtype": flags.dtype, "prepared_dir": flags.prepared_dir, "checkpoint": flags.checkpoint}
    if flags.format == "hf":
        run, architecture, own = export_hf(flags.workdir, flags.output, **options)
        code = f", with modeling_natsjax.py for {', '.join(own)} (trust_remote_code=True)" if own else ""
        logger.info(f"as {architecture}{code}")
    else:
        run = export(flags.workdir, flags.output, **options)
    logger.info(f"{run.config.model.layer_pattern}, step {run.step}; data: {run.data.description}")
    print(f"wrote {num_parameters(run.parameters):,} parameters in {flags.dtype} to {flags.output}")


if __name__ == "__main__":
    run_command(main)
