"""Block-sparse attention with the interface of `nn.MultiheadAttention`.

Shapes: N batch, L queries, S keys, E embed_dim, H heads, D head_dim, X appended keys (0, 1 or 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bs_patterns import BlockLayout

from ._checks import check_number
from ._mha_masks import Masks, check_call, check_mask_dtypes, merge
from ._mha_nested import check_nested, nest_like, pad_nested
from ._mha_weights import Appended, append_keys, dense_weights, unit_values
from ._tracing import while_tracing
from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import SparsePatternConfig
from .explain import Explanation

_INNER_DEFAULTS: dict[str, Any] = {
    "segment_lengths": None,
    "dilation_rates": None,
    "sparse_config": None,
    "mixed_precision": False,
    "use_memory_pool": False,
    "order": "auto",
    "backend": "auto",
    "deterministic": True,
}


class BlockSparseRingMultiheadDilatedAttention(nn.MultiheadAttention):
    """A drop-in `nn.MultiheadAttention` whose attention is block-sparse. It never communicates by itself.

    Positional arguments, initial weights, state dict, masks and return values are those of `nn.MultiheadAttention`
    (see there). What differs:

    - Queries see only the keys of the layout's active blocks. With a dense layout (`sparsity_ratio=1.0`) the results
      are equal to rounding.
    - `is_causal=True` without `attn_mask` is real causality, not an error.
    - A query whose keys are all masked gets zeros from the attention (so the output projection's bias), never NaN.
    - Nested tensors are padded to the longest sequence on the way, with gradients too.
    - TorchScript is not supported.

    Args:
        embed_dim: Width of queries and of the output.
        num_heads: Heads, which divide `embed_dim`.
        dropout: Probability with which an attention probability is dropped while training.
        bias: Whether the projections have biases.
        add_bias_kv: Append one learned key and value, which every query sees.
        add_zero_attn: Append one key and value of zeros, which every query sees.
        kdim: Width of keys; `None` is `embed_dim`.
        vdim: Width of values; `None` is `embed_dim`.
        batch_first: Whether batched inputs and outputs are (N, L, E) instead of (L, N, E).
        device: Of the parameters.
        dtype: Of the parameters.
        segment_lengths: As for `BlockSparseRingDilatedAttention`.
        dilation_rates: As for `BlockSparseRingDilatedAttention`.
        sparse_config: As for `BlockSparseRingDilatedAttention`; `sparsity_ratio` in it is a **density**.
        attention: The attention between the projections, instead of the base module that the arguments around this
            one describe: any module called as `(q, k, v, is_causal)` on `[N, L, H, D]`. Masks reach it as the keywords
            `key_padding_mask` and `attn_bias` of `BlockSparseAttention.forward`, and with appended keys it is asked
            for `return_lse=True`. Its `dropout` attribute follows this module's.
        mixed_precision: As for `BlockSparseRingDilatedAttention`.
        use_memory_pool: As for `BlockSparseRingDilatedAttention`.
        order: As for `BlockSparseRingDilatedAttention`.
        backend: As for `BlockSparseRingDilatedAttention`.
        deterministic: As for `BlockSparseRingDilatedAttention`.

    Raises:
        AssertionError: `num_heads` does not divide `embed_dim`.
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or is given beside `attention` and would have no effect.
    """

    attention: Any
    dropout: float
    #: Why the factory took this variant; `None` for a module that it did not make.
    chosen_because: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | Mapping[str, Any] | None = None,
        attention: nn.Module | None = None,
        mixed_precision: bool = False,
        use_memory_pool: bool = False,
        order: str = "auto",
        backend: str = "auto",
        deterministic: bool = True,
    ) -> None:
        check_number("dropout", dropout, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._attach(
            attention,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            sparse_config=sparse_config,
            mixed_precision=mixed_precision,
            use_memory_pool=use_memory_pool,
            order=order,
            backend=backend,
            deterministic=deterministic,
        )

    @classmethod
    def from_multihead(
        cls, module: nn.MultiheadAttention, *, attention: nn.Module | None = None, **sparse: Any
    ) -> Self:
        """Makes the block-sparse twin of a dense module.

        Args:
            module: Keeps working; its parameters, hooks and settings are **shared** with the result, so optimizers and
                handles stay valid.
            attention: As for the constructor.
            **sparse: The constructor's keyword-only arguments.

        Raises:
            TypeError: `module` is not exactly an `nn.MultiheadAttention`, or an unknown keyword.
        """
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"module: expected an nn.MultiheadAttention, got {type(module).__name__}")
        unknown = sorted(set(sparse) - set(_INNER_DEFAULTS))
        if unknown:
            raise TypeError(f"{unknown[0]}: not a keyword of from_multihead; valid: {', '.join(_INNER_DEFAULTS)}")
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        state = module.__dict__
        twin.__dict__.update(state)
        # The containers of parameters and children are the twin's own; what they hold is shared.
        twin.__dict__.update({name: state[name].copy() for name in ("_parameters", "_buffers", "_modules")})
        twin._attach(attention, **{**_INNER_DEFAULTS, **sparse})
        return twin

    def _attach(self, attention: nn.Module | None, **arguments: Any) -> None:
        """Gives this module its attention, and hides it from the fused dense paths of `torch.nn`."""
        if attention is None:
            attention = BlockSparseRingDilatedAttention(
                **arguments,
                num_heads=self.num_heads,
                dropout=self._inner_dropout(),
                device=self.out_proj.weight.device,
            )
        else:
            _check_attention(attention, self.num_heads, self.dropout, arguments)
        self.attention = attention.train(self.training)
        self._unfused = _Unfused()

    # -- the call ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends, with the arguments of `nn.MultiheadAttention.forward`.

        Args:
            query: `(L, E)`, `(L, N, E)`, or `(N, L, E)` with `batch_first`, where it may be nested, `(N, *, E)`, as
                then are `key` and `value`; masks are not possible then.
            key: `(S, kdim)`, `(S, N, kdim)`, or `(N, S, kdim)` with `batch_first`.
            value: `(S, vdim)`, `(S, N, vdim)`, or `(N, S, vdim)` with `batch_first`.
            key_padding_mask: `(N, S)` or `(S,)`; bool (**True = ignore the key**) or float (added to the scores).
            need_weights: Return the attention weights too. They cost L × S per head in time and memory whatever the
                density; the output is the same without them.
            attn_mask: `(L, S)` or `(N * num_heads, L, S)`; bool (**True = blocked**) or float (added). It acts inside
                the active blocks and leaves the layout as it is.
            average_attn_weights: Average the weights over heads.
            is_causal: Use the causal layout: a query sees only keys up to its own position, the last query being
                aligned with the last key. An `attn_mask` acts on top of it; if L ≠ S such a mask alone decides.

        Returns:
            The output, shaped like `query`, and the weights: `(N, L, S + X)` averaged or `(N, H, L, S + X)`, without N
            if unbatched, exact with zeros where a block is inactive; `None` without `need_weights`.

        Raises:
            AssertionError: As `nn.MultiheadAttention`: ranks, widths, a padding mask or mask dtypes that do not fit.
            RuntimeError: As `nn.MultiheadAttention`: batch sizes, dtypes or an `attn_mask` that do not fit.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            masks = (key_padding_mask, attn_mask)
            check_nested(query, key, value, *masks, batch_first=self.batch_first, is_causal=bool(is_causal))
            q, k, v, beyond = pad_nested(query, key, value)
            return nest_like(query, *self.forward(q, k, v, beyond, need_weights, None, average_attn_weights, is_causal))
        q, k, v, masks, batched = self._prepared(query, key, value, key_padding_mask, attn_mask, is_causal)
        weights = None
        if need_weights and _is_spread(self.attention):
            raise ValueError(
                "need_weights: expected False with an attention over several ranks, none of which holds all weights, "
                "got True (the default)"
            )
        if need_weights:
            attended, weights = self._attend_with_weights(q, k, v, masks)
        else:
            attended = self._attend(q, k, v, masks, self._appended(q))
        out = attended.flatten(2)
        out = self.out_proj(out if self.batch_first or not batched else out.transpose(0, 1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _prepared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Masks, bool]:
        """Checked and projected inputs `[N, length, H, D]`, the masks, and whether the inputs were batched."""
        same = (query is key, key is value)
        batched = check_call(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            batch_first=self.batch_first,
            packed=self.in_proj_weight is not None,
        )
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value, same)
        if not _autocasts(q.device.type):
            check_mask_dtypes(q.dtype, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        masks = merge(key_padding_mask, attn_mask, bool(is_causal), self.num_heads, q.shape[1] == k.shape[1])
        return q, k, v, masks, batched

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: tuple[bool, bool]) -> tuple[Tensor, ...]:
        """Queries, keys and values as `[N, length, H, D]`; equal inputs are projected in one multiplication."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        same_query, same_value = same
        if weight is not None and same_value:
            if same_query:
                parts = _linear(query, weight, bias).chunk(3, dim=-1)
            else:
                bias_q, bias_kv = (None, None) if bias is None else bias.split((width, 2 * width))
                weight_q, weight_kv = weight.split((width, 2 * width))
                parts = (_linear(query, weight_q, bias_q), *_linear(key, weight_kv, bias_kv).chunk(2, dim=-1))
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            matrices = separate if weight is None else weight.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            if weight is None and (key.shape[-1], value.shape[-1]) != (self.kdim, self.vdim):
                raise AssertionError(
                    f"key, value: expected {self.kdim} and {self.vdim} features, the kdim and vdim, got "
                    f"{key.shape[-1]} and {value.shape[-1]}"
                )
            parts = tuple(map(_linear, (query, key, value), matrices, biases))
        return tuple(x.unflatten(-1, (self.num_heads, self.head_dim)) for x in parts)

    def _appended(self, q: Tensor) -> Appended:
        """The keys and values that `add_bias_kv` and `add_zero_attn` append, each `[X, H, D]`."""
        shape = (1, self.num_heads, self.head_dim)
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(q.dtype).reshape(shape))
            values.append(self.bias_v.to(q.dtype).reshape(shape))
        if self.add_zero_attn:
            keys.append(q.new_zeros(shape))
            values.append(q.new_zeros(shape))
        return (torch.cat(keys), torch.cat(values)) if keys else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, appended: Appended) -> Tensor:
        """The attention between the projections, `[N, L, H, Dv]`, over the keys and the appended ones."""
        dropout = self.dropout if self.training else 0.0
        # No layout has zero tokens; an attention over several ranks looks at all of them.
        if _empty(q, k) and not _is_spread(self.attention):
            out = q.new_zeros(*q.shape[:3], v.shape[-1])
            lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=_wide(q))
        else:
            inner = self._inner_dropout()
            if getattr(self.attention, "dropout", inner) != inner:
                self.attention.dropout = inner
            more = {} if appended is None else {"return_lse": True}
            out = self.attention(q, k, v, masks.causal, **masks.arguments(), **more)
            out, lse = (out, out) if appended is None else out  # without appended keys nothing reads lse
        if dropout == 1:
            out = out * 0
        return out if appended is None else append_keys(out, lse, q, *appended, scale=self._scale(), dropout=dropout)

    def _attend_with_weights(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """The attention and its weights `[N, H, L, S + X]`."""
        appended, dropout = self._appended(q), self.dropout if self.training else 0.0
        if _empty(q, k):
            visible = torch.zeros(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        elif _is_static(self.attention):
            lengths = (index(q.shape[1]), index(k.shape[1]))
            visible = self._token_mask(lengths, masks.causal).to(q.device)
        else:
            wide, appended = unit_values(v, appended)
            out = self._attend(q, k, wide, masks, appended)
            return out[..., : v.shape[-1]], out[..., v.shape[-1] :].transpose(1, 2)
        weights = dense_weights(q, k, visible, masks, appended, scale=self._scale())
        if not dropout:
            return self._attend(q, k, v, masks, appended), weights
        weights = F.dropout(weights, dropout)  # the output is made of the very weights that are returned
        if appended is not None:
            v = torch.cat((v, appended[1].expand(v.shape[0], -1, -1, -1)), dim=1)
        return torch.einsum("nhls,nshd->nlhd", weights.to(v.dtype), v), weights

    def _token_mask(self, lengths: tuple[int, int], is_causal: bool) -> Tensor:
        """bool `[1 or H, L, S]`: what the layout lets see what."""
        if torch.compiler.is_compiling():
            name = _mask_while_tracing(self.attention, lengths, is_causal, self.num_heads)
            return getattr(self.attention._traced_plans, name)
        return torch.from_numpy(self.attention.layout(lengths, is_causal, self.num_heads).token_mask())

    def _inner_dropout(self) -> float:
        """The dropout of the attention, which does not take 1: this module drops everything itself."""
        return self.dropout if self.dropout != 1 else 0.0

    def _scale(self) -> float:
        scale = getattr(self.attention, "scale", None)
        return self.head_dim**-0.5 if scale is None else scale

    # -- what the attention between the projections tells ------------------------------------------------------------

    @property
    def sparse_config(self) -> Any:
        """The configuration of the attention; assigning to its fields takes effect at the next call."""
        return self.attention.sparse_config

    def layout(self, seq_len: int | tuple[int, int], is_causal: bool = False) -> BlockLayout:
        """The layout for one length; see `BlockSparseAttention.layout`."""
        return self.attention.layout(seq_len, is_causal, self.num_heads)

    def prepare(self, seq_len: int | tuple[int, int], is_causal: bool = False) -> BlockLayout:
        """Builds layout and plan ahead of a compiled call; see `BlockSparseAttention.prepare`."""
        return self.attention.prepare(seq_len, is_causal, self.num_heads)

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Explanation:
        """Says what this call would do between the projections; arguments as for `forward`.

        `need_weights` adds a dense computation of the weights beside it, of L × S per head.
        """
        del need_weights, average_attn_weights
        if query.is_nested:
            query, key, value, key_padding_mask = pad_nested(query, key, value)
        q, k, v, masks, _ = self._prepared(query, key, value, key_padding_mask, attn_mask, is_causal)
        return self.attention.explain(q, k, v, masks.causal, **masks.arguments())

    def get_pattern_stats(self, seq_len: int | None = None) -> dict[str, Any]:
        """Figures of the layout; see `BlockSparseAttention.get_pattern_stats`."""
        return self.attention.get_pattern_stats(seq_len)


class _Unfused(nn.Module):
    """Never called. `nn.TransformerEncoderLayer` in eval mode without gradients would take the weights and call a fused
    dense operator instead of the module, but for a hook anywhere inside, which that operator would pass by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(_unreached)


def _unreached(*_: Any) -> None:
    raise AssertionError("_Unfused is never called")


@while_tracing
def _mask_while_tracing(
    attention: BlockSparseAttention, lengths: tuple[int, int], is_causal: bool, num_heads: int
) -> str:
    """Leaves a token mask where the graph that is being traced looks for it; returns the attribute's name."""
    key = ("token mask", lengths, is_causal, num_heads, attention._fingerprint())
    return attention._traced_plans.name_of(
        key, lambda: torch.from_numpy(attention.layout(lengths, is_causal, num_heads).token_mask())
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x, weight) + bias  # what nn.MultiheadAttention computes where a bias was converted alone


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _empty(q: Tensor, k: Tensor) -> bool:
    return 0 in (q.shape[0], q.shape[1], k.shape[1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_static(attention: nn.Module) -> bool:
    """Whether the layout depends on the lengths alone, so that it tells the attention weights."""
    own = BlockSparseAttention._layout_or_plan
    return isinstance(attention, BlockSparseAttention) and type(attention)._layout_or_plan is own


def _is_spread(attention: nn.Module) -> bool:
    """Whether the attention is over the shards of several ranks."""
    return getattr(attention, "world_size", 1) > 1


def _check_attention(attention: Any, num_heads: int, dropout: float, arguments: Mapping[str, Any]) -> None:
    if not isinstance(attention, nn.Module):
        raise TypeError(f"attention: expected a module, got {attention!r}")
    for name, value in arguments.items():
        if value != _INNER_DEFAULTS[name]:
            raise ValueError(f"{name}: has no effect beside attention=; give it to that module")
    heads = getattr(attention, "num_heads", None)
    if heads is not None and heads != num_heads:
        raise ValueError(f"attention: expected num_heads {num_heads} or None, got a module with {heads}")
    own = getattr(attention, "dropout", None)
    if own is None and dropout:
        raise ValueError(f"dropout: expected 0 with an attention that has no dropout, got {dropout}")
    if own and own != dropout:
        raise ValueError(f"dropout: expected {own}, that of attention=, got {dropout}; set it on the multihead module")
