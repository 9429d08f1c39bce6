"""What nn.MultiheadAttention rejects, BlockSparseRingMultiheadDilatedAttention rejects with the same exception type."""

import pytest
import torch
from torch import nn

from bs_modules.attention import BlockSparseRingDilatedAttention
from bs_modules.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from bs_modules.testing.multihead import pair

BAD_CALLS = {
    "int attn_mask": lambda x: {"attn_mask": torch.zeros(6, 6, dtype=torch.int32)},
    "int padding": lambda x: {"key_padding_mask": torch.zeros(2, 6, dtype=torch.int64)},
    "attn_mask 2-D": lambda x: {"attn_mask": torch.zeros(6, 5)},
    "attn_mask 3-D": lambda x: {"attn_mask": torch.zeros(2, 6, 6)},
    "attn_mask 1-D": lambda x: {"attn_mask": torch.zeros(6)},
    "attn_mask 4-D": lambda x: {"attn_mask": torch.zeros(2, 2, 6, 6)},
    "attn_mask dtype": lambda x: {"attn_mask": torch.zeros(6, 6, dtype=torch.float64)},
    "padding dtype": lambda x: {"key_padding_mask": torch.zeros(2, 6, dtype=torch.bfloat16)},
    "padding length": lambda x: {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
    "padding batch": lambda x: {"key_padding_mask": torch.zeros(3, 6, dtype=torch.bool)},
    "padding 1-D": lambda x: {"key_padding_mask": torch.zeros(6, dtype=torch.bool)},
    "padding 3-D": lambda x: {"key_padding_mask": torch.zeros(2, 1, 6, dtype=torch.bool)},
    "query 1-D": lambda x: {"query": x[0, 0]},
    "query 4-D": lambda x: {"query": x[None]},
    "key 2-D": lambda x: {"key": x[0]},
    "value 4-D": lambda x: {"value": x[None]},
    "query width": lambda x: {"query": x[..., :4]},
    "key width": lambda x: {"key": x[..., :4], "value": x[..., :4]},
    "value width": lambda x: {"value": x[..., :4]},
    "value length": lambda x: {"value": x[:, :5]},
    "key batch": lambda x: {"key": x[:1], "value": x[:1]},
    "query batch": lambda x: {"query": x[:1]},
    "dtype": lambda x: {"query": x.double(), "key": x.double(), "value": x.double()},
    "list": lambda x: {"query": x.tolist()},
    "mask not a tensor": lambda x: {"attn_mask": True},
    "padding not a tensor": lambda x: {"key_padding_mask": [[True] * 6] * 2},
    "unknown": lambda x: {"padding": None},
}


#: Code that looks at the message of `nn.MultiheadAttention` finds it in ours.
SAME_WORDS = {"attn_mask 2-D", "attn_mask 3-D", "attn_mask 1-D", "attn_mask 4-D", "padding 1-D", "padding 3-D",
              "query 1-D", "query 4-D", "key 2-D", "value 4-D", "int attn_mask", "int padding"}  # fmt: skip


def outcome(function):
    """The exception that calling raises, without fused paths in the way."""
    try:
        function()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_rejects_what_the_dense_module_rejects_with_its_type(name, need_weights):
    dense, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8)
    call = {"query": x, "key": x, "value": x, "need_weights": need_weights, **BAD_CALLS[name](x)}
    theirs, ours = outcome(lambda: dense(**call)), outcome(lambda: sparse(**call))
    assert theirs is not None, "the case is not bad"
    assert type(ours) is type(theirs), f"{ours!r} instead of {theirs!r}"
    if name in SAME_WORDS:
        assert str(theirs).rstrip(".") in str(ours)


@pytest.mark.parametrize("name", ["attn_mask 3-D", "padding 2-D", "key 3-D", "kdim", "vdim", "lengths"])
def test_rejects_unbatched_and_unequal_widths_likewise(name):
    dense, sparse = pair(8, 2, kdim=4, vdim=6)
    query, key, value = torch.randn(6, 8), torch.randn(5, 4), torch.randn(5, 6)
    change = {
        "attn_mask 3-D": {"attn_mask": torch.zeros(4, 6, 5)},
        "padding 2-D": {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)},
        "key 3-D": {"key": key[None]},
        "kdim": {"key": torch.randn(5, 3)},
        "vdim": {"value": torch.randn(5, 3)},
        "lengths": {"value": torch.randn(4, 6)},
    }[name]
    call = {"query": query, "key": key, "value": value, **change}
    theirs, ours = outcome(lambda: dense(**call)), outcome(lambda: sparse(**call))
    assert theirs is not None
    assert type(ours) is type(theirs)
    if name in ("attn_mask 3-D", "padding 2-D", "key 3-D"):
        assert str(theirs) in str(ours)


@pytest.mark.parametrize(
    "arguments",
    [(7, 2), (0, 2), (8, 0), (-8, 2), (8, 2, 0.0, True, False, False, None, None, False, None, torch.int32)],
)
def test_constructor_rejects_likewise(arguments):
    theirs, ours = (outcome(lambda c=c: c(*arguments)) for c in (nn.MultiheadAttention, Multihead))
    assert theirs is not None
    assert type(ours) is type(theirs)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"dropout": 1.5}, ValueError, r"dropout: expected a number in \[0, 1\], got 1.5"),
        ({"dropout": "0.1"}, TypeError, "dropout: expected"),
        ({"sparse_config": 3}, TypeError, "sparse_config"),
        ({"sparsity": 0.5}, TypeError, "sparsity"),
        ({"attention": 3}, TypeError, "attention: expected a module"),
        ({"attention": nn.Identity(), "order": "row"}, ValueError, "order: has no effect"),
        ({"attention": nn.Identity(), "dropout": 0.1}, ValueError, "dropout: expected 0"),
        ({"attention": BlockSparseRingDilatedAttention(num_heads=3)}, ValueError, "num_heads 2"),
        ({"attention": BlockSparseRingDilatedAttention(dropout=0.3)}, ValueError, "dropout: expected 0.3"),
    ],
)
def test_constructor_rejects_arguments_of_its_own(kwargs, error, match):
    with pytest.raises(error, match=match):
        Multihead(8, 2, **kwargs)


def test_mixed_mask_kinds_warn_like_the_dense_module_and_work():
    dense, sparse = pair(8, 2, batch_first=True)
    x = torch.randn(2, 6, 8)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    masks = [torch.randn(6, 6), torch.ones(6, 6, dtype=torch.bool).triu(1)]
    for mask, pad in ((masks[0], padding), (masks[1], torch.randn(2, 6))):
        with pytest.warns(UserWarning, match="mismatched"):
            want = dense(x, x, x, attn_mask=mask, key_padding_mask=pad)
        with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
            got = sparse(x, x, x, attn_mask=mask, key_padding_mask=pad)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "wrong", [(16, 2, {}), (8, 2, {"kdim": 4}), (8, 2, {"bias": False}), (8, 2, {"add_bias_kv": True})]
)
def test_state_dicts_that_do_not_fit_are_refused_like_the_dense_module_refuses_them(wrong):
    dense, sparse = pair(8, 2)
    width, heads, more = wrong
    state = nn.MultiheadAttention(width, heads, **more).state_dict()
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    theirs, ours = outcome(lambda: dense.load_state_dict(state)), outcome(lambda: sparse.load_state_dict(state))
    assert isinstance(theirs, RuntimeError)
    assert type(ours) is type(theirs)
    assert str(ours).replace(type(sparse).__name__, "MultiheadAttention") == str(theirs)
    if not more:
        assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
