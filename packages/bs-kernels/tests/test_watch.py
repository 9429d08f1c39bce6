"""`watch`: what ran, and nothing left behind."""

import threading

import pytest
import torch

from bs_kernels import LayoutPlan, _recovery, block_sparse_attention, plan
from bs_kernels.backends.torch_blocks import TorchBackend
from bs_kernels.dispatch import BACKENDS, select
from bs_kernels.watch import BackendRun, PlanLookup, Recovery, watch
from bs_memory import RecoveryError, oom_recovery
from bs_patterns import LocalWindow


def traces():
    """Everything a watch puts in place."""
    own = [name for backend in BACKENDS for name in ("forward", "backward") if name in vars(backend)]
    if "get_or_build" in vars(plan._plans):
        own.append("get_or_build")
    if _recovery.oom_recovery is not oom_recovery:
        own.append("oom_recovery")
    return own


def inputs(grad=True, seed=0, tokens=70):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, 2, 8, generator=generator).requires_grad_(grad) for _ in range(3)]


LAYOUT = LocalWindow(16).layout(70, block_size=8)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_forward_and_backward_are_seen_with_one_key(backend):
    seen = []
    with watch(seen.append):
        tensors, others = inputs(), inputs(seed=1)
        outs = [block_sparse_attention(*x, LAYOUT, backend=backend) for x in (tensors, others)]
        for out in outs:
            out.sum().backward()
    runs = [event for event in seen if isinstance(event, BackendRun)]
    assert [(run.backend, run.phase) for run in runs] == [(backend, "forward")] * 2 + [(backend, "backward")] * 2
    assert all(run.seconds > 0 for run in runs)
    assert [run.key for run in runs[:2]] == [run.key for run in runs[2:]]
    assert runs[0].key != runs[1].key


def test_plan_lookups_tell_hits_from_misses():
    layout = LocalWindow(24).layout(71, block_size=8)
    plan._plans.clear()
    seen = []
    with watch(seen.append):
        for _ in range(3):
            block_sparse_attention(*inputs(tokens=71), layout)
        LayoutPlan.build(layout)
    lookups = [event.hit for event in seen if isinstance(event, PlanLookup)]
    assert lookups == [False, True, True, True]


def test_nothing_is_left_behind_and_nothing_is_there_before():
    assert traces() == []
    with watch(lambda event: None):
        assert len(traces()) == 2 * len(BACKENDS) + 2
        with pytest.raises(KeyError), watch(lambda event: None):
            raise KeyError
        assert len(traces()) == 2 * len(BACKENDS) + 2
    assert traces() == []


def test_watches_nest_in_any_order_and_each_sees_its_own_time():
    first, second = [], []
    a, b = watch(first.append), watch(second.append)
    a.__enter__()
    b.__enter__()
    block_sparse_attention(*inputs(False), LAYOUT)
    a.__exit__(None, None, None)
    block_sparse_attention(*inputs(False), LAYOUT)
    b.__exit__(None, None, None)
    counts = [sum(isinstance(event, BackendRun) for event in seen) for seen in (first, second)]
    assert counts == [1, 2]
    assert traces() == []


def test_calls_of_other_threads_are_seen():
    seen = []
    with watch(lambda event: seen.append((threading.get_ident(), event))):
        thread = threading.Thread(target=lambda: block_sparse_attention(*inputs(False), LAYOUT))
        thread.start()
        thread.join()
    assert {where for where, event in seen if isinstance(event, BackendRun)} == {thread.ident}


@pytest.mark.parametrize("most", [2, 0])
def test_recoveries_are_reported(monkeypatch, most):
    forward = TorchBackend.forward

    def tight(self, call, out_dtype):
        if call.q.shape[0] * call.k.shape[2] > most:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return forward(self, call, out_dtype)

    monkeypatch.setattr(TorchBackend, "forward", tight)
    select.cache_clear()
    seen, tensors = [], inputs(False)
    with watch(seen.append):
        if most:
            block_sparse_attention(*tensors, LAYOUT, backend="torch")
        else:
            with pytest.raises(RecoveryError):
                block_sparse_attention(*tensors, LAYOUT, backend="torch")
    (event,) = (event for event in seen if isinstance(event, Recovery))
    assert (event.what, event.failed) == ("attention", most == 0)
    assert [step.action for step in event.report.steps][:2] == ["free", "retry"]
    assert event.report.pieces == 2 if most else event.report.recovered
    assert traces() == []
