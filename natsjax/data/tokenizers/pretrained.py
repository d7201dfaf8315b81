"""What tokenizers share that were made elsewhere.

*Special ids.* BOS and EOS are the tokenizer's own where it declares them, else ids of ours behind its vocabulary. No
text gives BOS, EOS or another special id, not even one that spells them out: they are read as ordinary text.

*Bits per byte.* Many of these tokenizers do not give back every text: they put a space before it, normalise, lowercase,
join spaces, or have one id for all that they do not know. `token_bytes` counts the bytes of the text that comes back,
with U+FFFD for what is unknown, so that always `token_bytes[ids].sum() == len(decode(ids).encode())` but for cut
characters; bits per byte are then per byte of *that* text, and those of two tokenizers cannot be compared.

*What files do not say.* The same text always gives the same ids: what is random in a tokenizer (dropout of merges,
sampling) is off. `caveat` says what is lost and what had to be assumed; opening such a tokenizer warns, and `save`
stores it. Where BOS and EOS come from is logged.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from natsjax.data.readers.file_marks import check_no_pointer
from natsjax.data.tokenizers.base import PieceTokenizer
from natsjax.errors import UserError

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
"""What decoding writes for text that a tokenizer has no token for."""

# What a tokenizer may not give back, the common before the exotic: the first that fails is the example.
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
# Around one of its own tokens: some swallow the white space beside them, or stand for another spelling as well.
_OWN_PROBES = ("a {} b", "a{}b", "a  {}\n\t{} ")
_MAX_OWN = 64

_warned: set[str] = set()
_log = logging.getLogger(__name__)


class PretrainedTokenizer(PieceTokenizer):
    """A tokenizer that was made elsewhere.

    Attributes:
      assumed: what its files do not say and was assumed, for a sentence.
      notes: how its files were read, for a log.
    """

    assumed: str = ""
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def caveat(self) -> str:
        """What is lost and what was assumed, for a sentence; empty if all that was tried came back as it was."""
        return ", and ".join([*self._losses, *([self.assumed] if self.assumed else [])])

    def warn_once(self, source: Path) -> None:
        """Log notes and caveat, if there are any, the first time in this process that this tokenizer is opened."""
        if self.fingerprint in _warned:
            return
        _warned.add(self.fingerprint)
        if self.notes:
            _log.info("The tokenizer %s: %s.", source, "; ".join(self.notes))
        if self.caveat:
            measure = "; bits per byte will be per byte of the text as it comes back" if self._losses else ""
            _log.warning("The tokenizer %s: %s%s.", source, self.caveat, measure)

    @functools.cached_property
    def _losses(self) -> list[str]:
        found = ["it puts a space before each document, which counts as a byte of it"] if self._adds_space else []
        lost = [(text, back) for text in _PROBES if (back := self._back(text)) != text]
        if lost:
            found.append("it does not give back every text ({!r} comes back as {!r})".format(*map(_short, lost[0])))
        unknown = [text for text, back in lost[1:] if UNKNOWN.decode() in back]
        if unknown:
            found.append(f"it knows no token for parts of {_short(unknown[0])!r}")
        own = self._own_tokens()
        if lost:  # of the others, which are read as ordinary text, nothing new is to be found
            own = [token for token in own if token.encode() in {self._piece(at) for at in self.encode(token).tolist()}]
        for token in own[:: -(-len(own) // _MAX_OWN) or 1]:
            if changed := self._loss_around(token):
                found.append(changed)
                break
        if any(self.encode(text).tolist() != self.encode(text).tolist() for text in _PROBES):
            found.append("it does not always encode the same text alike")
        return found

    def _back(self, text: str) -> str:
        return self.decode([self.bos_id, *self.encode(text).tolist()])

    def _loss_around(self, token: str) -> str:
        """What happens to a text with one of the tokenizer's own tokens where one with a plain word comes back."""
        for spelling in dict.fromkeys((token, token.upper(), token.lower())):
            for probe in _OWN_PROBES:
                text, plain = probe.format(spelling, spelling), probe.format("cat", "cat")
                if (back := self._back(text)) != text and self._back(plain) == plain:
                    return f"its token {token!r} changes the text around it ({text!r} comes back as {back!r})"
        return ""

    def _own_tokens(self) -> Sequence[str]:
        """Spellings of tokens that stand beside the vocabulary that text is matched against."""
        return ()

    def _options(self) -> dict[str, Any]:
        return {"caveat": self.caveat, "assumed": self.assumed}


def note_on(name: str, token: str | None, where: str, token_id: int) -> str:
    """A note on BOS or EOS.

    Args:
      name: "BOS" or "EOS".
      token: its spelling; None: an id was appended.
      where: what says so.
      token_id: its id.
    """
    if token is None:
        return f"it has no {name}, for which the id {token_id} was appended"
    return f"{name} is {token!r} (id {token_id}), {where}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}…{text[-20:]}"


def with_specials(pieces: list[bytes], bos_id: int | None, eos_id: int | None) -> tuple[list[bytes], int, int]:
    """Pieces with BOS and EOS, which are appended where the tokenizer has none.

    Args:
      pieces: what each id stands for.
      bos_id: the tokenizer's own BOS, or None.
      eos_id: the tokenizer's own EOS, or None.

    Returns:
      The pieces, the id of BOS, the id of EOS.
    """
    pieces = list(pieces)
    found = []
    for special in (bos_id, eos_id):
        if special is None:
            special = len(pieces)
            pieces.append(b"")
        pieces[special] = b""
        found.append(special)
    return pieces, found[0], found[1]


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer library throws into one sentence that begins with `what`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust's panics are no `Exception`, and its errors are nothing else
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} ({reason[:200].rstrip('.')}).") from error


def num_threads() -> int:
    """Threads to encode a batch with; the variables that Hugging Face's library obeys hold for all of them.

    A process that is one of several should set `TOKENIZERS_PARALLELISM=false` or `RAYON_NUM_THREADS`.
    """
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "n", "f", "0"):
        return 1
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else os.cpu_count() or 1


def read_bytes(path: Path) -> bytes:
    """A tokenizer's file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}.") from error
    check_no_pointer(path, content)
    return content
