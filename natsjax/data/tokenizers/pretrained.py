"""Base class of tokenizers of other projects.

*Special ids.* BOS and EOS are the tokenizer's own if it declares them, else new ids after its vocabulary. No text is
encoded to BOS, EOS or another special id, not even one that spells them out, which is encoded as ordinary text.

*Bits per byte.* Many of these tokenizers are not lossless: they put a space before a text, normalize, lowercase, join
spaces, or have one id for everything unknown. ``token_bytes`` counts the bytes of the decoded text, with U+FFFD for
unknown text, so that ``token_bytes[ids].sum() == len(decode(ids).encode())`` if no character is split. Bits per byte
are then per byte of the decoded text, and those of two tokenizers cannot be compared.

*Assumptions.* The same text always has the same ids: randomness of a tokenizer (merge dropout, sampling) is off.
``caveat`` has the losses and the assumptions; it is logged as a warning when the tokenizer is opened, and stored by
``save``. The sources of BOS and EOS are logged.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from natsjax.data.readers.file_marks import check_no_pointer
from natsjax.data.tokenizers.base import Tokenizer
from natsjax.errors import UserError

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
"""Decoded text for an id that stands for unknown text."""

# Texts that a tokenizer may lose, common ones first: the first that fails is the example in the message.
_PROBES = (
    "The cat sat.",
    "two  spaces",
    "one line\nand\ttwo\r\n\n",
    " space around ",
    "(a, b): it's 1,234.5%",
    "naïve Café — Straße",
    "русский 한국어 日本 العربية हिन्दी",
    "🙂👍🏽 𝛼𐍈",
    "ﬁ ① Å e\u0301 \u00a0\u3000\u2028x",
    "\0\x01\x1b\x7f\x85\u200b\ufeff\ufffe\U0010ffff",
    "<s></s><unk>[UNK]<|endoftext|>",
    "<0x41> ##a b</w>",
    "a▁b",
    "x" * 1000,
)
# Texts around one of its own tokens: some remove the white space beside them, or match other spellings.
_OWN_PROBES = ("a {} b", "a{}b", "a  {}\n\t{} ")
_MAX_OWN = 64

_warned: set[str] = set()
_log = logging.getLogger(__name__)


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of another project; an id is appended for BOS or EOS where it has none.

    Attributes:
      file_names: pattern for the names of its files.
      assumed: assumptions about what its files do not define, as a part of a sentence.
      notes: notes on how its files were read, for the log.
    """

    file_names: ClassVar[re.Pattern[str]]
    assumed: str = ""
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        bos_id: int | None,
        eos_id: int | None,
        names: Mapping[int, str],
        adds_space: bool = False,
    ):
        pieces = list(pieces)
        specials = []
        for special in (bos_id, eos_id):
            if special is None:
                special = len(pieces)
                pieces.append(b"")
            pieces[special] = b""
            specials.append(special)
        super().__init__(pieces, bos_id=specials[0], eos_id=specials[1], names=names, adds_space=adds_space)

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Returns True if a file has this format, by its name."""
        return cls.file_names.fullmatch(path.name) is not None

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> PretrainedTokenizer:
        """Reads a file of another project; raises UserError if it cannot be read or is damaged."""

    @functools.cached_property
    def caveat(self) -> str:
        """Losses and assumptions, as a part of a sentence; empty if there are none."""
        return ", and ".join([*self._losses, *([self.assumed] if self.assumed else [])])

    def warn_once(self, source: Path) -> None:
        """Logs notes and caveat, the first time that this tokenizer is opened in this process."""
        if self.fingerprint in _warned:
            return
        _warned.add(self.fingerprint)
        if self.notes:
            _log.info("The tokenizer %s: %s.", source, "; ".join(self.notes))
        if self.caveat:
            measure = "; bits per byte will be per byte of the decoded text" if self._losses else ""
            _log.warning("The tokenizer %s: %s%s.", source, self.caveat, measure)

    @functools.cached_property
    def _losses(self) -> list[str]:
        found = ["it puts a space before each document, which counts as a byte of it"] if self._adds_space else []
        lost = [(text, back) for text in _PROBES if (back := self._back(text)) != text]
        if lost:
            text, back = map(_short, lost[0])
            found.append(f"it does not decode every text to what it was ({text!r} is decoded as {back!r})")
        unknown = [text for text, back in lost[1:] if UNKNOWN.decode() in back]
        if unknown:
            found.append(f"it has no token for parts of {_short(unknown[0])!r}")
        own = self._own_tokens()
        if lost:  # the others are encoded as ordinary text and lose nothing more
            own = [token for token in own if token.encode() in {self.piece(at) for at in self.encode(token).tolist()}]
        for token in own[:: -(-len(own) // _MAX_OWN) or 1]:
            if changed := self._loss_around(token):
                found.append(changed)
                break
        if any(self.encode(text).tolist() != self.encode(text).tolist() for text in _PROBES):
            found.append("it does not always encode a text in the same way")
        return found

    def _back(self, text: str) -> str:
        return self.decode([self.bos_id, *self.encode(text).tolist()])

    def _loss_around(self, token: str) -> str:
        """Describes how a text with one of the tokenizer's own tokens changes, if one with a plain word does not."""
        for spelling in dict.fromkeys((token, token.upper(), token.lower())):
            for probe in _OWN_PROBES:
                text, plain = probe.format(spelling, spelling), probe.format("cat", "cat")
                if (back := self._back(text)) != text and self._back(plain) == plain:
                    return f"its token {token!r} changes the text around it ({text!r} is decoded as {back!r})"
        return ""

    def _own_tokens(self) -> Sequence[str]:
        """Returns the spellings of tokens that are added to the vocabulary."""
        return ()

    def _options(self) -> dict[str, Any]:
        return {"caveat": self.caveat, "assumed": self.assumed}


def note_on(name: str, token: str | None, where: str, token_id: int) -> str:
    """Formats a note on BOS or EOS: ``token`` is its spelling (None if an id was appended), ``where`` its source."""
    if token is None:
        return f"it has no {name}; the id {token_id} was appended for it"
    return f"{name} is {token!r} (id {token_id}), {where}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}…{text[-20:]}"


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Converts any error of a tokenizer library to one sentence that begins with ``what``."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust is no ``Exception``, and its errors are bare ones
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} ({reason[:200].rstrip('.')}).") from error


def num_threads() -> int:
    """Returns the threads to encode a batch with, by the environment variables of Hugging Face's library.

    One of several processes should set ``TOKENIZERS_PARALLELISM=false`` or ``RAYON_NUM_THREADS``.
    """
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "n", "f", "0"):
        return 1
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else os.cpu_count() or 1


def read_bytes(path: Path) -> bytes:
    """Reads a tokenizer's file; raises UserError if it cannot be read or is a pointer."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}.") from error
    check_no_pointer(path, content)
    return content
