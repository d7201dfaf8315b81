"""The arguments of ``prepare``: checked, recorded in corpus.json, compared with a corpus that is there."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from natsjax.config_fields import named_path
from natsjax.data.corpus import Corpus
from natsjax.data.readers.corpus_reader import PACKAGE_PREFIX, CorpusReader, input_exists
from natsjax.data.tokenizers import MIN_VOCAB_SIZE, ByteTokenizer, Tokenizer, load_tokenizer
from natsjax.errors import UserError


@dataclass(frozen=True)
class PrepareRequest:
    """The arguments of ``prepare``, where they are explained; ``input`` and ``validation_input`` are absolute."""

    input: str
    output: Path
    tokenizer: str
    tiktoken_pattern: str
    vocab_size: int
    held_out_fraction: float
    validation_input: str
    text_field: str
    skip_bad_files: bool
    seed: int
    documents_per_shard: int
    deduplicate: bool
    workers: int
    progress: bool

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        if self.tokenizer == "bpe" and self.vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"vocab_size = {self.vocab_size}: a BPE needs at least {MIN_VOCAB_SIZE} (bytes, BOS, EOS).")
        if not self.validation_input and not 0 < self.held_out_fraction < 1:
            raise UserError(f"held_out_fraction = {self.held_out_fraction}: it must be between 0 and 1.")
        if self.validation_input and self.validation_input == self.input:
            raise UserError(
                f"validation_input is the same as input, {self.input}: a model would be judged on what it "
                "was trained on; leave validation_input empty to hold documents out."
            )
        if self.documents_per_shard < 1:
            raise UserError(f"documents_per_shard = {self.documents_per_shard}: it must be at least 1.")
        if self.workers < 0:
            raise UserError(f"workers = {self.workers}: it must be a number of processes, or 0 for one a core.")
        if not self.tokenizer:
            raise UserError('tokenizer is empty: it must be "byte", "bpe" or the folder or file of a tokenizer.')
        if self.tiktoken_pattern and self.tokenizer in ("byte", "bpe"):
            raise UserError(
                f"tiktoken_pattern = {self.tiktoken_pattern!r}: tokenizer is {self.tokenizer!r} and no .tiktoken "
                "file; leave tiktoken_pattern out."
            )

    def inputs(self) -> dict[str, str]:
        """Returns the inputs that are read, by argument name."""
        named = {"input": self.input, "validation_input": self.validation_input}
        return {name: value for name, value in named.items() if value}

    def check_apart(self, readers: dict[str, CorpusReader]) -> None:
        """Raises UserError if a file would be trained on and validated on."""
        if "validation_input" not in readers:
            return
        paths = {name: reader.real_paths() for name, reader in readers.items()}
        both = paths["input"].keys() & paths["validation_input"].keys()
        if both:
            names = sorted(paths["validation_input"][path] for path in both)
            raise UserError(
                f"{len(both)} of the {readers['validation_input'].num_sources} files of validation_input "
                f"{self.validation_input} are in input {self.input} too ({', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}): a model would be judged on what it was trained on; keep them in "
                "folders of which none is in the other."
            )

    @property
    def num_workers(self) -> int:
        """Processes to work with at most."""
        return self.workers or len(os.sched_getaffinity(0))

    def reader(self, input: str) -> CorpusReader:
        """Returns a reader of one of the inputs as asked for."""
        return CorpusReader(input, text_field=self.text_field, skip_bad_files=self.skip_bad_files)

    @functools.cached_property
    def existing_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where one is to be trained."""
        if self.tokenizer == "bpe":
            return None
        if self.tokenizer == "byte":
            return ByteTokenizer()
        return load_tokenizer(self.tokenizer, tiktoken_pattern=self.tiktoken_pattern)

    def arguments(self) -> dict[str, str | int | float | bool | None]:
        """Returns what decides the corpus, for corpus.json; None for what plays no part beside the rest."""
        existing = self.existing_tokenizer
        is_named = self.tokenizer in ("byte", "bpe")
        return {
            "input": self.input,
            "validation_input": self.validation_input,
            # A tokenizer's folder may move or change; its fingerprint says which one it is.
            "tokenizer": self.tokenizer if existing is None or is_named else existing.fingerprint,
            "vocab_size": self.vocab_size if existing is None else None,
            "held_out_fraction": None if self.validation_input else self.held_out_fraction,
            "seed": None if self.validation_input else self.seed,
            "text_field": self.text_field,
            "skip_bad_files": self.skip_bad_files,
            "documents_per_shard": self.documents_per_shard,
            "deduplicate": self.deduplicate,
        }

    def check_same(self, corpus: Corpus) -> None:
        """Raises UserError if a corpus was made with other arguments or from other files."""
        # Corpora that were made before there was `deduplicate` do not name it.
        there, asked = {"deduplicate": False} | corpus.arguments, self.arguments()
        names = [name for name in asked if name not in self.inputs()]
        differences = [
            f"{name} is {there.get(name)!r} there and {asked[name]!r} here"
            for name in names
            if there.get(name) != asked[name]
        ]
        for name, input in self.inputs().items():
            if there.get(name) == input and not input_exists(input):
                continue  # the text was moved away after it had been prepared
            # A mark of the content, not the path: the same files may lie elsewhere today.
            if self.reader(input).signature != corpus.input_signatures.get(name):
                before = there.get(name)
                change = "holds other files than then" if before == input else f"was {before!r}"
                if not corpus.input_report:  # made when fewer kinds of files were read, and no links followed
                    change += ", or other ones are read now: the corpus was prepared by an earlier natsjax"
                differences.append(f"{name} {input!r} {change}")
        if differences:
            raise UserError(
                f"{self.output} already holds a corpus that was prepared otherwise "
                f"({'; '.join(differences)}); give another output, or delete that folder."
            )


def absolute_input(input: str | os.PathLike[str]) -> str:
    """Returns the absolute path of the input, so that it means the same from every working directory."""
    name = os.fspath(input)
    if not name or name.startswith(PACKAGE_PREFIX):
        return name
    return str(named_path(name))
