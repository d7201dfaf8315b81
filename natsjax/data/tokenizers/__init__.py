"""Tokenizers by name: a folder that was saved here, or a file of another project.

| name | kind |
|---|---|
| a folder that ``save`` or ``natsjax.data.prepare`` wrote | any |
| ``tokenizer.json`` of Hugging Face ``tokenizers``, or a folder with one | ``huggingface`` |
| a ``.model`` of SentencePiece, or a folder with one | ``sentencepiece`` |
| a ``.tiktoken`` file (or Llama 3's ``tokenizer.model``), or a folder with one | ``tiktoken`` |

``ByteTokenizer`` (``byte``) and ``BPETokenizer`` (``bpe``, trained here) are our own. ``pretrained`` describes how
special ids and bits per byte are defined for tokenizers of other projects. A format is a class in a file of its own and
a name in ``_FORMATS``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from natsjax.config_fields import did_you_mean
from natsjax.data.tokenizers.base import DESCRIPTION_FILE, FORMAT_VERSION, Tokenizer, Vocabulary, read_json
from natsjax.data.tokenizers.bpe import MIN_VOCAB_SIZE, BPETokenizer, ByteTokenizer
from natsjax.data.tokenizers.huggingface import HUGGING_FACE_FILE, HuggingFaceTokenizer
from natsjax.data.tokenizers.pretrained import PretrainedTokenizer
from natsjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from natsjax.data.tokenizers.tiktoken import TiktokenTokenizer
from natsjax.data.tokenizers.tiktoken_patterns import find_pattern
from natsjax.errors import UserError

_FORMATS: tuple[type[PretrainedTokenizer], ...] = (HuggingFaceTokenizer, TiktokenTokenizer, SentencePieceTokenizer)
"""Formats of other projects; the first one that reads a file opens it."""
_OWN: tuple[type[Tokenizer], ...] = (ByteTokenizer, BPETokenizer)
_KINDS = {x.kind: x for x in (*_OWN, *_FORMATS)}

_CONVERT = (
    "which do not define how text is split; if they are byte-level like GPT-2's, convert them to one file: "
    "python -c \"from tokenizers import ByteLevelBPETokenizer as T; T('{}', '{}').save('tokenizer.json')\""
)
# Files that do not have a whole tokenizer, with advice.
_OTHER_FORMATS: dict[tuple[str, ...], str] = {
    ("tekken.json",): (
        "Mistral's format, which natsjax does not read; give the tokenizer.json that is published beside it."
    ),
    ("vocab.json", "merges.txt"): _CONVERT.format("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"): _CONVERT.format("encoder.json", "vocab.bpe"),
}

_log = logging.getLogger(__name__)


def load_tokenizer(path: str | os.PathLike[str], *, tiktoken_pattern: str = "") -> Tokenizer:
    """Loads a tokenizer that ``save`` wrote, or opens one of another project (see the module).

    Args:
      path: a folder, or a tokenizer.json, .model or .tiktoken file.
      tiktoken_pattern: pattern by which a ``.tiktoken`` tokenizer splits text before BPE, which the file does not
        define: a name or a regular expression (``tiktoken_patterns``). Empty: the pattern of its settings or its
        publisher, else cl100k's, with a warning.

    Raises:
      UserError: there is no tokenizer, its files are damaged or of another version, the library that runs it is not
        installed, or ``tiktoken_pattern`` does not apply to it.

    Example:
      >>> load_tokenizer("gpt2/tokenizer.json").encode("Fellow citizens")
    """
    path = Path(path)
    if (path / DESCRIPTION_FILE).is_file():
        tokenizer = _load_saved(path)
        if tiktoken_pattern and getattr(tokenizer, "pattern", None) != find_pattern(tiktoken_pattern):
            raise UserError(
                f"tiktoken_pattern = {tiktoken_pattern!r}: the tokenizer in {path} was stored with all that it needs; "
                "leave tiktoken_pattern out, or name the .tiktoken file itself."
            )
        return tokenizer
    opened = _open(_file(path), tiktoken_pattern)
    opened.warn_once(path)
    return opened


def is_tokenizer_of(path: str | os.PathLike[str], tokenizer: Tokenizer, *, tiktoken_pattern: str = "") -> bool:
    """Compares the tokenizer of a prepared corpus with the one at ``path``, as read today or by an older natsjax.

    Raises:
      UserError: see ``load_tokenizer``.
    """
    if load_tokenizer(path, tiktoken_pattern=tiktoken_pattern).fingerprint == tokenizer.fingerprint:
        return True
    if tiktoken_pattern or tokenizer.kind != TiktokenTokenizer.kind or (Path(path) / DESCRIPTION_FILE).is_file():
        return False
    file = _file(Path(path))
    as_before = TiktokenTokenizer.open(file, as_before=True) if TiktokenTokenizer.reads(file) else None
    if as_before is None or as_before.fingerprint != tokenizer.fingerprint:
        return False
    _log.warning(
        "%s splits text differently today than when the corpus was prepared; the corpus and its tokenizer are kept.",
        path,
    )
    return True


def _load_saved(folder: Path) -> Tokenizer:
    description_file = folder / DESCRIPTION_FILE
    description = read_json(description_file)
    version, kind, fingerprint = (description.get(name) for name in ("format_version", "kind", "fingerprint"))
    if version != FORMAT_VERSION:
        raise UserError(
            f"{description_file} has format_version {version!r}, but this natsjax reads version {FORMAT_VERSION}."
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(f'"{name}"' for name in _KINDS)
        raise UserError(f"{description_file} names the tokenizer kind {kind!r}; known are {known}.")
    tokenizer = _KINDS[kind].load(folder, description)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"the tokenizer in {folder} was changed: its fingerprint is {tokenizer.fingerprint[:12]}…, but "
            f"{description_file.name} was written for {str(fingerprint)[:12]}…."
        )
    return tokenizer


def _file(path: Path) -> Path:
    """Returns the file of another project's tokenizer: ``path``, or the only one in that folder."""
    if not path.exists():
        raise UserError(
            f"there is no tokenizer in {path}, which does not exist{did_you_mean(str(path), ('byte', 'bpe'))}; name a "
            "folder, or a tokenizer.json, SentencePiece .model or .tiktoken file."
        )
    if not path.is_dir():
        return path
    if (path / HUGGING_FACE_FILE).is_file():  # of several formats of the same tokenizer this is the one to take
        return path / HUGGING_FACE_FILE
    formats = [x for x in _FORMATS if x is not HuggingFaceTokenizer]
    files = sorted(x for x in path.iterdir() if x.is_file() and any(y.file_names.fullmatch(x.name) for y in formats))
    if not files:
        for others, advice in _OTHER_FORMATS.items():
            if all((path / name).is_file() for name in others):
                raise UserError(f"{path} holds {' and '.join(others)}, {advice}")
        raise UserError(
            f"there is no tokenizer in {path}: it holds no {DESCRIPTION_FILE}, {HUGGING_FACE_FILE}, SentencePiece "
            ".model or .tiktoken file."
        )
    if len(files) > 1:
        raise UserError(f"{path} holds several tokenizers ({', '.join(file.name for file in files)}); name one file.")
    return files[0]


def _open(path: Path, tiktoken_pattern: str) -> PretrainedTokenizer:
    for others, advice in _OTHER_FORMATS.items():
        if path.name in others:
            raise UserError(
                f"{path} is one of {' and '.join(others)}, {advice}" if others[1:] else f"{path} is {advice}"
            )
    opener = next((x for x in _FORMATS if x.reads(path)), None)
    if opener is None:
        raise UserError(
            f"{path} is not a tokenizer that natsjax can read: a folder, or a tokenizer.json, SentencePiece .model or "
            ".tiktoken file was expected."
        )
    if opener is TiktokenTokenizer:
        return TiktokenTokenizer.open(path, pattern=tiktoken_pattern)
    if tiktoken_pattern:
        raise UserError(
            f"tiktoken_pattern = {tiktoken_pattern!r}: {path} is no .tiktoken file and defines itself how text is "
            "split; leave tiktoken_pattern out."
        )
    return opener.open(path)


__all__ = [
    "MIN_VOCAB_SIZE",
    "BPETokenizer",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "PretrainedTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "Vocabulary",
    "is_tokenizer_of",
    "load_tokenizer",
]
