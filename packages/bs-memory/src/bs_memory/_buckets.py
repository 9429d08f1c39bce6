"""Size buckets: which requests may share a buffer."""

from bs_memory import _check

ALIGNMENT = 64  # what torch's CPU allocator aligns to, and the width of a cache line and of an AVX-512 register


def bucket_bytes(nbytes: int) -> int:
    """Rounds a request up to its bucket, eight buckets per power of two.

    Args:
        nbytes: bytes asked for, ≥ 0.

    Returns:
        The bucket's size in bytes: a multiple of 64, at most 12.5 % (or 63 bytes) above `nbytes`, at least 64.

    Raises:
        TypeError: if `nbytes` is not an int.
        ValueError: if it is negative.

    Source:
        The size classes of jemalloc (Evans 2006) have four steps per doubling, hence at most 20 % waste; eight steps
        halve that, and attention buffers repeat exactly, so that coarser buckets would not find more reuse.
    """
    _check.integer("nbytes", nbytes, 0)
    if nbytes <= ALIGNMENT:
        return ALIGNMENT
    step = max(ALIGNMENT, 1 << ((nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step
