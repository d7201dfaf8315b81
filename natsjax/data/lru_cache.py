"""A bounded cache that threads may share and that pickles empty."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Keeps the values used last, up to a total size; the newest one stays even if it alone exceeds that.

    `functools.lru_cache` bounds the number of entries, not their size, and cannot be pickled.

    Args:
      make: gives the value of a key that is not there; runs outside the lock, so that threads can read in
        parallel.
      max_size: bound on the sum of sizes.
      size: size of a value; 1 for each by default.
    """

    def __init__(self, make: Callable[[K], V], *, max_size: int, size: Callable[[V], int] | None = None):
        self._make = make
        self._max_size = max_size
        self._size_of = size or _one
        self._clear()

    def _clear(self) -> None:
        self._values: OrderedDict[K, V] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def __getitem__(self, key: K) -> V:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = self._make(key)
        with self._lock:
            if key not in self._values:  # another thread may have been faster
                self._values[key] = value
                self._size += self._size_of(value)
                while self._size > self._max_size and len(self._values) > 1:
                    self._size -= self._size_of(self._values.popitem(last=False)[1])
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_make", "_max_size", "_size_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()


def _one(_: object) -> int:  # a function, for a lambda cannot be pickled
    return 1
