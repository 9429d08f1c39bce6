"""Quantities with units, as people type them and as they like to read them."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ/]*)\s*$")
_SI = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def _split(name: str, text: str, example: str) -> tuple[float, str]:
    match = _NUMBER.match(text)
    if match is None:
        raise ValueError(f"{name}: expected a number with a unit such as {example}, got {text!r}")
    return float(match[1]), match[2]


def bandwidth(name: str, text: str) -> float:
    """Read bytes per second: ``50GB/s``, ``400Gbit/s``, ``50G`` (bytes)."""
    value, unit = _split(name, text, "50GB/s or 400Gbit/s")
    unit = unit.removesuffix("/s")
    for ending, scale in (("bit", 0.125), ("b", 0.125), ("B", 1.0), ("", 1.0)):
        if unit.endswith(ending) and unit.removesuffix(ending) in _SI:
            return value * _SI[unit.removesuffix(ending)] * scale
    raise ValueError(f"{name}: expected bytes or bits per second such as 50GB/s or 400Gbit/s, got {text!r}")


def duration(name: str, text: str) -> float:
    """Read seconds: ``5us``, ``1.5ms``, ``2s``; a bare number is seconds."""
    value, unit = _split(name, text, "5us")
    if unit not in _SECONDS and unit:
        raise ValueError(f"{name}: expected a duration such as 5us, 1.5ms or 2s, got {text!r}")
    return value * _SECONDS.get(unit, 1.0)


def flops(name: str, text: str) -> float:
    """Read operations per second: ``400T``, ``400TFLOP/s``, ``1.5e12``."""
    value, unit = _split(name, text, "400T")
    for ending in ("FLOP/s", "FLOPS", "FLOP", "flops", ""):
        if unit.endswith(ending) and unit.removesuffix(ending) in _SI:
            return value * _SI[unit.removesuffix(ending)]
    raise ValueError(f"{name}: expected operations per second such as 400T, got {text!r}")


def show_bytes(count: float) -> str:
    """``66.1 MB``."""
    return _show(count, "B", ("", "k", "M", "G", "T", "P", "E"), 1000)


def show_seconds(value: float) -> str:
    """``12.3 ms``."""
    if value == 0:
        return "0 s"
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value:,.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _show(value: float, unit: str, prefixes: tuple[str, ...], step: int) -> str:
    for prefix in prefixes[:-1]:
        if value < step:
            text = f"{value:.0f}" if not prefix else f"{value:.3g}"
            return f"{text} {prefix}{unit}"
        value /= step
    return f"{value:.3g} {prefixes[-1]}{unit}"
