"""Stand-ins for flash-attn's functions: the parameters of each release, computed in plain torch.

None of the packages runs on a CPU. A caller that passes an argument under another name, in another layout or in another
unit than the real function takes fails here as it would there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Recorder",
    "band_of",
    "check_operands",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "kernel_backward",
    "kernel_forward",
]

LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIDES = "window_size_left, window_size_right"

#: Parameters of the functions that are called, from the sources of each release.
FA2_FORWARD = {
    "2.6.0": "q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax",
    "2.8.3": f"q, k, v, dropout_p, softmax_scale, causal, {SIDES}, softcap, alibi_slopes, return_softmax",
}
FA2_VARLEN_FORWARD = {
    "2.6.0": f"q, k, v, {LENGTHS}, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, "
    "return_softmax, block_table",
    "2.8.3": f"q, k, v, {LENGTHS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, "
    "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, "
    "zero_tensors=False",
}
FA2_BACKWARD = {
    "2.6.0": "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap, "
    "alibi_slopes, deterministic, rng_state=None",
    "2.8.3": f"dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, {SIDES}, softcap, "
    "alibi_slopes, deterministic, rng_state=None",
}
FA2_VARLEN_BACKWARD = {
    release: given.replace("dv, ", f"dv, {LENGTHS}, ") + (", zero_tensors=False" if release == "2.8.3" else "")
    for release, given in FA2_BACKWARD.items()
}
FA2_VARLEN_FORWARD["2.6.0"] = FA2_VARLEN_FORWARD["2.6.0"].replace("block_table", "block_table=None")
FA3_FORWARD = (
    "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, "
    "seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, "
    "leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, "
    "v_descale=None, softmax_scale=None, causal=False, {band}, attention_chunk=0, softcap=0.0, "
    "rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0"
)
FA3_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, {causal}=False, {band}, "
    "softcap=0.0, deterministic=False, sm_margin=0"
)
FA3_BAND = {"2025-01": "window_size=(-1, -1)", "2026-03": "window_size_left=-1, window_size_right=-1"}
FA4_FORWARD = (
    "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None, "
    "window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, "
    "num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, "
    "block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None"
)
FA4_BACKWARD = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, "
    "window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, "
    "num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, "
    "AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
    "score_mod_bwd=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None, dlse=None"
)


# -- a dense kernel in plain torch -------------------------------------------------------------------------------------


def band_of(given: dict[str, Any]) -> tuple[int | None, int | None]:
    """`(left, right)` with the last tokens aligned, None for no bound."""
    sides = given.get("window_size") or (given.get("window_size_left"), given.get("window_size_right"))
    left, right = (None if side in (None, -1) else side for side in sides)
    assert not (given["causal"] and (left, right) != (None, None))
    return left, 0 if given["causal"] else right


def pieces(given: dict[str, Any], q: Tensor, k: Tensor) -> list[tuple[Any, Any]]:
    """Operands of each segment, batch-major: slices into q and k, and what may be indexed by them."""
    if given.get("cu_seqlens_q") is None:
        assert q.ndim == k.ndim == 4
        return [(b, b) for b in range(q.shape[0])]
    cuts = []
    for x, side in ((q, "q"), (k, "k")):
        cu, longest = given[f"cu_seqlens_{side}"], given[f"max_seqlen_{side}"]
        assert x.ndim == 3
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert cu[0] == 0
        assert cu[-1] == x.shape[0]
        assert isinstance(longest, int)
        assert longest == cu.diff().max()
        cuts.append([slice(a, b) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)])
    return list(zip(*cuts, strict=True))


def scores_of(q: Tensor, k: Tensor, scale: float, band: tuple[int | None, int | None]) -> Tensor:
    """[Hq, Sq, Sk] in float64, and what is masked."""
    m, n = q.shape[0], k.shape[0]
    s = torch.einsum("ihd,jhd->hij", q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    distance = torch.arange(n) - torch.arange(m)[:, None] - (n - m)
    out = torch.zeros_like(distance, dtype=torch.bool)
    if band[0] is not None:
        out |= distance < -band[0]
    if band[1] is not None:
        out |= distance > band[1]
    return s.masked_fill(out, -torch.inf)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What the real kernels need of dtype, width and alignment."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    for x in (q, k, v):  # read 16 bytes at a time
        assert x.stride(-1) == 1
        assert all(step % 8 == 0 for step in (*x.stride()[:-1], x.storage_offset()))


def kernel_forward(given: dict[str, Any], empty_lse: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; `empty_lse` for a query without keys."""
    q, k, v = given["q"], given["k"], given["v"]
    check_operands(q, k, v)
    out, lse = torch.empty_like(q), q.new_empty(lse_shape(q), dtype=torch.float32)
    for of_q, of_k in pieces(given, q, k):
        s = scores_of(q[of_q], k[of_k], given["softmax_scale"], band_of(given))
        found = s.logsumexp(-1)
        p = torch.exp(s - found.masked_fill(found == -torch.inf, 0)[..., None])
        values = v[of_k].double().repeat_interleave(q.shape[-2] // k.shape[-2], 1)
        out[of_q] = torch.einsum("hij,jhd->ihd", p, values).to(q.dtype)
        found = found.masked_fill(found == -torch.inf, empty_lse).float()
        if q.ndim == 4:
            lse[of_q] = found
        else:
            lse[:, of_q] = found
    return out, lse


def lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])


def kernel_backward(given: dict[str, Any], lse: Tensor, dlse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, out, dout = (given[name] for name in ("q", "k", "v", "out", "dout"))
    check_operands(q, k, v)
    assert out.shape == dout.shape == q.shape
    assert out.dtype == dout.dtype == q.dtype
    assert lse.shape == lse_shape(q)
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert not (lse == -torch.inf).any()
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    group = q.shape[-2] // k.shape[-2]
    for of_q, of_k in pieces(given, q, k):
        rows = (of_q,) if q.ndim == 4 else (slice(None), of_q)
        scale = given["softmax_scale"]
        p = torch.exp(scores_of(q[of_q], k[of_k], scale, band_of(given)) - lse[rows].double()[..., None])
        do = dout[of_q].double()
        delta = (do * out[of_q].double()).sum(-1).T
        if dlse is not None:
            delta = delta - dlse[rows].double()
        k_q, v_q = (x[of_k].double().repeat_interleave(group, 1) for x in (k, v))
        ds = p * (torch.einsum("ihd,jhd->hij", do, v_q) - delta[..., None]) * scale
        dq[of_q] = torch.einsum("hij,jhd->ihd", ds, k_q).to(q.dtype)
        for gradient, parts in (
            (dk, torch.einsum("hij,ihd->jhd", ds, q[of_q].double())),
            (dv, torch.einsum("hij,ihd->jhd", p, do)),
        ):
            gradient[of_k] = parts.unflatten(1, (-1, group)).sum(2).to(q.dtype)
    return dq, dk, dv


# -- packages that are not there ---------------------------------------------------------------------------------------


class Recorder:
    """Functions with given parameters that pass what they are given on, by name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def function(self, name: str, parameters: str, compute: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        """A function of this name with exactly these parameters."""

        def run(given: dict[str, Any]) -> Any:
            self.calls.append((name, given))
            return compute(given)

        scope: dict[str, Any] = {"run": run}
        exec(f"def {name}({parameters}):\n    return run(dict(locals()))", scope)
        return scope[name]

    def named(self, part: str) -> list[dict[str, Any]]:
        """The arguments of the calls of functions with this in their name."""
        return [given for name, given in self.calls if part in name]


def _fill(given: dict[str, Any], found: tuple[Tensor, ...]) -> None:
    for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
        assert given[name].shape == gradient.shape
        assert given[name].is_contiguous()
        given[name].copy_(gradient)


def flash_attn_2(release: str, recorder: Recorder) -> dict[str, ModuleType]:
    """The modules of FlashAttention-2, in this release."""

    def forward(given: dict[str, Any]) -> tuple[Any, ...]:
        assert (given["dropout_p"], given["softcap"], given["alibi_slopes"]) == (0.0, 0.0, None)
        assert given["return_softmax"] is False
        out, lse = kernel_forward(given, torch.inf)
        if release == "2.6.0":
            return out, given["q"], given["k"], given["v"], out, lse, None, None
        return out, lse, None, None

    def backward(given: dict[str, Any]) -> None:
        assert (given["dropout_p"], given["softcap"], given["alibi_slopes"]) == (0.0, 0.0, None)
        _fill(given, kernel_backward(given, given["softmax_lse"]))

    module = ModuleType("flash_attn.flash_attn_interface")
    for name, parameters, compute in (
        ("_flash_attn_forward", FA2_FORWARD, forward),
        ("_flash_attn_varlen_forward", FA2_VARLEN_FORWARD, forward),
        ("_flash_attn_backward", FA2_BACKWARD, backward),
        ("_flash_attn_varlen_backward", FA2_VARLEN_BACKWARD, backward),
    ):
        setattr(module, name, recorder.function(name, parameters[release], compute))
    return {"flash_attn": ModuleType("flash_attn"), "flash_attn.flash_attn_interface": module}


def flash_attn_3(release: str, recorder: Recorder) -> dict[str, ModuleType]:
    """The module of FlashAttention-3, as of this date."""

    causal = {"2025-01": "causal", "2026-03": "is_causal"}[release]

    def forward(given: dict[str, Any]) -> tuple[Any, ...]:
        assert given["num_splits"] == 1  # more would not be the same bits
        return (*kernel_forward(given, -torch.inf), None, None)

    def backward(given: dict[str, Any]) -> None:
        _fill(given, kernel_backward({**given, "causal": given[causal]}, given["softmax_lse"]))

    module: Any = ModuleType("flash_attn_interface")
    band = FA3_BAND[release]
    module._flash_attn_forward = recorder.function("_flash_attn_forward", FA3_FORWARD.format(band=band), forward)
    module._flash_attn_backward = recorder.function(
        "_flash_attn_backward", FA3_BACKWARD.format(band=band, causal=causal), backward
    )
    return {"flash_attn_interface": module}


def flash_attn_4(release: str, recorder: Recorder) -> dict[str, ModuleType]:
    """The modules of FlashAttention-4, in this beta."""

    def forward(given: dict[str, Any]) -> tuple[Any, ...]:
        assert given["return_lse"]
        assert given["num_splits"] == 1
        found = kernel_forward(given, -torch.inf)
        return found if release == "beta 5" else (*found, None, None)

    def backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
        assert given["dlse"].dtype == torch.float32
        assert given["dlse"].is_contiguous()
        return kernel_backward(given, given["lse"], given["dlse"])

    module: Any = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = recorder.function("_flash_attn_fwd", FA4_FORWARD, forward)
    module._flash_attn_bwd = recorder.function("_flash_attn_bwd", FA4_BACKWARD, backward)
    names = ("flash_attn", "flash_attn.cute")
    return {**{name: ModuleType(name) for name in names}, "flash_attn.cute.interface": module}
