"""What patterns refuse, and how they say so."""

import itertools
import re

import numpy as np
import pytest

from bs_patterns import (
    BigBird,
    BlockLayout,
    BSLongformer,
    Butterfly,
    Custom,
    Difference,
    DilatedSparse,
    Fixed,
    GlobalLocal,
    Hierarchical,
    HierarchicalLevel,
    Intersection,
    LocalWindow,
    LongNetSegments,
    PerHead,
    Union,
    Variable,
)
from bs_patterns.testing import DenseGrid, geometry_mask

LEVEL = {"stride": 1, "window_size": 64, "block_size": 16}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LocalWindow(0), ValueError, "window_size: expected an integer ≥ 1, got 0"),
        (lambda: LocalWindow(-3), ValueError, "window_size: expected an integer ≥ 1, got -3"),
        (
            lambda: LocalWindow(2**48),
            ValueError,
            "window_size: expected an integer ≥ 1 and below 2**48, got 281474976710656",
        ),
        (lambda: LocalWindow(2.5), TypeError, "window_size: expected an integer ≥ 1, got 2.5 (float)"),
        (lambda: LocalWindow(float("nan")), TypeError, "window_size: expected an integer ≥ 1, got nan (float)"),
        (lambda: LocalWindow(None), TypeError, "window_size: expected an integer ≥ 1, got None"),
        (lambda: GlobalLocal(0, 8), ValueError, "global_tokens: expected an integer ≥ 1, got 0"),
        (lambda: GlobalLocal(8, "8"), TypeError, "window_size: expected an integer ≥ 1, got '8' (str)"),
        (lambda: DilatedSparse([]), ValueError, "dilation_rates: expected at least one integer ≥ 1"),
        (lambda: DilatedSparse([2, 0]), ValueError, "dilation_rates[1]: expected an integer ≥ 1, got 0"),
        (lambda: DilatedSparse(2), TypeError, "dilation_rates: expected a sequence of integers ≥ 1, got 2 (int)"),
        (lambda: DilatedSparse([2], head_offsets=1), TypeError, "head_offsets: expected True or False, got 1"),
        (lambda: Butterfly(0), ValueError, "max_stride: expected an integer ≥ 1, got 0"),
        (lambda: Hierarchical([]), ValueError, "levels: expected at least one level"),
        (lambda: Hierarchical(LEVEL), TypeError, "levels: expected a sequence of levels"),
        (lambda: Hierarchical([7]), TypeError, "levels[0]: expected a HierarchicalLevel or a mapping"),
        (lambda: Hierarchical([LEVEL, {**LEVEL, "step": 2}]), ValueError, "levels[1]: expected the keys"),
        (
            lambda: Hierarchical([{**LEVEL, "stride": 0}]),
            ValueError,
            "levels[0].stride: expected an integer ≥ 1, got 0",
        ),
        (lambda: Hierarchical([{**LEVEL, "window_size": 0}]), ValueError, "levels[0].window_size: expected"),
        (lambda: Hierarchical([{**LEVEL, "window_size": -2}]), ValueError, "levels[0].window_size: expected"),
        (lambda: HierarchicalLevel(1, 1, 0), ValueError, "block_size: expected an integer ≥ 1, got 0"),
        (lambda: Hierarchical.auto(1000, 0), ValueError, "density: expected a number in (0, 1], got 0.0"),
        (lambda: Hierarchical.auto(0, 0.5), ValueError, "seq_len: expected an integer ≥ 1, got 0"),
        (
            lambda: LongNetSegments([64], [1, 2]),
            ValueError,
            "segment_lengths, dilation_rates: expected equally many, got 1 and 2",
        ),
        (lambda: LongNetSegments([0], [1]), ValueError, "segment_lengths[0]: expected an integer ≥ 1, got 0"),
        (lambda: LongNetSegments([], []), ValueError, "segment_lengths: expected at least one"),
        (lambda: PerHead([]), ValueError, "patterns: expected at least one pattern"),
        (lambda: PerHead([LocalWindow(1), 3]), TypeError, "patterns[1]: expected a pattern, got 3"),
        (lambda: Union(LocalWindow(3)), TypeError, "patterns: expected a sequence of patterns"),
        (lambda: Union([PerHead([LocalWindow(1)])]), TypeError, "patterns[0]: expected a pattern of one head"),
        (
            lambda: PerHead([LocalWindow(1)] * 2).layout(64, heads=3),
            ValueError,
            "heads: expected 2, the number of patterns, got 3",
        ),
        (lambda: Custom(3), TypeError, "fn: expected a function (q_blocks, kv_blocks, head) -> blocks, got 3"),
    ],
)
def test_constructors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len: expected an integer ≥ 1, got 0"),
        ({"seq_len": (8, -1)}, ValueError, "seq_len[1]: expected an integer ≥ 1, got -1"),
        ({"seq_len": 8.0}, TypeError, "seq_len: expected an integer or a (query, key) pair, got 8.0"),
        ({"seq_len": 2**40, "block_size": 1}, ValueError, "expected at most 2147483647 blocks per side"),
        ({"block_size": 0}, ValueError, "block_size: expected an integer ≥ 1, got 0"),
        ({"heads": 0}, ValueError, "heads: expected an integer ≥ 1, got 0"),
        ({"heads": None}, TypeError, "heads: expected an integer ≥ 1, got None"),
        ({"causal": None}, TypeError, "causal: expected True or False, got None"),
        ({"causal": "yes"}, TypeError, "causal: expected True or False, got 'yes'"),
        ({"density": 0}, ValueError, "density: expected a number in (0, 1], got 0.0"),
        ({"density": 1.5}, ValueError, "density: expected a number in (0, 1], got 1.5"),
        ({"density": -0.1}, ValueError, "density: expected a number in (0, 1], got -0.1"),
        ({"density": float("nan")}, ValueError, "density: expected a number in (0, 1], got nan"),
        ({"density": float("inf")}, ValueError, "density: expected a number in (0, 1], got inf"),
        ({"density": "0.5"}, TypeError, "density: expected a number in (0, 1], got '0.5' (str)"),
        ({"density": True}, TypeError, "density: expected a number in (0, 1], got True (bool)"),
        ({"density": 0.5j}, TypeError, "density: expected a number in (0, 1]"),
        ({"candidates": [64]}, TypeError, "candidates: expected LongNetSegments or None, got [64]"),
    ],
)
def test_layout_arguments(change, error, message):
    arguments = {"seq_len": 64, "block_size": 8, **change}
    with pytest.raises(error, match=re.escape(message)):
        LocalWindow(16).layout(arguments.pop("seq_len"), **arguments)


def test_numpy_numbers_are_numbers():
    layout = LocalWindow(np.int64(16)).layout(
        np.int32(64), block_size=(np.int64(8), np.uint8(4)), heads=np.int8(2), causal=np.True_, density=np.float32(0.5)
    )
    assert layout == LocalWindow(16).layout(64, block_size=(8, 4), heads=2, causal=True, density=0.5)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "fn: expected a result that yields blocks, got None"),
        ("0", TypeError, "fn: expected a result that yields blocks, got '0'"),
        (5, TypeError, "fn: expected a result that yields blocks, got 5"),
        ([0.5], TypeError, "got 0.5 as item 0"),
        ([0, float("nan")], TypeError, "got nan as item 1"),
        ([None], TypeError, "got None as item 0"),
        ([True], TypeError, "got True as item 0"),
        (["ab"], TypeError, "got 'ab' as item 0"),
        ([(1, 2, 3)], TypeError, "got (1, 2, 3) as item 0"),
        ([(0, [0.0, 1.0])], TypeError, "got [0.0, 1.0] in item 0"),
        ([(0, [[0], [1, 2]])], TypeError, "in item 0"),
        ([(0, 8)], ValueError, "fn: expected columns in [0, 7], got 8 in item 0"),
        ([0, (-1, 0)], ValueError, "fn: expected rows in [0, 7], got -1 in item 1"),
        ([([0, 1], [0, 1, 2])], ValueError, "fn: expected rows and columns that broadcast"),
        (itertools.repeat(0), ValueError, "fn: expected a result that ends"),
    ],
)
def test_custom_functions_that_return_nonsense(result, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Custom(lambda q_blocks, kv_blocks, head: result).layout(64, block_size=8)


def test_custom_errors_pass_through():
    with pytest.raises(ZeroDivisionError):
        Custom(lambda *_: 1 / 0).layout(64)


@pytest.mark.parametrize("cls", [Intersection, Difference])
def test_more_than_a_closed_pattern_yields_raises(cls):
    pattern = cls([LocalWindow(16), DilatedSparse([3])])
    met = pattern.layout(64, block_size=8)
    with pytest.raises(ValueError, match=rf"density: expected at most .* all {met.nnz} blocks .*, got 0.9"):
        pattern.layout(64, block_size=8, density=0.9)


def test_custom_yields_in_every_form():
    def fn(q_blocks, kv_blocks, head):
        yield 0
        yield -(10**30)
        yield 3, [0, 1]
        yield np.array([[4, 0], [5, 0]])[:, 0], 0
        yield np.array([6, 2])

    layout = Custom(fn).layout(64, block_size=8)
    expected = np.eye(8, dtype=bool)
    expected[[3, 3, 4, 5, 6], [0, 1, 0, 0, 2]] = True
    np.testing.assert_array_equal(layout.to_dense()[0], expected)
    rows, cols = np.nonzero(expected)
    assert Custom(lambda *_: (rows, cols)).layout(64, block_size=8) == layout
    assert Custom(lambda *_: []).layout(64, block_size=8).nnz == 0


def test_custom_per_head_is_asked_for_each_head():
    def fn(q_blocks, kv_blocks, head):
        return [-head]

    layout = Custom(fn, per_head=True).layout(64, block_size=8, heads=3)
    assert [np.diff(item)[0] for item in np.stack((layout.indptr[:, 0], layout.indptr[:, -1]), 1)] == [8, 7, 6]
    assert (Custom(fn).layout(64, block_size=8, heads=3).to_dense() == np.eye(8, dtype=bool)).all()


def test_patterns_are_values():
    assert LocalWindow(16) == LocalWindow(16) != LocalWindow(17)
    assert hash(DilatedSparse([2, 4])) == hash(DilatedSparse((2, 4)))
    assert repr(GlobalLocal(8, 16)) == "GlobalLocal(global_tokens=8, window_size=16)"
    assert {Hierarchical(), Hierarchical([dict(LEVEL)])} == {Hierarchical(), Hierarchical([HierarchicalLevel(**LEVEL)])}
    assert isinstance(Union([LocalWindow(8), Butterfly()]).layout(64), BlockLayout)
    with pytest.raises(AttributeError):
        LocalWindow(16).window_size = 3  # type: ignore[misc]


HUGE = 2**48 - 1


@pytest.mark.parametrize(
    "pattern",
    [
        LocalWindow(HUGE),
        DilatedSparse([HUGE, 2, HUGE]),
        DilatedSparse([HUGE], head_offsets=True),
        GlobalLocal(HUGE, HUGE),
        Hierarchical([HierarchicalLevel(HUGE, HUGE, HUGE), HierarchicalLevel(HUGE, -1, 1)]),
        Butterfly(HUGE),
        Fixed(num_local_blocks=HUGE, num_global_blocks=HUGE),
        Variable(local_window_blocks=[HUGE, HUGE], global_block_indices=[HUGE], num_random_blocks=HUGE),
        BSLongformer(num_sliding_window_blocks=HUGE, global_block_indices=[0], global_block_end_indices=[HUGE]),
        BigBird(num_sliding_window_blocks=HUGE, num_global_blocks=HUGE, num_random_blocks=HUGE, seed=2**64 - 1),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_parameters_do_not_overflow(pattern, causal):
    segments = LongNetSegments([HUGE, 3], [HUGE, 1])
    for candidates in (None, segments):
        layout = pattern.layout((50, 70), block_size=(4, 8), heads=2, causal=causal, candidates=candidates)
        assert BlockLayout(layout.block_size, layout.seq_len, layout.indptr, layout.indices, causal).validate().nnz
        expected = geometry_mask(pattern, DenseGrid((50, 70), (4, 8), causal, candidates)) if cheap(pattern) else None
        if expected is not None:
            np.testing.assert_array_equal(layout.to_dense()[0], expected)
    assert pattern.layout(HUGE, block_size=HUGE).nnz == 1


def cheap(pattern):
    """Whether the oracle, which writes such sizes out, can afford it."""
    return isinstance(pattern, LocalWindow | DilatedSparse | GlobalLocal | Hierarchical)
