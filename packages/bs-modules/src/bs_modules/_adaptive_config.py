"""What a learned gate chooses, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from ._checks import check_choice, check_density, check_flag, check_int, check_positive, check_sparsity
from .config import CheckedConfig

GATES = ("straight_through", "soft")
POOLINGS = ("mean_max", "mean", "max")
ROW_BUDGETS = ("even", "share")


@dataclasses.dataclass
class AdaptiveConfig(CheckedConfig):
    """How many blocks a learned gate keeps, and how it scores them.

    Assigning to a field checks it at once. `base_sparsity`, `max_density`, `min_temperature`, `gate`, `block_size`,
    `window_size`, `row_budget` and `distill_rows` take effect at the next call of the modules that hold the config; the
    other fields say what parameters a module is made with, and are read when it is made.

    Args:
        base_sparsity: The **sparsity** to meet, in [0, 1): 0.9 keeps 10 % of the allowed blocks.
        temperature: Divides the scores, at first: high explores while training, low trusts the scores.
        min_temperature: What the temperature never falls below.
        learnable_temperature: Whether the temperature is a parameter. `AdaptiveSparsityTrainer` anneals it either way.
        hidden_dim: Width of the scorer's hidden layers.
        num_layers: Linear layers of the scorer, on the queries' side and on the keys'.
        share_across_heads: One scorer and one selection for all heads instead of one per head.
        block_size: Tokens per key block.
        learn_density: Let every row keep the blocks whose score passes a learned threshold, up to `max_density`,
            instead of a fixed number of them.
        query_block_size: Tokens per query block; 1 selects for every query by itself. `None`: `block_size`.
        window_size: Tokens of a local window (as of `bs_patterns.LocalWindow`) whose blocks are always kept. They
            count towards the density, and are kept even where they alone are more. `None`: only the diagonal is.
        row_budget: How the query blocks of a head share its density: `"even"` lets all keep the same number of blocks,
            as far as they have so many; `"share"` the same share of what each may see, which leaves more to late causal
            ones.
        pooling: What the scorer reads of a block: the mean over its tokens, the largest and smallest value of every
            feature (`"max"`), or both.
        gate: `"straight_through"`: the selected blocks are attended to exactly, and the gradient is that of `"soft"`.
            `"soft"`: each selected block's log gate is added to its scores, in training and in evaluation.
        max_density: With `learn_density`, the most the rows may keep. `None`: twice `1 − base_sparsity`, at most 1.
        distill_rows: Query blocks per sequence, drawn anew in every training step, whose true block masses teach the
            scorer (see `AdaptiveSparsityTrainer`); 0 computes none.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or would have no effect.
    """

    base_sparsity: float = 0.9
    temperature: float = 1.0
    min_temperature: float = 0.1
    learnable_temperature: bool = True
    hidden_dim: int = 128
    num_layers: int = 2
    share_across_heads: bool = False
    block_size: int = 64
    learn_density: bool = False
    query_block_size: int | None = None
    window_size: int | None = None
    row_budget: str = "even"
    pooling: str = "mean_max"
    gate: str = "straight_through"
    max_density: float | None = None
    distill_rows: int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "sparsity_ratio":
            density = check_density(name, value)
            if density is None:
                raise TypeError(f"{name}: expected a number in (0, 1], got None")
            name, value = "base_sparsity", 1 - density
        super().__setattr__(name, value)

    @property
    def sparsity_ratio(self) -> float:
        """The **density** to meet, `1 − base_sparsity`. Schedules assign to it."""
        return 1 - self.base_sparsity

    @property
    def density(self) -> float:
        """The density asked for; with `learn_density`, the one that training starts from."""
        return 1 - self.base_sparsity

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens per (query, key) block."""
        return (self.query_block_size or self.block_size, self.block_size)

    @property
    def pattern_type(self) -> str:
        """The pattern's name in statistics."""
        return "adaptive"

    def validate(self) -> None:
        """Checks the fields again, and against one another.

        Raises:
            ValueError: The temperature starts below its minimum, or `max_density` does not fit.
        """
        super().validate()
        if self.temperature < self.min_temperature:
            raise ValueError(
                f"temperature: expected at least min_temperature={self.min_temperature:g}, got {self.temperature:g}"
            )
        if self.max_density is None:
            return
        if not self.learn_density:
            raise ValueError("max_density: has no effect without learn_density=True; leave it out")
        if self.max_density < self.density:
            raise ValueError(
                f"max_density: expected at least 1 − base_sparsity = {self.density:g}, got {self.max_density:g}"
            )

    def bound(self) -> float | None:
        """The density that bounds a learned one; `None` for a fixed one."""
        if not self.learn_density:
            return None
        return min(1.0, 2 * self.density) if self.max_density is None else self.max_density

    def _pattern_name(self) -> str:
        return self.pattern_type


AdaptiveConfig._checks = {
    "base_sparsity": check_sparsity,
    "temperature": check_positive,
    "min_temperature": check_positive,
    "learnable_temperature": check_flag,
    "hidden_dim": check_int,
    "num_layers": check_int,
    "share_across_heads": check_flag,
    "block_size": check_int,
    "learn_density": check_flag,
    "query_block_size": lambda name, value: None if value is None else check_int(name, value),
    "window_size": lambda name, value: None if value is None else check_int(name, value),
    "row_budget": lambda name, value: check_choice(name, value, ROW_BUDGETS),
    "pooling": lambda name, value: check_choice(name, value, POOLINGS),
    "gate": lambda name, value: check_choice(name, value, GATES),
    "max_density": check_density,
    "distill_rows": lambda name, value: check_int(name, value, least=0),
}
