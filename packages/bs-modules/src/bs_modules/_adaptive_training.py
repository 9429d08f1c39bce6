"""What training a gate takes beside the task's loss: a falling temperature, and the gate's own losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_int, check_number, check_positive, check_state
from .adaptive import BlockSparseAdaptive

_STATE = ("initial_temperature", "final_temperature", "annealing_steps", "current_step")


class AdaptiveSparsityTrainer:
    """Anneals the temperature of a model's gates, and adds up their losses.

    The temperature falls geometrically from `initial_temperature` to `final_temperature` over `annealing_steps` calls
    of `step`, and stays there. It is assigned to every `BlockSparseAdaptive` in the model, also where the temperature
    is learnable: there the optimizer moves it between two steps only, so leave `step` out to let it be learned.

    Args:
        model: A `BlockSparseAdaptive`, or a module that holds some.
        initial_temperature: Applies from construction on.
        final_temperature: At least the `min_temperature` of every gate.
        annealing_steps: Calls of `step` from the first temperature to the last, at least 1.
        sparsity_weight: Of the expected density in `loss`; for gates with `learn_density=True`.
        distillation_weight: Of the distance from the true block masses in `loss`; for gates with `distill_rows` > 0.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, the model has no gates, or a weight that no gate would feel.

    Example:
        >>> loss = task_loss(model(batch)) + trainer.loss()   # doctest: +SKIP
        >>> loss.backward(); optimizer.step(); trainer.step()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        initial_temperature: float = 1.0,
        final_temperature: float = 0.1,
        annealing_steps: int = 10_000,
        *,
        sparsity_weight: float = 0.0,
        distillation_weight: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        self.model = model
        if not self.gates():
            raise ValueError("model: expected a BlockSparseAdaptive or a module that holds some, found none")
        self.sparsity_weight = check_number("sparsity_weight", sparsity_weight, "a number ≥ 0", lambda x: x >= 0)
        self.distillation_weight = check_number(
            "distillation_weight", distillation_weight, "a number ≥ 0", lambda x: x >= 0
        )
        if self.sparsity_weight and not any(gate.sparse_config.learn_density for gate in self.gates()):
            raise ValueError(
                f"sparsity_weight: expected 0 for gates that meet their density exactly (learn_density=False), "
                f"got {sparsity_weight}"
            )
        if self.distillation_weight and not any(gate.sparse_config.distill_rows for gate in self.gates()):
            raise ValueError(
                f"distillation_weight: expected 0 for gates with distill_rows=0, got {distillation_weight}"
            )
        self._set(initial_temperature, final_temperature, annealing_steps, 0)

    def gates(self) -> list[BlockSparseAdaptive]:
        """The gated modules of the model."""
        return [module for module in self.model.modules() if isinstance(module, BlockSparseAdaptive)]

    @property
    def temperature(self) -> float:
        """The temperature of the current step."""
        progress = min(self.current_step / self.annealing_steps, 1.0)
        return self.initial_temperature * (self.final_temperature / self.initial_temperature) ** progress

    def step(self) -> float:
        """Takes one step, applies its temperature to the model, and returns it."""
        self.current_step += 1
        return self._apply()

    def loss(self) -> Tensor:
        """The gates' own losses of the last forward, each the mean over the gates that have it, weighted; a scalar.

        Gates keep them where the forward ran: replicas of `nn.DataParallel` keep theirs to themselves.

        Raises:
            RuntimeError: No gate has run in training mode since the weights were set.
        """
        total: Tensor | None = None
        for name, weight in (("sparsity", self.sparsity_weight), ("distillation", self.distillation_weight)):
            if not weight:
                continue
            found = [gate.gate_losses[name] for gate in self.gates() if name in gate.gate_losses]
            if not found:
                raise RuntimeError(f"loss: expected a forward in training mode before, which leaves the {name} loss")
            part = weight * torch.stack([item.to(found[0].device) for item in found]).mean()
            total = part if total is None else total + part
        return torch.zeros((), device=self.gates()[0].log_temperature.device) if total is None else total

    def report(self) -> dict[str, Any]:
        """The temperature, and of the last calls of all gates the mean density met, with `asked` beside it."""
        stats = [gate.get_pattern_stats() for gate in self.gates()]
        density = sum(item["density"] for item in stats) / len(stats)
        asked = sum(item["requested_density"] for item in stats) / len(stats)
        return {"temperature": self.temperature, "density": density, "sparsity": 1 - density, "asked": asked}

    def state_dict(self) -> dict[str, Any]:
        """Returns step and settings as plain data."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over step and settings, and applies the temperature of that step.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: Missing or unknown entries, or values out of range. The trainer is unchanged.
        """
        self._set(*check_state(state, _STATE))

    def _set(self, initial: Any, final: Any, steps: Any, current: Any) -> None:
        temperatures = [check_positive("initial_temperature", initial), check_positive("final_temperature", final)]
        steps, current = check_int("annealing_steps", steps), check_int("current_step", current, least=0)
        for name, value in zip(("initial_temperature", "final_temperature"), temperatures, strict=True):
            for gate in self.gates():
                lowest = gate.sparse_config.min_temperature
                if value < lowest:
                    raise ValueError(f"{name}: expected at least the gates' min_temperature={lowest:g}, got {value:g}")
        self.initial_temperature, self.final_temperature = temperatures
        self.annealing_steps, self.current_step = steps, current
        self._apply()

    def _apply(self) -> float:
        for gate in self.gates():
            gate.set_temperature(self.temperature)
        return self.temperature
