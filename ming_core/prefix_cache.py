"""Keys and values of past transcripts, found by content and bounded in bytes.

What a round computed, the next one need not compute again, whichever branch it is on and however it came there. An
entry holds the keys and values of one segment, under a key that stands for everything up to that segment's end, so
conversations with a common beginning share its entries. Entries rest in host memory; the least recently used go first,
and an entry always before those it builds on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .kv_cache import KeyValues

DEFAULT_BYTES = 1 << 30


class PrefixCache:
    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        """`limit` in bytes; 0 switches the cache off."""
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[bytes, KeyValues] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, keys: Sequence[bytes]) -> list[KeyValues]:
        """Entries of the longest run of leading `keys` (`conversation.segment_keys`) that is here."""
        found = []
        for key in keys:
            if key not in self._entries:
                break
            found.append(self._entries[key])
        self._touch(keys[: len(found)])
        return found

    def store(self, keys: Sequence[bytes], entries: Sequence[KeyValues]) -> None:
        """Remember the entries of the last len(entries) of `keys`; the keys before them are what they build on."""
        for key, entry in zip(keys[len(keys) - len(entries) :], entries, strict=True):
            if key not in self._entries:
                self._entries[key] = entry
                self.bytes += entry.bytes
        self._touch([key for key in keys if key in self._entries])
        while self.bytes > self.limit:
            _, dropped = self._entries.popitem(last=False)
            self.bytes -= dropped.bytes

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark as used, the beginning of a transcript last, so that it outlives what builds on it."""
        for key in reversed(keys):
            self._entries.move_to_end(key)
