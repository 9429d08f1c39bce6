"""One call of an attention module explained: which blocks, which plan, which backend, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bs_kernels import BackendTable, BatchedLayout, LayoutPlan
from bs_patterns import BlockLayout, render_text

_WIDTH = 48  # characters of the picture


@dataclass(frozen=True)
class Explanation:
    """What one call would do; `print` shows it.

    Args:
        module: The module as it prints itself.
        chosen_because: Why the factory took this variant, if it made the module.
        layout: The layout of the call; `None` where a module chooses the blocks of each batch element on its device.
        plan: The plan on the device of the inputs.
        requested_density: The density asked for; `None` where geometry decides.
        density: Active / allowed blocks.
        backends: Every backend's answer to this call.
        backend: The backend that computes it.
        reasons: Why, one sentence each.
    """

    module: str
    chosen_because: str | None
    layout: BlockLayout | None
    plan: LayoutPlan
    requested_density: float | None
    density: float
    backends: BackendTable
    backend: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        partial, slots = int(self.plan.partial.sum()), self.plan.indices.numel()
        asked = "none asked for" if self.requested_density is None else f"asked for {self.requested_density:g}"
        heads = "one layout for all heads" if self.plan.heads == 1 else f"{self.plan.heads} heads with their own"
        lines = [
            self.module,
            f"chosen      {self.chosen_because or 'by its constructor'}",
            f"density     {self.density:.6g} ({asked}), {heads}",
            f"plan        {slots:,} blocks, {partial:,} of them cut by the token mask; {self.plan.nbytes:,} bytes on "
            f"{self.plan.device}; order {self.plan.order!r}",
            f"backend     {self.backend}",
            *(f"because     {reason}" for reason in self.reasons),
            "",
            str(self.backends),
        ]
        if self.layout is not None:
            lines += ["", render_text(self.layout, width=min(_WIDTH, max(16, self.layout.shape[2])))]
        return "\n".join(lines)


def explain_call(module: Any, made: Any, plan: LayoutPlan | BatchedLayout, backends: BackendTable) -> Explanation:
    """Puts an explanation together.

    Args:
        module: A `BlockSparseAttention`.
        made: What the module would pass to the op.
        plan: The same on the device of the inputs.
        backends: The backends' answers to this call.
    """
    layout = made if isinstance(made, BlockLayout) else None
    if isinstance(plan, BatchedLayout):
        plan = LayoutPlan.build(plan, None, plan.device, order=module.order)
    density = layout.density if layout is not None else module.get_pattern_stats()["density"]
    chosen = backends.selected if module.backend == "auto" else module.backend
    return Explanation(
        repr(module),
        module.chosen_because,
        layout,
        plan,
        module.sparse_config.density,
        float(density),
        backends,
        chosen,
        tuple(_reasons(module, chosen, backends)),
    )


def _reasons(module: Any, chosen: str, backends: BackendTable) -> list[str]:
    if module.backend != "auto":
        return [f"backend={chosen!r} was given to the module, which then never falls back"]
    passed = []
    for report in backends:
        if report.name == chosen:
            break
        passed.append(f"{report.name} cannot: {'; '.join(report.reasons)}")
    first = "it is the first that can, in the order below" if passed else "it comes first in the order below, and can"
    return [*passed, first]
