"""Exact LongNet attention as a module, dense or block-sparse inside its segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from typing import Any, Unpack

import torch
from torch import Tensor

from bs_kernels import DilatedPlan, dilated_attention
from bs_patterns import BlockLayout

from ._checks import check_flag, check_int
from ._dilated_explain import DilatedExplanation, explain_dilated
from ._layouts import check_lengths
from ._options import UnorderedOptions, with_options_of
from ._tracing import while_tracing
from .attention import BlockSparseAttention, _half_dtype
from .config import SparsePatternConfig

#: The branches of the LongNet paper's language models (section 4.1).
DEFAULT_SEGMENT_LENGTHS = (2048, 4096, 8192, 16384, 32768)
DEFAULT_DILATION_RATES = (1, 2, 4, 6, 12)

_PLANS_KEPT = 16
_DEFAULT_SEQ_LEN = 8192


class DilatedAttention(BlockSparseAttention):
    """Exact LongNet: dilated attention at token granularity, over several segment lengths at once.

    A branch is a segment length w with a dilation rate r. In it, head h keeps the tokens whose index in their segment
    is h mod r, by steps of r, and every kept query attends to the kept keys of its segment; the definition is that of
    `bs_kernels.dilated_attention`. Other modules take `segment_lengths` and `dilation_rates` as a restriction of their
    pattern, in blocks; here they are the pattern, in tokens.

    With a `sparse_config`, every segment is block-sparse: in each branch, the n tokens that a head keeps in a segment
    attend to one another by the layout that the pattern has for n tokens, in its own density and block size (in kept
    tokens). Without one, segments are dense. The `segment_ids` of packed documents do not move LongNet's segments.

    Args:
        segment_lengths: w of every branch, in tokens; `None`: 2048, 4096, 8192, 16384, 32768.
        dilation_rates: r of every branch, in tokens; `None`: 1, 2, 4, 6, 12. Both defaults are the paper's.
        sparse_config: Pattern, density and block size inside every segment, or a mapping of its fields; `None`: dense.
            The module keeps this very object: assigning to its fields takes effect at the next call.
        combine: `"softmax"` (one softmax over the keys of all branches, a key that two branches see counting twice),
            `"longnet"` (the same value; no gradient through the branches' weights, as the released LongNet trains) or
            `"union"` (each key once; not with `sparse_config`).
        device: Where `prepare` builds plans, and where inputs must be. `None`: wherever the inputs are.
        dtype: What inputs must be. `None`: any floating dtype.
        num_heads: Query heads; `None` reads them from the first input.
        dropout: Probability with which an attention probability is dropped while training. It doubles the work.
        scale: Multiplies the scores; `None` is `head_dim ** -0.5`.
        mixed_precision: Run the attention in bf16 (fp16 on GPUs without bf16) and return the input's dtype.
        use_memory_pool: As for `BlockSparseAttention`.
        backend: Of `bs_kernels.dilated_attention`.
        deterministic: Whether the backward must give the same bits every time.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, only one of `segment_lengths` and `dilation_rates` is given, or
            `combine="union"` with a `sparse_config`.

    Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023.
    """

    segment_lengths: list[int]
    dilation_rates: list[int]

    @with_options_of(BlockSparseAttention.__init__, without=("order",))
    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: SparsePatternConfig | Mapping[str, Any] | None = None,
        *,
        combine: str = "softmax",
        **options: Unpack[UnorderedOptions],
    ) -> None:
        if segment_lengths is None and dilation_rates is None:
            segment_lengths, dilation_rates = DEFAULT_SEGMENT_LENGTHS, DEFAULT_DILATION_RATES
        super().__init__(segment_lengths, dilation_rates, sparse_config, **options)
        if sparse_config is None:
            self.sparse_config = None
        self.combine = combine
        self._plan_of(1, False, 1, torch.device("cpu"))  # checks combine, also against sparse_config

    # -- what the module attends to ----------------------------------------------------------------------------------

    def _fingerprint(self) -> tuple[Any, ...]:
        config = None if self.sparse_config is None else self.sparse_config.fingerprint()
        return (config, tuple(self.segment_lengths), tuple(self.dilation_rates), self.combine)

    def _plan_of(
        self, seq_len: int | tuple[int, int], is_causal: bool, num_heads: int, device: torch.device
    ) -> DilatedPlan:
        """The plan of a call; made again when the configuration changes."""
        lengths = check_lengths(seq_len)
        key = (lengths, is_causal, num_heads, device, self._fingerprint())
        with self._lock:
            found = self._dilated_plans.get(key)
        if found is None:
            found = self._make_plan(lengths, is_causal, num_heads, device)
            with self._lock:
                self._dilated_plans[key] = found
                while len(self._dilated_plans) > _PLANS_KEPT:
                    del self._dilated_plans[next(iter(self._dilated_plans))]
        return found

    def _make_plan(
        self, lengths: tuple[int, int], is_causal: bool, num_heads: int, device: torch.device
    ) -> DilatedPlan:
        return DilatedPlan.build(
            self.segment_lengths,
            self.dilation_rates,
            lengths,
            num_heads,
            causal=is_causal,
            combine=self.combine,
            segment_layout=self._segment_layout(is_causal),
            device=device,
        )

    def _segment_layout(self, is_causal: bool) -> Any:
        return None if self.sparse_config is None else partial(_pattern_of_rows, self.sparse_config, is_causal)

    def layout(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """Which keys each query sees under at least one branch: a layout of single tokens (`block_size` 1).

        It holds one entry for every pair, so it is for looking at and for checking short sequences; the computation
        never makes it. A key counts once here whatever `combine` says.

        Args:
            seq_len: As for `BlockSparseAttention.layout`.
            is_causal: See there.
            num_heads: Query heads; `None` takes the module's, or 1. Heads differ where a rate is above 1.
        """
        return super().layout(seq_len, is_causal, num_heads)

    def _make_layout(self, seq_len: tuple[int, int], is_causal: bool, num_heads: int) -> BlockLayout:
        return self._plan_of(seq_len, is_causal, num_heads, torch.device("cpu")).layout()

    def prepare(self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None) -> Any:
        """Builds and caches the plan ahead of the first call; `torch.compile(fullgraph=True)` needs that.

        Args:
            seq_len: Tokens, or a (query, key) pair.
            is_causal: As in `forward`.
            num_heads: Query heads; needed unless the constructor or a call told.

        Returns:
            The `bs_kernels.DilatedPlan`.

        Raises:
            ValueError: The number of heads is not known.
        """
        heads = self._known_heads() if num_heads is None else check_int("num_heads", num_heads)
        if heads is None:
            raise ValueError("num_heads: expected the number of query heads, whose tokens differ, got None")
        return self._plan_of(seq_len, check_flag("is_causal", is_causal), heads, self._anchor.device)

    def get_pattern_stats(self, seq_len: int | None = None) -> dict[str, Any]:
        """Figures of what is computed.

        Args:
            seq_len: Tokens; `None` takes the length and causality of the last call (8,192 tokens before the first).

        Returns:
            A dict with `density` (query–key pairs that are computed / pairs allowed, averaged over the heads; a pair
            that two branches compute counts twice but for `combine="union"`), `sparsity` (1 − density),
            `requested_density` (that of the `sparse_config`, inside segments), `pairs` per branch and head, `seq_len`,
            `is_causal`, `pattern` and `block_size` (of the layouts inside segments; 1 without).
        """
        length, causal = self._last_call or (_DEFAULT_SEQ_LEN, False)
        length = length if seq_len is None else check_int("seq_len", seq_len)
        heads = self._known_heads() or 1
        plan = self._plan_of(length, causal, heads, torch.device("cpu"))
        pairs = [count / heads for count in plan.pairs()]
        allowed = length * (length + 1) // 2 if causal else length * length
        density, config = sum(pairs) / allowed, self.sparse_config
        return {
            "density": density,
            "sparsity": 1 - density,
            "requested_density": None if config is None else config.density,
            "pairs": pairs,
            "seq_len": length,
            "is_causal": causal,
            "pattern": "dense segments" if config is None else f"{config._pattern_name()} in segments",
            "block_size": 1 if config is None else config.block_size,
        }

    # -- the call ----------------------------------------------------------------------------------------------------

    def _operation(self, q: Tensor, k: Tensor, is_causal: bool, masks: dict[str, Any]) -> Callable[..., Any]:
        plan = self._known_plan(q, k, is_causal)
        branches: dict[str, Any] = {"segment_lengths": self.segment_lengths, "dilation_rates": self.dilation_rates}
        how = {"causal": is_causal, "combine": self.combine, "segment_layout": plan.question.layout, "plan": plan}
        return partial(dilated_attention, **branches, **how)

    def _known_plan(self, q: Tensor, k: Tensor, is_causal: bool) -> DilatedPlan:
        if not torch.compiler.is_compiling():
            return self._plan_of((q.shape[1], k.shape[1]), is_causal, q.shape[2], q.device)
        lengths, heads = (index(q.shape[1]), index(k.shape[1])), index(q.shape[2])
        key = (lengths, is_causal, heads, q.device, self._fingerprint())
        if key in self._dilated_plans:
            return self._dilated_plans[key]
        return getattr(self._traced_plans, _plan_while_tracing(self, lengths, is_causal, heads, q.device))

    def _layout_or_plan(self, q: Tensor, k: Tensor, is_causal: bool) -> DilatedPlan:
        # Overridden, which tells whoever wants attention weights that `layout` alone does not determine them.
        return self._known_plan(q, k, is_causal)

    def explain(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        attn_bias: Tensor | None = None,
    ) -> DilatedExplanation:
        """Says what this very call would do, branch by branch, without doing it.

        Args:
            q: As for `forward`, like every argument; whether a gradient is needed counts too.
            k: See there.
            v: See there.
            is_causal: See there.
            key_padding_mask: See there.
            segment_ids: See there.
            attn_bias: See there.

        Returns:
            The explanation; `print` shows it.
        """
        self._check_inputs(q, k, v)
        if self.mixed_precision:
            q, k, v = (x.to(_half_dtype(x.device)) for x in (q, k, v))
        given = {
            "key_padding_mask": key_padding_mask,
            "segment_ids": segment_ids,
            "attn_bias": attn_bias,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        plan = self._known_plan(q, k, check_flag("is_causal", is_causal))
        return explain_dilated(self, plan, (q, k, v), given)

    # -- nn.Module's own business ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_dilated_plans"]
        return state

    def _forget(self) -> None:
        super()._forget()
        self._dilated_plans: dict[tuple[Any, ...], DilatedPlan] = {}

    def extra_repr(self) -> str:
        """Branches, how they combine, and the pattern inside segments."""
        parts = [f"segment_lengths={self.segment_lengths}", f"dilation_rates={self.dilation_rates}"]
        parts.append(f"combine={self.combine!r}")
        config = self.sparse_config
        if config is not None:
            density = "from geometry" if config.density is None else f"{config.density:g}"
            parts.append(f"pattern={config._pattern_name()}, density={density}, block_size={config.block_size}")
        return ", ".join(parts)


def _pattern_of_rows(config: SparsePatternConfig, is_causal: bool, rows: int) -> BlockLayout:
    """The layout inside a segment of which a head keeps this many tokens."""
    return config.pattern().layout(
        rows, block_size=config.block_size, heads=1, causal=is_causal, density=config.density
    )


@while_tracing
def _plan_while_tracing(
    module: DilatedAttention, lengths: tuple[int, int], is_causal: bool, num_heads: int, device: torch.device
) -> str:
    """Leaves a plan where the graph that is being traced looks for it; returns the attribute's name."""
    key = (lengths, is_causal, num_heads, device, module._fingerprint())
    return module._traced_plans.name_of(key, lambda: module._make_plan(lengths, is_causal, num_heads, device))
