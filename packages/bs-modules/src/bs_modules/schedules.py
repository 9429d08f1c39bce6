"""Schedules that make a model sparser while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

from torch import nn

from ._checks import check_choice, check_int, check_sparsity, check_state

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "cubic": lambda t: 1 - (1 - t) ** 3,
}
_STATE = ("initial_sparsity", "final_sparsity", "total_steps", "schedule", "current_step")


class ProgressiveSparsityScheduler:
    """Moves the density of a model's attention from one sparsity to another, a step at a time.

    It takes **sparsities** (0.9 drops 90 % of the allowed blocks) and assigns `sparsity_ratio = 1 − sparsity`, which is
    a density, to the `sparse_config` of the model and of every module inside it. The first sparsity applies from
    construction on, the last one after `total_steps` steps and ever after. Layouts of one pattern nest, so every step
    only removes blocks (or only adds them, if the sparsity falls).

    Args:
        model: A module that has a `sparse_config` with a `sparsity_ratio`, or holds such modules.
        initial_sparsity: In [0, 1).
        final_sparsity: In [0, 1).
        total_steps: Calls of `step` from the first sparsity to the last, at least 1.
        schedule: `"linear"`; `"cosine"`, slow at both ends; or `"cubic"`, which removes most early and little late.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A sparsity out of range, or one that a config does not take; an unknown schedule, or a model with
            nothing to schedule.

    Source: cubic: Zhu and Gupta, "To prune, or not to prune", 2017.
    """

    def __init__(
        self,
        model: nn.Module,
        initial_sparsity: float = 0.5,
        final_sparsity: float = 0.95,
        total_steps: int = 10_000,
        *,
        schedule: str = "linear",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        self.model = model
        if not any(True for _ in self._configs()):
            raise ValueError("model: expected a module with a sparse_config that has a sparsity_ratio, found none")
        self._set(initial_sparsity, final_sparsity, total_steps, schedule, 0)

    @property
    def sparsity(self) -> float:
        """The sparsity asked for at the current step."""
        progress = _SHAPES[self.schedule](min(self.current_step / self.total_steps, 1.0))
        return self.initial_sparsity + (self.final_sparsity - self.initial_sparsity) * progress

    @property
    def density(self) -> float:
        """`1 − sparsity`: what the configurations are set to."""
        return 1 - self.sparsity

    def step(self) -> float:
        """Takes one step, applies its density to the model, and returns the new sparsity."""
        self.current_step += 1
        self._apply()
        return self.sparsity

    def state_dict(self) -> dict[str, Any]:
        """Returns step and settings as plain data."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over step and settings, and applies the density of that step.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: Missing or unknown entries, or values out of range. The scheduler is unchanged.
        """
        self._set(*check_state(state, _STATE))

    def _set(self, initial: Any, final: Any, total_steps: Any, schedule: Any, step: Any) -> None:
        checked = (check_sparsity("initial_sparsity", initial), check_sparsity("final_sparsity", final))
        total_steps = check_int("total_steps", total_steps)
        schedule = check_choice("schedule", schedule, list(_SHAPES))
        step = check_int("current_step", step, least=0)
        for config in self._configs():
            for sparsity in checked:
                trial = copy(config)
                trial.sparsity_ratio = 1 - sparsity
                trial.validate()
        self.initial_sparsity, self.final_sparsity = checked
        self.total_steps, self.schedule, self.current_step = total_steps, schedule, step
        self._apply()

    def _apply(self) -> None:
        for config in self._configs():
            config.sparsity_ratio = self.density

    def _configs(self) -> Iterator[Any]:
        for module in self.model.modules():
            config = getattr(module, "sparse_config", None)
            if hasattr(config, "sparsity_ratio"):
                yield config
