"""Nested tensors through the multihead module: each sequence as if it were alone, in eager layers and encoders too."""

import copy

import pytest
import torch
from torch import nn

from bs_modules.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from bs_modules.testing.multihead import pair

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])


def nest(rows, layout):
    return torch.nested.as_nested_tensor(rows, layout=layout)


@LAYOUTS
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "appended"])
def test_every_sequence_is_as_if_alone(layout, is_causal, average, extra):
    _, sparse = pair(8, 2, batch_first=True, **extra)
    rows = [torch.randn(n, 8, requires_grad=True) for n in (5, 1, 9)]
    x = nest(rows, layout)
    out, weights = sparse(x, x, x, is_causal=is_causal, average_attn_weights=average)
    assert out.is_nested
    assert out.layout == layout
    torch.testing.assert_close(list((out + x).unbind()), [o + r for o, r in zip(out.unbind(), rows, strict=True)])
    for n, row in enumerate(rows):
        alone, attended = sparse(row, row, row, is_causal=is_causal, average_attn_weights=average)
        torch.testing.assert_close(out.unbind()[n], alone)
        assert not weights[n, ..., len(row) :, :].any()
        torch.testing.assert_close(weights[n, ..., : len(row), : len(row)], attended[..., : len(row)])
        wanted, got = (
            torch.autograd.grad(o.square().sum(), row, retain_graph=True)[0] for o in (alone, out.unbind()[n])
        )
        torch.testing.assert_close(got, wanted)


@LAYOUTS
def test_queries_and_keys_of_other_lengths(layout):
    _, sparse = pair(8, 2, batch_first=True, kdim=4, vdim=6)
    queries, keys, values = ([torch.randn(n, d) for n in ns] for ns, d in (((3, 6), 8), ((4, 2), 4), ((4, 2), 6)))
    out, none = sparse(nest(queries, layout), nest(keys, layout), nest(values, layout), need_weights=False)
    assert none is None
    for n, part in enumerate(out.unbind()):
        torch.testing.assert_close(part, sparse(queries[n], keys[n], values[n])[0])


@torch.no_grad()
def test_an_encoder_that_nests_its_input_equals_the_dense_one():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).eval()
    sparse = copy.deepcopy(dense)
    for place in sparse.layers:
        place.self_attn = Multihead.from_multihead(place.self_attn, sparse_config={"sparsity_ratio": 1.0})
    calls = []
    sparse.layers[1].self_attn.attention.register_forward_hook(lambda *_: calls.append(1))
    x, padded = torch.randn(2, 10, 16), torch.tensor([[False] * 10, [False] * 7 + [True] * 3])
    torch.testing.assert_close(sparse(x, src_key_padding_mask=padded), dense(x, src_key_padding_mask=padded))
    assert calls == [1]


@torch.no_grad()
def test_the_layout_is_used_where_nothing_is_hooked():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    local = {"pattern_type": "local_window", "window_size": 4, "block_size": 4}
    layer.self_attn = Multihead.from_multihead(layer.self_attn, sparse_config=local)
    rows = [torch.randn(32, 16), torch.randn(20, 16)]
    far = [row.clone() for row in rows]
    for row in far:
        row[-1] += 1
    near, moved = (layer(nest(x, torch.strided)).unbind() for x in (rows, far))
    for a, b in zip(near, moved, strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[-1], b[-1])


def test_wrong_nested_inputs():
    _, sparse = pair(8, 2, batch_first=True)
    x, y = (nest([torch.randn(n, 8) for n in lengths], torch.strided) for lengths in ((3, 5), (4, 2)))
    mask = torch.zeros(5, 5, dtype=torch.bool)
    with pytest.raises(AssertionError, match="key: expected a NestedTensor, as are other inputs"):
        sparse(x, torch.randn(2, 5, 8), x)
    with pytest.raises(AssertionError, match="attn_mask: expected None with NestedTensor"):
        sparse(x, x, x, attn_mask=mask)
    with pytest.raises(AssertionError, match="key_padding_mask: expected None with NestedTensor"):
        sparse(x, x, x, key_padding_mask=mask[:2])
    with pytest.raises(AssertionError, match=r"values as long as keys, got lengths \[3, 5\] of query, \[3, 5\] of key"):
        sparse(x, x, y)
    with pytest.raises(AssertionError, match=r"is_causal: expected False, or queries as long as their keys"):
        sparse(x, y, y, is_causal=True)
    with pytest.raises(AssertionError, match="received 1-D query tensor"):
        sparse(*[torch.nested.nested_tensor([])] * 3)
    sparse.batch_first = False
    with pytest.raises(AssertionError, match="query: expected batch_first=True with NestedTensor"):
        sparse(x, x, x)
