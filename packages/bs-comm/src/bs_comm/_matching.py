"""Cut pairwise transfers into steps in which every rank sends at most once and receives at most once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

#: With more pairs than this the ring schedule is kept even where fewer steps would do.
COLOURING_LIMIT = 65_536


def schedule(rows: Int64) -> Int32:
    """Assign every non-empty pair to a step.

    The ring schedule (in step s, rank r sends to r + s) is taken when no schedule has fewer steps, which is the case
    for dense and for banded traffic. Otherwise pairs are coloured so that there are exactly as many steps as the
    busiest rank has partners: no schedule has fewer.

    Args:
        rows: ``int64[world, world]``, how much sender (axis 0) sends to receiver (axis 1); the diagonal is ignored.

    Returns:
        ``int32[world, world]``: the step, from 1, or 0 where nothing is sent.

    Source: König 1916 (a bipartite graph has an edge colouring with as many colours as its largest degree), with
    alternating paths.
    """
    world = len(rows)
    busy = rows > 0
    np.fill_diagonal(busy, False)
    sender, receiver = np.nonzero(busy)
    if not len(sender):
        return np.zeros((world, world), np.int32)
    shift = (receiver - sender) % world
    degree = int(max(busy.sum(0).max(), busy.sum(1).max()))
    used = np.unique(shift)
    step = np.zeros((world, world), np.int32)
    if len(used) <= degree or len(sender) > COLOURING_LIMIT:
        used = used[np.lexsort((used, np.minimum(used, world - used)))]
        step_of_shift = np.zeros(world, np.int32)
        step_of_shift[used] = np.arange(1, len(used) + 1)
        step[sender, receiver] = step_of_shift[shift]
        return step
    # Largest first: transfers of one step are then alike in size, and a step lasts as long as its largest.
    order = np.lexsort((receiver, sender, np.minimum(shift, world - shift), -rows[sender, receiver]))
    edges = zip(sender[order].tolist(), receiver[order].tolist(), strict=True)
    for (s, r), colour in _colour(list(edges), world, degree).items():
        step[s, r] = colour + 1
    return step


def _colour(edges: list[tuple[int, int]], world: int, colours: int) -> dict[tuple[int, int], int]:
    """Colour the edges of a bipartite graph of degree ``colours`` with that many colours.

    ``sends[s][c]`` is the receiver that sender s reaches in colour c (−1: none), ``receives[r][c]`` the reverse.
    """
    sends = [[-1] * colours for _ in range(world)]
    receives = [[-1] * colours for _ in range(world)]
    for s, r in edges:
        mine, theirs = sends[s], receives[r]
        shared = next((c for c in range(colours) if mine[c] < 0 and theirs[c] < 0), None)
        if shared is None:
            a, b = mine.index(-1), theirs.index(-1)
            _flip(sends, receives, r, a, b)
            shared = a
        sends[s][shared] = r
        receives[r][shared] = s
    return {(s, r): c for s in range(world) for c, r in enumerate(sends[s]) if r >= 0}


def _flip(sends: list[list[int]], receives: list[list[int]], receiver: int, a: int, b: int) -> None:
    """Swap colours a and b along the path that leaves ``receiver`` in colour a, which frees a there.

    The path cannot reach the sender that waits for colour a: it would have to arrive there in colour a, which is free
    at that sender.
    """
    path = []
    at, colour, at_receiver = receiver, a, True
    while True:
        ends = receives if at_receiver else sends
        other = ends[at][colour]
        if other < 0:
            break
        path.append((other, at, colour) if at_receiver else (at, other, colour))
        at, at_receiver, colour = other, not at_receiver, b if colour == a else a
    for s, r, colour in path:
        sends[s][colour] = receives[r][colour] = -1
    for s, r, colour in path:
        swapped = b if colour == a else a
        sends[s][swapped] = r
        receives[r][swapped] = s
