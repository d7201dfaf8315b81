"""Tokenizers in Hugging Face's format, ``tokenizer.json``, run by the library ``tokenizers``.

BOS and EOS are declared by ``tokenizer_config.json`` or ``special_tokens_map.json`` beside the file (``bos_token``,
``eos_token``), else they are special tokens with one of the usual names, else ids after the vocabulary. Nothing else in
these files is used; contradictions to ``tokenizer.json`` are reported.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import tokenizers

from natsjax.data.tokenizers.base import Int32Array, as_ids, read_json
from natsjax.data.tokenizers.bpe import byte_of_character
from natsjax.data.tokenizers.pretrained import UNKNOWN, PretrainedTokenizer, as_user_error, note_on, read_bytes
from natsjax.errors import UserError

BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]", "<|endoftext|>", "[CLS]")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]", "[SEP]")

HUGGING_FACE_FILE = "tokenizer.json"
_DECLARING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_ADDING_FILE = "added_tokens.json"  # names and ids
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Parameters of a model that sample the tokens of a text at random.
_RANDOM = ("dropout", "alpha", "nbest_size")
# Names of the same in tokenizer_config.json, which ``transformers`` follows, and in tokenizer.json.
_SAID_TWICE = {
    "add_prefix_space": "add_prefix_space",
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_BEFORE_MODEL = ("normalizer", "pre_tokenizer")
_MAX_HOLES = 2**20  # a file with more unused ids is damaged


class _Definition:
    """The parsed content of a ``tokenizer.json``.

    Attributes:
      text: the content.
      changes_length: names of settings in it that truncate or pad texts.
      parsed: the content without truncation, padding and special tokens, which the pipeline adds itself.
      runnable: the same without random parameters.
      library: the library's tokenizer.
      vocabulary: token of each id.
      unknown: id of unknown text, or None.
      specials: ids of special tokens except ``unknown``; no text may be encoded to them.
    """

    def __init__(self, text: str, source: Path):
        self.text, self._source = text, source
        with as_user_error(f"the tokenizer {source} is no valid JSON"):
            parsed = json.loads(text)
        if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
            raise UserError(
                f"{source} is not a tokenizer.json of Hugging Face's library tokenizers: it has no object with a model."
            )
        self.changes_length = [name for name in ("truncation", "padding") if parsed.get(name)]
        self.parsed: dict[str, Any] = parsed | {"truncation": None, "padding": None, "post_processor": None}
        # Not removed from ``parsed``, whose fingerprint is stored.
        model = {name: value for name, value in self.parsed["model"].items() if name not in _RANDOM}
        self.runnable = self.parsed | {"model": model}
        with self.errors():
            self.library = tokenizers.Tokenizer.from_str(json.dumps(self.runnable))
            ids = self.library.get_vocab(with_added_tokens=True)
            self.vocabulary = {token_id: token for token, token_id in ids.items()}
            if not ids or max(self.vocabulary) > len(ids) + _MAX_HOLES:
                raise ValueError(f"it has {len(ids)} tokens")
            model = self.parsed["model"]
            has_name = isinstance(model.get("unk_token"), str)
            self.unknown = self.library.token_to_id(model["unk_token"]) if has_name else model.get("unk_id")
            added = self.library.get_added_tokens_decoder()
            self.specials = {token_id for token_id, token in added.items() if token.special} - {self.unknown}

    def errors(self) -> AbstractContextManager[None]:
        """Converts errors of the library to one sentence."""
        library = f"the library tokenizers {tokenizers.__version__}"
        return as_user_error(f"the tokenizer {self._source} cannot be run by {library}")

    def find(self, declared: Mapping[str, Any], setting: str, names: Sequence[str]) -> int | None:
        """Returns the id of BOS or EOS, or None if the tokenizer has none."""
        if setting in declared:
            value = declared[setting]
            content = value.get("content") if isinstance(value, dict) else value
            found = self.library.token_to_id(content) if isinstance(content, str) else None
            return None if found == self.unknown else found
        found_by_name = (self.library.token_to_id(name) for name in names)
        return next((token_id for token_id in found_by_name if token_id in self.specials), None)

    def what_is_off(self) -> list[str]:
        """Returns notes on random parameters and changes of length that are off."""
        random = {name: value for name in _RANDOM if (value := self.parsed["model"].get(name))}
        return [
            *(f"its {name} = {value} is off, so that a text always has the same ids" for name, value in random.items()),
            *(f"its {name} is off, so that texts keep their length" for name in self.changes_length),
        ]

    def contradictions(self, declared: Mapping[str, Any]) -> str:
        """Describes contradictions in files beside this one, which takes precedence."""
        found = []
        for theirs, ours in _SAID_TWICE.items():
            asked, here = declared.get(theirs), _values([self.parsed.get(step) for step in _BEFORE_MODEL], ours)
            if isinstance(asked, bool) and here and asked not in here:
                found.append(f"{theirs} = {str(asked).lower()}")
        said = []
        if found:
            files = " or ".join(_DECLARING_FILES)
            said.append(f"{files} has {', '.join(found)} and {HUGGING_FACE_FILE} the contrary, which takes precedence")
        if lacking := [name for name in _declared_tokens(declared) if self.library.token_to_id(name) is None]:
            shown = f"{', '.join(map(repr, lacking[:3]))}{', …' if lacking[3:] else ''}"
            said.append(f"files beside {HUGGING_FACE_FILE} name tokens that it lacks ({shown}), which are not used")
        return ", and ".join(said)

    def pieces(self, specials: set[int]) -> list[bytes]:
        """Returns the bytes of each id in the middle of a text; empty for specials and for ids without a token."""
        wanted = [token_id for token_id in sorted(self.vocabulary) if token_id not in specials]
        is_byte_level = any("ByteLevel" in _values(self.parsed.get(step), "type") for step in _BEFORE_MODEL)
        found = self._from_alphabet(wanted) if is_byte_level else self._from_decoder(wanted)
        if self.unknown is not None:
            space = b" " if found.get(self.unknown, b"").startswith(b" ") else b""
            found[self.unknown] = space + UNKNOWN
        return [found.get(token_id, b"") for token_id in range(max(self.vocabulary) + 1)]

    def _from_alphabet(self, ids: Sequence[int]) -> dict[int, bytes]:
        """Decodes tokens whose characters stand for bytes; added tokens are text."""
        alphabet = byte_of_character()
        added = self.library.get_added_tokens_decoder()
        model = self.parsed["model"]
        suffix, prefix = (model.get(name) or "" for name in ("end_of_word_suffix", "continuing_subword_prefix"))
        found = {}
        for token_id in ids:
            token = self.vocabulary[token_id]
            if token_id in added:
                found[token_id] = token.encode()
                continue
            ends_word = bool(suffix) and token.endswith(suffix)
            token = token.removesuffix(suffix).removeprefix(prefix)
            characters = (bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)
            found[token_id] = b"".join(characters) + (b" " if ends_word else b"")
        return found

    def _from_decoder(self, ids: Sequence[int]) -> dict[int, bytes]:
        """Decodes each token between two others, with the tokenizer's own decoder.

        The decoder may treat the first and the last token differently, and a token may begin or end with a space. So
        each token is decoded between two copies of a token ``a``, and its piece is the text between them. ``a`` is a
        token with which this succeeds for most others.
        """
        decoders = _values(self.parsed.get("decoder"), "type")
        is_byte = self.parsed["model"].get("byte_fallback") or "ByteFallback" in decoders
        sample = ids[:: max(1, len(ids) // 64)]
        best = max(ids[:: max(1, len(ids) // 32)], key=lambda a: sum(p is not None for p in self._between(a, sample)))
        found = {}
        for token_id, piece in zip(ids, self._between(best, ids), strict=True):
            token = self.vocabulary[token_id]
            byte = _BYTE_TOKEN.fullmatch(token) if is_byte else None
            found[token_id] = bytes([int(byte[1], 16)]) if byte else (token if piece is None else piece).encode()
        return found

    def _between(self, a: int, ids: Sequence[int]) -> list[str | None]:
        alone, two = (self.library.decode([a] * count, skip_special_tokens=False) for count in (1, 2))
        if not two.startswith(alone) or "\ufffd" in alone:
            return [None] * len(ids)
        rest = two[len(alone) :]
        texts = self.library.decode_batch([[a, token_id, a] for token_id in ids], skip_special_tokens=False)
        found: list[str | None] = []
        for text in texts:
            is_between = text.startswith(alone) and text.endswith(rest) and len(text) >= len(two)
            found.append(text[len(alone) : len(text) - len(rest)] if is_between else None)
        return found


class HuggingFaceTokenizer(PretrainedTokenizer):
    """A tokenizer of the library ``tokenizers``.

    Args:
      definition: content of a ``tokenizer.json``.
      bos_id: id of BOS in it; None: an id is appended.
      eos_id: id of EOS in it; None: an id is appended.
      vocab_size: number of ids, where a model has more than the file has tokens; None: as many as the file has.
      source: the file, for messages.

    Raises:
      UserError: the library cannot run it, or it has more tokens than ``vocab_size``.
    """

    kind = "huggingface"
    file_names = re.compile(r".*\.json", re.IGNORECASE | re.DOTALL)

    def __init__(
        self,
        definition: str | _Definition,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        vocab_size: int | None = None,
        source: Path = Path(HUGGING_FACE_FILE),
    ):
        self._read = read = definition if isinstance(definition, _Definition) else _Definition(definition, source)
        self._declared: dict[str, Any] = {"bos_id": bos_id, "eos_id": eos_id}
        own = {special for special in (bos_id, eos_id) if special is not None}
        specials = read.specials | own
        with read.errors():
            if bad := [special for special in own if special not in read.vocabulary or special == read.unknown]:
                raise ValueError(f"id {bad[0]} cannot be BOS or EOS")
            self._tokenizer = _for_text(read.runnable, {token_id: read.vocabulary[token_id] for token_id in specials})
            pieces = read.pieces(specials)
            num_tokens = len(pieces)
            if vocab_size is not None and vocab_size > num_tokens:
                pieces += [b""] * (vocab_size - num_tokens)
                self._declared["vocab_size"] = vocab_size
            first = self._tokenizer.encode("a", add_special_tokens=False).ids[:1]
        if vocab_size is not None and num_tokens > vocab_size:
            raise UserError(f"{source} has {num_tokens} tokens, and the model knows {vocab_size}.")
        names = {token_id: f"⟨unused {token_id}⟩" for token_id in range(len(pieces)) if token_id not in read.vocabulary}
        names |= {token_id: read.vocabulary[token_id] for token_id in specials}
        if read.unknown is not None:
            names[read.unknown] = read.vocabulary[read.unknown]
        adds_space = any(pieces[token_id].startswith(b" ") for token_id in first)
        super().__init__(pieces, bos_id=bos_id, eos_id=eos_id, names=names, adds_space=adds_space)

    @classmethod
    def open(cls, path: Path) -> HuggingFaceTokenizer:
        """Reads a ``tokenizer.json``, and BOS and EOS from the files beside it."""
        return cls._open(path)

    @classmethod
    def open_for_model(
        cls, path: Path, *, vocab_size: int, bos_id: int | None = None, eos_id: int | None = None
    ) -> HuggingFaceTokenizer:
        """Reads the ``tokenizer.json`` of a model that is there already, so that no id may be appended.

        BOS and EOS are those of the files beside it, else those given, else each is the other.

        Args:
          path: the file.
          vocab_size: ids that the model knows.
          bos_id, eos_id: of the model's config.

        Raises:
          UserError: see ``HuggingFaceTokenizer``; or there is neither BOS nor EOS.
        """
        return cls._open(path, vocab_size, (bos_id, eos_id))

    @classmethod
    def _open(
        cls, path: Path, vocab_size: int | None = None, of_model: tuple[int | None, int | None] | None = None
    ) -> HuggingFaceTokenizer:
        definition = _Definition(_decode(read_bytes(path), path), path)
        declared = _declarations(path.parent)
        bos_id = definition.find(declared, "bos_token", BOS_NAMES)
        eos_id = definition.find(declared, "eos_token", EOS_NAMES)
        if of_model is not None:
            found = [known if own is None else own for own, known in zip((bos_id, eos_id), of_model, strict=True)]
            bos_id, eos_id = (own if own is not None else other for own, other in (found, found[::-1]))
            if bos_id is None:
                raise UserError(
                    f"{path} and the config of the model name neither BOS nor EOS, of which natsjax needs one."
                )
        tokenizer = cls(definition, bos_id=bos_id, eos_id=eos_id, vocab_size=vocab_size, source=path)
        tokenizer.assumed = definition.contradictions(declared)
        notes = definition.what_is_off()
        for name, own, token_id in (("BOS", bos_id, tokenizer.bos_id), ("EOS", eos_id, tokenizer.eos_id)):
            setting = f"{name.lower()}_token"
            where = f"from {setting} beside it" if setting in declared else "by its usual name"
            if of_model is not None and definition.find(declared, setting, ()) is None and setting in declared:
                where = "from the config of the model"
            notes.append(note_on(name, None if own is None else definition.vocabulary[own], where, token_id))
        tokenizer.notes = tuple(notes)
        return tokenizer

    @classmethod
    def load(cls, folder: Path, description: Mapping[str, Any]) -> HuggingFaceTokenizer:
        """Loads what ``save`` wrote."""
        numbers = [description.get(f"declared_{name}") for name in ("bos_id", "eos_id", "vocab_size")]
        if not all(value is None or isinstance(value, int) for value in numbers):
            raise UserError(
                f"the tokenizer in {folder} declares the ids {numbers[:2]} as BOS and EOS, of {numbers[2]} in all; "
                "whole numbers were expected."
            )
        path = folder / HUGGING_FACE_FILE
        bos_id, eos_id, vocab_size = numbers
        text = _decode(read_bytes(path), path)
        tokenizer = cls(text, bos_id=bos_id, eos_id=eos_id, vocab_size=vocab_size, source=path)
        tokenizer.assumed = str(description.get("assumed", ""))
        return tokenizer

    def _encode(self, text: str) -> Int32Array:
        with as_user_error("the tokenizer cannot encode a text"):
            return as_ids(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_batch(self, texts: Sequence[str]) -> list[Int32Array]:
        with as_user_error("the tokenizer cannot encode a text"):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [as_ids(encoding.ids) for encoding in encodings]

    @property
    def definition(self) -> str:
        """The content of its ``tokenizer.json``."""
        return self._read.text

    def _write(self, folder: Path) -> None:
        (folder / HUGGING_FACE_FILE).write_text(self._read.text, encoding="utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._declared), (self._read.text,)

    def _own_tokens(self) -> Sequence[str]:
        return [token.content for token in self._read.library.get_added_tokens_decoder().values()]

    def _options(self) -> dict[str, Any]:
        return super()._options() | {f"declared_{name}": value for name, value in self._declared.items()}

    def _definition(self) -> list[object]:
        return [self._declared, json.dumps(self._read.parsed, sort_keys=True)]


def _decode(data: bytes, path: Path) -> str:
    with as_user_error(f"the tokenizer {path} is not UTF-8"):
        return data.decode("utf-8-sig")  # editors of Windows put a byte-order mark before it


def _declarations(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _DECLARING_FILES:
        if (folder / name).is_file():
            found = read_json(folder / name) | found
    if (folder / _ADDING_FILE).is_file():
        found |= {_ADDING_FILE: read_json(folder / _ADDING_FILE)}
    return found


def _declared_tokens(declared: Mapping[str, Any]) -> list[str]:
    """Returns the spellings of the tokens that files beside ``tokenizer.json`` name, each once."""
    added = declared.get("added_tokens_decoder")
    own = [declared.get("bos_token"), declared.get("eos_token"), *(added.values() if isinstance(added, dict) else [])]
    names = [token.get("content") if isinstance(token, dict) else token for token in own]
    names += declared.get(_ADDING_FILE, {})
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _for_text(parsed: dict[str, Any], specials: Mapping[int, str]) -> tokenizers.Tokenizer:
    """Builds the tokenizer for texts, none of which is encoded to a special id.

    The library has an option not to look for special tokens in a text, but a model that has them in its vocabulary may
    still produce them (unigram does). Here their names in the vocabulary are replaced by ones that no text contains.
    """
    mark = "\ufdd0natsjax special "  # begins with a noncharacter, which is not for interchange
    hidden = {name: f"{mark}{token_id}\ufdd0" for token_id, name in specials.items()}
    model = dict(parsed["model"])
    if isinstance(model.get("vocab"), list):
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {hidden.get(token, token): token_id for token, token_id in model["vocab"].items()}
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not hidden.keys() & set(_made_from(merge))]
    added = [
        token | ({"content": hidden[token["content"]], "special": True} if token["content"] in hidden else {})
        for token in parsed.get("added_tokens") or []
    ]
    library = tokenizers.Tokenizer.from_str(json.dumps(parsed | {"model": model, "added_tokens": added}))
    library.encode_special_tokens = True
    for token_id, name in specials.items():
        if library.token_to_id(hidden[name]) != token_id:
            raise ValueError(f"its special token {name!r} does not have its own id")
    return library


def _made_from(merge: str | Sequence[str]) -> Iterator[str]:
    """Yields the tokens of a merge: two parts and their concatenation."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    yield from (left, right, left + right)


def _values(step: Any, name: str) -> list[Any]:
    """Returns all values of a setting in the steps of the tokenizer."""
    if isinstance(step, list):
        return [value for part in step for value in _values(part, name)]
    if not isinstance(step, dict):
        return []
    return [*([step[name]] if name in step else []), *(v for part in step.values() for v in _values(part, name))]
