"""A tokenizer of natsjax as the files of a Hugging Face folder."""

import json
from typing import Any

import tokenizers

from natsjax.data.tokenizers import BPETokenizer, ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from natsjax.data.tokenizers.bpe import byte_of_character
from natsjax.errors import UserError

_BOS, _EOS = "<|begin_of_document|>", "<|end_of_document|>"
"""Names for BOS and EOS where a tokenizer has none."""


def tokenizer_files(tokenizer: Tokenizer, *, context_length: int, begins_with_bos: bool) -> dict[str, Any]:
    """Returns tokenizer.json and tokenizer_config.json, as JSON values by file name.

    Args:
      tokenizer: of a run.
      context_length: tokens.
      begins_with_bos: whether transformers should put BOS before a text, as natsjax does; False: the file stays as it
        is.

    Raises:
      UserError: the tokenizer has no such form.

    Example:
      >>> files = tokenizer_files(ByteTokenizer(), context_length=256, begins_with_bos=True)
      >>> files["tokenizer_config.json"]["bos_token"]
      '<|begin_of_document|>'
    """
    if isinstance(tokenizer, HuggingFaceTokenizer | BPETokenizer):
        definition = json.loads(tokenizer.definition)
    elif isinstance(tokenizer, ByteTokenizer):
        definition = _of_bytes()
    else:
        raise UserError(
            f"--format=hf: a {tokenizer.kind} tokenizer has no tokenizer.json; prepare the text with that "
            "which its publisher has, or add one to the folder that natsjax.export writes without --format=hf."
        )
    names = {}
    known = {token["id"]: token["content"] for token in definition.get("added_tokens") or []}
    vocab = definition["model"]["vocab"]
    known |= {at: item[0] for at, item in enumerate(vocab)} if isinstance(vocab, list) else {}
    known |= {token_id: token for token, token_id in vocab.items()} if isinstance(vocab, dict) else {}
    added = list(definition.get("added_tokens") or [])
    for name, token_id, usual in (("bos_token", tokenizer.bos_id, _BOS), ("eos_token", tokenizer.eos_id, _EOS)):
        if token_id not in known:
            known[token_id] = usual
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": token_id, "content": usual, **flags, "special": True})
        names[name] = known[token_id]
    definition["added_tokens"] = added
    if begins_with_bos:
        bos = names["bos_token"]
        special = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = ({"Sequence": {"id": each, "type_id": 0}} for each in ("A", "B"))
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special, first],
            "pair": [special, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": definition, "tokenizer_config.json": config}


def puts_bos_first(tokenizer: Tokenizer, *, is_imported: bool) -> bool:
    """Returns whether transformers puts BOS before a text with the tokenizer of an exported model.

    Args:
      tokenizer: of the model.
      is_imported: True where the model was imported: its tokenizer is the publisher's, and stays as it is.
    """
    if not is_imported:
        return True
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    return tokenizers.Tokenizer.from_str(tokenizer.definition).encode("").ids[:1] == [tokenizer.bos_id]


def _of_bytes() -> dict[str, Any]:
    """Returns a tokenizer.json of bytes: byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": byte_of_character(), "merges": []},
    }
