"""Arguments that make no sense, of every variant: refused by name, where they are given."""

import pytest
import torch

from bs_modules import create_block_sparse_attention

VARIANTS = ["base", "hierarchical", "adaptive", "hilbert", "dilated", "distributed"]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def operand():
    return torch.zeros(2, 40, 4, 8)


@pytest.mark.parametrize(
    ("error", "argument"),
    [
        (TypeError, {"scale": "0.1"}),
        (ValueError, {"scale": float("nan")}),
        (ValueError, {"dropout": 1.0}),
        (TypeError, {"dropout": True}),
        (ValueError, {"backend": "nativ"}),
        (TypeError, {"backend": None}),
        (TypeError, {"deterministic": 1}),
        (TypeError, {"dtype": torch.int64}),
        (TypeError, {"dtype": "float32"}),
    ],
)
def test_the_constructor(variant, error, argument):
    with pytest.raises(error, match=next(iter(argument))):
        create_block_sparse_attention(variant, **argument)


@pytest.mark.parametrize("variant", ["base", "hierarchical", "adaptive", "distributed"])
def test_an_order_is_checked_by_the_constructor(variant):
    with pytest.raises(ValueError, match=r"order: expected one of .*did you mean 'longest_first'"):
        create_block_sparse_attention(variant, order="longest-first")


@pytest.mark.parametrize("variant", ["hilbert", "dilated"])
def test_an_order_where_there_is_no_choice(variant):
    kind = type(create_block_sparse_attention(variant))
    with pytest.raises(TypeError, match=f"{kind.__name__}.* unexpected keyword argument 'order'"):
        kind(order="row")


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "is_causal: expected a bool", {"is_causal": "yes"}),
        (ValueError, r"k: expected head dim 8 \(that of q\), got 4", {"k": torch.zeros(2, 40, 4, 4)}),
        (ValueError, "k: expected batch 2", {"k": torch.zeros(1, 40, 4, 8), "v": torch.zeros(1, 40, 4, 8)}),
        (TypeError, "k: expected torch.float32", {"k": torch.zeros(2, 40, 4, 8, dtype=torch.float64)}),
        (TypeError, "key_padding_mask: expected .*bool", {"key_padding_mask": torch.ones(2, 40)}),
        (ValueError, r"key_padding_mask: .*\[2, 40\]", {"key_padding_mask": torch.ones(2, 39, dtype=torch.bool)}),
    ],
)
def test_the_call(variant, operand, error, match, change):
    module = create_block_sparse_attention(variant)
    with pytest.raises(error, match=match):
        module(**{"q": operand, "k": operand, "v": operand, **change})


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "seq_len: expected an integer ≥ 1", (0,)),
        (ValueError, r"seq_len: expected an integer or a \(query, key\) pair", ((1, 2, 3),)),
        (TypeError, "seq_len: expected an integer ≥ 1", (64.0,)),
        (ValueError, r"seq_len\[1\]: expected an integer ≥ 1", ((64, 0),)),
        (TypeError, "is_causal: expected a bool", (64, "yes")),
        (ValueError, "num_heads: expected an integer ≥ 1", (64, False, 0)),
    ],
)
def test_prepare(variant, error, match, arguments):
    module = create_block_sparse_attention(variant, num_heads=4)
    with pytest.raises(error, match=match):
        module.prepare(*arguments)


def test_prepare_knows_the_heads_of_the_last_call(variant, operand):
    module = create_block_sparse_attention(variant)
    module(operand, operand, operand)
    module.prepare(64, True)


def test_no_token_to_pick_blocks_for():
    empty = torch.zeros(1, 0, 4, 8)
    with pytest.raises(ValueError, match="q, k: expected at least one token"):
        create_block_sparse_attention("adaptive")(empty, empty, empty)
