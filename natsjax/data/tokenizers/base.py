"""What a tokenizer is, and what all tokenizers here share: every token stands for a string of bytes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from natsjax.data.readers.file_marks import check_no_pointer
from natsjax.errors import UserError

FORMAT_VERSION = 1
_IDS_AT_A_TIME = 1 << 18
DESCRIPTION_FILE = "natsjax_tokenizer.json"

Int32Array = npt.NDArray[np.int32]


@runtime_checkable
class Vocabulary(Protocol):
    """What a display or a metric needs to know of token ids; synthetic tasks have it without text behind it.

    `token_bytes` is int32 `[vocab_size]`, the UTF-8 bytes of text that each token stands for (0 for BOS, EOS and
    other specials), so that bits per byte = nats / ln 2 / bytes; None where there is no text. With a tokenizer that
    does not give back every text (`natsjax.data.tokenizers.pretrained`), it is the text that comes back that counts.
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
        """`"byte"`, `"bpe"`, `"huggingface"`, `"sentencepiece"` or `"tiktoken"`."""
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
        """Text of token ids; specials are skipped, incomplete UTF-8 becomes U+FFFD."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder that `load_tokenizer` reads."""
        ...


class PieceTokenizer(ABC):
    """A tokenizer whose tokens stand for strings of bytes, so that text is what they give one after another.

    Decoding is therefore the same for a whole text and for its parts: `decode(a + b) == decode(a) + decode(b)` where
    no character is cut in two. A tokenizer that puts a space before every text would lose that; here the space stays
    in the text, and only directly behind BOS, where a document begins, it is left out.

    Args:
      pieces: what each id stands for, in id order, specials (empty) among them.
      bos_id: id of BOS; its piece is empty.
      eos_id: id of EOS; its piece is empty. It may be `bos_id`, as in GPT-2.
      names: how to show ids whose pieces are no text (other specials, unknown text).
      adds_space: whether `encode` puts a space before a text that was not there.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        bos_id: int,
        eos_id: int,
        names: Mapping[int, str] | None = None,
        adds_space: bool = False,
    ):
        self._pieces = tuple(pieces)
        self._bos_id, self._eos_id = bos_id, eos_id
        specials = {bos_id: "⟨bos⟩", eos_id: "⟨eos⟩"} if bos_id != eos_id else {bos_id: "⟨bos/eos⟩"}
        self._names = dict(names or {}) | specials
        self._adds_space = adds_space

    @property
    def vocab_size(self) -> int:
        """Number of token ids, BOS and EOS included."""
        return len(self._pieces)

    @property
    def bos_id(self) -> int:
        """Id that marks the true beginning of a document; no text gives it."""
        return self._bos_id

    @property
    def eos_id(self) -> int:
        """Id that marks the true end of a document; no text gives it."""
        return self._eos_id

    @functools.cached_property
    def token_bytes(self) -> Int32Array:
        """UTF-8 bytes that each id stands for, int32 `[vocab_size]`, 0 for specials."""
        return np.array([len(piece) for piece in self._pieces], np.int32)

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
        if token_id in self._names:
            return self._names[token_id]
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return f"⟨{piece.hex(' ')}⟩"

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; specials are skipped, incomplete UTF-8 becomes U+FFFD.

        Raises:
          IndexError: an id is outside `0 … vocab_size-1`.
        """
        pieces: list[bytes] = []
        is_start = False
        for token_id in map(int, ids):
            piece = self._piece(token_id)
            pieces.append(piece.removeprefix(b" ") if is_start else piece)
            is_start = token_id == self.bos_id and self._adds_space
        return b"".join(pieces).decode("utf-8", errors="replace")

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of many texts, each int32 `[num_tokens]`."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def encode(self, text: str) -> Int32Array:
        """Token ids of a text, int32 `[num_tokens]`, without BOS and EOS."""

    @abstractmethod
    def _definition(self) -> list[object]:
        """Everything that decides how text is encoded, as plain JSON."""

    def _options(self) -> dict[str, Any]:
        """What loading needs beside the kind's own file, for the description."""
        return {}

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
            **self._options(),
        }
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _piece(self, token_id: int) -> bytes:
        # A negative id must not wrap around to another token.
        if not 0 <= token_id < self.vocab_size:
            raise IndexError(f"token id {token_id} is outside 0 … {self.vocab_size - 1}")
        return self._pieces[token_id]


def as_ids(ids: Sequence[int]) -> Int32Array:
    """Token ids as int32 `[num_tokens]`, with a chance for other threads now and then."""
    found = np.empty(len(ids), np.int32)
    for begin in range(0, len(ids), _IDS_AT_A_TIME):
        found[begin : begin + _IDS_AT_A_TIME] = ids[begin : begin + _IDS_AT_A_TIME]
    return found


def utf8(text: str) -> bytes:
    """A text in UTF-8.

    Raises:
      UserError: the text is no valid Unicode (it holds a lone surrogate).
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is no valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} stands at "
            f"character {error.start}."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        data = path.read_bytes()
        check_no_pointer(path, data)
        content = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__} where an object belongs.")
    return content
