"""Exact LongNet over the ring is exact LongNet."""

import math

import pytest
import torch

from bs_modules import BlockSparseRingDistributedDilatedAttention as Distributed
from bs_modules import DilatedAttention
from bs_modules.testing.rings import whole_tensors

LONGNET = ([32, 96, 400], [1, 2, 4])


def longnet(rank, world, cuts, combine, causal, extra, dtype):
    """A step of exact LongNet over the ring: (lse, out, gradients), and the bytes sent."""
    inside = DilatedAttention(*LONGNET, combine=combine, dropout=0.3 if extra == "wide" else 0.0)
    module = Distributed(attention=inside)
    here = slice(cuts[rank], cuts[rank + 1])
    q, k, v, dout = (x[:, here] for x in whole_tensors(dtype=dtype))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    masks = {}
    if extra == "wide":
        bias = torch.linspace(-1, 1, 4 * 203 * 203, dtype=dtype).view(1, 4, 203, 203)[:, :, here].clone()
        masks = {
            "key_padding_mask": (torch.arange(203) % 7 != 3).expand(2, -1)[:, here],
            "segment_ids": (torch.arange(203) // 120).expand(2, -1)[:, here],
            "attn_bias": bias.requires_grad_(),
        }
        leaves.append(bias)
    torch.manual_seed(9 + rank)
    out, lse = module(*leaves[:3], causal, return_lse=True, **masks)
    finite = torch.where(lse == -math.inf, 0, lse)
    loss = (out * dout.to(out.dtype)).sum() + finite.square().sum() / 8
    sent = int(module.sent_bytes()["kv"].sum())
    return [lse.detach(), out.detach(), *torch.autograd.grad(loss, leaves)], sent


@pytest.mark.parametrize("combine", ["softmax", "longnet", "union"])
@pytest.mark.parametrize(
    ("cuts", "causal", "extra"),
    [
        ([0, 64, 203], True, ""), ([0, 96, 100, 203], False, "wide"), ([0, 203, 203], False, ""),
    ],
    ids=["causal", "masks, bias, dropout", "an empty shard"],
)  # fmt: skip
def test_longnet_over_the_ring_is_longnet(ranks, combine, cuts, causal, extra):
    world = len(cuts) - 1
    results = ranks.run(longnet, cuts, combine, causal, extra, torch.float64, world_size=world)
    whole, _ = ranks.run(longnet, [0, 203], combine, causal, extra, torch.float64, world_size=1)[0]
    for i, want in enumerate(whole):
        dim = {0: 2, 5: 2}.get(i, 1)
        torch.testing.assert_close(torch.cat([r[i] for r, _ in results], dim), want, rtol=1e-10, atol=1e-12)


def test_longnet_moves_what_its_segments_need_and_rounds_once(ranks):
    results = ranks.run(longnet, [0, 64, 203], "softmax", True, "", torch.bfloat16, world_size=2)
    exact, _ = ranks.run(longnet, [0, 203], "softmax", True, "", torch.float64, world_size=1)[0]
    alone, _ = ranks.run(longnet, [0, 203], "softmax", True, "", torch.bfloat16, world_size=1)[0]
    for i, want in enumerate(exact):
        got = torch.cat([r[i] for r, _ in results], 2 if i == 0 else 1).double()
        band = torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (alone[i].double() - want).abs().max() + band
    # Causal, one segment of 400: the second rank reads the first one's 64 tokens, the first nothing.
    assert [sent for _, sent in results] == [2 * 2 * 64 * 2 * 16 * 2, 0]


def test_longnet_stays_where_its_segments_are(ranks):
    module = Distributed(attention=DilatedAttention([64], [2]))
    assert module.exchange_plan(256, True).rows.sum() == 0
    said = ranks.run(longnet_refused, world_size=2)
    assert (
        said
        == [
            ["placement: expected 'contiguous' for a DilatedAttention, got 'zigzag'", said[0][1]],
        ]
        * 2
    )
    assert said[0][1].startswith("sparse_config: expected None for a DilatedAttention over several ranks")


def longnet_refused(rank, world):
    x, said = torch.zeros(1, 64, 2, 8), []
    for inside, config in (({}, {"placement": "zigzag"}), ({"sparse_config": {"sparsity_ratio": 0.5}}, {})):
        with pytest.raises(ValueError) as caught:
            Distributed(attention=DilatedAttention([64], [2], **inside), distributed_config=config)(x, x, x)
        said.append(str(caught.value))
    return said
