"""Monitor, sinks and explain: right figures while on, nothing at all while off."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import re
import sys
import threading
import tracemalloc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bs_kernels import LayoutPlan, dispatch, plan
from bs_kernels.backends.torch_blocks import TorchBackend
from bs_modules import create_block_sparse_attention, create_multihead_block_sparse
from bs_modules.attention import BlockSparseAttention
from bs_modules.monitor import ELSEWHERE, ModuleMetrics, Monitor
from bs_modules.multihead import BlockSparseRingMultiheadDilatedAttention
from bs_modules.sinks import LoggingSink, PrometheusSink, TensorBoardSink, prometheus_text
from bs_patterns import LocalWindow, PerHead


class Model(nn.Module):
    """Two attentions on the very same tensors, the second in a module of its own."""

    def __init__(self, backend="torch"):
        super().__init__()
        self.near = create_block_sparse_attention("base", pattern_type="local_window", block_size=8, backend=backend)
        self.rest = nn.ModuleDict({"far": create_block_sparse_attention("base", sparsity_ratio=0.5, block_size=8)})

    def forward(self, q, k, v):
        return self.near(q, k, v, is_causal=True) + self.rest["far"](q, k, v)


def inputs(tokens=72, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, 2, 8, generator=generator).requires_grad_(grad) for _ in range(3)]


def traces(*modules):
    """Everything a monitor puts in place."""
    found = [
        kind for kind in (BlockSparseAttention, BlockSparseRingMultiheadDilatedAttention) if "__call__" in vars(kind)
    ]
    found += [b for b in dispatch.BACKENDS if {"forward", "backward"} & vars(b).keys()]
    found += [plan._plans] if "get_or_build" in vars(plan._plans) else []
    found += [m for m in modules if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    return found


def test_counts_calls_caches_backends_and_phases():
    model = Model()
    plan._plans.clear()
    with Monitor(model) as monitor:
        for _ in range(3):
            model(*inputs()).sum().backward()
    found = monitor.metrics()
    assert set(found) == {"near", "rest.far", ELSEWHERE}
    near, far = found["near"], found["rest.far"]
    assert (near.calls, far.calls) == (3, 3)
    assert (near.layout_hits, near.layout_misses) == (2, 1)
    assert (near.plan_hits, near.plan_misses) == (2, 1)
    assert near.backend_runs == {("torch", "forward"): 3, ("torch", "backward"): 3}
    assert near.backends == ("torch",)
    assert sum(far.backend_runs.values()) == 6
    assert near.density == model.near.layout(72, True).density
    assert near.requested_density == model.near.sparse_config.density
    assert far.density == model.rest["far"].layout(72).density
    assert {phase: time.count for phase, time in near.phases.items()} == dict.fromkeys(
        ("layout", "plan", "forward", "backward", "call"), 3
    )
    inside = sum(near.phases[phase].seconds for phase in ("layout", "plan", "forward"))
    assert 0 < inside <= near.phases["call"].seconds
    assert near.phases["call"].longest <= near.phases["call"].seconds
    assert found[ELSEWHERE] == ModuleMetrics()


def test_nothing_is_there_before_and_nothing_is_left_behind():
    model = Model()
    everything = list(model.modules())
    before = [dict(vars(module)) for module in everything]
    assert traces(*everything) == []
    monitor = Monitor(model)
    assert traces(*everything) == []
    with monitor:
        assert len(traces(*everything)) == 2 + len(dispatch.BACKENDS) + 1
        model(*inputs())
        with Monitor(model):
            pass
        assert monitor.running
    assert traces(*everything) == []
    assert not monitor.running
    assert [vars(module).keys() for module in everything] == [state.keys() for state in before]


def test_off_it_neither_runs_nor_allocates():
    model = Model()
    tensors = inputs(grad=False)
    with Monitor(model):
        model(*tensors)
    model(*tensors)
    files = {sys.modules[name].__file__ for name in ("bs_modules.monitor", "bs_modules.sinks", "bs_kernels.watch")}
    entered = []

    def trace(frame, event, arg):
        if event == "call" and frame.f_code.co_filename in files:
            entered.append(frame.f_code.co_name)

    sys.setprofile(trace)
    try:
        model(*tensors)
    finally:
        sys.setprofile(None)
    assert entered == []
    gc.collect()
    tracemalloc.start()
    try:
        model(*tensors)
        taken = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    assert not [trace for trace in taken.traces if trace.traceback[0].filename in files]


def test_results_are_the_same_bits_while_watched():
    model, tensors = Model(), inputs()
    expected = model(*tensors)
    with Monitor(model):
        got = model(*tensors)
    assert torch.equal(got, expected)


def test_copies_and_pickles_of_a_watched_model_are_free_of_it():
    model = Model()
    with Monitor(model) as monitor:
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            twin(*inputs(grad=False))
    found = monitor.metrics()
    assert found["near"].calls == 0
    assert found[ELSEWHERE].backend_runs.total() == 4


def test_a_backward_is_counted_for_the_module_of_its_forward():
    model = Model()
    with Monitor(model) as monitor:
        first, second = model.near(*inputs(seed=1)), model.rest["far"](*inputs(seed=2))
        first.sum().backward()
        assert monitor.metrics()["near"].backend_runs["torch", "backward"] == 1
        second.sum().backward()
        assert monitor.metrics()["rest.far"].phases["backward"].count == 1
        checkpoint(model.near, *inputs(seed=3), use_reentrant=False).sum().backward()
    near = monitor.metrics()["near"]
    assert near.backend_runs == {("torch", "forward"): 3, ("torch", "backward"): 2}


def test_a_call_that_raises_is_counted_and_leaves_the_stack_in_order():
    model = Model()
    with Monitor(model) as monitor:
        with pytest.raises(ValueError):
            model.near(*[x[0] for x in inputs()])
        model.rest["far"](*inputs())
    found = monitor.metrics()
    assert (found["near"].calls, found["rest.far"].calls) == (1, 1)
    assert found["near"].backend_runs == {}


def test_multihead_and_its_attention_are_both_watched_and_other_models_are_not():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer.self_attn = create_multihead_block_sparse(16, 2, batch_first=True, block_size=8)
    other = create_block_sparse_attention("base")
    with Monitor(layer) as monitor, torch.no_grad():
        layer.eval()(torch.randn(1, 40, 16))
        other(*inputs())
    found = monitor.metrics()
    assert (found["self_attn"].calls, found["self_attn.attention"].calls) == (1, 1)
    assert found["self_attn"].backend_runs == {}
    assert found["self_attn.attention"].backend_runs.total() == 1
    assert found["self_attn"].density == found["self_attn.attention"].density
    assert found[ELSEWHERE].backend_runs.total() == 1


class Mean(nn.Module):
    """An attention of the user's own that can tell no density."""

    def forward(self, q, k, v, is_causal):
        return v.mean(1, keepdim=True).expand_as(q)


def test_an_attention_that_tells_no_density_is_timed_all_the_same():
    module = create_multihead_block_sparse(16, 2, attention=Mean())
    x = torch.randn(5, 1, 16)
    with Monitor(module) as monitor:
        module(x, x, x, need_weights=False)
    found = monitor.metrics()[type(module).__name__]
    assert (found.calls, found.density) == (1, None)


def test_heads_that_differ_need_no_announcement():
    module = create_block_sparse_attention(
        "base", pattern_type=PerHead([LocalWindow(16), LocalWindow(64)]), block_size=8
    )
    with Monitor(module) as monitor:
        module(*inputs())
    density = monitor.metrics()[type(module).__name__].density
    assert density == module.layout(72, num_heads=2).density == module.get_pattern_stats()["density"]


def test_threads_are_told_apart():
    model = Model()
    with Monitor(model) as monitor:
        threads = [
            threading.Thread(target=lambda module=module: [module(*inputs(grad=False)) for _ in range(20)])
            for module in (model.near, model.rest["far"])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = monitor.metrics()
    assert [found[name].backend_runs.total() for name in ("near", "rest.far", ELSEWHERE)] == [20, 20, 0]


def test_compiled_modules_work_while_watched():
    model = create_block_sparse_attention("base", sparsity_ratio=0.5, block_size=8)
    tensors = inputs(grad=False)
    expected = model(*tensors)
    model.prepare(72)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with Monitor(model) as monitor:
        torch.testing.assert_close(compiled(*tensors), expected)
    found = monitor.metrics()
    assert sum(metrics.backend_runs.total() for metrics in found.values()) == 1


@pytest.mark.parametrize("most", [1, 0])
def test_want_of_memory_is_reported_by_module(monkeypatch, most):
    forward = TorchBackend.forward

    def tight(self, call, out_dtype):
        if call.q.shape[0] * call.k.shape[2] > most:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return forward(self, call, out_dtype)

    model, tensors = Model(), inputs(grad=False)
    expected = model.near(*tensors)
    monkeypatch.setattr(TorchBackend, "forward", tight)
    with Monitor(model) as monitor:
        if most:
            assert torch.equal(model.near(*tensors), expected)
        else:
            with pytest.raises(MemoryError, match="attention: out of memory"):
                model.near(*tensors)
    near = monitor.metrics()["near"]
    assert (near.recoveries, near.failures) == (most, 1 - most)
    if most:
        assert near.backend_runs["torch", "forward"] == 2  # one piece per head
        assert 'bsattn_memory_recoveries_total{module="near",result="recovered"} 1' in prometheus_text({"near": near})


def test_metrics_are_a_copy_go_on_after_stopping_and_can_be_reset():
    model = Model()
    monitor = Monitor(model)
    with pytest.raises(RuntimeError, match="not running"), monitor:
        monitor.start()
    for _ in range(2):
        with monitor:
            model.near(*inputs())
    found = monitor.metrics()
    found["near"].backend_runs.clear()
    assert monitor.metrics()["near"].calls == 2
    assert monitor.metrics()["near"].backends
    monitor.reset()
    assert monitor.metrics()["near"] == ModuleMetrics()
    monitor.stop()


def test_asking_for_metrics_counts_nothing():
    model = Model()
    with Monitor(model) as monitor:
        model(*inputs())
        assert monitor.metrics() == monitor.metrics()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("model",), TypeError, "model: expected a module, got str"),
        ((nn.Linear(2, 2),), ValueError, "model: expected a module with block-sparse attention inside"),
        ((Model(), [print]), TypeError, r"sinks\[0\]: expected an object with a method write"),
        ((Model(), [], 1), TypeError, "synchronize: expected a bool"),
    ],
)
def test_bad_arguments(arguments, error, words):
    names = ("model", "sinks", "synchronize")
    with pytest.raises(error, match=words):
        Monitor(**dict(zip(names, arguments, strict=False)))


# -- sinks -------------------------------------------------------------------------------------------------------------


def watched(sink):
    model = Model()
    with Monitor(model, sinks=[sink]) as monitor:
        model(*inputs()).sum().backward()
        return monitor.emit(step=7)


def test_the_log_has_one_line_per_module(caplog):
    with caplog.at_level(logging.INFO):
        watched(LoggingSink())
    lines = [record.getMessage() for record in caplog.records if record.name == "bs_modules.monitor"]
    assert len(lines) == 2
    assert lines[0].startswith("step 7: near: 1 calls, density ")
    assert "torch backward × 1, torch forward × 1" in lines[0]
    assert re.search(r"backward [\d.]+ ms", lines[0])


def test_tensorboard_gets_scalars():
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            self.scalars[tag] = (value, step)

    writer = Writer()
    found = watched(TensorBoardSink(writer, prefix="run"))
    assert writer.scalars["run/near/density"] == (found["near"].density, 7)
    assert writer.scalars["run/near/runs/torch_forward"] == (1, 7)
    assert writer.scalars["run/near/milliseconds/backward"][0] > 0
    assert not any(tag.startswith(f"run/{ELSEWHERE}") for tag in writer.scalars)
    with pytest.raises(TypeError, match="writer: expected a folder"):
        TensorBoardSink(3)


def test_a_missing_tensorboard_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardSink(tmp_path)


SAMPLE = re.compile(r'^[a-z_]+(\{[a-z_]+="(\\.|[^"\\\n])*"(,[a-z_]+="(\\.|[^"\\\n])*")*\})? -?[0-9.e+-]+$')


def test_prometheus_text_is_well_formed(tmp_path):
    sink = PrometheusSink(tmp_path / "attention.prom")
    found = watched(sink)
    assert (tmp_path / "attention.prom").read_text(encoding="utf-8") == sink.text
    assert list(tmp_path.iterdir()) == [tmp_path / "attention.prom"]
    lines = sink.text.splitlines()
    assert sink.text.endswith("\n")
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    assert [line.split()[2] for line in lines if line.startswith("# HELP")] == families
    samples = [line for line in lines if not line.startswith("#")]
    assert all(SAMPLE.match(line) for line in samples), samples
    assert {re.split("[{ ]", line)[0] for line in samples} == set(families)
    assert 'bsattn_backend_runs_total{module="near",backend="torch",phase="backward"} 1' in samples
    assert f'bsattn_density{{module="near"}} {found["near"].density!r}' in samples
    assert 'bsattn_plan_lookups_total{module="near",result="miss"}' in sink.text
    assert "bsattn_step 7" in samples


def test_prometheus_labels_are_escaped():
    metrics = ModuleMetrics(density=0.5)
    text = prometheus_text({'a"b\\c\nd': metrics})
    assert 'bsattn_density{module="a\\"b\\\\c\\nd"} 0.5' in text.splitlines()


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_explain_tells_layout_plan_backend_and_reasons(backend):
    module = create_block_sparse_attention("base", sparsity_ratio=0.3, block_size=8, backend=backend)
    tensors = inputs()
    told = module.explain(*tensors, is_causal=True)
    with Monitor(module) as monitor:
        module(*tensors, is_causal=True)
    (name,) = monitor.metrics()[type(module).__name__].backends
    assert told.backend == name
    assert told.layout == module.layout(72, True)
    assert told.density == told.layout.density
    assert told.plan.digest == LayoutPlan.build(told.layout).digest
    assert told.requested_density == 0.3
    text = str(told)
    for part in ("density     0.", "asked for 0.3", f"backend     {name}", "because     ", "base: asked for by name"):
        assert part in text
    if backend == "torch":
        assert "never falls back" in told.reasons[0]
    else:
        assert "in the order below" in told.reasons[-1]


def test_explain_says_why_a_faster_backend_is_passed_over(monkeypatch):
    first = dispatch.BACKENDS[0]
    able = first.not_supported_reasons
    monkeypatch.setattr(first, "not_supported_reasons", lambda p: ["no dropout here"] if p.dropout else able(p))
    dispatch.select.cache_clear()
    module = create_block_sparse_attention("base", block_size=8, dropout=0.5)
    told = module.explain(*inputs())
    assert told.backend != first.name
    assert told.reasons[0] == f"{first.name} cannot: no dropout here"
    assert "no dropout here" not in " ".join(module.eval().explain(*inputs()).reasons)
    monkeypatch.undo()
    dispatch.select.cache_clear()


def test_explain_computes_nothing(monkeypatch):
    module = create_block_sparse_attention("base", block_size=8)

    def refuse(*args):
        raise AssertionError("computed")

    for backend in dispatch.BACKENDS:
        monkeypatch.setattr(backend, "forward", refuse)
    module.explain(*inputs())
    with pytest.raises(AssertionError, match="computed"):
        module(*inputs())


@pytest.mark.parametrize("variant", ["base", "hierarchical", "hilbert", "adaptive", "distributed"])
def test_explain_tells_the_backend_that_runs_in_every_variant(variant):
    module = create_block_sparse_attention(variant)
    tensors = inputs(200)
    told = module.explain(*tensors, is_causal=True)
    with Monitor(module) as monitor:
        module(*tensors, is_causal=True).sum().backward()
    found = monitor.metrics()
    assert {name for metrics in found.values() for name in metrics.backends} == {told.backend}
    assert found[ELSEWHERE] == ModuleMetrics()
    assert str(told)


@pytest.mark.parametrize("variant", ["base", "hierarchical", "hilbert"])
def test_explain_through_the_multihead_module(variant):
    module = create_multihead_block_sparse(16, 2, attention=variant, batch_first=True)
    x = torch.randn(2, 200, 16)
    told = module.explain(x, x, x, attn_mask=torch.randn(200, 200), need_weights=False)
    assert told.layout == module.layout(200)
    assert told.backend in str(told)
    with pytest.raises(AssertionError, match="embed_dim"):
        module.explain(x[..., :4], x, x)
