"""The body of a request for completions, read and checked field by field: every mistake is one sentence."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from natsjax.config_fields import format_value, nearest
from natsjax.decode.rows import MAX_LIKELIEST
from natsjax.decode.sampling import Sampling
from natsjax.errors import UserError
from natsjax.serve.errors import ApiError

MAX_CHOICES = 128
"""Texts of one request: prompts times ``n``."""

_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000  # characters
_MAX_STOP_TOKENS = 64
_LARGEST = 2**30
_LARGEST_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """Request of a client; the fields are those of OpenAI's ``/v1/completions``, unless they are explained here.

    Attributes:
      prompts: texts, or token ids.
      sampling: temperature, top_p and seed, and ``top_k`` and ``min_p``, which OpenAI's interface lacks. Without a
        seed the server chooses one.
      has_seed: False where it has to.
      include_usage: of ``stream_options``.
      ignore_eos: continue where the model ends the document (an addition).
      stop_token_ids: a text ends after one of them (an addition).
    """

    prompts: tuple[str | tuple[int, ...], ...]
    model: str | None = None
    max_tokens: int = 16
    n: int = 1
    echo: bool = False
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    has_seed: bool = False
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


def parse_request(body: bytes) -> CompletionRequest:
    """Reads the JSON of a request.

    Raises:
      ApiError: it is no JSON object, or a field is unknown or does not fit (status 400).
    """
    fields = {name: value for name, value in _object(body).items() if value is not None}
    for name in fields:
        if name not in _READERS:
            shown = name if name.isidentifier() and len(name) < 100 else format_value(name)
            raise _mistake(None, f"unknown field {shown}{nearest(name, _READERS)}.")
    read = {name: _READERS[name](name, value) for name, value in fields.items()}
    if "prompt" not in read:
        raise _mistake("prompt", 'prompt: it is missing; give a text, "" where a document is to begin, or token ids.')
    if read.get("best_of", read.get("n", 1)) != read.get("n", 1):
        raise _mistake("best_of", "best_of: texts are not chosen from here; leave it out, or give what n is.")
    if read.get("stream_options") is not None and not read.get("stream"):
        raise _mistake("stream_options", "stream_options: it is for streams; give stream = true, or leave it out.")
    prompts = read["prompt"]
    if len(prompts) * read.get("n", 1) > MAX_CHOICES:
        raise _mistake("n", f"prompts * n = {len(prompts) * read.get('n', 1)}: at most {MAX_CHOICES}; divide them.")
    if read.get("max_tokens") == 0 and not read.get("echo"):
        raise _mistake("max_tokens", "max_tokens = 0: there would be no text; give 1 or more, or echo = true.")
    rule = {"temperature": 1.0} | {name: read[name] for name in ("temperature", *_RULES) if name in read}
    try:
        sampling = Sampling(**rule)
    except UserError as error:
        raise _mistake(str(error).partition(" ")[0], str(error)) from error
    same = ("model", "max_tokens", "n", "echo", "logprobs", "stop", "stream", "ignore_eos", "stop_token_ids")
    return CompletionRequest(
        prompts,
        sampling=sampling,
        has_seed="seed" in read,
        include_usage=bool(read.get("stream_options")),
        **{name: read[name] for name in same if name in read},
    )


_RULES = ("top_p", "top_k", "min_p", "seed")


def _mistake(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param=param)


def _object(body: bytes) -> dict[str, Any]:
    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    try:
        content = json.loads(body.decode("utf-8-sig"), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise _mistake(None, f"the body is no UTF-8 text (at byte {error.start}); convert it to UTF-8.") from error
    except RecursionError as error:
        raise _mistake(None, "the body is nested too deeply; a flat JSON object was expected.") from error
    except ValueError as error:
        reason = str(error).partition(";")[0][:150]  # Python's message on numbers of many digits gives it advice
        raise _mistake(None, f"the body is no JSON ({reason}); a JSON object was expected.") from error
    if not isinstance(content, dict):
        raise _mistake(None, f"the body is {format_value(content)}; a JSON object was expected.")
    return content


# --- a field each: ``reader(name, value)`` returns what it stands for ---


def _wrong(name: str, value: Any, expected: str) -> ApiError:
    return _mistake(name, f"{name} = {format_value(value)}: {expected} was expected.")


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return read


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30 or math.isnan(value):
        raise _wrong(name, value, "a number")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return value


def _stop(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > _MAX_STOPS or not all(isinstance(text, str) for text in texts):
        raise _wrong(name, value, f"a text or a list of up to {_MAX_STOPS} texts")
    if not all(0 < len(text) <= _MAX_STOP_LENGTH for text in texts):
        raise _wrong(name, value, f"texts of 1 to {_MAX_STOP_LENGTH} characters")
    return tuple(texts)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_STOP_TOKENS or not all(map(_is_id, value)):
        raise _wrong(name, value, f"a list of up to {_MAX_STOP_TOKENS} token ids")
    return tuple(value)


def _prompts(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Reads a text, token ids, or a list of either."""
    if isinstance(value, str):
        return (value,)
    expected = "a text, a list of token ids, or a list of texts or of lists of ids, none of them empty,"
    if not isinstance(value, list) or not value:
        raise _wrong(name, value, expected)
    if all(map(_is_id, value)):
        return (tuple(value),)
    found: list[str | tuple[int, ...]] = []
    for one in value:
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, list) and one and all(map(_is_id, one)):
            found.append(tuple(one))
        else:
            raise _wrong(name, value, expected)
    return tuple(found)


def _stream_options(name: str, value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= {"include_usage", "include_obfuscation"}:
        raise _wrong(name, value, '{"include_usage": true}')
    return _flag("stream_options.include_usage", value.get("include_usage", False))


def _nothing(*neutral: Any) -> Callable[[str, Any], None]:
    """Reads a field of OpenAI's that is not served here, in the values that change nothing."""

    def read(name: str, value: Any) -> None:
        if isinstance(value, bool) or value not in neutral:
            raise _mistake(name, f"{name} = {format_value(value)}: it is not served here; leave it out.")

    return read


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "prompt": _prompts,
    "max_tokens": _integer(0, _LARGEST),
    "n": _integer(1, MAX_CHOICES),
    "best_of": _integer(1, MAX_CHOICES),
    "echo": _flag,
    "logprobs": _integer(0, MAX_LIKELIEST),
    "stop": _stop,
    "stream": _flag,
    "stream_options": _stream_options,
    "temperature": _number,
    "top_p": _number,
    "seed": _integer(0, _LARGEST_SEED - 1),
    "user": _text,
    "suffix": _nothing(""),
    "presence_penalty": _nothing(0),
    "frequency_penalty": _nothing(0),
    "logit_bias": _nothing({}),
    "top_k": _integer(0, _LARGEST),
    "min_p": _number,
    "ignore_eos": _flag,
    "stop_token_ids": _ids,
}
