"""Layouts survive the trip to SciPy's and FlexAttention's formats and back, and mean the same there."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bs_patterns import BlockLayout
from bs_patterns.interchange import (
    from_block_mask,
    from_bsr_array,
    from_csr_array,
    to_block_mask,
    to_bsr_array,
    to_csr_array,
)


@st.composite
def layouts(draw, heads=3):
    heads, rows, cols = draw(st.tuples(st.integers(1, heads), st.integers(1, 7), st.integers(1, 7)))
    block_size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    seq_len = tuple(
        count * size - draw(st.integers(0, size - 1)) for count, size in zip((rows, cols), block_size, strict=True)
    )
    mask = draw(hnp.arrays(np.bool_, (heads, rows, cols)))
    return BlockLayout.from_dense(mask, block_size=block_size, seq_len=seq_len, causal=draw(st.booleans()))


@given(layouts())
def test_csr_arrays_hold_the_blocks_and_come_back(layout):
    pytest.importorskip("scipy")
    matrices = [to_csr_array(layout, head) for head in range(layout.heads)]
    assert np.array_equal(np.stack([matrix.toarray() for matrix in matrices]), layout.to_dense())
    kept = {"block_size": layout.block_size, "seq_len": layout.seq_len, "causal": layout.causal}
    assert from_csr_array(matrices, **kept) == layout
    if layout.heads == 1:
        assert from_csr_array(to_csr_array(layout), **kept) == layout


@given(layouts())
def test_bsr_arrays_hold_the_token_mask_and_come_back(layout):
    pytest.importorskip("scipy")
    matrices = [to_bsr_array(layout, head) for head in range(layout.heads)]
    rows, cols = layout.seq_len
    assert np.array_equal(np.stack([matrix.toarray()[:rows, :cols] for matrix in matrices]), layout.token_mask())
    for matrix, mask in zip(matrices, layout.token_mask(), strict=True):
        assert matrix.sum() == mask.sum()
        assert matrix.blocksize == layout.block_size
    assert from_bsr_array(matrices, seq_len=layout.seq_len, causal=layout.causal) == layout


def test_scipy_arrays_multiply():
    pytest.importorskip("scipy")
    layout = BlockLayout.from_dense(np.eye(3, dtype=bool)[None], block_size=(4, 2), seq_len=(12, 6))
    values = np.arange(6.0)
    assert np.array_equal(to_bsr_array(layout, dtype=np.float64) @ values, layout.token_mask()[0] @ values)
    assert to_csr_array(layout).sum() == 3


def test_stored_zeros_and_unsorted_entries_are_understood():
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.csr_array((np.array([1, 0, 2]), np.array([2, 1, 0]), np.array([0, 3, 3])), shape=(2, 3))
    layout = from_csr_array(matrix, block_size=4, seq_len=(8, 12))
    assert layout.to_dense().tolist() == [[[True, False, True], [False, False, False]]]
    blocks = np.zeros((2, 4, 4))
    blocks[1, 3, 0] = -1.0
    matrix = sparse.bsr_array((blocks, np.array([0, 1]), np.array([0, 2])), shape=(4, 8))
    assert from_bsr_array(matrix).to_dense().tolist() == [[[False, True]]]


def test_scipy_refusals():
    sparse = pytest.importorskip("scipy.sparse")
    layout = BlockLayout.from_dense(np.ones((2, 3, 3), bool), block_size=4, seq_len=12)
    matrix = to_csr_array(layout, 0)
    with pytest.raises(ValueError, match=r"head: expected one in \[0, 1\] of a layout with several, got None"):
        to_csr_array(layout)
    with pytest.raises(ValueError, match=r"head: expected an integer in \[0, 1\], got 2"):
        to_bsr_array(layout, 2)
    with pytest.raises(TypeError, match="layout: expected a BlockLayout"):
        to_csr_array(matrix)
    with pytest.raises(TypeError, match="matrices: expected a csr_array"):
        from_csr_array(np.eye(3), block_size=4, seq_len=12)
    with pytest.raises(TypeError, match=r"matrices\[1\]: expected a csr_array"):
        from_csr_array([matrix, matrix.tocoo()], block_size=4, seq_len=12)
    with pytest.raises(TypeError, match="matrices: expected a bsr_array"):
        from_bsr_array(matrix)
    with pytest.raises(TypeError, match="matrices: expected a csr_array"):
        from_csr_array([], block_size=4, seq_len=12)
    with pytest.raises(ValueError, match=r"matrices: expected shape \(4, 3\).*got \(3, 3\)"):
        from_csr_array(matrix, block_size=4, seq_len=(13, 12))
    with pytest.raises(ValueError, match=r"matrices\[1\]: expected shape \(12, 12\) in blocks of \(4, 4\)"):
        from_bsr_array([to_bsr_array(layout, 0), sparse.bsr_array(np.eye(12), blocksize=(3, 3))])
    with pytest.raises(ValueError, match=r"seq_len: expected lengths that round up to \(12, 12\).*got \(8, 8\)"):
        from_bsr_array(to_bsr_array(layout, 0), seq_len=8)
    broken = to_csr_array(layout, 0)
    broken.indices[0] = 7
    with pytest.raises(ValueError, match="matrices: expected a valid csr_array, got one whose indices"):
        from_csr_array(broken, block_size=4, seq_len=12)


@settings(max_examples=12)
@given(layouts())
def test_block_masks_hold_the_token_mask_and_come_back(layout):
    torch = pytest.importorskip("torch")
    mask = to_block_mask(layout)
    heads, (len_q, len_k) = layout.heads, layout.seq_len
    assert mask.shape == (1, heads, len_q, len_k)
    assert np.array_equal(mask.to_dense()[0].numpy().astype(bool), layout.to_dense())
    head, query, key = (torch.from_numpy(part) for part in np.indices((heads, len_q, len_k)))
    seen = mask.mask_mod(torch.zeros_like(head), head, query, key)
    assert np.array_equal(seen.numpy(), layout.token_mask())
    for h in range(heads):  # full blocks are those that the token mask leaves whole
        for i in range(layout.shape[1]):
            for j in mask.full_kv_indices[0, h, i, : mask.full_kv_num_blocks[0, h, i]].tolist():
                (block_q, block_k), tokens = layout.block_size, layout.token_mask()[h]
                block = tokens[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
                assert block.shape == layout.block_size
                assert block.all()
    assert from_block_mask(mask, causal=layout.causal) == layout
    guessed = from_block_mask(mask)
    assert np.array_equal(guessed.token_mask(), layout.token_mask())
    assert from_block_mask(mask, causal=layout.causal, ignore_mask_mod=True) == layout


@settings(max_examples=5)
@given(layouts(heads=1), st.integers(0, 2**31))
def test_flex_attention_agrees_with_dense_attention(layout, seed):
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import _WARNINGS_SHOWN, flex_attention

    _WARNINGS_SHOWN.add("flex_attention_performance")  # eager mode is what this test means to run
    generator = torch.Generator().manual_seed(seed)
    len_q, len_k = layout.seq_len
    q, k, v = (
        torch.randn(2, 3, length, 8, dtype=torch.float64, generator=generator) for length in (len_q, len_k, len_k)
    )
    found = flex_attention(q, k, v, block_mask=to_block_mask(layout))
    seen = torch.from_numpy(layout.token_mask())
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, -torch.inf)
    weights = torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    torch.testing.assert_close(found, weights @ v)


def test_block_masks_made_by_torch_are_read():
    pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b, h, q, k):
        return q >= k

    def head_window(b, h, q, k):
        return (q // 16 - k // 16).abs() <= h

    mask = create_block_mask(causal, 2, None, 100, 100, device="cpu", BLOCK_SIZE=16)
    layout = from_block_mask(mask)
    assert layout == BlockLayout.from_dense(np.ones((1, 7, 7), bool), block_size=16, seq_len=100, causal=True)
    layout = from_block_mask(create_block_mask(head_window, None, 3, 96, 128, device="cpu", BLOCK_SIZE=(16, 16)))
    query, key = np.divmod(np.arange(48), 8)
    expected = [(abs(query - key) <= head).reshape(6, 8) for head in range(3)]
    assert layout == BlockLayout.from_dense(np.stack(expected), block_size=16, seq_len=(96, 128))


def test_block_masks_that_no_layout_can_hold_are_refused():
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_block_mask

    documents = torch.tensor([0] * 20 + [1] * 44)
    packed = create_block_mask(
        lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k), None, None, 64, 64, device="cpu", BLOCK_SIZE=16
    )
    for causal in (None, True, False):
        with pytest.raises(ValueError, match=r"block_mask: expected a mask_mod that is .*ignore_mask_mod=True"):
            from_block_mask(packed, causal=causal)
    layout = from_block_mask(packed, causal=True, ignore_mask_mod=True)
    assert np.array_equal(layout.to_dense()[0], packed.to_dense()[0, 0].numpy().astype(bool))
    with pytest.raises(ValueError, match="causal: expected True or False with ignore_mask_mod=True, got None"):
        from_block_mask(packed, ignore_mask_mod=True)
    full = create_block_mask(lambda b, h, q, k: q >= 0, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match="a mask_mod that is causal"):
        from_block_mask(full, causal=True)
    by_batch = create_block_mask(lambda b, h, q, k: (q + b * 16) >= k, 2, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match="expected equal batch elements, got 2 that differ"):
        from_block_mask(by_batch)
    assert from_block_mask(by_batch[0], causal=True, ignore_mask_mod=True).causal
    with pytest.raises(TypeError, match="block_mask: expected a BlockMask, got 3"):
        from_block_mask(3)
    with pytest.raises(TypeError, match="layout: expected a BlockLayout"):
        to_block_mask(full)


@pytest.mark.parametrize(("library", "call"), [("scipy", "to_csr_array(layout)"), ("torch", "to_block_mask(layout)")])
def test_without_the_library_the_package_works_and_says_what_is_missing(library, call):
    code = f"""
import sys
sys.modules[{library!r}] = None
import numpy as np
import bs_patterns, bs_patterns.interchange as interchange, bs_patterns.ordering, bs_patterns.render
layout = bs_patterns.BlockLayout.from_dense(np.eye(3, dtype=bool)[None], block_size=4, seq_len=12)
str(layout)
try:
    interchange.{call}
except ImportError as error:
    assert {library!r} in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
