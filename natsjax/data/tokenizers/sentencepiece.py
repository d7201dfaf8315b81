"""Tokenizers of SentencePiece, `.model` files, run by that library (https://github.com/google/sentencepiece)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from natsjax.data.tokenizers.base import Int32Array, as_ids, utf8
from natsjax.data.tokenizers.pretrained import (
    UNKNOWN,
    PretrainedTokenizer,
    as_user_error,
    note_on,
    num_threads,
    read_bytes,
    with_specials,
)
from natsjax.errors import UserError

_MODEL_FILE = "tokenizer.model"
_SPACE = "▁"  # how its pieces write a space


class SentencePieceTokenizer(PretrainedTokenizer):
    """A SentencePiece model, unigram or BPE, with its own BOS and EOS where it has them.

    Args:
      model: the content of the `.model` file.
      source: the file, for messages.

    Raises:
      UserError: `sentencepiece` is not installed, or this is no model of it.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, *, source: Path = Path(_MODEL_FILE)):
        self._model = model
        if not model:  # the library would take it
            raise UserError(f"the tokenizer {source} is empty; it must be a model of SentencePiece.")
        sentencepiece = _import_sentencepiece(source)
        with as_user_error(f"the tokenizer {source} is no model of SentencePiece, or damaged"):
            # The library can draw at random which pieces a text becomes; that is off.
            self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model, enable_sampling=False)
            size = processor.get_piece_size()
            pieces = [_piece(processor, token_id) for token_id in range(size)]
            names = {
                token_id: processor.id_to_piece(token_id)
                for token_id in range(size)
                if processor.is_control(token_id) or processor.is_unknown(token_id)
            }
            first = processor.encode("a", out_type=int)[:1]
            # A piece that is called <s> but is no control symbol could come out of a text.
            bos_id, eos_id = (
                special if 0 <= special < size and processor.is_control(special) else None
                for special in (processor.bos_id(), processor.eos_id())
            )
            # Symbols that the user of the trainer defined have no score, which the library does not tell otherwise.
            self._own = [
                processor.id_to_piece(token_id)
                for token_id in range(size)
                if processor.is_control(token_id)
                or (processor.get_score(token_id) == 0 and not processor.is_byte(token_id))
            ]
        spelled = [None if special is None else processor.id_to_piece(special) for special in (bos_id, eos_id)]
        adds_space = any(pieces[token_id].startswith(b" ") for token_id in first)
        pieces, bos_id, eos_id = with_specials(pieces, bos_id, eos_id)
        super().__init__(pieces, bos_id=bos_id, eos_id=eos_id, names=names, adds_space=adds_space)
        self.notes = (
            note_on("BOS", spelled[0], "as the model says", bos_id),
            note_on("EOS", spelled[1], "as the model says", eos_id),
        )

    @classmethod
    def open(cls, path: Path) -> SentencePieceTokenizer:
        """Read a `.model` file.

        Raises:
          UserError: it cannot be read, or is no model of SentencePiece.
        """
        return cls(read_bytes(path), source=path)

    @classmethod
    def load(cls, folder: Path, description: Mapping[str, Any]) -> SentencePieceTokenizer:
        """Read what `save` wrote; `description` is the folder's description file."""
        return cls.open(folder / _MODEL_FILE)

    def encode(self, text: str) -> Int32Array:
        """Token ids of a text, int32 `[num_tokens]`, without BOS and EOS.

        Raises:
          UserError: the text is no valid Unicode (it holds a lone surrogate).
        """
        utf8(text)
        with as_user_error("the tokenizer cannot encode a text"):
            return as_ids(self._processor.encode(text, out_type=int))

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of many texts, each int32 `[num_tokens]`, on all cores.

        Raises:
          UserError: a text is no valid Unicode (it holds a lone surrogate).
        """
        for text in texts:
            utf8(text)
        with as_user_error("the tokenizer cannot encode a text"):
            batch = self._processor.encode(list(texts), out_type=int, num_threads=num_threads())
        return [as_ids(ids) for ids in batch]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder (made if missing), with the `.model` file for other programs.

        Raises:
          OSError: the folder cannot be written.
        """
        super().save(folder)
        (Path(folder) / _MODEL_FILE).write_bytes(self._model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model,)

    def _own_tokens(self) -> Sequence[str]:
        return self._own

    def _definition(self) -> list[object]:
        return [hashlib.sha256(self._model).hexdigest()]


def _piece(processor: Any, token_id: int) -> bytes:
    """What an id stands for."""
    if processor.is_control(token_id):
        return b""
    if processor.is_unknown(token_id):
        return UNKNOWN
    text = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):  # <0x0A>
        return bytes([int(text[3:-1], 16)])
    return text.replace(_SPACE, " ").encode("utf-8")


def _import_sentencepiece(source: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"the tokenizer {source} needs sentencepiece, which is not installed; install it with "
            "`pip install 'natsjax[formats]'`."
        ) from error
    return sentencepiece
