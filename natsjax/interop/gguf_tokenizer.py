"""The tokenizer of a GGUF file as a ``tokenizer.json``, from its vocabulary and its merges or scores.

llama.cpp names the pattern by which byte-level BPE splits text and does not store it; a name that is not in
``_PATTERNS`` is refused. SentencePiece's BPE has scores, from which the order of its merges follows.
"""

import json
from typing import Any

from natsjax.config_fields import format_value
from natsjax.data.tokenizers import HuggingFaceTokenizer
from natsjax.data.tokenizers.bpe import GPT2_PATTERN
from natsjax.errors import UserError
from natsjax.interop.gguf_file import GGUFFile
from natsjax.interop.hf_config import DescribedModel

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Types of tokens (``tokenizer.ggml.token_type``)."""

_WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (_WORDS + r"\p{N}{1,3}" + _REST,)
_PATTERNS = {
    "gpt-2": (GPT2_PATTERN,),
    "smollm": (r"\p{N}", GPT2_PATTERN),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": (_WORDS + r"\p{N}" + _REST,),
}
"""Patterns that split a text one after the other, by ``tokenizer.ggml.pre``.

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3")
"""Where a word that is a token is taken as it is, whatever merges lead to."""

_ADVICE = "name a tokenizer.json of the same model with --tokenizer"


def gguf_tokenizer(file: GGUFFile, described: DescribedModel) -> HuggingFaceTokenizer:
    """Builds the tokenizer of a GGUF file.

    Args:
      file: it.
      described: the model in it.

    Raises:
      UserError: its vocabulary is of a kind that natsjax does not know, or damaged.
    """
    kind = file.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{file.where}: tokenizer.ggml.model = {format_value(kind)}: natsjax rebuilds gpt2 and llama; {_ADVICE}."
        )
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.numbers("tokenizer.ggml.token_type")
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{file.where}: the tokens of its vocabulary do not differ, or some have no type.")
    definition = _byte_level(file, tokens) if kind == "gpt2" else _with_scores(file, tokens, types)
    definition |= {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    definition["added_tokens"] = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[token_id] in (_CONTROL, _UNKNOWN),
        }
        for token_id, token in enumerate(tokens)
        if types[token_id] in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    bos_id, eos_id = described.bos_id, described.eos_id
    bos_id, eos_id = (eos_id if bos_id is None else bos_id), (bos_id if eos_id is None else eos_id)
    if bos_id is None:
        raise UserError(f"{file.where} names neither BOS nor EOS, of which natsjax needs one; {_ADVICE}.")
    return HuggingFaceTokenizer(
        json.dumps(definition, ensure_ascii=False), bos_id=bos_id, eos_id=eos_id, vocab_size=described.vocab_size
    )


def _byte_level(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """Returns the parts of byte-level BPE."""
    pattern = file.get("tokenizer.ggml.pre")
    if pattern not in _PATTERNS:
        raise UserError(
            f"{file.where}: tokenizer.ggml.pre = {format_value(pattern)}: natsjax does not know how it splits text; it "
            f"knows {', '.join(_PATTERNS)}; {_ADVICE}."
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in _PATTERNS[pattern]
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": file.strings("tokenizer.ggml.merges"),
            "ignore_merges": pattern in _WHOLE_FIRST,
        },
    }


def _with_scores(file: GGUFFile, tokens: list[str], types: list[float]) -> dict[str, Any]:
    """Returns the parts of SentencePiece's BPE."""
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise UserError(f"{file.where}: some tokens of its vocabulary have no score.")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN, _BYTE, _USER_DEFINED):
            continue
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        own = sorted((ids[left], ids[right]) for left, right in halves if left in ids and right in ids)
        merges += [(-score, tokens[left], tokens[right]) for left, right in own]
    merges.sort(key=lambda merge: merge[0])  # a stable order: of equal scores the first token goes first
    space = "▁"
    prefix = [{"type": "Prepend", "prepend": space}] if file.get("tokenizer.ggml.add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": space}],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": _BYTE in types,
            "vocab": ids,
            "merges": [[left, right] for _, left, right in merges],
        },
    }
