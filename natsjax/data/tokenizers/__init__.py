"""Tokenizers by name: a folder that was saved here, or a file that was made elsewhere.

| what is named | kind |
|---|---|
| a folder that `save` or `natsjax.data.prepare` wrote | any |
| `tokenizer.json` of Hugging Face `tokenizers`, or a folder with one | `huggingface` |
| a `.model` of SentencePiece, or a folder with one | `sentencepiece` |
| a `.tiktoken` file (or Llama 3's `tokenizer.model`), or a folder with one | `tiktoken` |

`ByteTokenizer` (`byte`) and `BPETokenizer` (`bpe`, trained here) are our own. What tokenizers from elsewhere do with
special ids and with bits per byte stands in `natsjax.data.tokenizers.pretrained`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from natsjax.config_fields import did_you_mean
from natsjax.data.tokenizers.base import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    PieceTokenizer,
    Tokenizer,
    Vocabulary,
    read_json,
)
from natsjax.data.tokenizers.bpe import MIN_VOCAB_SIZE, NUM_SPECIALS, BPETokenizer, ByteTokenizer
from natsjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from natsjax.data.tokenizers.pretrained import PretrainedTokenizer
from natsjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from natsjax.data.tokenizers.tiktoken import TiktokenTokenizer, is_tiktoken
from natsjax.data.tokenizers.tiktoken_patterns import find_pattern
from natsjax.errors import UserError

_PRETRAINED: dict[str, type[HuggingFaceTokenizer | SentencePieceTokenizer | TiktokenTokenizer]] = {
    tokenizer.kind: tokenizer for tokenizer in (HuggingFaceTokenizer, SentencePieceTokenizer, TiktokenTokenizer)
}
_KINDS = (ByteTokenizer.kind, BPETokenizer.kind, *_PRETRAINED)
_HUGGING_FACE_FILE = "tokenizer.json"
_MODEL_NAME = re.compile(r".*\.model(\.v\w+)?", re.IGNORECASE | re.DOTALL)  # Mistral's are called tokenizer.model.v3


# Files that do not hold a whole tokenizer, and what to do.
_OTHER_FORMATS: dict[tuple[str, ...], str] = {
    ("tekken.json",): (
        "Mistral's format, which natsjax does not read; give the tokenizer.json that is published beside it."
    ),
    **{
        names: (
            "which do not say how text is cut up; if they are byte-level like GPT-2's, make one file of them: "
            f"python -c \"from tokenizers import ByteLevelBPETokenizer as T; T('{names[0]}', '{names[1]}')"
            ".save('tokenizer.json')\""
        )
        for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    },
}

_log = logging.getLogger(__name__)


def load_tokenizer(path: str | os.PathLike[str], *, tiktoken_pattern: str = "") -> PieceTokenizer:
    """Read a tokenizer that `save` wrote, or one that was made elsewhere (see the module).

    Args:
      path: a folder, or a tokenizer.json, .model or .tiktoken file.
      tiktoken_pattern: what text is cut up with before BPE, for a `.tiktoken` file, which does not say it: a name or
        a regular expression (`tiktoken_patterns`). Empty: as its settings or its publisher say, else
        cl100k's, and a warning.

    Raises:
      UserError: there is no tokenizer there, its files are damaged or of another version, the library that runs it
        is not installed, or `tiktoken_pattern` is not for it.

    Example:
      >>> load_tokenizer("gpt2/tokenizer.json").encode("Fellow citizens")
    """
    path = Path(path)
    if (path / DESCRIPTION_FILE).is_file():
        tokenizer = _load_saved(path)
        if tiktoken_pattern and getattr(tokenizer, "pattern", None) != find_pattern(tiktoken_pattern):
            raise UserError(
                f"tiktoken_pattern is {tiktoken_pattern!r}, but the tokenizer in {path} was stored with all that it "
                "needs; leave tiktoken_pattern out, or name the .tiktoken file itself."
            )
        return tokenizer
    tokenizer = _open(_file(path), tiktoken_pattern)
    tokenizer.warn_once(path)
    return tokenizer


def is_tokenizer_of(path: str | os.PathLike[str], tokenizer: Tokenizer, *, tiktoken_pattern: str = "") -> bool:
    """Whether a corpus with this tokenizer was prepared with the one at `path`, perhaps by an earlier natsjax.

    Raises:
      UserError: see `load_tokenizer`.
    """
    if load_tokenizer(path, tiktoken_pattern=tiktoken_pattern).fingerprint == tokenizer.fingerprint:
        return True
    if tiktoken_pattern or tokenizer.kind != TiktokenTokenizer.kind or (Path(path) / DESCRIPTION_FILE).is_file():
        return False
    file = _file(Path(path))
    if not _holds_ranks(file) or TiktokenTokenizer.open(file, as_before=True).fingerprint != tokenizer.fingerprint:
        return False
    _log.warning(
        "%s is cut up otherwise today than when the corpus was prepared; its corpus and tokenizer stay as they were.",
        path,
    )
    return True


def _load_saved(folder: Path) -> PieceTokenizer:
    description_file = folder / DESCRIPTION_FILE
    description = read_json(description_file)
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{description_file} has format_version {description.get('format_version')!r}, "
            f"but this natsjax reads version {FORMAT_VERSION}."
        )
    kind = description.get("kind")
    tokenizer: PieceTokenizer
    if kind == ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
    elif kind == BPETokenizer.kind:
        tokenizer = BPETokenizer.load(folder)
    elif isinstance(kind, str) and kind in _PRETRAINED:
        tokenizer = _PRETRAINED[kind].load(folder, description)
    else:
        known = ", ".join(f'"{name}"' for name in _KINDS)
        raise UserError(f"{description_file} names the tokenizer kind {kind!r}; known are {known}.")
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise UserError(
            f"the tokenizer in {folder} was changed: its fingerprint is {tokenizer.fingerprint[:12]}…, but "
            f"{description_file.name} was written for {str(description.get('fingerprint'))[:12]}…."
        )
    return tokenizer


def _file(path: Path) -> Path:
    """The file of a tokenizer that was made elsewhere; of a folder, the one that it holds."""
    if not path.exists():
        raise UserError(
            f"there is no tokenizer in {path}, which does not exist{did_you_mean(str(path), ('byte', 'bpe'))}; name a "
            "folder, or a tokenizer.json, SentencePiece .model or .tiktoken file."
        )
    return _file_in(path) if path.is_dir() else path


def _file_in(folder: Path) -> Path:
    """The one tokenizer file of a folder; of several formats of the same, Hugging Face's is the one to take."""
    if (folder / _HUGGING_FACE_FILE).is_file():
        return folder / _HUGGING_FACE_FILE
    files = sorted(file for file in folder.iterdir() if file.is_file() and (_is_model(file) or _has_ranks(file)))
    if not files:
        for others, advice in _OTHER_FORMATS.items():
            if all((folder / name).is_file() for name in others):
                raise UserError(f"{folder} holds {' and '.join(others)}, {advice}")
        raise UserError(
            f"there is no tokenizer in {folder}: it holds no {DESCRIPTION_FILE}, {_HUGGING_FACE_FILE}, SentencePiece "
            ".model or .tiktoken file."
        )
    if len(files) > 1:
        raise UserError(f"{folder} holds several tokenizers ({', '.join(file.name for file in files)}); name one file.")
    return files[0]


def _open(path: Path, tiktoken_pattern: str) -> PretrainedTokenizer:
    """A tokenizer that was made elsewhere."""
    for others, advice in _OTHER_FORMATS.items():
        if path.name in others:
            raise UserError(
                f"{path} is one of {' and '.join(others)}, {advice}" if others[1:] else f"{path} is {advice}"
            )
    if _holds_ranks(path):
        return TiktokenTokenizer.open(path, pattern=tiktoken_pattern)
    tokenizer: PretrainedTokenizer
    if path.suffix.lower() == ".json":
        tokenizer = HuggingFaceTokenizer.open(path)
    elif _is_model(path):
        tokenizer = SentencePieceTokenizer.open(path)
    else:
        raise UserError(
            f"{path} is no tokenizer that natsjax knows: it must be a folder, or a tokenizer.json, SentencePiece "
            ".model or .tiktoken file."
        )
    if tiktoken_pattern:
        raise UserError(
            f"tiktoken_pattern is {tiktoken_pattern!r}, but {path} is no .tiktoken file and says itself how text is "
            "cut up; leave tiktoken_pattern out."
        )
    return tokenizer


def _holds_ranks(path: Path) -> bool:
    return _has_ranks(path) or (_is_model(path) and is_tiktoken(path))


def _is_model(path: Path) -> bool:
    return _MODEL_NAME.fullmatch(path.name) is not None


def _has_ranks(path: Path) -> bool:
    return path.suffix.lower() == ".tiktoken"


__all__ = [
    "FORMAT_VERSION",
    "MIN_VOCAB_SIZE",
    "NUM_SPECIALS",
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
