"""Generated text on its way to a person: never half a character, never two prompts at once."""

from collections.abc import Sequence
from typing import TextIO

from natsjax.data import Tokenizer
from natsjax.decode.generation import OnTokens
from natsjax.runtime import standard_streams

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decoder of a growing list of tokens; it gives out the text that no later token can change.

    Example:
      >>> stream = TextStream(ByteTokenizer())
      >>> [stream.push([byte]) for byte in "aö".encode()]
      ['a', '', 'ö']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._held = tokenizer, b""

    def push(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Takes more tokens and returns more text; ``is_last`` gives out what is left."""
        data, self._held = self._held + self._tokenizer.decode_bytes(tokens), b""
        text = data.decode(errors="replace")
        if is_last or not text.endswith(_REPLACEMENT):
            return text
        # A character that is not whole yet: of up to three bytes, and no more is kept, however much is no text at all.
        ends = (data[-3:], data[-2:], data[-1:])
        self._held = next(end for end in ends if end.decode(errors="replace") == _REPLACEMENT)
        return text[:-1]

    def num_before(self, token: int) -> int:
        """Counts the characters, not given out yet, before the one that a token's text would begin in: 0 or 1."""
        first = self._tokenizer.piece(token)[:1]
        return len((self._held + first).decode(errors="replace")) - 1 if first else 0


class IdStream:
    """The same where there is no text: it gives ids with commas between them, as ``--prompt_tokens`` takes them."""

    def __init__(self):
        self._is_first = True

    def push(self, tokens: Sequence[int], is_last: bool = False) -> str:
        """Takes more tokens and returns more text."""
        comma = "" if self._is_first or not tokens else ","
        self._is_first &= not tokens
        return comma + ",".join(map(str, tokens))

    def num_before(self, token: int) -> int:
        """Returns 0: nothing is held back, and a comma is a part of the id behind it."""
        return 0


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Characters that a terminal would obey, made visible."""


class Printer:
    """Writer of prompts and their continuations, in order: of the first unfinished one at once, then of the next.

    Args:
      stream: gets the text; None: nothing is written.
      tokenizer: None: ids are written.
      prompts: ids of all prompts.
      stop: ids that end a prompt.
      num_new: number of tokens that ends a prompt.
      echo: whether prompts are written too.
      kept: whether tokens are kept elsewhere too; then generation continues when the stream is gone.
    """

    def __init__(
        self,
        stream: TextIO | None,
        tokenizer: Tokenizer | None,
        prompts: list[list[int]],
        stop: set[int],
        num_new: int,
        echo: bool,
        kept: bool = False,
    ):
        self._stream, self._tokenizer, self._prompts = stream, tokenizer, prompts
        self._stop, self._num_new, self._echo, self._kept = stop, num_new, echo, kept
        self._waiting: list[list[int]] = [[] for _ in prompts]
        self._count, self._is_done = [0] * len(prompts), [False] * len(prompts)
        self._at, self._is_open = 0, False
        self._is_terminal = stream is not None and stream.isatty()

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, *_) -> None:
        if self._is_open:  # interrupted; what comes next on a terminal begins a line
            self._write("\n")

    def begin(self) -> None:
        """Writes the heading and the prompt that come next."""
        self._words: TextStream | IdStream = IdStream() if self._tokenizer is None else TextStream(self._tokenizer)
        self._is_open = True
        if len(self._prompts) > 1:
            self._write(f"{chr(10) if self._at else ''}==> {self._at + 1} of {len(self._prompts)} <==\n")
        if self._echo:
            self._write(self._words.push(self._prompts[self._at]), bold=True)

    def of_batch(self, first: int) -> OnTokens:
        """Returns the callback of ``decode.generate`` for the batch that begins with this prompt."""
        return lambda row, tokens, _: self.add(first + row, tokens)

    def add(self, number: int, tokens: list[int]) -> None:
        """Takes more tokens of a prompt, counted from 0.

        Raises:
          standard_streams.OutputLost: nobody reads the stream any more, and tokens are not kept elsewhere.
        """
        if not self._kept:
            standard_streams.check(self._stream)
        self._waiting[number] += tokens
        self._count[number] += len(tokens)
        self._is_done[number] = tokens[-1] in self._stop or self._count[number] == self._num_new
        while self._at < len(self._prompts):
            waiting, is_done = self._waiting[self._at], self._is_done[self._at]
            self._write(self._words.push(waiting, is_done))
            waiting.clear()
            if not is_done:
                return
            self._write("\n")
            self._at, self._is_open = self._at + 1, False
            if self._at < len(self._prompts):
                self.begin()

    def _write(self, text: str, bold: bool = False) -> None:
        if self._stream is None or not text:
            return
        if self._is_terminal:
            text = text.translate(_CONTROLS)
            text = f"\x1b[1m{text}\x1b[0m" if bold else text
        self._stream.write(text)
        self._stream.flush()
