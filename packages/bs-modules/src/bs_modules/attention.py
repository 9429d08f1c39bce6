"""The common base type of all block-sparse attention modules, and the base module: one fixed pattern."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bs_kernels import LayoutPlan, block_sparse_attention, explain_backends
from bs_kernels.dispatch import BACKENDS
from bs_memory import default_pool
from bs_patterns import BlockLayout, LongNetSegments

from ._checks import check_choice, check_flag, check_int, check_number
from ._layouts import check_lengths, check_pairs, check_segments, share_equal_heads
from ._tracing import TracedPlans, while_tracing
from .config import CheckedConfig, SparsePatternConfig
from .explain import Explanation, explain_call

_LAYOUTS_KEPT = 16
_DEFAULT_SEQ_LEN = 8192
_BACKENDS = ("auto", *(backend.name for backend in BACKENDS))


class BlockSparseAttention(nn.Module):
    """Attention over the active blocks of a layout. Subclasses say which layout.

    Args:
        segment_lengths: LongNet segment lengths in tokens. Together with `dilation_rates` they restrict the pattern to
            LongNet's geometry at block granularity. `None`: every block is a candidate.
        dilation_rates: One rate per segment length, in blocks.
        sparse_config: Pattern, density and block size, or a mapping of its fields. The module keeps this very object:
            assigning to its fields takes effect at the next call.
        device: Where `prepare` builds plans, and where inputs must be. `None`: wherever the inputs are.
        dtype: What inputs must be. `None`: any floating dtype.
        num_heads: Query heads; `None` reads them from the first input.
        dropout: Probability with which an attention probability is dropped while training.
        scale: Multiplies the scores; `None` is `head_dim ** -0.5`.
        mixed_precision: Run the attention in bf16 (fp16 on GPUs without bf16) and return the input's dtype.
        use_memory_pool: Lease the half-precision copies that `mixed_precision` makes from `bs_memory.default_pool()`
            where no gradient needs them later. The kernels' workspaces come from that pool in any case.
        order: In which order tiles are processed; changes the result by rounding at most.
        backend: Of `bs_kernels.block_sparse_attention`.
        deterministic: Whether the backward must give the same bits every time.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or only one of `segment_lengths` and `dilation_rates` is given.
    """

    #: The values that `order` may have.
    _orders: tuple[str, ...] = ("auto", "row", "longest_first", "hilbert", "morton")
    #: What `sparse_config` is an instance of.
    _config_type: type[CheckedConfig] = SparsePatternConfig
    #: Why the factory took this variant; `None` for a module that it did not make.
    chosen_because: str | None = None
    _last_heads: int | None = None  # of the last call

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_heads: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        mixed_precision: bool = False,
        use_memory_pool: bool = False,
        order: str = "auto",
        backend: str = "auto",
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        self.sparse_config: Any = self._config_type.of("sparse_config", sparse_config)
        self.segment_lengths, self.dilation_rates = check_segments(segment_lengths, dilation_rates)
        self.num_heads = None if num_heads is None else check_int("num_heads", num_heads)
        self.dropout = check_number("dropout", dropout, "a number in [0, 1)", lambda p: 0 <= p < 1)
        self.scale = None if scale is None else check_number("scale", scale, "a finite number or None")
        self.mixed_precision = check_flag("mixed_precision", mixed_precision)
        self.use_memory_pool = check_flag("use_memory_pool", use_memory_pool)
        self.order = check_choice("order", order, self._orders)
        self.backend = check_choice("backend", backend, _BACKENDS)
        self.deterministic = check_flag("deterministic", deterministic)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating torch.dtype or None, got {dtype!r}")
        self._device_given, self._dtype_given = device is not None, dtype is not None
        # Follows .to(), so that the module knows where it lives although it may have no parameter.
        self.register_buffer("_anchor", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self._anchor: Tensor
        self._last_call: tuple[int, bool] | None = None
        self._last_heads = None
        self._forget()

    # -- what the module attends to ----------------------------------------------------------------------------------

    def layout(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """The layout for one length; cached until the configuration changes.

        Args:
            seq_len: Tokens, or a (query, key) pair of lengths. With `is_causal` the last query sees the last key, and
                fewer queries than keys are the last rows of the square layout (decoding with a cache).
            is_causal: Whether queries see only keys up to their own position.
            num_heads: Query heads; `None` takes the module's, those of the last call, or 1.

        Returns:
            One row pattern shared by all heads (`heads == 1`) unless the heads differ.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A length or a number of heads below 1, or one that the configuration does not take.
        """
        lengths, is_causal = check_lengths(seq_len), check_flag("is_causal", is_causal)
        heads = (self._known_heads() or 1) if num_heads is None else check_int("num_heads", num_heads)
        key = (lengths, is_causal, heads, self._fingerprint())
        with self._lock:
            found = self._layouts.get(key)
            if found is not None:
                self._layouts.move_to_end(key)
                return found
        q_len, k_len = lengths
        if is_causal and q_len < k_len:
            made = self.layout(k_len, True, heads).rows_at(k_len - q_len, k_len)
        else:
            made = share_equal_heads(self._make_layout((q_len, k_len), is_causal, heads))
        with self._lock:
            self._layouts[key] = made
            while len(self._layouts) > _LAYOUTS_KEPT:
                self._layouts.popitem(last=False)
        return made

    def _make_layout(self, seq_len: tuple[int, int], is_causal: bool, num_heads: int) -> BlockLayout:
        """Builds the layout for a (query, key) pair of lengths: what a variant overrides."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layout it uses")

    def _fingerprint(self) -> tuple[Any, ...]:
        """Everything a layout depends on, besides lengths, causality and heads."""
        return (self.sparse_config.fingerprint(), tuple(self.segment_lengths or ()), tuple(self.dilation_rates or ()))

    def _known_heads(self) -> int | None:
        return self.num_heads or getattr(self.sparse_config, "heads", None) or self._last_heads

    def _candidates(self) -> LongNetSegments | None:
        if self.segment_lengths is None or self.dilation_rates is None:
            return None
        return LongNetSegments(tuple(self.segment_lengths), tuple(self.dilation_rates))

    def prepare(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """Builds and caches layout and plan ahead of the first call.

        Without it the first call of a length does this, in a compiled model while it is traced. Prepare layers that are
        compiled one by one: then they share one graph instead of having one each. Call this again after `.to(device)`
        or a change of the configuration.

        Args:
            seq_len: Tokens, or a (query, key) pair.
            is_causal: As in `forward`.
            num_heads: Query heads; needed only where heads differ and the constructor was not told.

        Returns:
            The layout.

        Raises:
            ValueError: Heads differ and their number is not known.
        """
        heads = self._known_heads() if num_heads is None else num_heads
        layout = self.layout(seq_len, is_causal, heads)
        if heads is None and self.layout(seq_len, is_causal, 2).heads != 1:
            raise ValueError("num_heads: expected the number of query heads, whose layouts differ, got None")
        device = self._anchor.device
        key = (layout.seq_len, is_causal, heads, device, self._fingerprint())
        self._plans[key] = LayoutPlan.build(layout, None, device, order=self.order)
        return layout

    def get_pattern_stats(self, seq_len: int | None = None) -> dict[str, Any]:
        """Figures of the layout in use.

        Args:
            seq_len: Tokens; `None` takes the length and causality of the last call (8,192 tokens before the first).

        Returns:
            A dict with `density` (active / allowed blocks), `sparsity` (1 − density), `requested_density`, `seq_len`,
            `is_causal`, `pattern`, `block_size` and what `BlockLayout.stats()` tells.
        """
        length, causal = self._last_call or (_DEFAULT_SEQ_LEN, False)
        length = length if seq_len is None else check_int("seq_len", seq_len)
        layout = self.layout(length, causal)
        return {
            **layout.stats(),
            "density": layout.density,
            "sparsity": 1 - layout.density,
            "requested_density": self.sparse_config.density,
            "seq_len": length,
            "is_causal": causal,
            "pattern": str(self.sparse_config.pattern_type),
            "block_size": layout.block_size,
        }

    def clear_caches(self) -> None:
        """Forgets cached layouts and plans (a subclass whose pattern depends on its own state calls this on change)."""
        self._forget()

    # -- the call ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        attn_bias: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Exact softmax attention over the active blocks.

        Args:
            q: `[batch, seq, heads, head_dim]`.
            k: `[batch, keys, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
            v: `[batch, keys, kv_heads, value_dim]`.
            is_causal: Whether a query sees only keys up to its own position; the last query is aligned with the last
                key.
            key_padding_mask: `bool[batch, keys]`, True = a real token.
            segment_ids: `int[batch, seq]`, or a (query, key) pair: only tokens of equal id see each other.
            attn_bias: Bool (True = attend) or float, broadcastable to `[batch, heads, seq, keys]`; read only in active
                blocks.
            return_lse: Also return the log-sum-exp of the scores, fp32 `[batch, heads, seq]`.

        Returns:
            `[batch, seq, heads, value_dim]` in the input's dtype, or a pair with the log-sum-exp.

        Raises:
            TypeError: An input is not a floating tensor of the module's dtype, or a mask or flag has the wrong type.
            ValueError: Shapes, devices or head counts do not fit.
        """
        self._check_inputs(q, k, v)
        check_flag("is_causal", is_causal)
        self._last_call, self._last_heads = (q.shape[1], is_causal), q.shape[2]
        masks = {"key_padding_mask": key_padding_mask, "segment_ids": segment_ids, "attn_bias": attn_bias}
        arguments: dict[str, Any] = {
            **masks,
            "dropout_p": self.dropout if self.training else 0.0,
            "scale": self.scale,
            "return_lse": return_lse,
            "deterministic": self.deterministic,
            "backend": self.backend,
        }
        return self._computed(q, k, v, partial(self._operation(q, k, is_causal, masks), **arguments))

    def _operation(self, q: Tensor, k: Tensor, is_causal: bool, masks: dict[str, Any]) -> Callable[..., Any]:
        """What computes this call, lacking only operands, masks and the module's settings."""
        made, bias = self._layout_and_bias(q, k, is_causal, masks["key_padding_mask"], masks["segment_ids"])
        return partial(block_sparse_attention, layout=made, block_bias=bias, order=self.order)

    def _computed(self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Any]) -> Any:
        """What `attend` returns for these operands, computed in half precision where that is asked for."""
        if not self.mixed_precision:
            return attend(q, k, v)
        with ExitStack() as leases:
            q_half, k_half, v_half = (self._half(x, leases) for x in (q, k, v))
            result = attend(q_half, k_half, v_half)
        return (result[0].to(q.dtype), result[1]) if isinstance(result, tuple) else result.to(q.dtype)

    def _half(self, x: Tensor, leases: ExitStack) -> Tensor:
        """A half-precision copy; leased for this call where the pool is asked for and no backward reads it."""
        dtype = _half_dtype(x.device)
        if not self.use_memory_pool or x.dtype == dtype or torch.compiler.is_compiling():
            return x.to(dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return x.to(dtype)
        return leases.enter_context(default_pool().lease(tuple(x.shape), dtype, x.device)).copy_(x)

    def explain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        attn_bias: Tensor | None = None,
    ) -> Explanation:
        """Says what this very call would do, without doing it: layout, plan, backend, and why that one.

        Args:
            q: As for `forward`, like every argument; whether a gradient is needed counts too.
            k: See there.
            v: See there.
            is_causal: See there.
            key_padding_mask: See there.
            segment_ids: See there.
            attn_bias: See there.

        Returns:
            The explanation; `print` shows it with a picture of the layout.

        Raises:
            TypeError, ValueError: As `forward`.
        """
        self._check_inputs(q, k, v)
        check_flag("is_causal", is_causal)
        made, block_bias = self._layout_and_bias(q, k, is_causal, key_padding_mask, segment_ids)
        if self.mixed_precision:
            q, k, v = (x.to(_half_dtype(x.device)) for x in (q, k, v))
        plan = LayoutPlan.build(made, None, q.device, order=self.order) if isinstance(made, BlockLayout) else made
        table = explain_backends(
            q,
            k,
            v,
            plan,
            block_bias=block_bias,
            key_padding_mask=key_padding_mask,
            segment_ids=segment_ids,
            attn_bias=attn_bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            deterministic=self.deterministic,
        )
        return explain_call(self, made, plan, table)

    def _layout_and_bias(
        self, q: Tensor, k: Tensor, is_causal: bool, key_padding_mask: Tensor | None, segment_ids: Any
    ) -> tuple[Any, Tensor | None]:
        """What this call attends to, and its `block_bias`: what a variant that reads its input overrides."""
        del key_padding_mask, segment_ids  # a layout that depends on lengths alone has no use for them
        return self._layout_or_plan(q, k, is_causal), None

    def _layout_or_plan(self, q: Tensor, k: Tensor, is_causal: bool) -> Any:
        if not torch.compiler.is_compiling():
            return self.layout((q.shape[1], k.shape[1]), is_causal, q.shape[2])
        # A compiled graph serves one length and layout; `index` makes a constant of a size that is a variable.
        lengths, heads = (index(q.shape[1]), index(k.shape[1])), index(q.shape[2])
        for told in (heads, None):
            key = (lengths, is_causal, told, q.device, self._fingerprint())
            if key in self._plans:
                return self._plans[key]
        return getattr(self._traced_plans, _plan_while_tracing(self, lengths, is_causal, heads, q.device))

    def _check_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor [batch, seq, heads, head_dim], got {type(x).__name__}")
            if x.ndim != 4:
                raise ValueError(f"{name}: expected [batch, seq, heads, head_dim], got shape {list(x.shape)}")
            if self._device_given and x.device != self._anchor.device:
                raise ValueError(f"{name}: expected device {self._anchor.device}, the module's, got {x.device}")
            if self._dtype_given and x.dtype != self._anchor.dtype:
                raise TypeError(f"{name}: expected dtype {self._anchor.dtype}, the module's, got {x.dtype}")
        if self.num_heads is not None and q.shape[2] != self.num_heads:
            raise ValueError(f"q: expected {self.num_heads} heads, the module's num_heads, got {q.shape[2]}")

    # -- nn.Module's own business ------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Pattern, density and block size."""
        config = self.sparse_config
        unasked = "from geometry" if getattr(config, "heads", None) is None else "by head group"
        density = unasked if config.density is None else f"{config.density:g}"
        parts = [f"pattern={config._pattern_name()}", f"density={density}", f"block_size={config.block_size}"]
        if self.segment_lengths is not None:
            parts.append(f"segment_lengths={self.segment_lengths}, dilation_rates={self.dilation_rates}")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_lock", "_layouts", "_plans", "_traced_plans"):  # rebuilt on demand; a lock cannot be copied
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._layouts: OrderedDict[tuple[Any, ...], BlockLayout] = OrderedDict()
        # For compiled graphs. One that finds its plan prepared serves other modules that have it too; one whose plan
        # was made while tracing serves its module alone, and reads it from an attribute, which no later plan disturbs.
        self._plans: dict[tuple[Any, ...], LayoutPlan] = {}
        self._traced_plans = TracedPlans()


class BlockSparseRingDilatedAttention(BlockSparseAttention):
    """Attention with a fixed pattern: the base module. It never communicates; the name is kept for compatibility.

    A subclass may override `_get_sparse_block_indices` to choose the blocks itself; the pairs it returns are checked,
    and then pattern and density of the config play no part. A pattern object in `SparsePatternConfig.pattern_type`
    is the way that also meets densities.
    """

    def _get_sparse_block_indices(self, num_blocks: int, num_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The active (query block, key block) pairs of all heads, in any order.

        Args:
            num_blocks: Blocks of the sequence.
            num_heads: Query heads.
            device: Where the returned tensors live.

        Returns:
            Row and column indices, each `int64[n]`.
        """
        size = self._square_block_size()
        layout = self._pattern_layout((num_blocks * size, num_blocks * size), False, num_heads)
        _, rows, columns = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in layout.to_coo())
        pairs = torch.unique(torch.stack((rows, columns), dim=1), dim=0)
        return pairs[:, 0], pairs[:, 1]

    def _make_layout(self, seq_len: tuple[int, int], is_causal: bool, num_heads: int) -> BlockLayout:
        own = BlockSparseRingDilatedAttention._get_sparse_block_indices
        if type(self)._get_sparse_block_indices is own:
            return self._pattern_layout(seq_len, is_causal, num_heads)
        size = self._square_block_size()
        if seq_len[0] != seq_len[1]:
            raise ValueError(
                f"_get_sparse_block_indices: describes one sequence, so it cannot serve {seq_len[0]} queries over "
                f"{seq_len[1]} keys unless is_causal=True aligns them with the last keys"
            )
        blocks = -(-seq_len[0] // size)
        pairs = self._get_sparse_block_indices(blocks, num_heads, torch.device("cpu"))
        rows, columns = check_pairs(pairs, blocks)
        return BlockLayout.from_coo(0, rows, columns, block_size=size, seq_len=seq_len, causal=is_causal)

    def _pattern_layout(self, seq_len: tuple[int, int], is_causal: bool, num_heads: int) -> BlockLayout:
        return self.sparse_config.layout(seq_len, heads=num_heads, causal=is_causal, candidates=self._candidates())

    def _square_block_size(self) -> int:
        size = self.sparse_config.block_size
        if isinstance(size, int):
            return size
        if size[0] != size[1]:
            raise ValueError(
                f"block_size: _get_sparse_block_indices speaks of blocks of one size, got (query, key) = {size}"
            )
        return size[0]


@while_tracing
def _plan_while_tracing(
    module: BlockSparseAttention, lengths: tuple[int, int], is_causal: bool, num_heads: int, device: torch.device
) -> str:
    """Leaves a plan where the graph that is being traced looks for it; returns the attribute's name."""
    key = (lengths, is_causal, num_heads, device, module._fingerprint())
    return module._traced_plans.name_of(
        key, lambda: LayoutPlan.build(module.layout(lengths, is_causal, num_heads), None, device, order=module.order)
    )


def _half_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
