"""BlockSparseAdaptive: gradients reach the gate, and it learns."""

import pytest
import torch

from bs_kernels import block_sparse_attention
from bs_modules import BlockSparseAdaptive
from bs_modules.testing import attention_inputs, small_gate


@pytest.mark.parametrize("gate", ["straight_through", "soft"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("learn", [False, True])
def test_gradient_reaches_the_scorer(gate, share, learn):
    module = small_gate(train=True, gate=gate, share_across_heads=share, learn_density=learn)
    q, k, v = attention_inputs(48, grad=True)
    module(q, k, v, True).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def smooth(gate):
    """A module in fp64 whose selection stands still, and its inputs."""
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "hidden_dim": 4}
    module = small_gate(
        train=False, gate=gate, base_sparsity=0.5, query_block_size=2, backend="torch", **shape
    ).double()
    return module, attention_inputs(16, batch=1, heads=2, kv_heads=1, dim=4, dtype=torch.float64, grad=True)


def test_gradients_of_the_soft_gate_by_finite_differences():
    module, (q, k, v) = smooth("soft")
    parameters = dict(module.named_parameters())
    names = ["scorer.gain", "scorer.slope", "scorer.q_bias_1", "scorer.k_bias_0", "log_temperature"]

    def attend(q, k, v, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (q, k, v, True))

    assert torch.autograd.gradcheck(attend, (q, k, v, *(parameters[name] for name in names)), fast_mode=True)


def test_the_straight_through_gradient_is_that_of_a_log_gate_at_zero():
    module, (q, k, v) = smooth("straight_through")
    out = module(q, k, v, True)
    made = module.select(q, k, True)
    assert torch.equal(out, block_sparse_attention(q, k, v, made.layout))  # exact in value
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    bias = torch.zeros_like(made.layout.indices, dtype=torch.float64, requires_grad=True)
    again = block_sparse_attention(q.detach(), k.detach(), v.detach(), made.layout, block_bias=bias)
    upstream = torch.autograd.grad((again * weight).sum(), bias)[0]
    module.sparse_config.gate = "soft"
    log_gates = module.select(q, k, True).bias
    wanted = torch.autograd.grad((log_gates * upstream).sum(), module.scorer.gain)[0]
    torch.testing.assert_close(module.scorer.gain.grad, wanted)


def test_a_gate_learns_where_to_look():
    """Half of the sequences hold their answer in one block, told by a marker in its keys that no query matches yet."""
    torch.manual_seed(0)
    module = BlockSparseAdaptive(
        sparse_config={"block_size": 4, "base_sparsity": 0.8, "hidden_dim": 8, "learnable_temperature": False},
        num_heads=1,
        head_dim=8,
    )
    optimizer = torch.optim.Adam(module.scorer.parameters(), lr=0.03)

    def batch():
        q, k = torch.zeros(16, 40, 1, 8), 0.3 * torch.randn(16, 40, 1, 8)
        v = torch.zeros(16, 40, 1, 1)
        q[..., 0] = 1
        for b, block in enumerate(torch.randint(10, (16,)).tolist()):
            k[b, 4 * block : 4 * block + 4, :, 1] = 3  # orthogonal to the queries: attention alone cannot tell
            v[b, 4 * block : 4 * block + 4] = 1
        return q, k, v

    def found():
        module.eval()
        with torch.no_grad():
            mean = module(*batch()).mean()
        module.train()
        return float(mean)

    before = found()
    for _ in range(40):
        loss = -module(*batch()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found() > 0.45 > 0.2 > before  # two blocks of ten are kept: 0.5 at best, 0.1 by chance


def test_losses_of_the_gate():
    module = small_gate(train=True, learn_density=True, distill_rows=3)
    q, k, v = attention_inputs(48, grad=True)
    module(q, k, v, True)
    assert set(module.gate_losses) == {"sparsity", "distillation"}
    module.gate_losses["sparsity"].backward(retain_graph=True)
    assert (module.scorer.threshold.grad < 0).all()  # a higher threshold is a lower expected density
    q.grad = k.grad = v.grad = None
    module.gate_losses["distillation"].backward()
    assert (module.scorer.gain.grad != 0).any()
    assert (q.grad != 0).any()  # queries and keys learn to be found
    assert (k.grad != 0).any()
    assert v.grad is None
