"""Tokenizers in tiktoken's file format: byte-level BPE, lossless, run by ``tiktoken`` (github.com/openai/tiktoken).

Each line of a ``.tiktoken`` file has a token, in base64, and its rank, which is its id. A JSON file beside it,
``NAME.tiktoken.json``, may have what the file does not define, all of it optional:

    {"pattern": "…",                              splits text before BPE: a regular expression, or a name of
                                                  ``natsjax.data.tokenizers.tiktoken_patterns``
     "special_tokens": {"<|endoftext|>": 100257}, ids that stand for no text
     "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}

The files of OpenAI and of Llama 3 are recognized by their hash, and have their publisher's settings. For others the
pattern is assumed to be cl100k's (GPT-4), with a warning, and BOS and EOS are appended.
"""

from __future__ import annotations

import base64
import binascii
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from natsjax.data.optional import import_optional
from natsjax.data.tokenizers.base import Int32Array, as_ids, read_json
from natsjax.data.tokenizers.pretrained import PretrainedTokenizer, as_user_error, note_on, num_threads, read_bytes
from natsjax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from natsjax.data.tokenizers.tiktoken_patterns import (
    FIRST_CL100K_PATTERN,
    assumption,
    check_pattern,
    find_pattern,
    recognize,
)
from natsjax.errors import UserError

_RANKS_FILE = "tokenizer.tiktoken"
_SETTINGS = {"pattern": str, "special_tokens": dict, "bos_token": str, "eos_token": str}
_MAX_ID = 2**24  # far above any vocabulary; a file with a larger id is damaged
# The library's regular expressions overflow the stack in a longer run of white space, which is split before.
_LONGEST_SPACE = 10_000
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{_LONGEST_SPACE},}}")
_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")


class TiktokenTokenizer(PretrainedTokenizer):
    """Byte-level BPE by ranks.

    Args:
      ranks: id of every token; each single byte must be a token.
      pattern: regular expression that splits text before BPE; text that it does not match is lost.
      special_tokens: ids of special tokens by name.
      bos_token: name of BOS among them; None: an id is appended.
      eos_token: name of EOS among them; None: an id is appended.
      source: the file, for messages.

    Raises:
      UserError: ``tiktoken`` is not installed, or an argument is wrong.
    """

    kind = "tiktoken"
    file_names = re.compile(r".*\.tiktoken", re.IGNORECASE | re.DOTALL)

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        *,
        pattern: str = FIRST_CL100K_PATTERN,
        special_tokens: Mapping[str, int] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        source: Path = Path(_RANKS_FILE),
    ):
        special_tokens = dict(special_tokens or {})
        _check(ranks, special_tokens, bos_token, eos_token, source)
        used = {*ranks.values(), *special_tokens.values()}
        size = 1 + max(used)
        pieces = [b""] * size
        for piece, rank in ranks.items():
            pieces[rank] = piece
        bos_id = None if bos_token is None else special_tokens[bos_token]
        eos_id = None if eos_token is None else special_tokens[eos_token]
        names = {token_id: f"⟨unused {token_id}⟩" for token_id in set(range(size)) - used}
        names |= {token_id: name for name, token_id in special_tokens.items()}
        super().__init__(pieces, bos_id=bos_id, eos_id=eos_id, names=names)
        self._ranks = {piece: ranks[piece] for piece in sorted(ranks, key=ranks.__getitem__)}
        self._settings: dict[str, Any] = {
            "pattern": pattern,
            "special_tokens": special_tokens,
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        tiktoken = import_optional("tiktoken", f"the tokenizer {source}")
        # The library does not get the special tokens, and encodes their names as ordinary text.
        check_pattern(pattern, source)
        refused = f"the pattern {pattern!r} of the tokenizer {source} is no regular expression that tiktoken accepts"
        with as_user_error(refused):
            self._encoding = tiktoken.Encoding(
                "natsjax", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={}
            )

    @classmethod
    def open(cls, path: Path, *, pattern: str = "", as_before: bool = False) -> TiktokenTokenizer:
        """Reads a ``.tiktoken`` file, and the settings beside it if there are any.

        Args:
          path: the file.
          pattern: a name of ``tiktoken_patterns`` or a regular expression; overrides the settings.
          as_before: True to read it as before files were recognized, with cl100k's pattern for all.
        """
        settings_file = path.with_name(path.name + ".json")
        settings = read_json(settings_file) if settings_file.is_file() else {}
        _check_types(settings, settings_file)
        if pattern:
            settings = settings | {"pattern": pattern}
        if settings.get("pattern") is not None:
            settings = settings | {"pattern": find_pattern(settings["pattern"])}
        ranks = _read_ranks(path)
        known = None if as_before else recognize(ranks)
        notes: list[str] = []
        if known is not None:
            name, found = known
            if "special_tokens" in settings:  # which BOS and EOS are names of
                found = {"pattern": found["pattern"]}
            settings = found | settings
            notes = [f"its ranks are those of {name}, whose settings are known"]
        given = {name: value for name, value in settings.items() if value is not None}
        tokenizer = cls(ranks, **given, source=path)
        tokenizer.notes = (
            *notes,
            note_on("BOS", given.get("bos_token"), "from its settings", tokenizer.bos_id),
            note_on("EOS", given.get("eos_token"), "from its settings", tokenizer.eos_id),
        )
        if "pattern" not in given:
            tokenizer.assumed = assumption(ranks)
        return tokenizer

    @classmethod
    def load(cls, folder: Path, description: Mapping[str, Any]) -> TiktokenTokenizer:
        """Loads what ``save`` wrote."""
        settings = {name: value for name in _SETTINGS if (value := description.get(name)) is not None}
        _check_types(settings, folder)
        path = folder / _RANKS_FILE
        tokenizer = cls(_read_ranks(path), **settings, source=path)
        tokenizer.assumed = str(description.get("assumed", ""))
        return tokenizer

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Returns True for a file of ranks, also one with a SentencePiece name, as Llama 3's ``tokenizer.model``."""
        if super().reads(path):
            return True
        return SentencePieceTokenizer.reads(path) and _FIRST_LINE.match(read_bytes(path)) is not None

    @property
    def pattern(self) -> str:
        """Regular expression that splits text before BPE."""
        return self._settings["pattern"]

    def _encode(self, text: str) -> Int32Array:
        return np.concatenate([as_ids(self._encode_part(part)) for part in _parts(text)])

    def _encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        if all(len(_parts(text)) == 1 for text in texts):
            try:
                batch = self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads())
                return [as_ids(ids) for ids in batch]
            except BaseException as error:
                if not _is_panic(error):
                    raise
        return [self._encode(text) for text in texts]

    def _write(self, folder: Path) -> None:
        lines = (base64.b64encode(piece) + b" %d\n" % rank for piece, rank in self._ranks.items())
        (folder / _RANKS_FILE).write_bytes(b"".join(lines))

    def _encode_part(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            if not _is_panic(error):
                raise
            if len(text) < 2:
                raise UserError(f"tiktoken cannot encode {text!r} with the pattern {self.pattern!r}.") from error
        middle = len(text) // 2  # another pattern overflowed the stack: halves need less of it, and have the same bytes
        return self._encode_part(text[:middle]) + self._encode_part(text[middle:])

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._settings), (self._ranks,)

    def _own_tokens(self) -> Sequence[str]:
        return [*self._settings["special_tokens"]]

    def _options(self) -> dict[str, Any]:
        return super()._options() | self._settings

    def _definition(self) -> list[object]:
        settings = {**self._settings, "special_tokens": sorted(self._settings["special_tokens"].items())}
        return [settings, [(piece.hex(), rank) for piece, rank in self._ranks.items()]]


def _parts(text: str) -> list[str]:
    """Splits the text where a run of white space is too long for the library."""
    # A long run covers one of these places. The regular expression takes a second for a long text.
    if not any(text[at].isspace() for at in range(0, len(text), _LONGEST_SPACE // 2)):
        return [text]
    if not (runs := list(_LONG_SPACE.finditer(text))):
        return [text]
    cuts = [at for run in runs for at in range(run.start() + _LONGEST_SPACE, run.end(), _LONGEST_SPACE)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


def _is_panic(error: BaseException) -> bool:
    """Returns True for a panic of Rust, which is no ``Exception`` and has no class that can be imported."""
    return type(error).__name__ == "PanicException"


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            piece, token_id = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}:{number} is not a line of a tiktoken file: a token in base64, a space and its rank."
            ) from error
        if piece in ranks:
            raise UserError(f"{path}:{number} has the token {piece!r} for the second time.")
        ranks[piece] = token_id
    return ranks


def _check_types(settings: Mapping[str, Any], settings_file: Path) -> None:
    for name, value in settings.items():
        if name not in _SETTINGS:
            raise UserError(f"{settings_file}: unknown setting {name!r}; known are {', '.join(_SETTINGS)}.")
        if value is not None and not isinstance(value, _SETTINGS[name]):
            raise UserError(f"{settings_file}: {name} = {value!r}: a {_SETTINGS[name].__name__} was expected.")


def _check(
    ranks: Mapping[bytes, int],
    special_tokens: Mapping[str, int],
    bos_token: str | None,
    eos_token: str | None,
    source: Path,
) -> None:
    """Checks what the library does not check, or crashes on."""
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise UserError(
            f"the tokenizer {source} lacks {len(missing)} of the 256 single bytes (the first is 0x{missing[0]:02x}), "
            "without which some texts cannot be encoded; it may be cut off or damaged."
        )
    seen: set[int] = set()
    for name, token_id in (*ranks.items(), *special_tokens.items()):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < _MAX_ID:
            raise UserError(f"the tokenizer {source} gives {name!r} the id {token_id!r}; ids are 0 … {_MAX_ID - 1}.")
        if token_id in seen:
            raise UserError(f"the tokenizer {source} has the id {token_id} twice, the second time for {name!r}.")
        seen.add(token_id)
    if b"" in ranks:
        raise UserError(f"the tokenizer {source} has a token without bytes, of rank {ranks[b'']}.")
    for setting, token in (("bos_token", bos_token), ("eos_token", eos_token)):
        if token is not None and token not in special_tokens:
            known = ", ".join(special_tokens) or "none"
            raise UserError(
                f"{setting} = {token!r}: not one of the special_tokens of the tokenizer {source} ({known})."
            )
