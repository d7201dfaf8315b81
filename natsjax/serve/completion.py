"""A text of an answer: its tokens' text as it grows, where a stop string cuts it, and log-probabilities beside it.

A token at a time is looked at, so that a text does not depend on how many come together, streamed or not.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from natsjax.data import Tokenizer
from natsjax.data.tokenizers.base import Vocabulary
from natsjax.decode.rows import Drawn, RowRequest
from natsjax.generate.text_stream import IdStream, TextStream

_LEAST_LOGPROB = -9999.0
"""JSON has no -∞."""


class Piece(NamedTuple):
    """A part of a text on its way to the client.

    Attributes:
      number: of the text in the answer.
      text: what is new.
      logprobs: as OpenAI's, of the tokens that begin in it; None where they are not asked for.
      finish_reason: "stop" or "length" with the last one, else None.
      num_tokens: tokens that were drawn so far.
      error: why nothing more comes, as a sentence; None where all is well.
    """

    number: int
    text: str = ""
    logprobs: dict[str, list | None] | None = None
    finish_reason: str | None = None
    num_tokens: int = 0
    error: str | None = None


class _Token(NamedTuple):
    text: str
    offset: int
    logprob: float | None
    likeliest: dict[str, float] | None


class GrowingText:
    """Text of tokens that come one by one, up to the first stop string.

    Args:
      vocabulary: a tokenizer, or the recall task's vocabulary, whose text is ids with commas.
      stop: strings before which the text ends.
      counts: False where a prompt comes first, in which they are looked over.

    Attributes:
      is_cut: True when a stop string has come.

    Example:
      >>> text = GrowingText(ByteTokenizer(), ["st"])
      >>> for byte in b"a stop":
      ...     text.add(byte)
      >>> text.end()
      >>> text.take()
      ('a ', …)
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = (), *, counts: bool = True):
        self._vocabulary, self._stop = vocabulary, tuple(stop)
        self._stream = TextStream(vocabulary) if isinstance(vocabulary, Tokenizer) else IdStream()
        self._ahead: list[int] = []  # BOS, which decides on the space of the next token
        self._held, self._given = "", 0  # text that is not given out yet, and the length of what was
        self._begin: int | None = 0 if counts else None  # of the text in which stop strings count
        self._tokens: list[_Token] = []
        self.is_cut, self._is_ended = False, False

    def add(
        self,
        token: int,
        logprob: float | None = None,
        likeliest: Mapping[int, float] | None = None,
        *,
        is_shown: bool = True,
    ) -> None:
        """Adds a token; one that is not shown is not among those that ``take`` returns."""
        if is_shown:
            name, best = self.name(token), None if likeliest is None else self._named(likeliest)
            if best is not None and logprob is not None:
                best.setdefault(name, logprob)
            offset = self._given + len(self._held) + self._stream.num_before(token)
            self._tokens.append(_Token(name, offset, logprob, best))
        if token == getattr(self._vocabulary, "bos_id", None):
            self._ahead.append(token)
            return
        self._append(self._stream.push([*self._ahead, token]))
        self._ahead = []

    def begin_generated(self) -> None:
        """Ends the part in which stop strings do not count, the prompt's."""
        self._flush()
        self._begin = self._given + len(self._held)

    def end(self) -> None:
        """Ends the text: half a character at its end becomes U+FFFD."""
        if not self.is_cut:
            self._flush()
            self._append(self._stream.push([], is_last=True) if isinstance(self._stream, TextStream) else "")
        self._is_ended = True

    def _flush(self) -> None:
        if self._ahead:
            self._append(self._stream.push(self._ahead))
            self._ahead = []

    def _append(self, text: str) -> None:
        self._held += text
        if self._begin is None or not (self._stop and text):
            return
        # One that ends in the new text; those before have been looked for.
        longest = max(map(len, self._stop))
        first = max(len(self._held) - len(text) - longest + 1, self._begin - self._given, 0)
        places = [at for stop in self._stop if (at := self._held.find(stop, first)) >= 0]
        if places:
            cut = min(places)
            self._held, self.is_cut = self._held[:cut], True
            self._tokens = [token for token in self._tokens if token.offset < self._given + cut]

    def take(self) -> tuple[str, list[_Token]]:
        """Returns the text that nothing can change any more, and the tokens that begin in it."""
        sure = len(self._held)
        if not (self._is_ended or self.is_cut):
            sure -= self._doubtful()
        text, self._held = self._held[:sure], self._held[sure:]
        self._given += sure
        if self._is_ended or self.is_cut:
            tokens, self._tokens = self._tokens, []
        else:
            count = sum(token.offset < self._given for token in self._tokens)
            tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return text, tokens

    def _doubtful(self) -> int:
        """Returns the length of the longest end of the text that a stop string may begin with."""
        if self._begin is None:
            return 0
        generated = self._held[max(self._begin - self._given, 0) :]
        lengths = range(min(max(map(len, self._stop), default=0) - 1, len(generated)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(generated[-n:]) for stop in self._stop)), 0)

    def name(self, token: int) -> str:
        r"""Returns a token as OpenAI's log-probabilities have it: its text, or ``bytes:\xe2`` for a part of one."""
        if not isinstance(self._vocabulary, Tokenizer):
            return str(token)
        piece = self._vocabulary.piece(token)
        if not piece:
            return self._vocabulary.token_text(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _named(self, likeliest: Mapping[int, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in likeliest.items():  # of two with one text the likelier one
            found.setdefault(self.name(token), max(logprob, _LEAST_LOGPROB))
        return found


def _as_openai(tokens: Sequence[_Token], num_logprobs: int) -> dict[str, list | None]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.likeliest for token in tokens] if num_logprobs else None,
        "text_offset": [token.offset for token in tokens],
    }


@dataclasses.dataclass(eq=False)
class Choice:
    """One text of an answer, as the engine's ``Job``.

    Attributes:
      index: number of the text in the answer.
      request: of its row.
      vocabulary: of the run.
      stop: strings before which the text ends.
      echo: True to begin with the prompt.
      num_logprobs: likeliest tokens that the answer has beside each one; None for no log-probabilities.
      has_own_bos: True where the prompt begins with a BOS that the client did not give.
      streams: True to send text as it comes.
      send: takes the pieces; called in the engine's thread.
    """

    index: int
    request: RowRequest
    vocabulary: Vocabulary
    stop: tuple[str, ...]
    echo: bool
    num_logprobs: int | None
    has_own_bos: bool
    streams: bool
    send: Callable[[Piece], Any]

    def __post_init__(self):
        self._text = GrowingText(self.vocabulary, self.stop, counts=False)
        self._is_scored = self.num_logprobs is not None
        self._num_tokens, self._has_begun, self._is_generating = 0, False, False

    def take(self, drawn: Drawn) -> str | None:
        """See ``Job``."""
        reason = None
        if not self._has_begun:
            self._has_begun = True
            self._begin()
        if not drawn.of_prompt and not self._is_generating:
            self._is_generating = True
            self._text.begin_generated()
        for place, (token, logprob) in enumerate(zip(drawn.tokens, drawn.logprobs, strict=True)):
            self._num_tokens += not drawn.of_prompt
            likeliest = drawn.likeliest[place] if drawn.likeliest else None
            self._text.add(token, max(logprob, _LEAST_LOGPROB), likeliest, is_shown=self._is_scored)
            if self._text.is_cut:
                reason = "stop"
                break
        if reason is None and drawn.is_last:
            ended = drawn.tokens and drawn.tokens[-1] in self.request.stop_tokens
            reason = "stop" if ended else "length"
            self._text.end()
            reason = "stop" if self._text.is_cut else reason
        if self.streams or reason is not None:
            text, tokens = self._text.take()
            if text or tokens or reason is not None:
                logprobs = None if self.num_logprobs is None else _as_openai(tokens, self.num_logprobs)
                self.send(Piece(self.index, text, logprobs, reason, self._num_tokens))
        return reason

    def _begin(self) -> None:
        """Adds the part of the prompt that no log-probabilities come for: all of it, or its first token."""
        if not self.echo:
            return
        prompt = self.request.prompt
        first = prompt[:1] if self.request.scores_prompt else prompt
        for place, token in enumerate(first):
            self._text.add(token, is_shown=self._is_scored and not (self.has_own_bos and place == 0))

    def fail(self, message: str) -> None:
        """See ``Job``."""
        self.send(Piece(self.index, error=message, num_tokens=self._num_tokens))
