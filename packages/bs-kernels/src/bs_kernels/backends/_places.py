"""Where the units of every chunk lie, and what the plan alone masks there: worked out once per plan and batch shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._derived import derived
from ..plan import LayoutPlan
from ..token_mask import UNBOUNDED
from ._chunks import Chunk, Schedule, build_schedule

__all__ = ["ChunkPlace", "Grouping", "Places", "PlanFacts", "places_of"]

#: Bytes of index and mask tensors that are kept with a plan; where they would be more, every call works them out.
_KEEP = 1 << 26


@dataclass(frozen=True)
class Grouping:
    """How the heads of a call form units (see `_chunks`).

    Attributes:
        batch, kv_heads: B and Hkv.
        group: query heads per unit.
        head_units: HU, the number of head units.
        expansions: units per layout row.
    """

    batch: int
    kv_heads: int
    group: int
    head_units: int
    expansions: int

    @classmethod
    def of(cls, plan: LayoutPlan, batch: int, q_heads: int, kv_heads: int) -> Grouping:
        """The grouping of a plan's rows for these sizes."""
        group = q_heads // kv_heads if plan.heads == 1 else 1
        head_units = q_heads // group
        expansions = (batch if plan.batch == 1 else 1) * (head_units if plan.heads == 1 else 1)
        return cls(batch, kv_heads, group, head_units, expansions)


class PlanFacts:
    """Sizes and positions of a plan, without the tensors that what is derived from it is remembered by."""

    def __init__(self, plan: LayoutPlan, grouping: Grouping, used: Tensor) -> None:
        self.grouping, self.used_blocks = grouping, used.numel()
        self.block_size, self.seq_len, self.band = plan.block_size, plan.seq_len, plan.token_mask.band
        self.layouts, self.heads, self.q_blocks = plan.batch, plan.heads, plan.q_blocks
        self.q_token = torch.arange(plan.block_size[0], device=plan.device)
        self.k_token = torch.arange(plan.block_size[1], device=plan.device)
        self.token_distance = (self.k_token - self.q_token[:, None]).to(torch.int32)
        self.q_begin, self.q_first = plan.q_bounds.to(torch.int64), plan.q_start.to(torch.int64)
        self.k_begin, self.k_first = plan.kv_bounds[used].to(torch.int64), plan.kv_start[used].to(torch.int64)
        self.k_length = plan.kv_bounds.diff()[used].to(torch.int64)


class ChunkPlace:
    """One chunk of a plan for one batch shape.

    Scores of a chunk are viewed as ``[E, R, g, bq, n, bk]``: expansions, layout rows, query heads of the unit, query
    tokens, key blocks of the row, key tokens.

    Args:
        facts: about the plan.
        chunk: the chunk.
        span: the range of its units in the order of chunks.
    """

    def __init__(self, facts: PlanFacts, chunk: Chunk, span: slice) -> None:
        self.facts, self.chunk, self.span = facts, chunk, span
        rows, n = chunk.blocks.shape
        block_q, block_k = facts.block_size
        self.shape = (chunk.expand[1] - chunk.expand[0], rows, facts.grouping.group, block_q, n, block_k)

    @cached_property
    def _expansion(self) -> Tensor:
        return torch.arange(*self.chunk.expand, device=self.chunk.rows.device)[:, None]

    @property
    def _heads_expanded(self) -> int:
        """How many of a layout row's expansions belong to one batch element."""
        return self.facts.grouping.head_units if self.facts.heads == 1 else 1

    @cached_property
    def batch(self) -> Tensor:
        """int64[E, R]; batch element of each unit."""
        facts = self.facts
        if facts.layouts > 1:
            return (self.chunk.rows // (facts.heads * facts.q_blocks)).expand(self.shape[:2])
        return (self._expansion // self._heads_expanded).expand(self.shape[:2])

    @cached_property
    def head_unit(self) -> Tensor:
        """int64[E, R]; head unit of each unit."""
        facts = self.facts
        if facts.heads > 1:
            return ((self.chunk.rows // facts.q_blocks) % facts.heads).expand(self.shape[:2])
        return (self._expansion % self._heads_expanded).expand(self.shape[:2])

    @cached_property
    def q_block(self) -> Tensor:
        """int64[R]; query block of each row."""
        return self.chunk.rows % self.facts.q_blocks

    @cached_property
    def q_index(self) -> Tensor:
        """int64[E · R]; the units, in the order of layouts."""
        head_units = self.facts.grouping.head_units
        return ((self.batch * head_units + self.head_unit) * self.facts.q_blocks + self.q_block).flatten()

    @cached_property
    def kv_index(self) -> Tensor:
        """int64[E · R · n]; blocks in packed key tensors."""
        grouping = self.facts.grouping
        head = self.batch * grouping.kv_heads + self.head_unit // (grouping.head_units // grouping.kv_heads)
        return (head[..., None] * self.facts.used_blocks + self.chunk.blocks).flatten()

    @cached_property
    def q_head(self) -> Tensor:
        """int64[E, R, g]; query heads of each unit."""
        group = self.facts.grouping.group
        return self.head_unit[..., None] * group + torch.arange(group, device=self.head_unit.device)

    @property
    def q_tokens(self) -> Tensor:
        """int64[R, bq]; local query tokens. Those beyond a short block are not its own."""
        return self.facts.q_begin[self.q_block][:, None] + self.facts.q_token

    @property
    def k_tokens(self) -> Tensor:
        """int64[R, n, bk]; local key tokens, likewise."""
        return self.facts.k_begin[self.chunk.blocks][..., None] + self.facts.k_token

    @property
    def q_positions(self) -> Tensor:
        """int64[R, bq]; absolute positions of query tokens."""
        return self.facts.q_first[self.q_block][:, None] + self.facts.q_token

    @property
    def k_positions(self) -> Tensor:
        """int64[R, n, bk]; absolute positions of key tokens."""
        return self.facts.k_first[self.chunk.blocks][..., None] + self.facts.k_token

    @cached_property
    def outside_band(self) -> Tensor:
        """bool[1, R or 1, 1, bq, cut, bk]; pairs of the trailing blocks that the band drops or that do not exist."""
        facts = self.facts
        blocks = self.chunk.blocks[:, self.chunk.blocks.shape[1] - self.chunk.cut :]
        outside = (facts.k_token >= facts.k_length[blocks][..., None])[:, None]
        lo, hi = facts.band
        apart = (facts.k_first[blocks] - facts.q_first[self.q_block][:, None])[:, None, :, None]
        distance = apart.to(torch.int32) + facts.token_distance[:, None, :]
        if hi < UNBOUNDED:
            outside = outside | (distance > hi)
        if lo > -UNBOUNDED:
            outside = outside | (distance < lo)
        if outside.device.type == "cpu" and bool((outside == outside[:1]).all()):  # as along a diagonal
            outside = outside[:1].clone()
        return outside[None, :, None]

    @cached_property
    def band_bits(self) -> tuple[Tensor, Tensor] | None:
        """``outside_band`` for float32 scores as int32 of bits to keep and bits to set, where all rows share it."""
        outside = self.outside_band
        if outside.device.type != "cpu" or outside.shape[1] > 1:
            return None
        return outside.to(torch.int32) - 1, torch.where(outside, float("-inf"), 0.0).view(torch.int32)

    @cached_property
    def repeats(self) -> Tensor:
        """bool[1, R, 1, 1, max_padding, 1]; leading blocks that only fill a short row."""
        slot = torch.arange(self.chunk.max_padding, device=self.chunk.rows.device)
        return (slot < self.chunk.padding[:, None])[None, :, None, None, :, None]


@dataclass(frozen=True, eq=False)
class Places:
    """All chunks of a plan for one batch shape.

    Attributes:
        schedule: the schedule.
        chunks: where its chunks lie.
        units: how many units there are.
        busy: how many of them have a key block.
    """

    schedule: Schedule
    chunks: tuple[ChunkPlace, ...]
    units: int
    busy: int

    @classmethod
    def of(cls, plan: LayoutPlan, grouping: Grouping, schedule: Schedule) -> Places:
        """The places of a schedule."""
        facts = PlanFacts(plan, grouping, schedule.used)
        places: list[ChunkPlace] = []
        begin = end = 0
        for chunk in schedule.chunks:
            if chunk.first:
                begin, end = end, end + len(chunk.rows) * (chunk.expand[1] - chunk.expand[0])
            places.append(ChunkPlace(facts, chunk, slice(begin, end)))
        return cls(schedule, tuple(places), grouping.batch * grouping.head_units * plan.q_blocks, end)

    @cached_property
    def order(self) -> Tensor:
        """int64[units]; all units, in the order of chunks and then those without key blocks."""
        first = [place.q_index for place in self.chunks if place.chunk.first]
        at = torch.full((self.units,), self.units, device=self.schedule.used.device)
        if first:
            at[torch.cat(first)] = torch.arange(self.busy, device=at.device)
        return at.argsort(stable=True)


def places_of(plan: LayoutPlan, grouping: Grouping, budget: int) -> Places:
    """The places of a plan, kept with it unless they are large.

    Args:
        plan: the plan.
        grouping: how heads form units.
        budget: elements of a chunk's score tile.
    """
    key = (grouping.group, grouping.expansions, budget)
    schedule = derived(
        plan, ("chunks", *key), lambda: build_schedule(plan, grouping.group, grouping.expansions, budget)
    )

    def build() -> Places:
        return Places.of(plan, grouping, schedule)

    return build() if schedule.bytes_placed > _KEEP else derived(plan, ("places", grouping, *key), build)
