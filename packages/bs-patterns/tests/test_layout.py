"""BlockLayout against dense arrays."""

import copy
import hashlib
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_patterns import BlockLayout, LocalWindow
from bs_patterns.testing import DenseGrid, block_sizes, layouts, seq_lens


def revalidated(layout: BlockLayout) -> BlockLayout:
    """A copy that knows nothing about where it came from, checked in full."""
    return BlockLayout(
        layout.block_size, layout.seq_len, layout.indptr.copy(), layout.indices.copy(), layout.causal
    ).validate()


@st.composite
def pairs(draw):
    """Two layouts of one grid, of equal heads or one of them shared."""
    seq_len, block_size = draw(seq_lens()), draw(block_sizes())
    causal, heads = draw(st.booleans()), draw(st.integers(1, 3))
    fixed = {"seq_len": seq_len, "block_size": block_size, "causal": causal}
    first, second = draw(st.sampled_from([(heads, heads), (1, heads), (heads, 1)]))
    return draw(layouts(**fixed, heads=first)), draw(layouts(**fixed, heads=second))


@given(layouts())
def test_csr_dense_and_coo_agree(layout):
    dense = layout.to_dense()
    assert layout.nnz == dense.sum()
    assert layout.indptr.shape == (layout.shape[0], layout.shape[1] + 1)
    assert layout.indptr[0, 0] == 0
    assert layout.indptr[-1, -1] == layout.nnz
    assert (layout.indptr[1:, 0] == layout.indptr[:-1, -1]).all()
    assert (layout.indptr.dtype, layout.indices.dtype) == (np.int64, np.int32)
    for head in range(layout.heads):
        for i in range(layout.shape[1]):
            np.testing.assert_array_equal(layout.rows(head, i), np.nonzero(dense[head, i])[0])
    arguments = {"block_size": layout.block_size, "seq_len": layout.seq_len, "causal": layout.causal}
    assert BlockLayout.from_dense(dense, **arguments) == layout
    shuffled = np.random.default_rng(0).permutation(layout.nnz)
    coo = [part[shuffled] for part in layout.to_coo()]
    assert BlockLayout.from_coo(*coo, heads=layout.heads, **arguments) == layout
    assert revalidated(layout) == layout


@given(pairs())
def test_set_algebra_is_boolean_algebra(pair):
    a, b = pair
    dense_a, dense_b = np.broadcast_arrays(a.to_dense(), b.to_dense())
    for result, expected in (
        (a | b, dense_a | dense_b),
        (a & b, dense_a & dense_b),
        (a - b, dense_a & ~dense_b),
    ):
        np.testing.assert_array_equal(revalidated(result).to_dense(), expected)
    assert (a <= b) == (dense_a <= dense_b).all()
    assert (a & b) <= a <= (a | b)
    assert (a | b) == (b | a)
    assert (a & b) == (b & a)


@given(layouts())
def test_transpose_is_an_involution(layout):
    turned = layout.T
    np.testing.assert_array_equal(revalidated(turned).to_dense(), layout.to_dense().transpose(0, 2, 1))
    assert (turned.block_size, turned.seq_len) == (layout.block_size[::-1], layout.seq_len[::-1])
    assert not turned.causal
    assert layout == turned.T
    np.testing.assert_array_equal(revalidated(turned).T.to_dense(), layout.to_dense())


@given(layouts(), st.data())
def test_rows_at_is_a_slice_of_the_token_mask(layout, data):
    start = data.draw(st.integers(0, layout.seq_len[0] - 1))
    stop = data.draw(st.integers(start + 1, layout.seq_len[0]))
    part = revalidated(layout.rows_at(start, stop))
    whole, cut = layout.token_mask(), part.token_mask()
    keys = part.seq_len[1]
    np.testing.assert_array_equal(cut, whole[:, start:stop, :keys])
    assert not whole[:, start:stop, keys:].any()
    assert part.causal == layout.causal
    expected = max(1, stop + layout.seq_len[1] - layout.seq_len[0]) if layout.causal else layout.seq_len[1]
    assert keys == expected


def test_rows_at_shapes():
    layout = LocalWindow(64).layout(256, block_size=32, causal=True)
    assert layout.rows_at(0, 256) is layout
    decode = layout.rows_at(100, 101)
    assert (decode.shape, decode.seq_len) == ((1, 1, 4), (1, 101))
    assert decode.rows(0, 0).tolist() == layout.rows(0, 3).tolist()
    aligned = layout.rows_at(64, 128)
    assert (aligned.block_size, aligned.seq_len) == ((32, 32), (64, 128))
    assert layout.rows_at(40, 100).block_size == (8, 32)
    assert LocalWindow(64).layout(256, block_size=32).rows_at(64, 128).seq_len == (64, 256)


def test_rows_at_before_every_key_sees_none():
    layout = BlockLayout.from_token_mask(np.ones((8, 3), bool), block_size=2, causal=True)
    part = layout.rows_at(0, 4)
    assert (part.seq_len, part.nnz) == ((4, 1), 0)


@given(layouts())
def test_as_causal_drops_what_no_query_sees(layout):
    causal = revalidated(layout.as_causal())
    grid = DenseGrid(layout.seq_len, layout.block_size, True)
    np.testing.assert_array_equal(causal.to_dense(), layout.to_dense() & grid.allowed)
    assert causal.causal
    assert causal.as_causal() is causal
    assert causal.allowed == layout.heads * grid.allowed.sum()
    assert causal.density == pytest.approx(causal.nnz / causal.allowed)


@given(layouts())
def test_token_mask_round_trip(layout):
    mask = layout.token_mask()
    rebuilt = BlockLayout.from_token_mask(mask, block_size=layout.block_size, causal=layout.causal)
    assert rebuilt == layout
    shift = layout.seq_len[1] - layout.seq_len[0]
    for head, query, key in np.random.default_rng(0).integers(0, mask.shape, (20, 3)):
        block = layout.to_dense()[head, query // layout.block_size[0], key // layout.block_size[1]]
        assert mask[head, query, key] == (block and (not layout.causal or key <= query + shift))


@given(st.lists(layouts(seq_len=(20, 30), block_size=(4, 3), causal=True), min_size=1, max_size=3))
def test_stack_heads_concatenates(parts):
    stacked = revalidated(BlockLayout.stack_heads(parts))
    np.testing.assert_array_equal(stacked.to_dense(), np.concatenate([part.to_dense() for part in parts]))


@given(layouts())
def test_equality_hash_digest_and_copies(layout):
    for other in (revalidated(layout), pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert other == layout
        assert hash(other) == hash(layout)
        assert other.digest == layout.digest
        assert not other.indices.flags.writeable
    dense = layout.to_dense()
    dense[0, -1, 0] ^= True
    changed = BlockLayout.from_dense(dense, block_size=layout.block_size, seq_len=layout.seq_len, causal=layout.causal)
    assert (changed == layout) == (changed.digest == layout.digest) == (changed.nnz == layout.nnz)
    assert layout != object()


def test_digest_covers_every_field():
    dense = np.ones((1, 2, 2), bool)
    variants = [
        BlockLayout.from_dense(dense, block_size=4, seq_len=8),
        BlockLayout.from_dense(dense, block_size=4, seq_len=7),
        BlockLayout.from_dense(dense, block_size=5, seq_len=8),
        BlockLayout.from_dense(dense, block_size=(4, 5), seq_len=8),
        BlockLayout.from_dense(dense, block_size=4, seq_len=8, causal=True),
        BlockLayout.from_dense(np.ones((2, 2, 2), bool), block_size=4, seq_len=8),
        BlockLayout.from_dense(np.eye(2, dtype=bool), block_size=4, seq_len=8),
    ]
    assert len({layout.digest for layout in variants}) == len(variants)


def test_digest_is_the_same_everywhere():
    layout = BlockLayout((4, 5), (8, 9), [[0, 1, 3]], [0, 0, 1])
    content = struct.pack("<8q", 4, 5, 8, 9, 0, 1, 2, 2) + struct.pack("<3q", 0, 1, 3) + struct.pack("<3i", 0, 0, 1)
    assert layout.digest == hashlib.sha256(b"bs_patterns.BlockLayout 1\0" + content).hexdigest()
    script = "from bs_patterns import BlockLayout; print(BlockLayout((4, 5), (8, 9), [[0, 1, 3]], [0, 0, 1]).digest)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == layout.digest


def test_arrays_are_private_and_read_only():
    indptr, indices = np.array([[0, 1, 2]]), np.array([0, 1], np.int32)
    layout = BlockLayout(4, 8, indptr, indices)
    indices[0] = 1
    indptr[0, 1] = 2
    assert layout.rows(0, 0).tolist() == [0]
    with pytest.raises(ValueError, match="read-only"):
        layout.indices[0] = 1
    with pytest.raises(AttributeError):
        layout.causal = True  # type: ignore[misc]


def test_shared_layout_answers_for_every_head():
    layout = LocalWindow(8).layout(32, block_size=8)
    assert layout.rows(7, 1).tolist() == layout.rows(0, 1).tolist()


@given(layouts())
def test_stats_count_tokens(layout):
    stats = layout.stats()
    dense = layout.to_dense()
    grid = DenseGrid(layout.seq_len, layout.block_size, layout.causal)
    sizes = np.array([[len(q) * len(k) for k in grid.keys] for q in grid.queries])
    assert stats["nnz"] == dense.sum()
    assert stats["density"] == layout.density
    assert stats["sparsity"] == 1 - layout.density
    assert stats["flops"] == 4 * (dense * sizes).sum()
    assert stats["flops_dense"] == 4 * layout.heads * (grid.allowed * sizes).sum()
    assert stats["flops_ratio"] == stats["flops"] / stats["flops_dense"]
    per_row = dense.sum(axis=2)
    assert stats["blocks_per_row_min"] == per_row.min()
    assert stats["blocks_per_row_median"] == np.median(per_row)
    assert stats["blocks_per_row_max"] == per_row.max()
    assert stats["empty_rows"] == (per_row == 0).sum()
    assert stats["bytes"] == 8 * layout.indptr.size + 4 * layout.nnz
    farthest = -grid.over_pairs(lambda q, k: -(q - k if layout.causal else np.abs(q - k)))
    reaches = np.broadcast_to(farthest, dense.shape)[dense]
    assert stats["reach"] == (reaches.max() if len(reaches) else 0)


def test_one_million_tokens_stay_sparse():
    layout = LocalWindow(64).layout(2**20)
    assert layout.shape == (1, 2**14, 2**14)
    assert layout.T.nnz == layout.nnz == (layout | layout.T).nnz == (layout & layout.T).nnz
