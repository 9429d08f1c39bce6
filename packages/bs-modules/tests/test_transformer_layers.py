"""The multihead module inside torch.nn's transformer layers: really used there, in every mode."""

import copy

import pytest
import torch
from torch import nn

from bs_modules.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from bs_modules.replace import replace_attention

DENSE = {"sparsity_ratio": 1.0, "block_size": 4}
LOCAL = {"pattern_type": "local_window", "window_size": 4, "block_size": 4}


def encoder_layer(**kwargs):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)


def padding(batch, length):
    """Left-aligned, as the fused nested path of nn.TransformerEncoder wants it."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, length - 3 :] = True
    return mask


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_layout_is_used_in_every_mode_without_hooks(training, grad):
    """A far token reaches a query through dense attention only; hooks would hide a bypass."""
    layer = encoder_layer()
    x = torch.randn(1, 32, 16)
    far = x.clone()
    far[:, 31] += 1
    with torch.set_grad_enabled(grad):
        layer.train(training)
        assert not torch.allclose(layer(x)[:, 0], layer(far)[:, 0])
        assert len(replace_attention(layer, sparse_config=dict(LOCAL))) == 1
        assert torch.equal(layer(x)[:, 0], layer(far)[:, 0])
        assert not torch.equal(layer(x)[:, 31], layer(far)[:, 31])


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_a_dense_layout_in_an_encoder_equals_the_dense_encoder(norm_first, masked, training, grad):
    encoder = nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2)
    sparse = copy.deepcopy(encoder)
    report = replace_attention(sparse, sparse_config=dict(DENSE))
    assert list(report) == ["layers.0.self_attn", "layers.1.self_attn"]
    x = torch.randn(2, 10, 16)
    masks = {}
    if masked in ("causal", "both"):
        masks.update(mask=nn.Transformer.generate_square_subsequent_mask(10), is_causal=True)
    if masked in ("padding", "both"):
        blocked = padding(2, 10)
        as_floats = torch.zeros(2, 10).masked_fill(blocked, -torch.inf)
        masks["src_key_padding_mask"] = as_floats if masked == "both" else blocked
    with torch.set_grad_enabled(grad):
        want, got = (m.train(training)(x, **masks) for m in (encoder, sparse))
    real = torch.ones(2, 10, dtype=torch.bool) if masked in ("none", "causal") else ~padding(2, 10)
    torch.testing.assert_close(got[real], want[real])  # the fused path leaves zeros at padded queries
    assert got.isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_dense_layout_in_a_decoder_equals_the_dense_decoder(training):
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0), 2).train(training)
    sparse = copy.deepcopy(decoder)
    assert len(replace_attention(sparse, sparse_config=dict(DENSE))) == 4
    target, memory = torch.randn(9, 2, 16, requires_grad=True), torch.randn(7, 2, 16, requires_grad=True)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float32) < 0,
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3]),
    }
    outs = [m(target, memory, **masks) for m in (decoder, sparse)]
    torch.testing.assert_close(outs[1], outs[0])
    gradients = [torch.autograd.grad(out.square().sum(), (target, memory)) for out in outs]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_built_from_a_layer_with_our_module_copies_it():
    layer = encoder_layer()
    layer.self_attn = Multihead(16, 2, batch_first=True, sparse_config=dict(LOCAL))
    encoder = nn.TransformerEncoder(layer, 3).eval()
    x = torch.randn(1, 32, 16)
    far = x.clone()
    far[:, 31] += 1
    with torch.no_grad():
        assert torch.equal(encoder(x)[:, 0], encoder(far)[:, 0])
        encoder(x, src_key_padding_mask=padding(1, 32))
    assert len({id(m.self_attn) for m in encoder.layers}) == 3


def test_replacing_shares_parameters_hooks_and_settings():
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.25, batch_first=True).eval()
    attention = model.encoder.layers[0].self_attn
    attention.in_proj_weight.requires_grad_(False)
    calls = []
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    before = {name: id(p) for name, p in model.named_parameters()}
    report = replace_attention(model, sparse_config=dict(LOCAL))
    new = model.encoder.layers[0].self_attn
    assert isinstance(new, Multihead)
    assert not new.training
    assert not new.attention.training
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert (new.dropout, new.batch_first, new.in_proj_weight.requires_grad) == (0.25, True, False)
    x = torch.randn(2, 8, 16)
    new(x, x, x)
    handle.remove()
    new(x, x, x)
    assert calls == [1]
    assert len(report) == 3
    assert "replaced 3 nn.MultiheadAttention, skipped 0" in str(report)
    assert not model.encoder.use_nested_tensor


def test_replacing_keeps_the_old_module_working():
    dense = nn.MultiheadAttention(8, 2, batch_first=True)
    twin = Multihead.from_multihead(dense, sparse_config=dict(DENSE))
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(twin(x, x, x), dense(x, x, x))
    assert dense._qkv_same_embed_dim
    assert "attention" not in dict(dense.named_children())
    assert twin.in_proj_weight is dense.in_proj_weight


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.MultiheadAttention(8, 2))
        self.second = nn.ModuleDict({"again": self.first[0]})


class OwnKind(nn.MultiheadAttention):
    pass


def test_reports_shared_selected_and_foreign_modules():
    model = Shared()
    assert list(replace_attention(model)) == ["first.0", "second.again"]
    assert model.first[0] is model.second["again"]
    assert isinstance(model.first[0], Multihead)
    again = replace_attention(model)
    assert len(again) == 0
    assert again.skipped[0] == ("first.0", "is block-sparse already")
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2), "c": OwnKind(8, 2)})
    report = replace_attention(model, select=lambda name, module: name == "b" and module.embed_dim == 8)
    assert list(report) == ["b"]
    assert [name for name, _ in report.skipped] == ["a", "c"]
    assert "skipped a: not selected" in str(report)
    assert "OwnKind" in str(report)


def test_replacing_with_a_chosen_inner_attention():
    from bs_modules.hilbert import BlockSparseRingDilatedAttentionHilbertPostPattern as Hilbert

    model = nn.Sequential(nn.MultiheadAttention(8, 2, dropout=0.5))
    replace_attention(model, attention=lambda module: Hilbert(num_heads=module.num_heads))
    assert isinstance(model[0].attention, Hilbert)
    x = torch.randn(6, 1, 8)
    model[0](x, x, x, need_weights=False)
    assert model[0].attention.dropout == 0.5


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "match"),
    [
        (nn.MultiheadAttention(8, 2), {}, ValueError, "from_multihead"),
        ("model", {}, TypeError, "model: expected a module"),
        (
            nn.Sequential(nn.MultiheadAttention(8, 2)),
            {"sparsity": 0.1},
            TypeError,
            "sparsity: not an argument of .*did",
        ),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), {"dropout": 0.1}, TypeError, "dropout: not an argument"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), {"select": "0"}, TypeError, "select: expected a function"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), {"attention": "base"}, TypeError, "attention: expected a fun"),
        (
            nn.Sequential(nn.MultiheadAttention(8, 2)),
            {"sparse_config": {}, "sparsity_ratio": 0.1},
            ValueError,
            "sparsity_ratio: given beside sparse_config",
        ),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), {"sparse_config": {"block_size": 0}}, ValueError, "block_size"),
    ],
)
def test_replacing_rejects_and_leaves_the_model_alone(model, kwargs, error, match):
    with pytest.raises(error, match=match):
        replace_attention(model, **kwargs)
    if isinstance(model, nn.Sequential):
        assert type(model[0]) is nn.MultiheadAttention


def test_replacing_takes_the_fields_of_a_config():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    replace_attention(model, sparsity_ratio=0.3, block_size=16, backend="torch")
    config = model[0].sparse_config
    assert (config.sparsity_ratio, config.block_size, model[0].attention.backend) == (0.3, 16, "torch")


def test_from_multihead_rejects_other_modules():
    with pytest.raises(TypeError, match=r"module: expected an nn\.MultiheadAttention, got OwnKind"):
        Multihead.from_multihead(OwnKind(8, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_compiles_with_weights():
    torch._dynamo.reset()
    sparse = Multihead(8, 2, batch_first=True, sparse_config=dict(LOCAL))
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(torch.compile(sparse, backend="eager", fullgraph=True)(x, x, x), sparse(x, x, x))


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiles_into_one_graph(is_causal):
    torch._dynamo.reset()
    sparse = Multihead(8, 2, batch_first=True, add_bias_kv=True, sparse_config=dict(LOCAL))
    x = torch.randn(2, 12, 8)
    call = {
        "key_padding_mask": torch.tensor([[False] * 12, [False] * 9 + [True] * 3]),
        "attn_mask": torch.rand(12, 12) < 0.2,
        "need_weights": False,
        "is_causal": is_causal,
    }
    want = sparse(x, x, x, **call)[0]
    got = torch.compile(sparse, backend="aot_eager", fullgraph=True)(x, x, x, **call)[0]
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(out.square().sum(), sparse.in_proj_weight)[0] for out in (want, got)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_compiled_weights_at_several_lengths():
    torch._dynamo.reset()
    module = Multihead(16, 2, batch_first=True, sparse_config=dict(LOCAL)).eval()
    compiled = torch.compile(module, backend="eager", dynamic=True)
    for length in (8, 13, 21, 13):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x, x, x), module(x, x, x))
