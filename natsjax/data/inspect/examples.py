"""One context taken apart for people: its document pieces, token by token, as plain data and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from natsjax.data.packing import Row, piece_spans
from natsjax.data.tokenizers import Tokenizer, Vocabulary

_UNLEARNED = "°"
_SHADES = ("\x1b[48;5;236m", "\x1b[48;5;240m")  # neighboring tokens have different backgrounds
_UNLEARNED_COLOR, _TITLE, _RESET = "\x1b[38;5;208m", "\x1b[1m", "\x1b[0m"
LEGEND = f"tokens stand between bars; {_UNLEARNED} behind one: what follows it is not learned (loss_weight 0)"
COLOR_LEGEND = (
    f"each token has its own background; orange and {_UNLEARNED}: what follows is not learned (loss_weight 0)"
)


@dataclass(frozen=True)
class Example:
    """A context with what is needed to read it.

    Attributes:
      row: arrays ``[t]`` (see ``natsjax.data.packing``).
      vocabulary: the tokens.
      document_name: gives the id of a document by its index; None where documents have none.
      place: where the context stands, by name, for example ``{"context": 7}``.
    """

    row: Row
    vocabulary: Vocabulary
    document_name: Callable[[int], str] | None
    place: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns everything about the context, as plain JSON; ``end`` is exclusive."""
        return {**self.place, **self.statistics(), "pieces": [self._piece(begin, end) for begin, end in self.spans()]}

    def spans(self) -> list[tuple[int, int]]:
        """Returns first token and end of each document piece: positions restart there."""
        _, starts, stops = piece_spans(self.row)
        return list(zip(starts.tolist(), stops.tolist(), strict=True))

    def statistics(self) -> dict[str, int]:
        """Counts ``tokens`` but padding, ``padding``, ``learned`` targets, ``pieces``; ``text_bytes`` of text."""
        row = self.row
        real = row["document_end"] > 0
        counts = {
            "tokens": int(real.sum()),
            "padding": int((~real).sum()),
            "learned": int((row["loss_weight"] > 0).sum()),
            "pieces": len(self.spans()),
        }
        token_bytes = self.vocabulary.token_bytes
        return counts if token_bytes is None else counts | {"text_bytes": int(token_bytes[row["inputs"][real]].sum())}

    def lines(self, *, color: bool) -> Iterator[str]:
        """Yields the lines of the context for people.

        Args:
          color: mark tokens by ANSI colors; otherwise by ``|``.
        """
        statistics = self.statistics()
        where = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.place.items())
        counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in statistics.items())
        yield _titled(f"{where}: {counts}", color)
        pieces = self.to_json()["pieces"]
        for number, piece in enumerate(pieces, 1):
            yield _titled(f"-- piece {number} of {len(pieces)}: {_piece_title(piece)}", color)
            yield from _shown_tokens(piece["tokens"], color)
        if statistics["padding"]:
            yield _titled(f"-- {statistics['padding']} tokens of padding", color)

    def _piece(self, begin: int, end: int) -> dict[str, Any]:
        row, here = self.row, slice(begin, end)
        ids = row["inputs"][here].tolist()
        document = int(row["document_id"][begin])
        piece: dict[str, Any] = {"begin": begin, "end": end, "document": document}
        if self.document_name is not None and document >= 0:
            piece["id"] = self.document_name(document)
        if isinstance(self.vocabulary, Tokenizer):
            piece["begins_document"] = ids[0] == self.vocabulary.bos_id
            piece["text"] = self.vocabulary.decode(ids)
        # A piece that a context's edge cuts off continues with its own document, which is learned.
        piece["ends_document"] = not row["loss_weight"][end - 1] > 0
        fields = zip(
            ids,
            row["targets"][here].tolist(),
            row["loss_weight"][here].tolist(),
            row["positions"][here].tolist(),
            strict=True,
        )
        piece["tokens"] = [
            {
                "id": token,
                "text": self.vocabulary.token_text(token),
                "target": target,
                "loss_weight": weight,
                "position": position,
            }
            for token, target, weight, position in fields
        ]
        return piece


def _piece_title(piece: dict[str, Any]) -> str:
    begin, end, tokens = piece["begin"], piece["end"], piece["tokens"]
    parts = [f"tokens {begin} to {end - 1}, positions {tokens[0]['position']} to {tokens[-1]['position']}"]
    if piece["document"] >= 0:
        parts.append(f"document {piece['document']}" + (f" {visible(piece['id'])!r}" if "id" in piece else ""))
    if "begins_document" in piece:
        parts.append("from its beginning" if piece["begins_document"] else "from its middle")
        parts.append("to its end" if piece["ends_document"] else "cut off")
    return ", ".join(parts)


def _shown_tokens(tokens: list[dict[str, Any]], color: bool) -> Iterator[str]:
    text = ""
    for number, token in enumerate(tokens):
        unlearned = not token["loss_weight"] > 0
        shown = visible(token["text"]) + (_UNLEARNED if unlearned else "")
        if color:
            style = _SHADES[number % 2] + (_UNLEARNED_COLOR if unlearned else "")
            # Each line by itself: a terminal would draw the background to the end of the line.
            text += "\n".join(f"{style}{line}{_RESET}" for line in shown.split("\n"))
        else:
            text += f"|{shown}"
    yield from (text if color else f"{text}|").split("\n")


def visible(text: str) -> str:
    """Returns text with line ends marked (``↵`` before each) and other control characters spelled out."""
    return "".join(
        "↵\n" if letter == "\n" else letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _titled(line: str, color: bool) -> str:
    return f"{_TITLE}{line}{_RESET}" if color else line
