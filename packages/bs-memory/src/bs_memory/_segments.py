"""Segmented LRU: the algorithm of the cache, without its locks, keys and devices."""

import itertools
from collections import OrderedDict
from typing import Any

import torch

from bs_memory._residence import Residence

_PROTECTED_SHARE = 0.8  # of either bound; what is left is where newcomers prove themselves


class Entry:
    """A cached value and what it costs."""

    __slots__ = ("nbytes", "place", "residences", "value")

    def __init__(self, value: Any, nbytes: int, place: torch.device, residences: tuple[Residence, ...]) -> None:
        self.value = value
        self.nbytes = nbytes
        self.place = place  # where its memory is
        self.residences = residences

    def read(self) -> Any:
        """The value, made safe to read on the current stream."""
        for residence in self.residences:
            residence.enter()
        return self.value


class Segments:
    """Entries under two bounds, the ones that were asked for twice protected from those that were not.

    Source:
        Karedla, Love and Wherry, "Caching strategies to improve disk system performance", 1994.
    """

    __slots__ = (
        "evictions",
        "high_water",
        "max_bytes",
        "max_entries",
        "nbytes",
        "probation",
        "promotions",
        "protected",
    )

    def __init__(self, max_bytes: int | None, max_entries: int | None) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.probation: OrderedDict[Any, Entry] = OrderedDict()  # coldest first, as below
        self.protected: OrderedDict[Any, Entry] = OrderedDict()
        self.nbytes = {"all": 0, "protected": 0}
        self.high_water = 0
        self.promotions = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self.probation) + len(self.protected)

    def hit(self, key: Any) -> Entry | None:
        """Finds an entry and makes it hotter; `key` must be the very one it was added under."""
        entry = self.protected.get(key)
        if entry is not None:
            self.protected.move_to_end(key)
            return entry
        entry = self.probation.get(key)
        if entry is not None:
            self._promote(key, entry)
        return entry

    def _promote(self, key: Any, entry: Entry) -> None:
        entries = None if self.max_entries is None else int(_PROTECTED_SHARE * self.max_entries)
        nbytes = None if self.max_bytes is None else int(_PROTECTED_SHARE * self.max_bytes)
        self.probation.move_to_end(key)
        if entries == 0 or (nbytes is not None and entry.nbytes > nbytes):
            return  # one that fills the whole segment would push all the others out of it
        self.protected[key] = self.probation.pop(key)
        self.nbytes["protected"] += entry.nbytes
        self.promotions += 1
        while (entries is not None and len(self.protected) > entries) or (
            nbytes is not None and self.nbytes["protected"] > nbytes
        ):
            coldest, demoted = self.protected.popitem(last=False)
            self.nbytes["protected"] -= demoted.nbytes
            self.probation[coldest] = demoted

    def add(self, key: Any, entry: Entry) -> list[Any]:
        """Adds an entry as the newest on probation; returns the keys that have to be removed for it."""
        self.probation[key] = entry
        self.nbytes["all"] += entry.nbytes
        entries, nbytes, victims = len(self), self.nbytes["all"], []
        for other, cold in itertools.chain(self.probation.items(), self.protected.items()):
            over_bytes = self.max_bytes is not None and nbytes > self.max_bytes
            over_entries = self.max_entries is not None and entries > self.max_entries
            if not (over_bytes or over_entries):
                break
            if other is not key:
                victims.append(other)
                nbytes -= cold.nbytes
                entries -= 1
        self.evictions += len(victims)
        self.high_water = max(self.high_water, nbytes)
        return victims

    def remove(self, key: Any) -> Entry | None:
        """Removes an entry and returns it, so that the caller says when it is destroyed."""
        entry = self.probation.pop(key, None)
        if entry is None:
            entry = self.protected.pop(key, None)
            if entry is None:
                return None
            self.nbytes["protected"] -= entry.nbytes
        self.nbytes["all"] -= entry.nbytes
        return entry

    def coldest_first(self) -> list[tuple[Any, Entry]]:
        """All keys and entries in the order in which they go."""
        return [*self.probation.items(), *self.protected.items()]
