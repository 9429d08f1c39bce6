"""The dense oracle: every score of every pair, masked, in float64. Shares no code with the backends.

`dense_results` computes the same in the dtype of a case, the way a dense kernel does (sums in float32, probabilities
rounded to the operands' dtype): its error is the yardstick for everyone else's. `magnitudes` says how large the sums of
absolute values are that rounding errors scale with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bs_patterns import BlockLayout

from ..batched import BatchedLayout
from .case import Case, evaluate

__all__ = ["block_entries", "dense_attention", "dense_results", "magnitudes", "oracle_results", "token_mask_of"]

_NEG_INF = float("-inf")


def block_entries(layout: BlockLayout | BatchedLayout) -> Tensor:
    """Which entry of the layout covers each pair: int64[L, H, Sq, Sk], −1 where no active block does."""
    block_q, block_kv = layout.block_size
    len_q, len_kv = layout.seq_len
    entries = np.full(layout.shape if isinstance(layout, BatchedLayout) else (1, *layout.shape), -1, np.int64)
    if isinstance(layout, BatchedLayout):
        slots = layout.indices.shape[3]
        flat = np.arange(layout.indices.numel()).reshape(layout.indices.shape)
        for at in np.ndindex(*entries.shape[:3]):
            used = layout.indices[at].cpu().numpy()[: int(layout.counts[at])]
            entries[at][used] = flat[at][: min(slots, len(used))]
    else:
        for head in range(layout.shape[0]):
            for row in range(layout.shape[1]):
                begin, end = layout.indptr[head, row : row + 2]
                entries[0, head, row, layout.indices[begin:end]] = np.arange(begin, end)
    tokens = entries.repeat(block_q, axis=2)[:, :, :len_q].repeat(block_kv, axis=3)[..., :len_kv]
    return torch.from_numpy(np.ascontiguousarray(tokens))


def token_mask_of(case: Case) -> Tensor:
    """Which (query, key) pairs a case keeps: bool, broadcastable to [B, Hq, Sq, Sk]."""
    arguments, layout = case.arguments, case.layout
    len_q, len_kv = layout.seq_len
    kept = block_entries(layout) >= 0
    q_pos = torch.arange(len_q) + (len_kv - len_q) if case.q_positions is None else case.q_positions
    k_pos = torch.arange(len_kv) if case.kv_positions is None else case.kv_positions
    distance = k_pos - q_pos[:, None]
    causal = arguments.get("causal")
    if layout.causal if causal is None else causal:
        kept = kept & (distance <= 0)
    window = arguments.get("window")
    if isinstance(window, int):
        window = (window - 1, 0)
    left, right = window or (None, None)
    if left not in (None, -1):
        kept = kept & (distance >= -left)
    if right not in (None, -1):
        kept = kept & (distance <= right)
    if (padding := arguments.get("key_padding_mask")) is not None:
        kept = kept & padding[:, None, None, :]
    if (segments := arguments.get("segment_ids")) is not None:
        of_query, of_key = segments if isinstance(segments, (tuple, list)) else (segments, segments)
        kept = kept & (of_query[:, None, :, None] == of_key[:, None, None, :])
    bias = arguments.get("attn_bias")
    if bias is not None and bias.dtype == torch.bool:
        kept = kept & bias
    return kept


def _philox_word(counter: list[Any], seed: int) -> Any:
    """First word of Philox4x32-10 in numpy's uint64, written from the paper."""
    low = np.uint64(0xFFFFFFFF)
    x = [np.asarray(word, np.int64).astype(np.uint64) & low for word in counter]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    shift, weyl = np.uint64(32), (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
    for _ in range(10):
        p0, p1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(p1 >> shift) ^ x[1] ^ key[0], p1 & low, (p0 >> shift) ^ x[3] ^ key[1], p0 & low]
        key = [(k + w) & low for k, w in zip(key, weyl, strict=True)]
    return x[0]


def _dropout_factor(case: Case, dtype: torch.dtype) -> Tensor | None:
    p = case.arguments.get("dropout_p", 0.0)
    if not p:
        return None
    seed = int(case.arguments["dropout_seed"])
    batch, len_q, heads, _ = case.q.shape
    len_kv = case.layout.seq_len[1]
    q_pos = np.arange(len_q) + len_kv - len_q if case.q_positions is None else case.q_positions.numpy()
    k_pos = np.arange(len_kv) if case.kv_positions is None else case.kv_positions.numpy()
    counter = np.broadcast_arrays(
        np.arange(batch)[:, None, None, None], np.arange(heads)[:, None, None], q_pos[:, None], k_pos
    )
    kept = _philox_word(list(counter), seed) >= np.uint64(int(p * 2**32))
    return torch.from_numpy(kept).to(dtype) / (1 - p)


def _keys(case: Case, x: Tensor) -> Tensor:
    """K or V head-major, pages resolved and heads repeated for their groups: [B, Hq, Sk, X]."""
    table = case.arguments.get("page_table")
    if table is not None:
        active = (block_entries(case.layout) >= 0).any(2).any(1)  # [L, Sk]
        token = torch.arange(case.layout.seq_len[1])
        page = table.to(torch.int64)[:, token // case.layout.block_size[1]]
        x = x[torch.where(active, page, 0), token % case.layout.block_size[1]]
        x = torch.where(active[..., None, None], x, 0)
    return x.transpose(1, 2).repeat_interleave(case.q.shape[2] // x.shape[2], dim=1)


def _scores(case: Case, dtype: torch.dtype, *, absolute: bool = False) -> Tensor:
    """Scaled and biased scores [B, Hq, Sq, Sk], not masked; ``absolute`` sums absolute values instead."""
    clean = torch.abs if absolute else (lambda x: x)
    scale = case.arguments.get("scale")
    scale = case.q.shape[3] ** -0.5 if scale is None else scale
    q, k = case.q.transpose(1, 2), _keys(case, case.k)
    scores = clean(q.to(dtype)) @ clean(k.to(dtype)).transpose(-1, -2) * clean(torch.tensor(scale, dtype=dtype))
    bias = case.arguments.get("attn_bias")
    if bias is not None and bias.is_floating_point():
        scores = scores + clean(bias.to(dtype))
    if (blocks := case.arguments.get("block_bias")) is not None:
        entries = block_entries(case.layout).clamp(min=0)
        if isinstance(case.layout, BatchedLayout):
            scores = scores + clean(blocks.to(dtype)).flatten()[entries]
        elif blocks.shape[-1]:
            blocks = clean(blocks.to(dtype))[(None,) * (3 - blocks.ndim)]
            index = entries[0].expand(*scores.shape[1:]).flatten(1)
            blocks = blocks.expand(*scores.shape[:2], -1)
            scores = scores + blocks.gather(2, index.expand(scores.shape[0], -1, -1)).view(scores.shape)
    return scores


def dense_attention(case: Case, dtype: torch.dtype, operand_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Dense attention of a case; differentiable.

    Args:
        case: the case.
        dtype: of scores, softmax and sums.
        operand_dtype: what probabilities are rounded to before they multiply V.

    Returns:
        ``(out, lse)`` as `block_sparse_attention` shapes them, both in ``dtype``.
    """
    kept = token_mask_of(case)
    scores = torch.where(kept, _scores(case, dtype), _NEG_INF)
    sinks = case.arguments.get("sinks")
    if sinks is not None:
        column = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    empty = (scores == _NEG_INF).all(-1)
    lse = torch.logsumexp(torch.where(empty[..., None], 0, scores), -1)
    weights = torch.where(scores == _NEG_INF, 0, torch.exp(scores - lse[..., None]))[..., : kept.shape[-1]]
    factor = _dropout_factor(case, dtype)
    if factor is not None:
        weights = weights * factor
    out = weights.to(operand_dtype).to(dtype) @ _keys(case, case.v).to(dtype)
    return out.transpose(1, 2), lse.masked_fill(empty, _NEG_INF)


def _evaluate_dense(case: Case, dtype: torch.dtype, operand_dtype: torch.dtype) -> dict[str, Tensor]:
    def function(
        q: Tensor, k: Tensor, v: Tensor, _: Any, *, return_lse: bool, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        leaves = {"q": q, "k": k, "v": v} | {name: x for name, x in arguments.items() if name in case.leaves}
        return dense_attention(case.with_leaves(leaves), dtype, operand_dtype)

    return evaluate(case, function)


def oracle_results(case: Case) -> dict[str, Tensor]:
    """What a case should give, in float64: "out", "lse" and the gradients by name."""
    wide = case.with_leaves({name: x.double() for name, x in case.leaves.items()})
    return _evaluate_dense(wide, torch.float64, torch.float64)


def dense_results(case: Case) -> dict[str, Tensor]:
    """What a dense kernel gives in the dtype of the case."""
    accumulate = torch.float64 if case.q.dtype == torch.float64 else torch.float32
    found = _evaluate_dense(case, accumulate, case.q.dtype)
    return found | {"out": found["out"].to(case.q.dtype)}


def magnitudes(case: Case) -> dict[str, Tensor]:
    """For every result, the sum of absolute values that the rounding errors of a computation scale with, in float64.

    Source:
        First-order error analysis of the forward and of ``dS = P ∘ (dP − delta)``: every product and difference is
        replaced by the sum of the magnitudes of its terms.
    """
    wide = case.with_leaves({name: x.double() for name, x in case.leaves.items()})
    leaves = {name: x.detach() for name, x in wide.leaves.items()}
    wide = wide.with_leaves(leaves)
    _, lse = dense_attention(wide, torch.float64, torch.float64)
    kept = token_mask_of(wide)
    scores = torch.where(kept, _scores(wide, torch.float64), _NEG_INF)
    shift = torch.where(lse == _NEG_INF, torch.inf, lse)[..., None]
    weights = torch.exp(scores - shift)
    factor = _dropout_factor(wide, torch.float64)
    dropped = weights if factor is None else weights * factor
    dout, dlse = case.dout.double().abs().transpose(1, 2), case.dlse.double().abs()
    k, v = _keys(wide, wide.k).abs(), _keys(wide, wide.v).abs()
    of_out = dropped @ v
    dweights = dout @ v.transpose(-1, -2)
    dweights = dweights if factor is None else dweights * factor
    delta = (dout * of_out).sum(-1) + dlse
    dscores = weights * (dweights + delta[..., None])
    scale = wide.arguments.get("scale")
    scale = abs(case.q.shape[3] ** -0.5 if scale is None else scale)
    # Sums over groups, pages, broadcasts and blocks are those of autograd: differentiate what is linear in dscores.
    probe = wide.with_leaves({name: torch.zeros_like(x).requires_grad_() for name, x in leaves.items()})
    linear = (_keys(probe, probe.k) * (scale * (dscores.transpose(-1, -2) @ wide.q.abs().transpose(1, 2)))).sum()
    linear = linear + (_keys(probe, probe.v) * (dropped.transpose(-1, -2) @ dout)).sum()
    linear = linear + (probe.q.transpose(1, 2) * (scale * (dscores @ k))).sum()
    only_biases = probe.with_leaves(probe.leaves | {"q": leaves["q"], "k": leaves["k"], "v": leaves["v"]})
    linear = linear + (_scores(only_biases, torch.float64) * dscores).sum()
    if (sinks := wide.arguments.get("sinks")) is not None:
        finite = torch.where(lse == _NEG_INF, torch.inf, lse)
        linear = (
            linear + (probe.arguments["sinks"].view(1, -1, 1) * torch.exp(sinks.view(1, -1, 1) - finite) * delta).sum()
        )
    gradients = torch.autograd.grad(linear, list(probe.leaves.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), gradients, strict=True)
    }
    largest = torch.where(kept, _scores(wide, torch.float64, absolute=True), 0)
    found["scores"] = largest.max() if largest.numel() else torch.zeros((), dtype=torch.float64)
    of_lse = 1 + torch.where(lse == _NEG_INF, 0, lse.abs())
    return found | {"out": of_out.transpose(1, 2), "lse": of_lse}
