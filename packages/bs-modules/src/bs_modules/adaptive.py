"""Attention whose blocks a learned gate picks, for every sequence anew.

B batch, S queries or keys, H query heads, G key heads, D head dim, QB query blocks, KB key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from bs_kernels import BatchedLayout, LayoutPlan
from bs_patterns import BlockLayout

from ._adaptive_config import AdaptiveConfig
from ._candidates import candidate_layout, check_candidates
from ._checks import check_flag, check_int, check_positive
from ._frozen import Calibration, RecordedLayouts, read_samples
from ._gate_documents import Documents, read_documents
from ._gate_losses import block_mass, distillation_loss
from ._gate_noise import draw_rows, draw_seed
from ._gate_room import Room, make_room
from ._gate_scorer import ImportanceScorer, Pooled
from ._gate_select import Selection, logits_of, noisy, select_blocks
from ._layouts import check_lengths
from ._operand_checks import check_operands, check_tokens
from ._options import AttentionOptions, one_config, with_options_of
from ._tracing import while_tracing
from .attention import BlockSparseAttention, BlockSparseRingDilatedAttention
from .config import CheckedConfig, SparsePatternConfig

_ROOMS_KEPT = 16
_DEFAULT_SEQ_LEN = 8192


class BlockSparseAdaptive(BlockSparseAttention):
    """Attention over the blocks that a learned gate picks for every sequence and head. It never communicates.

    A scorer (`ImportanceScorer`) rates every pair of a query block and a key block from what pooling leaves of them;
    every query block keeps its best key blocks, and the attention over those is one exact softmax. While training,
    Gumbel noise explores and the gradient of the selected blocks' gates reaches the scorer, and through it queries and
    keys; in eval mode nothing is random.

    The density is met exactly: per head, the selected blocks differ by at most one half from
    `max(density · allowed blocks, blocks that must be kept)`.

    With `is_causal` nothing is read ahead: what a query block picks depends on tokens up to its first position only.
    Its summary is that of the queries that end there; key blocks that end before the block of that position can be
    picked; later ones that the query block reaches (the diagonal) are always kept, and those of the config's
    `window_size`. So outputs up to a position do not change by a bit when later tokens do. `query_block_size=1` picks
    for every query by itself.

    Args:
        segment_lengths: LongNet segment lengths in tokens. Together with `dilation_rates` they restrict what the gate
            may pick from; the density stays relative to all allowed blocks.
        dilation_rates: One rate per segment length, in blocks.
        sparse_config: An `AdaptiveConfig` or a mapping of its fields. The module keeps this very object.
        adaptive_config: The same under another name; give one of the two.
        candidates: Further restricts what the gate may pick from, and makes it adaptive inside that: a `bs_patterns`
            pattern, or a config such as `HierarchicalConfig` (its block size plays no part).
        cache: In eval mode, pick once per shape and reuse the selection until `clear_caches()` or `train()`.
        num_heads: Query heads; `None` reads them from the first input.
        num_kv_heads: Key heads; `None`: those of the first input, or `num_heads` where `head_dim` is given too.
        head_dim: Width of queries and keys; `None` reads it from the first input. The scorer's parameters are made
            when the heads and their width are known.
        device: Of the parameters, and where inputs must be. `None`: wherever the inputs are.
        dtype: What inputs must be. `None`: any floating dtype.
        dropout: As for `BlockSparseRingDilatedAttention`, like the arguments below.
        scale: See there.
        mixed_precision: See there.
        use_memory_pool: See there.
        order: `"auto"` or `"longest_first"`.
        backend: See there.
        deterministic: See there.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or both configs are given.

    Source: Gumbel top-k: Kool et al., "Stochastic Beams and Where to Find Them", 2019; straight-through gradients:
    Bengio et al., 2013. The forms of scorer and gate are our own; `ImportanceScorer` and `select_blocks` define them.
    """

    sparse_config: Any
    _config_type = AdaptiveConfig
    _orders = ("auto", "longest_first")  # of blocks picked on the device

    @with_options_of(BlockSparseAttention.__init__)
    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: AdaptiveConfig | Mapping[str, Any] | None = None,
        *,
        adaptive_config: AdaptiveConfig | Mapping[str, Any] | None = None,
        candidates: Any = None,
        cache: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        config = one_config(AdaptiveConfig, "adaptive_config", adaptive_config, sparse_config)
        super().__init__(segment_lengths, dilation_rates, config, **options)
        self.candidates = check_candidates(candidates)
        self.cache = check_flag("cache", cache)
        config, device = self.sparse_config, options.get("device")
        self.scorer = ImportanceScorer(
            self.num_heads,
            None if head_dim is None else check_int("head_dim", head_dim),
            num_kv_heads=None if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads),
            hidden_dim=config.hidden_dim,
            num_layers=config.num_layers,
            share_across_heads=config.share_across_heads,
            pooling=config.pooling,
            query_block_size=config.blocks[0],
            density=config.density if config.learn_density else None,
            scale=self.scale,
            device=device,
            dtype=options.get("dtype"),
        )
        log_temperature = torch.tensor(math.log(config.temperature), device=device, dtype=options.get("dtype"))
        self.log_temperature: Tensor
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    # -- what the gate picks -----------------------------------------------------------------------------------------

    @property
    def temperature(self) -> Tensor:
        """What scores are divided by, a scalar tensor; never below the config's `min_temperature`."""
        return self.log_temperature.exp().clamp(min=self.sparse_config.min_temperature)

    def set_temperature(self, temperature: float) -> None:
        """Sets the temperature, a number > 0, learnable or not."""
        with torch.no_grad():
            self.log_temperature.fill_(math.log(check_positive("temperature", temperature)))

    def select(
        self,
        q: Tensor,
        k: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Selection:
        """Picks the blocks of a batch, with noise in training mode.

        Args:
            q: `[B, Sq, H, D]`.
            k: `[B, Sk, G, D]`.
            is_causal: As in `forward`.
            key_padding_mask: `bool[B, Sk]`, True = a real token. Other tokens are not pooled, and blocks without a
                real one are taken last.
            segment_ids: `int[B, S]`, or a (query, key) pair, of packed documents. Only blocks that share a document are
                picked, at most as many as the budget, and the tokens of one document do not change what another one
                sees of the picks.

        Returns:
            The layout of every batch element, and the `block_bias` that goes with it.

        Raises:
            TypeError, ValueError: As `forward`.
        """
        self._check_inputs(q, k, k)
        check_operands(q, k, k)
        check_tokens("key_padding_mask", key_padding_mask, k, (torch.bool,))
        check_flag("is_causal", is_causal)
        config, lengths = self.sparse_config, (q.shape[1], k.shape[1])
        if 0 in lengths:
            raise ValueError(f"q, k: expected at least one token to pick blocks for, got {lengths[0]} and {lengths[1]}")
        room = self._room(lengths, is_causal, q.device, q.shape[2])
        dead = None if key_padding_mask is None else _dead_blocks(key_padding_mask, config.block_size)
        packed = None
        if segment_ids is not None:
            packed = read_documents(segment_ids, (q.shape[0], *lengths), config.blocks, is_causal, room, dead)
            room = packed.room
        pooled = self.scorer.pool(q, k, config.block_size, is_causal, key_padding_mask, packed)
        seed = draw_seed(q.device) if self.training else None
        if seed is not None and config.distill_rows and torch.is_grad_enabled():
            rows = draw_rows(seed, pooled.queries.shape[2], config.distill_rows, q.device)
            self.gate_losses["distillation"] = self._distill(
                q, k, pooled, room, rows, is_causal, key_padding_mask, packed
            )
        made = self._choose(pooled, room, lengths, is_causal, dead, seed)
        if made.expected_density is not None and self.training:
            self.gate_losses["sparsity"] = made.expected_density
        self._note_density(lengths, is_causal, made.density)
        if self._calibration is not None:
            self._calibration.add(made.layout)
        return made

    def _note_density(self, lengths: tuple[int, int], is_causal: bool, density: Tensor) -> None:
        """Keeps the density that a call met, for statistics."""
        self._met = ((lengths, is_causal, self._fingerprint()), density)

    def _choose(
        self,
        pooled: Pooled,
        room: Room,
        lengths: tuple[int, int],
        is_causal: bool,
        dead: Tensor | None,
        seed: Tensor | int | None,
        rows: Tensor | None = None,
        of: int | None = None,
    ) -> Selection:
        """Picks blocks for all query blocks, or for the `rows` `of` them that pooled queries, room and lengths are of.

        The noise of a seed belongs to the position of a pair of blocks, so rows may be chosen apart.
        """
        learn = self.scorer.threshold is not None
        logits = logits_of(self.scorer.score(pooled, room.distance), room, self.temperature, self.scorer.threshold)
        return select_blocks(
            logits if seed is None else noisy(logits, learn, seed, rows, of),
            room,
            self.sparse_config.blocks,
            lengths,
            is_causal,
            soft=self.sparse_config.gate == "soft",
            learn_density=learn,
            dead=dead,
        )

    def _distill(
        self,
        q: Tensor,
        k: Tensor,
        pooled: Pooled,
        room: Room,
        rows: Tensor,
        is_causal: bool,
        key_padding_mask: Tensor | None,
        packed: Documents | None,
    ) -> Tensor:
        """The distillation loss of some query blocks. It teaches the scorer, and queries and keys to be found by it."""
        config = self.sparse_config
        with torch.no_grad():
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            labels = None if packed is None else packed.labels
            mass = block_mass(q, k, rows, config.blocks, is_causal, scale, key_padding_mask, labels)
        picked = pooled._replace(queries=pooled.queries[:, :, rows])
        scores = self.scorer.score(picked, room.distance[rows])
        return distillation_loss(scores, mass, room.readable[..., rows, :])

    def _layout_and_bias(
        self, q: Tensor, k: Tensor, is_causal: bool, key_padding_mask: Tensor | None, segment_ids: Any
    ) -> tuple[Any, Tensor | None]:
        if not (self.cache and not self.training):
            made = self.select(q, k, is_causal, key_padding_mask=key_padding_mask, segment_ids=segment_ids)
            return made.layout, made.bias
        if segment_ids is not None:
            raise ValueError(
                "segment_ids: expected None with cache=True, which would reuse the picks of other documents"
            )
        key = (tuple(q.shape), tuple(k.shape), is_causal, q.device, self._fingerprint())
        if key not in self._selections:
            with torch.no_grad():
                made = self.select(q, k, is_causal, key_padding_mask=key_padding_mask)
                self._selections[key] = (LayoutPlan.build(made.layout, None, q.device, order=self.order), made.bias)
        return self._selections[key]

    def _layout_or_plan(self, q: Tensor, k: Tensor, is_causal: bool) -> BatchedLayout:
        return self.select(q, k, is_causal).layout

    # -- what it may pick from ---------------------------------------------------------------------------------------

    def _fingerprint(self) -> tuple[Any, ...]:
        given = self.candidates
        return (*super()._fingerprint(), given.fingerprint() if isinstance(given, CheckedConfig) else given)

    def _room(self, lengths: tuple[int, int], is_causal: bool, device: torch.device, heads: int) -> Room:
        if torch.compiler.is_compiling():
            lengths, heads = (index(lengths[0]), index(lengths[1])), index(heads)
        key = (lengths, is_causal, device, heads, self._fingerprint())
        found = self._rooms.get(key)
        if found is not None:
            return found
        if torch.compiler.is_compiling():
            return getattr(self._traced_plans, _room_while_tracing(self, lengths, is_causal, device, heads))
        room = self._make_room(lengths, is_causal, device, heads)
        with self._lock:
            self._rooms[key] = room
            while len(self._rooms) > _ROOMS_KEPT:
                del self._rooms[next(iter(self._rooms))]
        return room

    def _make_room(self, lengths: tuple[int, int], is_causal: bool, device: torch.device, heads: int) -> Room:
        config, shared = self.sparse_config, int(self.sparse_config.share_across_heads)
        config.validate()
        return make_room(
            lengths,
            config.blocks,
            is_causal,
            config.density,
            config.bound(),
            lambda grid: candidate_layout(
                self.candidates, self._candidates(), config.blocks, grid, is_causal, shared or heads
            ),
            device,
            config.window_size,
            config.row_budget,
        )

    def layout(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """Raises: there is no layout without an input. `select` gives that of one, `freeze` one for all.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "layout: expected an input to pick blocks for; select(q, k, is_causal) gives the layout of one, and "
            "freeze(samples) a module with one layout for all"
        )

    def prepare(
        self, seq_len: int | tuple[int, int], is_causal: bool = False, num_heads: int | None = None
    ) -> BlockLayout:
        """Prepares the budgets of a length ahead of the first call; see `BlockSparseAttention.prepare`.

        Args:
            seq_len: Tokens, or a (query, key) pair.
            is_causal: As in `forward`.
            num_heads: Query heads; needed unless the constructor or a call told.

        Returns:
            All blocks that a call may come to use.

        Raises:
            ValueError: The number of heads is not known.
        """
        lengths = check_lengths(seq_len)
        heads = self._known_heads() if num_heads is None else check_int("num_heads", num_heads)
        if heads is None:
            raise ValueError("num_heads: expected the number of query heads, got None")
        room = self._room(lengths, check_flag("is_causal", is_causal), self._anchor.device, heads)
        mask = (room.readable | room.kept).cpu().numpy()
        return BlockLayout.from_dense(mask, block_size=self.sparse_config.blocks, seq_len=lengths, causal=is_causal)

    def get_pattern_stats(self, seq_len: int | None = None) -> dict[str, Any]:
        """Figures of what the gate keeps.

        Args:
            seq_len: Tokens; `None` takes the lengths and causality of the last call (8,192 tokens before the first).

        Returns:
            A dict with `density` (active / allowed blocks), `sparsity` (1 − density), `requested_density`, `seq_len`,
            `is_causal`, `pattern`, `block_size`, `q_blocks`, `kv_blocks`, `allowed` and `nnz` (per head, on average),
            `temperature`, and `measured`: whether `density` is that of the last call rather than that of the budgets,
            which are always met unless the density is learned. A change of the config since the last call counts.
        """
        length, causal = self._last_call or (_DEFAULT_SEQ_LEN, False)
        length = length if seq_len is None else check_int("seq_len", seq_len)
        room = self._room((length, length), causal, self._anchor.device, self._known_heads() or 1)
        measured = self._met is not None and self._met[0] == ((length, length), causal, self._fingerprint())
        met = float(self._met[1]) if measured and self._met is not None else room.met
        return {
            "density": met,
            "sparsity": 1 - met,
            "requested_density": self.sparse_config.density,
            "seq_len": length,
            "is_causal": causal,
            "pattern": "adaptive",
            "block_size": self.sparse_config.blocks,
            "q_blocks": room.readable.shape[1],
            "kv_blocks": room.readable.shape[2],
            "allowed": room.allowed,
            "nnz": met * room.allowed,
            "temperature": float(self.temperature.detach()),
            "measured": measured,
        }

    # -- after training ----------------------------------------------------------------------------------------------

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Counts what the gate picks in the calls inside the block, for `freeze()`; switches to eval mode meanwhile."""
        training, self._calibration = self.training, Calibration()
        self.eval()
        try:
            yield
        finally:
            self._recorded, self._calibration = self._calibration, None
            self.train(training)

    def freeze(
        self, samples: Iterable[Sequence[Tensor]] | None = None, is_causal: bool = False
    ) -> BlockSparseRingDilatedAttention:
        """Makes a module with the fixed layout that the gate picks most often.

        Every query block keeps as many blocks as here, those picked most often over all calibration sequences; ties go
        to the earlier block. The gates themselves (`gate="soft"`) are not part of the result.

        Args:
            samples: Tuples that start with `q` and `k`. `None`: what was counted inside `calibrating()`.
            is_causal: Of the samples; what was counted keeps its own.

        Returns:
            The module. It knows the lengths it was calibrated for, and causal ones shorter than those.

        Raises:
            TypeError: A sample is not a tuple that starts with two tensors.
            ValueError: There is nothing to calibrate with.
        """
        if samples is not None:
            with self.calibrating(), torch.no_grad():
                for q, k in read_samples(samples):
                    self.select(q, k, is_causal)
        elif is_causal:
            raise ValueError("is_causal: has no effect without samples; what was counted keeps its own")
        if self._recorded is None or not self._recorded.counts:
            raise ValueError("samples: expected at least one, or calls inside calibrating() before, got none")
        frozen = BlockSparseRingDilatedAttention(
            sparse_config=SparsePatternConfig(
                pattern_type=RecordedLayouts(self._recorded.layouts()), block_size=self.sparse_config.blocks
            ),
            device=self._anchor.device if self._device_given else None,
            dtype=self._anchor.dtype if self._dtype_given else None,
            num_heads=self.num_heads,
            dropout=self.dropout,
            scale=self.scale,
            mixed_precision=self.mixed_precision,
            use_memory_pool=self.use_memory_pool,
            order=self.order,
            backend=self.backend,
            deterministic=self.deterministic,
        )
        return frozen.train(self.training)

    # -- nn.Module's own business ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> BlockSparseAdaptive:
        """As `nn.Module.train`; forgets cached selections."""
        self._selections = {}
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._selections = {}
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Density, block sizes and the kind of gate."""
        more = [f"blocks={self.sparse_config.blocks}", f"gate={self.sparse_config.gate}"]
        more += ["learn_density=True"] * self.sparse_config.learn_density
        more += [f"candidates={self.candidates}"] * (self.candidates is not None)
        return ", ".join([super().extra_repr(), *more])

    def _forget(self) -> None:
        super()._forget()
        self._rooms: dict[tuple[Any, ...], Room] = {}
        self._selections: dict[tuple[Any, ...], tuple[LayoutPlan, Tensor | None]] = {}
        #: Of the last training call, for `AdaptiveSparsityTrainer`: `"sparsity"` and `"distillation"`.
        self.gate_losses: dict[str, Tensor] = {}
        self._met: tuple[tuple[Any, ...], Tensor] | None = None  # what the last call was, and its density
        self._calibration: Calibration | None = None
        self._recorded: Calibration | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_rooms", "_selections", "gate_losses", "_met", "_calibration", "_recorded"):
            del state[name]
        return state


@while_tracing
def _room_while_tracing(
    module: BlockSparseAdaptive, lengths: tuple[int, int], is_causal: bool, device: torch.device, heads: int
) -> str:
    """Leaves what may be picked where the graph that is being traced looks for it; returns the attribute's name."""
    key = (lengths, is_causal, device, heads, module._fingerprint())
    return module._traced_plans.name_of(key, lambda: module._make_room(lengths, is_causal, device, heads))


def _dead_blocks(key_padding_mask: Tensor, block: int) -> Tensor:
    """bool `[B, KB]`: key blocks without a real token."""
    padded = nn.functional.pad(key_padding_mask, (0, -key_padding_mask.shape[1] % block))
    return ~padded.unflatten(1, (-1, block)).any(-1)
