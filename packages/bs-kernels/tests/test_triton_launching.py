"""Launches go through all of Triton but the GPU: its binder, its compiler, and what reaches the launcher."""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bs_kernels._arguments import make_call
from bs_kernels.testing import make_case, make_layout

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

from triton.runtime import driver  # after the two skips

from bs_kernels.backends.triton import launch
from bs_kernels.backends.triton.ahead import TARGETS, missing_tool
from bs_kernels.backends.triton.backward_bias import bias_kernel
from bs_kernels.backends.triton.backward_columns import columns_kernel
from bs_kernels.backends.triton.backward_rows import rows_kernel
from bs_kernels.backends.triton.config import Config
from bs_kernels.backends.triton.forward import forward_kernel, merge_kernel

CONFIG = Config(16, 16, 1, 1)


class Recorder:
    """A driver of a device that is not there; keeps what would be loaded and launched."""

    DEVICE = 4096  # none that a machine has: Triton keeps compiled kernels by it

    def __init__(self):
        self.loaded, self.launched = [], []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=self.load,
            unload_module=lambda module: None,
        )

    def load(self, name, *_):
        self.loaded.append(name)
        return (object(), object(), 32, 0, 1024)

    def get_current_device(self):
        return self.DEVICE

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS["sm90"][0]

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launched.append((x, dict(zip(source.signature, arguments, strict=True)), source.signature))

        return run


@pytest.fixture
def recorder(monkeypatch, tmp_path):
    if reason := missing_tool("sm90"):
        pytest.skip(reason)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = Recorder()
    monkeypatch.setattr(driver, "_active", made)
    yield made
    for kernel in (forward_kernel, merge_kernel, rows_kernel, columns_kernel, bias_kernel):
        kernel.device_caches.pop(Recorder.DEVICE, None)


def launches(q_len, k_len, *, batch=1, **arguments):
    layout = make_layout(np.random.default_rng(0), seq_len=(q_len, k_len), block_size=(16, 16), density=0.5)
    case = make_case(layout, batch=batch, q_heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16, **arguments)
    call = make_call(case.q, case.k, case.v, layout, **case.arguments)
    lse = torch.empty(batch, 4, q_len)
    given = call, case.dout, lse, lse
    pieces = torch.empty(2, *case.dout.shape), torch.empty(2, *lse.shape)
    return {
        "forward": launch.forward_launch(call, case.dout, lse, CONFIG),
        "merge": launch.merge_launch(*pieces, case.dout, lse),
        "rows": launch.rows_launch(*given, case.q, None, CONFIG),
        "columns": launch.columns_launch(*given, None, case.k, case.v, CONFIG),
        "bias": launch.bias_launch(*given, torch.empty(1, 1, q_len, 512), CONFIG),
    }


def leaves(signature, value):
    """The values that a compiled kernel takes, in order, with their types."""
    if isinstance(signature, (tuple, list)):
        assert len(signature) == len(value)
        return [leaf for pair in zip(signature, value, strict=True) for leaf in leaves(*pair)]
    return [] if signature == "constexpr" else [(signature, value)]


def test_what_is_launched_is_what_was_compiled(recorder):
    one = launches(48, 80, causal=True, window=(30, 0), sinks=True, dropout_p=0.2, dropout_seed=3)["forward"]
    one.run()
    ((programs, arguments, signature),) = recorder.launched
    assert programs == one.programs
    assert arguments == {name: one.arguments[name] for name in signature}
    flat = [leaf for name in signature for leaf in leaves(signature[name], arguments[name])]
    (cache,) = (caches[0] for device, caches in one.kernel.device_caches.items() if device == Recorder.DEVICE)
    (compiled,) = (kernel for kernel in cache.values() if kernel.src.signature == signature)
    taken = re.findall(r"\.param \.(?:align \d+ )?\.?(\w+)(?: \.ptr)?", compiled.asm["ptx"].split(")", 1)[0])
    assert len(taken) == len(flat) + 2  # Triton adds two pointers to scratch memory
    widths = {"i32": 32, "i64": 64, "fp32": 32}
    for kind, (stated, value) in zip(taken, flat, strict=False):
        assert int(kind.lstrip("usbf")) == (64 if stated.startswith("*") else widths[stated])
        assert torch.is_tensor(value) == stated.startswith("*")


@pytest.mark.parametrize("kernel", ["forward", "merge", "rows", "columns", "bias"])
def test_no_length_or_batch_compiles_a_kernel_again(recorder, kernel):
    """A cache that grows by a token a step, packed batches of other lengths: one kernel serves them."""
    for q_len, k_len, batch in ((48, 512, 1), (48, 513, 1), (31, 545, 1), (17, 256, 1), (64, 256, 2), (33, 4096, 3)):
        launches(q_len, k_len, batch=batch)[kernel].run()
    assert len(recorder.loaded) == 1
    assert len(recorder.launched) == 6
