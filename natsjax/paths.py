"""Paths in settings: stored absolute, so that they mean the same from every folder, and told apart from words.

A field that names paths says so with a ``PathSyntax``; ``settings.resolve_paths`` makes all of them absolute where a
run begins, and ``settings.differences`` takes two ways to write the same path for the same.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from natsjax.outputs import named_path


@dataclasses.dataclass(frozen=True)
class PathSyntax:
    """How the text of a field names paths.

    Attributes:
      words: texts that name none, beside the empty one.
      prefix: begins texts that name none; empty: there is no such.
      is_mixture: the text is ``PATH=WEIGHT,PATH=WEIGHT``.
    """

    words: tuple[str, ...] = ()
    prefix: str = ""
    is_mixture: bool = False

    def changed(self, text: str, change: Callable[[str], str]) -> str:
        """Returns the text with each of its paths changed."""
        if not self.is_path(text):
            return text
        if not self.is_mixture:
            return change(text)
        parts = []
        for part in text.split(","):
            path, equals, weight = part.strip().rpartition("=")
            parts.append(f"{change(path)}={weight}" if equals and path else part)
        return ",".join(parts)

    def resolved(self, text: str) -> str:
        """Returns the text with each of its paths absolute, links followed (``outputs.named_path``)."""
        return self.changed(text, lambda path: str(named_path(path)))

    def is_path(self, text: str) -> bool:
        """Whether the text names any path."""
        return bool(text) and text not in self.words and not (self.prefix and text.startswith(self.prefix))

    def may_be_moved(self, old: str, new: str) -> bool:
        """Whether ``new`` may be what ``old`` was, in another place: whoever reads it must compare the contents."""
        if not self.is_path(old) or not self.is_path(new):
            return False
        if self.is_mixture:
            return self.changed(old, lambda _: "") == self.changed(new, lambda _: "")
        return Path(old).name == Path(new).name


MIXTURE = PathSyntax(is_mixture=True)
"""Of ``data.mixture``; the weights stay as they are written."""
