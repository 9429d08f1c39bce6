"""What a text costs without a transformer: byte n-gram models and general-purpose compressors."""

from __future__ import annotations

import gzip
import lzma

import numpy as np


def ngram_bits_per_byte(train: np.ndarray, validation: np.ndarray, order: int) -> float:
    """Bits per byte of an order-`order` byte model fitted on `train`, measured on `validation`.

    The probability of a byte after the `order` bytes before it is interpolated with that of the next lower order
    by Witten-Bell smoothing, down to the uniform distribution, so that no byte has probability zero and nothing is
    tuned.

    Args:
        train: `uint8[n]`.
        validation: `uint8[m]`, `m > order`; its first `order` bytes are context only.
        order: Bytes of context: 0, 1 or 2 (the count table has 256^(order + 1) entries).

    Source:
        Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37 (1991).
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order: expected 0, 1 or 2, got {order}")
    probability = np.full(len(validation) - order, 1 / 256)
    for length in range(order + 1):
        counts = np.bincount(_codes(train, length, length + 1), minlength=256 ** (length + 1)).astype(np.int32)
        table = counts.reshape(-1, 256)
        total, kinds = table.sum(1), np.count_nonzero(table, axis=1)
        codes = _codes(validation, length, length + 1)[order - length :]
        seen, mass = counts[codes], total[codes // 256] + kinds[codes // 256]
        probability = np.where(mass > 0, (seen + kinds[codes // 256] * probability) / np.maximum(mass, 1), probability)
    return float(-np.log2(probability).mean())


def compressor_bits_per_byte(validation: np.ndarray) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the same bytes (they adapt to them; they saw no training text)."""
    raw = validation.tobytes()
    sizes = {"gzip -9": len(gzip.compress(raw, compresslevel=9, mtime=0)), "xz -9": len(lzma.compress(raw, preset=9))}
    return {name: 8 * size / len(raw) for name, size in sizes.items()}


def yardsticks(train: np.ndarray, validation: np.ndarray) -> dict[str, float]:
    """All of them, by name, in bits per byte."""
    orders = {f"order-{order} byte model": ngram_bits_per_byte(train, validation, order) for order in (1, 2)}
    return {**orders, **compressor_bits_per_byte(validation)}


def _codes(text: np.ndarray, order: int, width: int) -> np.ndarray:
    """Each run of `width` bytes as one number, first byte most significant: `int64[n - order]`."""
    codes = np.zeros(len(text) - order, np.int64)
    for i in range(width):
        codes = codes * 256 + text[i : len(text) - order + i]
    return codes
