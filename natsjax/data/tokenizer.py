"""Tokenizers: raw bytes and byte-level BPE, both lossless on every text.

Ids `0 … vocab_size-3` stand for byte strings, the last two are BOS and EOS. The special ids are no part of
the vocabulary that text is matched against, so no text can ever produce them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from natsjax.errors import UserError

FORMAT_VERSION = 1
NUM_SPECIALS = 2  # BOS and EOS
MIN_VOCAB_SIZE = 256 + NUM_SPECIALS  # every byte must have a token, or some text could not be encoded

_DESCRIPTION_FILE = "natsjax_tokenizer.json"
_BPE_FILE = "tokenizer.json"  # in the format of Hugging Face `tokenizers`, so that others can read it too

Int32Array = npt.NDArray[np.int32]


@runtime_checkable
class Vocabulary(Protocol):
    """What a display or a metric needs to know of token ids; synthetic tasks have it without text behind it.

    `token_bytes` is int32 `[vocab_size]`, the UTF-8 bytes of text that each token stands for (0 for BOS and
    EOS), so that bits per byte = nats / ln 2 / bytes; None where there is no text.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids, specials included."""
        ...

    @property
    def token_bytes(self) -> Int32Array | None:
        """Bytes of text that each id stands for, int32 `[vocab_size]`, or None without text."""
        ...

    def token_text(self, token_id: int) -> str:
        """How to show one token to a person."""
        ...


@runtime_checkable
class Tokenizer(Vocabulary, Protocol):
    """Text to token ids and back."""

    @property
    def kind(self) -> str:
        """`"byte"` or `"bpe"`."""
        ...

    @property
    def bos_id(self) -> int:
        """Id that marks the true beginning of a document."""
        ...

    @property
    def eos_id(self) -> int:
        """Id that marks the true end of a document."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the definition: equal fingerprints encode every text alike."""
        ...

    def encode(self, text: str) -> Int32Array:
        """Token ids of a text, int32 `[num_tokens]`, without BOS and EOS."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of many texts, in parallel where the tokenizer can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; BOS and EOS are skipped, incomplete UTF-8 becomes U+FFFD."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder that `load_tokenizer` reads."""
        ...


class _ByteStringTokenizer(ABC):
    """What tokenizers share whose every token stands for a byte string."""

    kind: ClassVar[str]

    def __init__(self, pieces: Sequence[bytes]):
        self._pieces = tuple(pieces)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, BOS and EOS included."""
        return len(self._pieces) + NUM_SPECIALS

    @property
    def bos_id(self) -> int:
        """The last id but one."""
        return len(self._pieces)

    @property
    def eos_id(self) -> int:
        """The last id."""
        return len(self._pieces) + 1

    @functools.cached_property
    def token_bytes(self) -> Int32Array:
        """UTF-8 bytes that each id stands for, int32 `[vocab_size]`, 0 for BOS and EOS."""
        return np.array([len(piece) for piece in self._pieces] + [0] * NUM_SPECIALS, np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the definition."""
        # Hashed is the definition itself and no file, so that a new version of a library that writes the file
        # differently does not make old corpora look foreign.
        return hashlib.sha256(json.dumps([self.kind, *self._definition()]).encode()).hexdigest()

    def token_text(self, token_id: int) -> str:
        """One token for display: its text, ⟨bos⟩, ⟨eos⟩, or bytes in hex (`⟨e2 80⟩`) that are no whole UTF-8.

        Raises:
          IndexError: the id is outside `0 … vocab_size-1`.
        """
        piece = self._piece(token_id)
        if token_id == self.bos_id:
            return "⟨bos⟩"
        if token_id == self.eos_id:
            return "⟨eos⟩"
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return f"⟨{piece.hex(' ')}⟩"

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; BOS and EOS are skipped, incomplete UTF-8 becomes U+FFFD.

        Raises:
          IndexError: an id is outside `0 … vocab_size-1`.
        """
        return b"".join(self._piece(int(token_id)) for token_id in ids).decode("utf-8", errors="replace")

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of many texts, each int32 `[num_tokens]`."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def encode(self, text: str) -> Int32Array:
        """Token ids of a text, int32 `[num_tokens]`, without BOS and EOS."""

    @abstractmethod
    def _definition(self) -> list[object]:
        """Everything that decides how text is encoded, as plain JSON."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder (made if it is missing) that `load_tokenizer` reads.

        Raises:
          OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        (folder / _DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _piece(self, token_id: int) -> bytes:
        # A negative id must not wrap around to another token.
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is outside 0 … {self.vocab_size - 1}")
        return self._pieces[token_id] if token_id < len(self._pieces) else b""


class ByteTokenizer(_ByteStringTokenizer):
    """One token a byte of UTF-8: 256 bytes, BOS 256, EOS 257.

    Example:
      >>> ByteTokenizer().encode("Hi").tolist()
      [72, 105]
    """

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)])

    def encode(self, text: str) -> Int32Array:
        """The UTF-8 bytes of a text, int32 `[num_bytes]`.

        Raises:
          UserError: the text is no valid Unicode (it holds a lone surrogate).
        """
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def _definition(self) -> list[object]:
        return []


class BPETokenizer(_ByteStringTokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) as in GPT-2.

    Args:
      vocabulary: tokens in id order, without BOS and EOS, in GPT-2's byte alphabet (one character a byte).
      merges: the pairs of tokens to join, first ones first.
    """

    kind = "bpe"

    def __init__(self, vocabulary: Sequence[str], merges: Sequence[tuple[str, str]]):
        alphabet = _byte_of_character()
        super().__init__([bytes(alphabet[character] for character in token) for token in vocabulary])
        self._vocabulary = list(vocabulary)
        self._merges = [(left, right) for left, right in merges]
        ids = {token: token_id for token_id, token in enumerate(vocabulary)}
        self._tokenizer = _byte_level(models.BPE(vocab=ids, merges=self._merges))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn a vocabulary from texts; the same texts in the same order always give the same one.

        Args:
          texts: read once, never held together.
          vocab_size: number of ids, BOS and EOS included. Little text can give fewer: see `vocab_size`.

        Raises:
          UserError: `vocab_size` is below 258 (256 bytes, BOS, EOS).
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size is {vocab_size}, but a byte-level vocabulary needs at least {MIN_VOCAB_SIZE}: "
                "256 bytes, BOS and EOS."
            )
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - NUM_SPECIALS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls._from_json(json.loads(tokenizer.to_str()))

    @classmethod
    def _from_json(cls, definition: dict) -> BPETokenizer:
        """From the Hugging Face format; KeyError or TypeError where it is another kind of tokenizer."""
        ids = definition["model"]["vocab"]
        merges = [(left, right) for left, right in definition["model"]["merges"]]
        return cls(sorted(ids, key=ids.__getitem__), merges)

    def encode(self, text: str) -> Int32Array:
        """Token ids of a text, int32 `[num_tokens]`, without BOS and EOS.

        Raises:
          UserError: the text is no valid Unicode (it holds a lone surrogate).
        """
        _utf8(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of many texts, each int32 `[num_tokens]`, on all cores.

        Raises:
          UserError: a text is no valid Unicode (it holds a lone surrogate).
        """
        for text in texts:
            _utf8(text)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder (made if missing), with a `tokenizer.json` for other programs.

        Raises:
          OSError: the folder cannot be written.
        """
        super().save(folder)
        # Not the library's own `save`: its errors are bare `Exception`s.
        (Path(folder) / _BPE_FILE).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def _definition(self) -> list[object]:
        return [self._vocabulary, self._merges]


def load_tokenizer(folder: str | os.PathLike[str]) -> ByteTokenizer | BPETokenizer:
    """Read a tokenizer that `save` wrote.

    Raises:
      UserError: there is no tokenizer in the folder, or its files are damaged or of another version.
    """
    description_file = Path(folder) / _DESCRIPTION_FILE
    description = _read_json(description_file)
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{description_file} has format_version {description.get('format_version')!r}, "
            f"but this natsjax reads version {FORMAT_VERSION}."
        )
    tokenizer: ByteTokenizer | BPETokenizer
    match description.get("kind"):
        case ByteTokenizer.kind:
            tokenizer = ByteTokenizer()
        case BPETokenizer.kind:
            tokenizer = _load_bpe(Path(folder) / _BPE_FILE)
        case kind:
            raise UserError(f'{description_file} names the tokenizer kind {kind!r}; known are "byte" and "bpe".')
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise UserError(
            f"the tokenizer in {folder} was changed: its fingerprint is {tokenizer.fingerprint[:12]}…, but "
            f"{description_file.name} was written for {str(description.get('fingerprint'))[:12]}…."
        )
    return tokenizer


def _load_bpe(path: Path) -> BPETokenizer:
    try:
        return BPETokenizer._from_json(_read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no byte-level BPE tokenizer as natsjax writes them ({error!r}).") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"there is no tokenizer in {path.parent}: {path.name} is missing; give a folder that "
            "`natsjax.data.prepare` or `save` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__} where an object belongs.")
    return content


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 characters are themselves, the other bytes begin at U+0100."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(set(range(256)) - set(table.values()))
    table.update(zip(characters[len(table) :], others, strict=True))
    return table


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is no valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} stands at "
            f"character {error.start}."
        ) from error
