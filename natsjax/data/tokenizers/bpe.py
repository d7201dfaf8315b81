"""The tokenizers of our own: raw bytes, and byte-level BPE trained here; both lossless on every text.

Ids `0 … vocab_size-3` stand for byte strings, the last two are BOS and EOS. The special ids are no part of
the vocabulary that text is matched against, so no text can ever produce them.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from natsjax.data.tokenizers.base import Int32Array, PieceTokenizer, as_ids, read_json, utf8
from natsjax.errors import UserError

NUM_SPECIALS = 2  # BOS and EOS
MIN_VOCAB_SIZE = 256 + NUM_SPECIALS  # every byte must have a token, or some text could not be encoded

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What GPT-2 cuts text up with before BPE (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""

LONGEST_TRAINING_WORD = 256
"""Characters: longer words (runs of letters, of digits, …) are cut for training, whose time is quadratic in a word."""

# The library takes a hundred bytes of memory and more for a byte of a text that it is given in one piece.
_LONGEST_PART = 1 << 20  # characters
_WORD_END = re.compile(r"(?<=[^\W_])(?=\s)")  # where GPT-2's pattern always cuts, whatever stands around

_BPE_FILE = "tokenizer.json"  # in the format of Hugging Face `tokenizers`, so that others can read it too


class _ByteStringTokenizer(PieceTokenizer):
    """BOS and EOS behind the pieces that text is made of."""

    def __init__(self, pieces: Sequence[bytes]):
        super().__init__([*pieces, b"", b""], bos_id=len(pieces), eos_id=len(pieces) + 1)


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
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

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
        alphabet = byte_of_character()
        super().__init__([bytes(alphabet[character] for character in token) for token in vocabulary])
        self._vocabulary = list(vocabulary)
        self._merges = [(left, right) for left, right in merges]
        ids = {token: token_id for token_id, token in enumerate(vocabulary)}
        self._tokenizer = _byte_level(models.BPE(vocab=ids, merges=self._merges))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn a vocabulary from texts; the same texts in the same order always give the same one.

        Words that are longer than `LONGEST_TRAINING_WORD` are cut, so that time is linear in the text also where it has
        no word boundaries (DNA). Encoding does not cut them.

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
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GPT2_PATTERN), behavior="isolated"),
                pre_tokenizers.FixedLength(LONGEST_TRAINING_WORD),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - NUM_SPECIALS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
        return cls._from_json(json.loads(tokenizer.to_str()))

    @classmethod
    def load(cls, folder: Path) -> BPETokenizer:
        """Read what `save` wrote.

        Raises:
          UserError: the folder's `tokenizer.json` is damaged or another kind of tokenizer.
        """
        path = folder / _BPE_FILE
        try:
            return cls._from_json(read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no byte-level BPE tokenizer as natsjax writes them ({error!r}).") from error

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
        utf8(text)
        return np.concatenate([self._encode_batch([part])[0] for part in _parts(text)])

    def encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of many texts, each int32 `[num_tokens]`, on all cores.

        Raises:
          UserError: a text is no valid Unicode (it holds a lone surrogate).
        """
        for text in texts:
            utf8(text)
        if any(len(text) > _LONGEST_PART for text in texts):
            return [self.encode(text) for text in texts]
        return self._encode_batch(texts)

    def _encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [as_ids(encoding.ids) for encoding in encodings]

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


def _parts(text: str) -> Iterator[str]:
    """The text, in parts of one to two `_LONGEST_PART` that are encoded as the whole would be.

    Only where that many characters have no word's end among them, the text is cut at any place.
    """
    begin = 0
    while len(text) - begin > _LONGEST_PART:
        at, last = begin + _LONGEST_PART, begin + 2 * _LONGEST_PART
        end = _WORD_END.search(text, at, last)
        cut = end.start() if end else last
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 characters are themselves, the other bytes begin at U+0100."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(set(range(256)) - set(table.values()))
    table.update(zip(characters[len(table) :], others, strict=True))
    return table
