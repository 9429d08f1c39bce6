"""Two training steps of a small model whose sequences are spread over all ranks, under several engines.

Run by `torchrun`, with the engines and the file for the results as arguments; imported for the model and the data.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from bs_kernels.backends.native import NativeBackend
from bs_modules import create_multihead_block_sparse

TOKENS, WIDTH, STEPS, RATE = 203, 32, 2, 0.05
CONFIG = {"pattern_type": "global_local", "sparsity_ratio": 0.5, "block_size": 16}


class Layer(nn.Module):
    def __init__(self, deepspeed):
        super().__init__()
        self.attention = create_multihead_block_sparse(
            WIDTH, 4, attention="distributed", batch_first=True, sparse_config=CONFIG,
            enable_deepspeed_integration=deepspeed,
        )  # fmt: skip
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False, is_causal=True)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    """Two layers; the loss is a sum over this rank's tokens, divided by all tokens of the sequence."""

    def __init__(self, deepspeed=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(deepspeed) for _ in range(2))
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x, target):
        for layer in self.layers:
            x = layer(x)
        return (self.out(x) - target).square().sum() / TOKENS

    def shard(self, x):
        return self.layers[0].attention.attention.shard(x, True)


def batch(step, dtype=torch.float32):
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(2, TOKENS, width, generator=g).to(dtype) for width in (WIDTH, 8)]


def alone(dtype):
    """Losses and weights of the same steps in one process."""
    model = Model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses = []
    for step in range(STEPS):
        loss = model(*batch(step, dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def plain():
    """Gradients summed by hand."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def update(loss):
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()

    return model, model, update, lambda: dict(model.named_parameters())


def ddp():
    """Averages gradients over ranks, while the rings of earlier layers run."""
    model = Model()
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def update(loss):
        (loss * dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, wrapped, update, lambda: dict(model.named_parameters())


def fsdp2():
    """Every rank holds a part of each weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def update(loss):
        (loss * dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, model, update, lambda: {name: p.full_tensor() for name, p in model.named_parameters()}


def deepspeed():
    """ZeRO-3: likewise, with DeepSpeed's own machinery."""
    import deepspeed as engine_library

    model = Model(deepspeed=True)
    assert all(engine_library.utils.z3_leaf_module(layer.attention.attention) for layer in model.layers)
    engine, *_ = engine_library.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )

    def update(loss):
        engine.backward(loss * dist.get_world_size())
        engine.step()

    def weights():
        found = {}
        for name, p in model.named_parameters():
            with engine_library.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        return found

    return model, engine, update, weights


ENGINES = {"plain": plain, "ddp": ddp, "fsdp2": fsdp2, "deepspeed": deepspeed}


def main(names, file):
    """Take the steps under each engine; the first rank writes what came out."""
    torch.set_num_threads(1)
    calls = {"forward": 0, "backward": 0}
    for name in calls:
        real = getattr(NativeBackend, name)

        def counted(self, *args, _real=real, _name=name, **kwargs):
            calls[_name] += 1
            return _real(self, *args, **kwargs)

        setattr(NativeBackend, name, counted)
    results = {}
    for name in names:
        calls.update(forward=0, backward=0)
        model, called, update, weights = ENGINES[name]()
        losses = []
        for step in range(STEPS):
            loss = called(*(model.shard(x) for x in batch(step)))
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item())
            update(loss)
        sent = int(model.layers[0].attention.attention.sent_bytes()["kv"].sum())
        fewest = torch.tensor([calls["forward"], calls["backward"]])
        dist.all_reduce(fewest, dist.ReduceOp.MIN)
        results[name] = (losses, {n: p.detach().clone() for n, p in weights().items()}, fewest.tolist(), sent)
    if dist.get_rank() == 0:
        torch.save(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "deepspeed" not in sys.argv[1]:
        dist.init_process_group("gloo")
    else:
        import deepspeed as library

        library.init_distributed("gloo")
    main(sys.argv[1].split(","), sys.argv[2])
