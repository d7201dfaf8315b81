"""What tokenizers share that were made elsewhere.

*Special ids.* BOS and EOS are the tokenizer's own where it declares them, else ids of ours behind its vocabulary. No
text gives BOS, EOS or another special id, not even one that spells them out: they are read as ordinary text.

*Bits per byte.* Many of these tokenizers do not give back every text: they put a space before it, normalise, lowercase,
join spaces, or have one id for all that they do not know. `token_bytes` counts the bytes of the text that comes back,
with U+FFFD for what is unknown, so that always `token_bytes[ids].sum() == len(decode(ids).encode())` but for cut
characters; bits per byte are then per byte of *that* text, and those of two tokenizers cannot be compared. `caveat`
says what is lost, and opening such a tokenizer warns.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from natsjax.data.file_marks import check_no_pointer
from natsjax.data.tokenizer_base import PieceTokenizer
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
)

_warned: set[str] = set()
_log = logging.getLogger(__name__)


class PretrainedTokenizer(PieceTokenizer):
    """A tokenizer that was made elsewhere."""

    @functools.cached_property
    def caveat(self) -> str:
        """What this tokenizer does not give back as it was, for a sentence; empty if all that was tried came back."""
        found = ["it puts a space before each document, which counts as a byte of it"] if self._adds_space else []
        for text in _PROBES:
            back = self.decode([self.bos_id, *self.encode(text).tolist()])
            if back != text:
                found.append(f"it does not give back every text ({text!r} comes back as {back!r})")
                break
        return ", and ".join(found)

    def warn_once(self, source: Path) -> None:
        """Log the caveat, if there is one, the first time in this process that this tokenizer is opened."""
        if self.caveat and self.fingerprint not in _warned:
            _warned.add(self.fingerprint)
            _log.warning(
                "The tokenizer %s: %s; bits per byte will be per byte of the text as it comes back.",
                source,
                self.caveat,
            )


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
