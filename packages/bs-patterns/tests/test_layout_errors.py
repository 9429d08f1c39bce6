"""What BlockLayout refuses, and how it says so."""

import re

import numpy as np
import pytest

from bs_patterns import BlockLayout, LocalWindow

GOOD = {"block_size": 4, "seq_len": 8, "indptr": [[0, 1, 3]], "indices": [0, 0, 1]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected an integer ≥ 1, got 0"),
        ({"block_size": (4, -1)}, ValueError, "block_size[1]: expected an integer ≥ 1, got -1"),
        ({"block_size": 4.0}, TypeError, "block_size: expected an integer or a (query, key) pair, got 4.0"),
        ({"block_size": True}, TypeError, "block_size: expected an integer ≥ 1, got True (bool)"),
        ({"block_size": (4, 4, 4)}, TypeError, "block_size: expected an integer or a (query, key) pair"),
        ({"seq_len": 0}, ValueError, "seq_len: expected an integer ≥ 1, got 0"),
        ({"seq_len": "8"}, TypeError, "seq_len: expected an integer or a (query, key) pair, got '8'"),
        ({"seq_len": (8, 2**40)}, ValueError, "expected at most 2147483647 blocks per side (indices are int32)"),
        ({"causal": 1}, TypeError, "causal: expected True or False, got 1 (int)"),
        ({"indptr": [0, 1, 3]}, ValueError, "indptr: expected shape [heads ≥ 1, 3], got [3]"),
        ({"indptr": [[0, 1, 2, 3]]}, ValueError, "indptr: expected shape [heads ≥ 1, 3], got [1, 4]"),
        ({"indptr": [[0.0, 1.0, 3.0]]}, TypeError, "indptr: expected integers, got float64"),
        ({"indptr": [[1, 1, 3]]}, ValueError, "indptr: expected heads to follow one another from 0 to nnz=3"),
        ({"indptr": [[0, 1, 2]]}, ValueError, "indptr: expected heads to follow one another from 0 to nnz=3"),
        ({"indptr": [[0, 1, 2], [0, 1, 3]]}, ValueError, "indptr: expected heads to follow one another"),
        ({"indices": [[0, 0, 1]]}, ValueError, "indices: expected one dimension, got shape [1, 3]"),
        ({"indices": [0, 0, float("nan")]}, TypeError, "indices: expected integers, got float64"),
        ({"indices": [0, 0, 2**31]}, ValueError, "indices: expected values that fit int32, got 2147483648"),
        ({"indptr": [[0, 2, 1]], "indices": [0]}, ValueError, "indptr: expected non-decreasing row pointers"),
        ({"indices": [0, 1, 0]}, ValueError, "ascending and unique key blocks within a row, got 1 followed by 0"),
        ({"indices": [0, 1, 1]}, ValueError, "got 1 followed by 1 in head 0, query block 1"),
        ({"indices": [0, 0, 2]}, ValueError, "indices: expected key blocks in [0, 1], got 2 in head 0, query block 1"),
        ({"indices": [-1, 0, 1]}, ValueError, "indices: expected key blocks in [0, 1], got -1"),
        (
            {"indices": [1, 0, 1], "causal": True},
            ValueError,
            "hold a key ≤ query pair in a causal layout, got key block 1",
        ),
    ],
)
def test_constructor_and_validate(change, error, message):
    BlockLayout(**GOOD).validate()
    with pytest.raises(error, match=re.escape(message)):
        BlockLayout(**{**GOOD, **change}).validate()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x.rows(-1, 0), ValueError, "head: expected an integer ≥ 0, got -1"),
        (
            lambda x: BlockLayout.stack_heads([x, x]).rows(2, 0),
            ValueError,
            "head: expected an integer in [0, 1], got 2",
        ),
        (lambda x: x.rows(0, 2), ValueError, "i: expected an integer in [0, 1], got 2"),
        (lambda x: x.rows(0, 0.5), TypeError, "i: expected an integer in [0, 1], got 0.5"),
        (lambda x: x.rows_at(8, 9), ValueError, "q_start: expected an integer in [0, 7], got 8"),
        (lambda x: x.rows_at(3, 3), ValueError, "q_stop: expected an integer in [4, 8], got 3"),
        (lambda x: x.rows_at(3, 9), ValueError, "q_stop: expected an integer in [4, 8], got 9"),
        (lambda x: x | x.as_causal(), ValueError, "|: expected layouts of one grid"),
        (lambda x: x & LocalWindow(4).layout(9, block_size=4), ValueError, "&: expected layouts of one grid"),
        (lambda x: BlockLayout.stack_heads([]), ValueError, "layouts: expected at least one BlockLayout"),
        (lambda x: BlockLayout.stack_heads([x, 1]), TypeError, "layouts: expected a sequence of BlockLayout"),
        (
            lambda x: BlockLayout.stack_heads([x, x.as_causal()]),
            ValueError,
            "layouts[1]: expected the grid of layouts[0]",
        ),
        (lambda x: x | 1, TypeError, "unsupported operand"),
    ],
)
def test_methods(call, error, message):
    layout = BlockLayout(**GOOD)
    with pytest.raises(error, match=re.escape(message)):
        call(layout)


GRID = {"block_size": 4, "seq_len": 8}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockLayout.from_dense(np.ones((1, 2, 3), bool), **GRID), ValueError, "mask: expected [heads, 2, 2]"),
        (lambda: BlockLayout.from_dense(np.ones((2, 2)), **GRID), TypeError, "mask: expected a bool array"),
        (
            lambda: BlockLayout.from_dense(np.ones(4, bool), **GRID),
            ValueError,
            "mask: expected [heads, q_blocks, kv_blocks]",
        ),
        (
            lambda: BlockLayout.from_token_mask(np.ones((0, 3), bool), block_size=2),
            ValueError,
            "mask: expected at least one",
        ),
        (lambda: BlockLayout.from_token_mask(np.ones((3, 3), bool), block_size=0), ValueError, "block_size: expected"),
        (lambda: BlockLayout.from_coo(0, [0, 2], [0, 0], **GRID), ValueError, "row: expected values in [0, 1], got 2"),
        (
            lambda: BlockLayout.from_coo(0, [0, 1], [0, -1], **GRID),
            ValueError,
            "column: expected values in [0, 1], got -1",
        ),
        (lambda: BlockLayout.from_coo(1, [0], [0], **GRID), ValueError, "head: expected values in [0, 0], got 1"),
        (lambda: BlockLayout.from_coo(0, [0.0], [0], **GRID), TypeError, "row: expected integers, got float64"),
        (lambda: BlockLayout.from_coo(0, [0, 1], [0], **GRID), ValueError, "head, row, column: expected equal lengths"),
        (
            lambda: BlockLayout.from_coo(0, [0], [0], heads=0, **GRID),
            ValueError,
            "heads: expected an integer ≥ 1, got 0",
        ),
    ],
)
def test_builders(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
