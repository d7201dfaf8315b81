"""The command ``python -m natsjax.import_model``: a model of another project as an export."""

from collections.abc import Sequence

from natsjax.import_model import DTYPES
from natsjax.runtime.flags import Parser, run_command
from natsjax.runtime.log import logger


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
      UserError: see ``import_model``.
    """
    parser = Parser(
        prog="python -m natsjax.import_model",
        description="Makes an export, which natsjax.load, natsjax.evaluate, natsjax.generate and train.init_from read, "
        "of a Llama, Mistral, Qwen2 or Qwen3 model.",
    )
    parser.add_argument(
        "--input", required=True, metavar="FOLDER|FILE", help="a Hugging Face folder with safetensors, or a .gguf file"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to write; an export that is there is replaced"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the parameters and of the model's activations (default: bfloat16 where all tensors are, else float32)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE|FOLDER",
        help="the tokenizer (default: tokenizer.json beside the tensors, or the vocabulary of the .gguf file)",
    )
    parser.add_argument(
        "--context_length",
        type=int,
        metavar="N",
        help="tokens of a context in evaluation and training (default: the most that the model was made for)",
    )
    flags = parser.parse_args(argv)
    from natsjax.import_model.convert import import_model  # here: --help needs nothing slow

    options = {"dtype": flags.dtype, "tokenizer": flags.tokenizer, "context_length": flags.context_length}
    found = import_model(flags.input, flags.output, **options)
    logger.info(f"{found.description}; {found.config.model.layer_pattern}, {found.vocabulary}")
    print(f"wrote {found.num_parameters:,} parameters in {found.dtype} to {flags.output}")


if __name__ == "__main__":
    run_command(main)
