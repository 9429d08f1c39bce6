"""The positional part of the token mask: causal and window, as one band of key − query distances."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["UNBOUNDED", "TokenMask"]

#: Stands for "no bound on this side" in `TokenMask.band`; beyond any distance of two int32 positions that is used.
UNBOUNDED = 2**30


@dataclass(frozen=True)
class TokenMask:
    """The token-level rule inside active blocks that depends on absolute positions alone.

    Key padding, segment ids and ``attn_bias`` belong to one call and travel beside the plan; this part is baked into
    it.

    Attributes:
        causal: keys at positions after the query's are masked.
        window: ``(left, right)``: keys from ``query − left`` to ``query + right``, both inclusive; None on a side means
            that this side is not bounded. None masks nothing.
    """

    causal: bool = False
    window: tuple[int | None, int | None] | None = None

    @property
    def band(self) -> tuple[int, int]:
        """``(lo, hi)``: a pair is kept iff ``lo ≤ key position − query position ≤ hi``."""
        left, right = self.window or (None, None)
        lo = -UNBOUNDED if left is None else -left
        hi = UNBOUNDED if right is None else right
        return lo, min(hi, 0) if self.causal else hi

    @property
    def is_trivial(self) -> bool:
        """Whether every pair is kept."""
        return self.band == (-UNBOUNDED, UNBOUNDED)

    @staticmethod
    def parse_window(window: object, *, causal: bool) -> tuple[int | None, int | None] | None:
        """Check and normalise a user's ``window``.

        Args:
            window: None, ``(left, right)`` with ``-1`` or None for an unbounded side, or, for causal attention, the
                number of keys including the query's own position.
            causal: whether the call is causal.

        Returns:
            ``(left, right)`` with None for an unbounded side, or None when nothing is bounded.

        Raises:
            TypeError: not an integer and not a pair of integers.
            ValueError: a negative size other than −1, or a single number for attention that is not causal.
        """
        if window is None:
            return None
        if isinstance(window, bool):
            raise TypeError(f"window: expected (left, right) or, when causal, an int, got {window!r}")
        if isinstance(window, int):
            if not causal:
                raise ValueError(f"window: expected (left, right) for attention that is not causal, got {window}")
            if window < 1:
                raise ValueError(
                    f"window: expected at least 1 key (a causal window counts the query itself), got {window}"
                )
            return window - 1, 0
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window: expected (left, right) or, when causal, an int, got {window!r}")
        sides: list[int | None] = []
        for name, side in zip(("left", "right"), window, strict=True):
            if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
                raise TypeError(f"window: expected {name} to be an int or None, got {side!r}")
            if side is not None and side < -1:
                raise ValueError(f"window: expected {name} ≥ 0, or −1 for unbounded, got {side}")
            sides.append(None if side is None or side == -1 or side >= UNBOUNDED else side)
        left, right = sides
        return None if left is None and right is None else (left, right)
