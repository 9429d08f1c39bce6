"""The header that ranks compare before the first byte of data: fixed size, whatever the version."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .health import RingMismatchError
from .transport import Transport

#: Raise this when messages change their meaning; ranks of different versions then refuse one another.
WIRE_VERSION = 1
#: Words of a header, in all versions.
_WORDS = 32
_FIELDS = ("batch", "head_dim", "value_head_dim", "dtype", "wire_dtype", "channel", "serial number of the ring")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def agree(transport: Transport, digest: str, sizes: Sequence[int | torch.dtype], device: torch.device) -> None:
    """Compare version, plan digest and sizes with every rank.

    Args:
        transport: Of the ring.
        digest: Hex SHA-256 of the plan.
        sizes: One value for each of `_FIELDS`.
        device: Where messages must live.

    Raises:
        RingMismatchError: On every rank, if any two differ.
    """
    words = torch.zeros(_WORDS, dtype=torch.int64)
    words[0] = WIRE_VERSION
    words[1:9] = torch.tensor([int(digest[i : i + 8], 16) for i in range(0, 64, 8)])
    numbers = [_DTYPES.index(s) if isinstance(s, torch.dtype) else int(s) for s in sizes]
    words[9 : 9 + len(numbers)] = torch.tensor(numbers)
    all_words = transport.gather(words.to(device), "header").cpu()
    different: dict[str, list[int]] = {}
    spans = {"wire version": (0, 1), "digest": (1, 9)}
    spans |= {name: (9 + i, 10 + i) for i, name in enumerate(_FIELDS)}
    for name, (start, stop) in spans.items():
        ranks = (all_words[:, start:stop] != all_words[0, start:stop]).any(1).nonzero().flatten().tolist()
        if ranks:
            different[name] = ranks
    if different:
        raise RingMismatchError(different)
