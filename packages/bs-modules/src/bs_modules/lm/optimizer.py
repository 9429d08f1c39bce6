"""Muon for the matrices, AdamW for embedding and gains, as one optimizer whose state is a flat dict of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Five steps of these bring any singular value in (0, 1] near 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon:
    """Momentum orthogonalised by Newton-Schulz, for stacks of matrices; AdamW for everything else.

    torch.optim.Muon takes one 2-D matrix at a time; fused projections are stacks of matrices that must be
    orthogonalised one by one, and on a CPU batching equal shapes is what makes the iteration cheap.

    Args:
        matrices: Parameters `[..., m, n]`, each leading index a matrix of its own.
        embeddings: Parameters for AdamW at `embedding_lr`.
        gains: Parameters for AdamW at `gain_lr`.
        gates: Parameters for AdamW at `gate_lr`; those without a gradient (every block was picked) stay as they are.

    Source:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the update scale
        0.2 · √max(m, n) is from Liu et al., "Muon is Scalable for LLM Training" (2025).
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        embeddings: Sequence[nn.Parameter],
        gains: Sequence[nn.Parameter],
        gates: Sequence[nn.Parameter] = (),
        *,
        matrix_lr: float = 0.01,
        embedding_lr: float = 0.005,
        gain_lr: float = 0.005,
        gate_lr: float = 0.003,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        iterations: int = 5,
        iteration_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.matrices = list(matrices)
        self.others = [*embeddings, *gains, *gates]
        self.other_lrs = [embedding_lr] * len(embeddings) + [gain_lr] * len(gains) + [gate_lr] * len(gates)
        self.matrix_lr, self.momentum, self.betas = matrix_lr, momentum, betas
        self.weight_decay, self.iterations, self.iteration_dtype = weight_decay, iterations, iteration_dtype
        self.steps = 0
        self._momentum = [torch.zeros_like(p) for p in self.matrices]
        self._first = [torch.zeros_like(p) for p in self.others]
        self._second = [torch.zeros_like(p) for p in self.others]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Updates every parameter from its gradient, all learning rates multiplied by `scale`."""
        self.steps += 1
        self._step_matrices(scale)
        self._step_others(scale)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for p in (*self.matrices, *self.others):
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All state but the step count, by name; the tensors are the live ones."""
        named = {"momentum": self._momentum, "first": self._first, "second": self._second}
        return {f"{name}.{i}": tensor for name, tensors in named.items() for i, tensor in enumerate(tensors)}

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restores what `state_tensors` gave."""
        for name, tensor in self.state_tensors().items():
            tensor.copy_(tensors[name])
        self.steps = steps

    def _step_matrices(self, scale: float) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, momentum in zip(self.matrices, self._momentum, strict=True):
            assert p.grad is not None
            momentum.lerp_(p.grad, 1 - self.momentum)
            update = torch.lerp(p.grad, momentum, self.momentum).to(self.iteration_dtype)
            by_shape.setdefault(p.shape[-2:], []).append((p, update.reshape(-1, *p.shape[-2:])))
        for shape, items in by_shape.items():
            stack = orthogonalize(torch.cat([update for _, update in items]), self.iterations)
            step = 0.2 * math.sqrt(max(shape)) * self.matrix_lr * scale
            for (p, _), update in zip(items, stack.split([len(update) for _, update in items]), strict=True):
                if self.weight_decay:
                    p.mul_(1 - self.weight_decay * self.matrix_lr * scale)
                p.add_(update.view(p.shape), alpha=-step)

    def _step_others(self, scale: float) -> None:
        beta1, beta2 = self.betas
        for p, lr, first, second in zip(self.others, self.other_lrs, self._first, self._second, strict=True):
            if p.grad is None:
                continue
            first.lerp_(p.grad, 1 - beta1)
            second.lerp_(p.grad.square(), 1 - beta2)
            corrected = (second / (1 - beta2**self.steps)).sqrt_().add_(1e-10)
            p.addcdiv_(first, corrected, value=-lr * scale / (1 - beta1**self.steps))


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Brings every singular value near 1: `[n, m, k] → [n, m, k]`, computed in the input's dtype."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_min(1e-7)
    x = matrices / norm
    for _ in range(iterations):
        # The smaller Gram matrix, so that nothing is ever transposed in memory.
        gram = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a) if wide else torch.baddbmm(x, x, polynomial, beta=a)
    return x
