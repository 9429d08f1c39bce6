"""From what a gate picked to a layout that stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_kernels import BatchedLayout
from bs_patterns import BlockLayout

Key = tuple[tuple[int, int], tuple[int, int], bool]


def read_samples(samples: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """q and k of every calibration sample, checked."""
    if not isinstance(samples, Iterable):
        raise TypeError(f"samples: expected tuples that start with q and k, got {type(samples).__name__}")
    for n, sample in enumerate(samples):
        given = sample[:2] if isinstance(sample, tuple | list) else ()
        if len(given) < 2 or not all(isinstance(x, Tensor) for x in given):
            raise TypeError(f"samples[{n}]: expected a tuple that starts with q and k, got {type(sample).__name__}")
        yield given[0], given[1]


class Calibration:
    """Counts how often every block was picked, per lengths and causality."""

    def __init__(self) -> None:
        self.counts: dict[Key, Tensor] = {}
        self._sizes: dict[Key, Tensor] = {}
        self._sequences: dict[Key, int] = {}

    def add(self, layout: BatchedLayout) -> None:
        """Counts the picks of every sequence of a batch."""
        _, heads, rows, columns = layout.shape
        key = (layout.seq_len, layout.block_size, layout.causal)
        used = torch.arange(layout.indices.shape[-1], device=layout.device) < layout.counts[..., None]
        picks = torch.zeros(layout.shape, device=layout.device)
        picks.scatter_add_(-1, layout.indices.long(), used.to(picks.dtype))  # unused slots may repeat an index
        known = self.counts.get(key)
        if known is not None and known.shape[0] != heads:
            raise ValueError(f"samples: expected {known.shape[0]} heads in all of them, got {heads}")
        zero = torch.zeros(heads, rows, columns, device=layout.device)
        self.counts[key] = (zero if known is None else known) + picks.sum(0)
        sizes = layout.counts.sum(0)
        self._sizes[key] = sizes if known is None else self._sizes[key] + sizes
        self._sequences[key] = self._sequences.get(key, 0) + layout.indices.shape[0]

    def layouts(self) -> list[BlockLayout]:
        """Per lengths and causality, the blocks picked most often, each row keeping its average number of them."""
        made = []
        for key, counts in self.counts.items():
            seq_len, block_size, causal = key
            sizes = np.rint(self._sizes[key].cpu().numpy() / self._sequences[key]).astype(np.int64)
            picks = counts.cpu().numpy()
            order = np.argsort(-picks, axis=-1, kind="stable")
            rank = np.empty_like(order)
            np.put_along_axis(rank, order, np.arange(order.shape[-1])[None, None], axis=-1)
            mask = (rank < sizes[..., None]) & (picks > 0)
            made.append(BlockLayout.from_dense(mask, block_size=block_size, seq_len=seq_len, causal=causal))
        return made


class RecordedLayouts:
    """A pattern that knows the layouts of some lengths; of causal ones also every shorter length, as a prefix.

    Args:
        layouts: At most one per lengths and causality.
    """

    def __init__(self, layouts: list[BlockLayout]) -> None:
        self.layouts: Mapping[tuple[tuple[int, int], bool], BlockLayout] = {
            ((item.seq_len[0], item.seq_len[1]), item.causal): item for item in layouts
        }

    def layout(
        self,
        seq_len: int | tuple[int, int],
        *,
        block_size: int | tuple[int, int] = 64,
        heads: int = 1,
        causal: bool = False,
        density: float | None = None,
        candidates: Any = None,
    ) -> BlockLayout:
        """The layout of a length; arguments as for `bs_patterns.Pattern.layout`.

        Raises:
            ValueError: An unknown length, other blocks or heads than recorded, or a density or candidates, which would
                have no effect.
        """
        lengths = (seq_len, seq_len) if isinstance(seq_len, int) else (seq_len[0], seq_len[1])
        for name, value in (("density", density), ("candidates", candidates)):
            if value is not None:
                raise ValueError(f"{name}: expected None for recorded layouts, got {value!r}")
        found = self.layouts.get((lengths, causal))
        if found is None and causal and lengths[0] == lengths[1]:
            longer = [item for (known, c), item in self.layouts.items() if c and known[0] == known[1] > lengths[0]]
            if longer:
                found = min(longer, key=lambda item: item.seq_len[0]).rows_at(0, lengths[0])
        if found is None:
            known = ", ".join(f"{q} × {k}{' causal' if c else ''}" for (q, k), c in self.layouts)
            raise ValueError(
                f"seq_len: expected lengths that were calibrated ({known}) or causal ones shorter than those, got "
                f"{lengths[0]} × {lengths[1]}{' causal' if causal else ''}"
            )
        wanted = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
        if tuple(found.block_size) != wanted:
            raise ValueError(f"block_size: expected {found.block_size}, as recorded, got {wanted}")
        if found.heads not in (1, heads):
            raise ValueError(f"heads: expected {found.heads}, as recorded, got {heads}")
        return found

    def __repr__(self) -> str:
        known = ", ".join(f"{q} × {k}{' causal' if causal else ''}" for (q, k), causal in self.layouts)
        return f"RecordedLayouts({known})"
