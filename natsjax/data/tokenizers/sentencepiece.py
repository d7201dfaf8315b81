"""SentencePiece tokenizers, ``.model`` files, run by that library (https://github.com/google/sentencepiece)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from natsjax.data.optional import import_optional
from natsjax.data.tokenizers.base import Int32Array, as_ids
from natsjax.data.tokenizers.pretrained import (
    UNKNOWN,
    PretrainedTokenizer,
    as_user_error,
    note_on,
    num_threads,
    read_bytes,
)
from natsjax.errors import UserError

_MODEL_FILE = "tokenizer.model"
_SPACE = "▁"  # a space in its pieces


class SentencePieceTokenizer(PretrainedTokenizer):
    """A SentencePiece model, unigram or BPE, with its own BOS and EOS if it has them.

    Args:
      model: the content of the ``.model`` file.
      source: the file, for messages.

    Raises:
      UserError: ``sentencepiece`` is not installed, or the content is not a model.
    """

    kind = "sentencepiece"
    file_names = re.compile(r".*\.model(\.v\w+)?", re.IGNORECASE | re.DOTALL)  # Mistral's are called tokenizer.model.v3

    def __init__(self, model: bytes, *, source: Path = Path(_MODEL_FILE)):
        self._model = model
        if not model:  # the library accepts it
            raise UserError(f"the tokenizer {source} is empty; a SentencePiece model was expected.")
        sentencepiece = import_optional("sentencepiece", f"the tokenizer {source}")
        with as_user_error(f"the tokenizer {source} is not a SentencePiece model, or damaged"):
            # The library can sample the pieces of a text at random; that is off.
            self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model, enable_sampling=False)
            size = processor.get_piece_size()
            pieces = [_piece(processor, token_id) for token_id in range(size)]
            names = {
                token_id: processor.id_to_piece(token_id)
                for token_id in range(size)
                if processor.is_control(token_id) or processor.is_unknown(token_id)
            }
            first = processor.encode("a", out_type=int)[:1]
            # A text can be encoded to a piece that is named <s> but is no control symbol.
            bos_id, eos_id = (
                special if 0 <= special < size and processor.is_control(special) else None
                for special in (processor.bos_id(), processor.eos_id())
            )
            # User-defined symbols have score 0; the library has no other way to find them.
            self._own = [
                processor.id_to_piece(token_id)
                for token_id in range(size)
                if processor.is_control(token_id)
                or (processor.get_score(token_id) == 0 and not processor.is_byte(token_id))
            ]
        spelled = [None if special is None else processor.id_to_piece(special) for special in (bos_id, eos_id)]
        adds_space = any(pieces[token_id].startswith(b" ") for token_id in first)
        super().__init__(pieces, bos_id=bos_id, eos_id=eos_id, names=names, adds_space=adds_space)
        self.notes = (
            note_on("BOS", spelled[0], "from the model", self.bos_id),
            note_on("EOS", spelled[1], "from the model", self.eos_id),
        )

    @classmethod
    def open(cls, path: Path) -> SentencePieceTokenizer:
        """Reads a ``.model`` file."""
        return cls(read_bytes(path), source=path)

    @classmethod
    def load(cls, folder: Path, description: Mapping[str, Any]) -> SentencePieceTokenizer:
        """Loads what ``save`` wrote."""
        return cls.open(folder / _MODEL_FILE)

    def _encode(self, text: str) -> Int32Array:
        with as_user_error("the tokenizer cannot encode a text"):
            return as_ids(self._processor.encode(text, out_type=int))

    def _encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        with as_user_error("the tokenizer cannot encode a text"):
            batch = self._processor.encode(list(texts), out_type=int, num_threads=num_threads())
        return [as_ids(ids) for ids in batch]

    def _write(self, folder: Path) -> None:
        (folder / _MODEL_FILE).write_bytes(self._model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model,)

    def _own_tokens(self) -> Sequence[str]:
        return self._own

    def _definition(self) -> list[object]:
        return [hashlib.sha256(self._model).hexdigest()]


def _piece(processor: Any, token_id: int) -> bytes:
    """Returns the bytes of an id."""
    if processor.is_control(token_id):
        return b""
    if processor.is_unknown(token_id):
        return UNKNOWN
    text = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):  # <0x0A>
        return bytes([int(text[3:-1], 16)])
    return text.replace(_SPACE, " ").encode("utf-8")
