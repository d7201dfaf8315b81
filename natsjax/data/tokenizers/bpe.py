"""Tokenizers of our own: raw bytes, and byte-level BPE trained here; both are lossless on every text.

Ids ``0 … vocab_size-3`` stand for byte strings, the last two are BOS and EOS. The special ids are not in the vocabulary
that text is matched with, so no text is encoded to them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from natsjax.data.tokenizers.base import Int32Array, Tokenizer, as_ids, read_json
from natsjax.errors import UserError

NUM_SPECIALS = 2  # BOS and EOS
MIN_VOCAB_SIZE = 256 + NUM_SPECIALS  # every byte must have a token, or some text could not be encoded

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern, by which it splits text before BPE (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""

LONGEST_TRAINING_WORD = 256
"""Characters of a word in training. Longer ones (of letters, of digits, …) are cut: time is quadratic in a word."""

# The library needs over a hundred bytes of memory per byte of a text that it gets in one piece.
_LONGEST_PART = 1 << 20  # characters
_WORD_END = re.compile(r"(?<=[^\W_])(?=\s)")  # where GPT-2's pattern always splits

_BPE_FILE = "tokenizer.json"  # in the format of Hugging Face `tokenizers`, so that others can read it too


class _ByteStringTokenizer(Tokenizer):
    """A tokenizer with BOS and EOS after the pieces of text."""

    def __init__(self, pieces: Sequence[bytes]):
        super().__init__([*pieces, b"", b""], bos_id=len(pieces), eos_id=len(pieces) + 1)


class ByteTokenizer(_ByteStringTokenizer):
    """A tokenizer with one token per byte of UTF-8: 256 bytes, BOS 256, EOS 257.

    Example:
      >>> ByteTokenizer().encode("Hi").tolist()
      [72, 105]
    """

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)])

    @classmethod
    def load(cls, folder: Path, description: Mapping[str, Any]) -> ByteTokenizer:
        """Returns the tokenizer, which has no files."""
        return cls()

    def _encode(self, text: str) -> Int32Array:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def _definition(self) -> list[object]:
        return []


class BPETokenizer(_ByteStringTokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) as in GPT-2.

    Args:
      vocabulary: tokens in id order, without BOS and EOS, in GPT-2's byte alphabet (one character per byte).
      merges: pairs of tokens to join, in order.
    """

    kind = "bpe"

    def __init__(self, vocabulary: Sequence[str], merges: Sequence[tuple[str, str]]):
        alphabet = byte_of_character()
        super().__init__([bytes(alphabet[character] for character in token) for token in vocabulary])
        self._vocabulary = list(vocabulary)
        self._merges = [(left, right) for left, right in merges]
        ids = {token: token_id for token_id, token in enumerate(vocabulary)}
        self._tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=self._merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Trains a vocabulary on texts; the same texts in the same order always give the same one.

        Words longer than ``LONGEST_TRAINING_WORD`` are cut, so that time is linear in the text even without word
        boundaries (DNA). Encoding does not cut them.

        Args:
          texts: texts, read once and one at a time.
          vocab_size: number of ids, with BOS and EOS. From little text the result may have fewer.

        Raises:
          UserError: ``vocab_size`` is below 258 (256 bytes, BOS, EOS).
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size = {vocab_size}: a byte-level vocabulary needs at least {MIN_VOCAB_SIZE}, for 256 bytes, "
                "BOS and EOS."
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
    def load(cls, folder: Path, description: Mapping[str, Any]) -> BPETokenizer:
        """Loads what ``save`` wrote."""
        path = folder / _BPE_FILE
        try:
            return cls._from_json(read_json(path))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a byte-level BPE tokenizer of natsjax ({error!r}).") from error

    @classmethod
    def _from_json(cls, definition: dict) -> BPETokenizer:
        """Builds it from the Hugging Face format; raises KeyError or TypeError for another kind of tokenizer."""
        ids = definition["model"]["vocab"]
        return cls(sorted(ids, key=ids.__getitem__), definition["model"]["merges"])

    def _encode(self, text: str) -> Int32Array:
        return np.concatenate([self._encode_parts([part])[0] for part in _parts(text)])

    def _encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        if any(len(text) > _LONGEST_PART for text in texts):
            return [self._encode(text) for text in texts]
        return self._encode_parts(texts)

    def _encode_parts(self, texts: Sequence[str]) -> list[Int32Array]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [as_ids(encoding.ids) for encoding in encodings]

    @property
    def definition(self) -> str:
        """The content of its ``tokenizer.json``, which has neither BOS nor EOS."""
        return self._tokenizer.to_str(pretty=True)

    def _write(self, folder: Path) -> None:
        # Not with the library's own `save`, whose errors are bare `Exception`s.
        (folder / _BPE_FILE).write_text(self.definition, encoding="utf-8")

    def _definition(self) -> list[object]:
        return [self._vocabulary, self._merges]


def _parts(text: str) -> Iterator[str]:
    """Yields parts of the text, of one to two ``_LONGEST_PART``, whose encodings together are that of the whole.

    Only if so many characters contain no end of a word, the text is cut at any place.
    """
    begin = 0
    while len(text) - begin > _LONGEST_PART:
        at, last = begin + _LONGEST_PART, begin + 2 * _LONGEST_PART
        end = _WORD_END.search(text, at, last)
        cut = end.start() if end else last
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Returns GPT-2's byte alphabet: printable Latin-1 characters as they are, the other bytes from U+0100 on."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {character: ord(character) for character in characters if ord(character) < 256}
    others = sorted(set(range(256)) - set(table.values()))
    table.update(zip(characters[len(table) :], others, strict=True))
    return table
