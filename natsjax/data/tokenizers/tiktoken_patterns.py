"""Patterns and special ids for ``.tiktoken`` files, which have neither.

The patterns and the hashes of files are from tiktoken (https://github.com/openai/tiktoken,
``tiktoken_ext/openai_public.py``). The hash of Llama 3's ``tokenizer.model`` is from Hugging Face's hub
(``meta-llama/Meta-Llama-3-8B``), its special ids are from Meta's ``llama3/tokenizer.py``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from natsjax.data.tokenizers.bpe import GPT2_PATTERN
from natsjax.errors import UserError

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
"""Pattern of cl100k (GPT-3.5 and GPT-4)."""

FIRST_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Pattern of cl100k as first published, and of Llama 3: it splits line ends from white space at the end of a text.

It is assumed for an unknown file, as it was before patterns had names, so that stored corpora stay valid.
"""

O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern of o200k (GPT-4o)."""

PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "r50k": GPT2_PATTERN,
    "p50k": GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
    "o200k": O200K_PATTERN,
}
"""Patterns by name."""

ASSUMED = "cl100k"
"""Name of the pattern that is assumed for an unknown file."""

_PATTERNS_OF_FILES = PATTERNS | {"llama3": FIRST_CL100K_PATTERN}
_FILES = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": (
        "r50k_base (GPT-2)",
        "r50k",
        {"<|endoftext|>": 50256},
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": ("p50k_base", "p50k", {"<|endoftext|>": 50256}),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
        "cl100k_base",
        "cl100k",
        {"<|endoftext|>": 100257},
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (
        "o200k_base",
        "o200k",
        {"<|endoftext|>": 199999},
    ),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": (
        "Llama 3's",
        "llama3",
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001},
    ),
}
_TRIED = "A cat's 12 €?\n\n "  # to test a pattern
_MOST_TRIED = 20_000  # tokens
_WORTH_SAYING = 0.005  # fraction of the tokens


def find_pattern(asked: str) -> str:
    """Returns the regular expression for a name; a regular expression as it is. Unknown names raise UserError."""
    name = asked.lower().removesuffix("_base")
    if name in PATTERNS:
        return PATTERNS[name]
    if re.fullmatch(r"[\w. -]*", asked):  # as a regular expression it would match only this word
        raise UserError(
            f"tiktoken_pattern = {asked!r}: {', '.join(PATTERNS)} or a regular expression that matches all of every "
            "text was expected."
        )
    return asked


def check_pattern(pattern: str, source: Path) -> None:
    """Raises UserError for a pattern that matches empty text, which crashes the library."""
    import regex  # which tiktoken depends on

    try:
        is_empty = any(match.end() == match.start() for match in regex.finditer(pattern, _TRIED))
    except regex.error:
        return  # the library has a better message
    if is_empty:
        raise UserError(
            f"the pattern {pattern!r} of the tokenizer {source} matches empty text; a match must have at least one "
            "character."
        )


def recognize(ranks: Mapping[bytes, int]) -> tuple[str, dict[str, Any]] | None:
    """Recognizes a published file by its content; the order of its lines and their ends do not matter.

    Returns:
      ``(name, settings)``, the settings as arguments of ``TiktokenTokenizer``; None for an unknown file.
    """
    digest = hashlib.sha256()
    for piece, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        digest.update(base64.b64encode(piece) + b" %d\n" % rank)
    if (found := _FILES.get(digest.hexdigest())) is None:
        return None
    name, pattern, specials = found
    return name, {
        "pattern": _PATTERNS_OF_FILES[pattern],
        "special_tokens": dict(specials),
        "bos_token": next(iter(specials)),
        "eos_token": next(reversed(specials)),
    }


def assumption(ranks: Mapping[bytes, int]) -> str:
    """Describes the assumption about an unknown file, with a better one if there is one."""
    found = f"its file does not define how text is split before BPE, and the pattern of {ASSUMED} (GPT-4) is assumed"
    advice = "give --tiktoken_pattern to choose another"
    lost = {name: _unreachable(ranks, PATTERNS[name]) for name in ("gpt2", "cl100k", "o200k")}
    best = min(lost, key=lambda name: (lost[name], name != ASSUMED))
    if lost[ASSUMED] - lost[best] > _WORTH_SAYING:
        advice = (
            f"with it no text is encoded to {lost[ASSUMED]:.1%} of the tokens, with {best}'s to {lost[best]:.1%}: give "
            f"--tiktoken_pattern={best} if that is right"
        )
    return f"{found} ({advice})"


def _unreachable(ranks: Mapping[bytes, int], pattern: str) -> float:
    """Returns the fraction of the tokens that are text and are split by the pattern."""
    import regex  # which tiktoken depends on

    cut = regex.compile(pattern)
    pieces = sorted(ranks)
    num_cut = num_tried = 0
    for piece in pieces[:: -(-len(pieces) // _MOST_TRIED)]:
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError:
            continue
        num_tried += 1
        found = cut.match(text)
        num_cut += found is None or found.end() < len(text)
    return num_cut / max(1, num_tried)
