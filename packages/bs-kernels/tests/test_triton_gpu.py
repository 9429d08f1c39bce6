"""What only a GPU can show about the Triton backend: it is taken, it can be captured, it scales to real sizes."""

import numpy as np
import pytest
import torch

from bs_kernels import BatchedLayout, LayoutPlan, TokenMask, block_sparse_attention, explain_backends
from bs_kernels.testing import make_layout

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("triton")


def operands(tokens, *, heads=4, kv_heads=2, dim=128, batch=2, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(count):
        return torch.randn(batch, tokens, count, dim, generator=generator, device="cuda", dtype=dtype)

    return normal(heads).requires_grad_(), normal(kv_heads).requires_grad_(), normal(kv_heads).requires_grad_()


def gradients(out, inputs):
    return torch.autograd.grad(out.float().square().mean(), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_auto_takes_it_and_it_agrees_with_torch_operations(dtype, causal):
    layout = make_layout(np.random.default_rng(0), seq_len=(3000, 3000), block_size=(128, 128), density=0.3)
    inputs = operands(3000, dtype=dtype)
    assert explain_backends(*inputs, layout, causal=causal).selected == "triton"
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = block_sparse_attention(*wide, layout, causal=causal, backend="torch")
    got = block_sparse_attention(*inputs, layout, causal=causal)
    tolerance = {torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(got, inputs), gradients(want, wide), strict=True):
        assert (a.double() - b).abs().max() <= 2 * tolerance * b.abs().max()


def test_same_bits_again():
    layout = make_layout(np.random.default_rng(1), seq_len=(4096, 4096), block_size=(64, 64), heads=4, density=0.2)
    inputs = operands(4096)
    runs = []
    for _ in range(3):
        out = block_sparse_attention(*inputs, layout, causal=True, backend="triton")
        runs.append((out, *gradients(out, inputs)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_an_adaptive_step_can_be_captured():
    """Plan, forward and backward in one CUDA graph, replayed for a layout that was not there when it was captured."""
    tokens, block, slots = 1024, 64, 4
    q, k, v = operands(tokens, heads=2, kv_heads=2)
    shape = (2, 2, tokens // block, tokens // block)
    indices = torch.rand(shape, device="cuda").argsort(-1)[..., :slots].to(torch.int32)
    counts = torch.full(shape[:3], slots, dtype=torch.int32, device="cuda")

    def step():
        layout = BatchedLayout(indices, counts, (block, block), (tokens, tokens), causal=True)
        out = block_sparse_attention(q, k, v, layout, backend="triton")
        return (out, *gradients(out, (q, k, v)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    indices.copy_(torch.rand(shape, device="cuda").argsort(-1)[..., :slots])
    counts.fill_(slots - 1)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_building_an_adaptive_plan_does_not_wait():
    indices = torch.rand(1, 2, 64, 64, device="cuda").argsort(-1)[..., :8].to(torch.int32)
    counts = torch.full((1, 2, 64), 8, dtype=torch.int32, device="cuda")
    layout = BatchedLayout(indices, counts, (64, 64), (4096, 4096), causal=True)
    q, k, v = operands(4096, heads=2, kv_heads=2, batch=1)
    block_sparse_attention(q, k, v, layout, backend="triton").sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sparse_attention(q, k, v, layout, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits():
    """More than 2³¹ elements per operand."""
    tokens, heads = 1 << 16, 300
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    mask = np.eye(tokens // 128, dtype=bool)[None]
    from bs_patterns import BlockLayout

    layout = BlockLayout.from_dense(mask, block_size=128, seq_len=tokens)
    q = torch.randn(1, tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    with torch.no_grad():
        out = block_sparse_attention(q, q, q, layout, backend="triton")
        last = q[:, -128:, -1:].float().transpose(1, 2)
        want = torch.nn.functional.scaled_dot_product_attention(last, last, last).transpose(1, 2)
    torch.testing.assert_close(out[:, -128:, -1:].float(), want, rtol=2**-6, atol=2**-6)


def test_other_devices_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layout = make_layout(np.random.default_rng(0), seq_len=(256, 256), block_size=(64, 64), density=0.5)
    q, k, v = (x.detach().to("cuda:1") for x in operands(256, batch=1))
    out = block_sparse_attention(q, k, v, LayoutPlan.build(layout, TokenMask(), "cuda:1"), backend="triton")
    assert out.device.index == 1
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, layout, backend="torch"), rtol=2**-5, atol=2**-5)
