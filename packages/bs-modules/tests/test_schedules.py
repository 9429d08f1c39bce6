"""ProgressiveSparsityScheduler: shapes, resumption, and what it does to models."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bs_modules.adaptive import BlockSparseAdaptive
from bs_modules.attention import BlockSparseRingDilatedAttention as Base
from bs_modules.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from bs_modules.schedules import ProgressiveSparsityScheduler as Scheduler

SCHEDULES = ("linear", "cosine", "cubic")
sparsities = st.floats(0, 1, exclude_max=True)


@given(sparsities, sparsities, st.integers(1, 30), st.sampled_from(SCHEDULES))
def test_runs_from_the_first_sparsity_to_the_last_and_stays(initial, final, total, schedule):
    model = Base()
    scheduler = Scheduler(model, initial, final, total, schedule=schedule)
    seen = [scheduler.sparsity] + [scheduler.step() for _ in range(total + 3)]
    assert seen[0] == initial
    assert seen[total:] == pytest.approx([final] * 4)
    ordered = seen if final >= initial else seen[::-1]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(ordered))
    assert model.sparse_config.sparsity_ratio == pytest.approx(1 - final)


@pytest.mark.parametrize(
    ("schedule", "quarter"),
    [("linear", 0.25), ("cosine", (1 - math.cos(math.pi / 4)) / 2), ("cubic", 1 - 0.75**3)],
)
def test_shapes(schedule, quarter):
    scheduler = Scheduler(Base(), 0.2, 0.8, 4, schedule=schedule)
    assert scheduler.step() == pytest.approx(0.2 + 0.6 * quarter)
    assert scheduler.density == pytest.approx(1 - scheduler.sparsity)


def test_every_step_takes_effect_at_the_next_call_and_only_removes_blocks():
    model = Base(sparse_config={"block_size": 4})
    scheduler = Scheduler(model, 0.2, 0.9, 5)
    layouts = [model.layout(64)]
    for _ in range(5):
        scheduler.step()
        layouts.append(model.layout(64))
        assert layouts[-1].density == pytest.approx(scheduler.density, abs=1 / 16)
    assert all((b - a).nnz == 0 and b.nnz < a.nnz for a, b in itertools.pairwise(layouts))


def test_reaches_every_module_inside_a_model():
    model = nn.Sequential(Multihead(8, 2), nn.Sequential(Base(), nn.Linear(2, 2)))
    Scheduler(model, 0.25, 0.75, 10)
    assert model[0].attention.sparse_config.sparsity_ratio == 0.75
    assert model[1][0].sparse_config.sparsity_ratio == 0.75


@given(st.integers(0, 12), st.sampled_from(SCHEDULES))
def test_state_resumes_through_json(steps, schedule):
    first = Scheduler(Base(), 0.1, 0.9, 8, schedule=schedule)
    for _ in range(steps):
        first.step()
    model = Base()
    second = Scheduler(model, 0.5, 0.6, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert model.sparse_config.sparsity_ratio == first.density
    assert second.step() == first.step()


@pytest.mark.parametrize(
    ("arguments", "kwargs", "error", "match"),
    [
        (("model",), {}, TypeError, "model: expected a module"),
        ((nn.Linear(2, 2),), {}, ValueError, "model: expected a module with a sparse_config"),
        ((Base(), 1.0), {}, ValueError, r"initial_sparsity: expected a sparsity in \[0, 1\).*got 1.0"),
        ((Base(), 0.5, -0.1), {}, ValueError, "final_sparsity"),
        ((Base(), 0.5, math.nan), {}, ValueError, "final_sparsity"),
        ((Base(), "0.5"), {}, TypeError, "initial_sparsity"),
        ((Base(), 0.5, True), {}, TypeError, "final_sparsity"),
        ((Base(), 0.5, 0.9, 0), {}, ValueError, "total_steps"),
        ((Base(), 0.5, 0.9, 2.5), {}, TypeError, "total_steps"),
        ((Base(),), {"schedule": "cubik"}, ValueError, "did you mean 'cubic'"),
        ((Base(),), {"schedule": 3}, TypeError, "schedule"),
    ],
)
def test_rejects(arguments, kwargs, error, match):
    with pytest.raises(error, match=match):
        Scheduler(*arguments, **kwargs)


def test_a_bad_state_changes_nothing():
    scheduler = Scheduler(Base(), 0.5, 0.9, 10)
    before = scheduler.state_dict()
    for state in ({}, {**before, "more": 1}, {**before, "total_steps": 0}, {**before, "current_step": -1}):
        with pytest.raises(ValueError, match=r"state|total_steps|current_step"):
            scheduler.load_state_dict(state)
    assert scheduler.state_dict() == before


def test_a_config_that_would_not_take_a_density_is_refused_at_once():
    groups = [{"heads": 1, "sparsity_ratio": 0.5}, {"heads": 1, "sparsity_ratio": 0.2}]
    module = Base(sparse_config={"head_groups": groups})
    with pytest.raises(ValueError, match="sparsity_ratio: has no effect beside head_groups"):
        Scheduler(module)
    assert module.sparse_config.sparsity_ratio is None
    gate = BlockSparseAdaptive(sparse_config={"learn_density": True, "max_density": 0.3})
    with pytest.raises(ValueError, match="max_density"):
        Scheduler(gate, initial_sparsity=0.5, final_sparsity=0.9)
    assert gate.sparse_config.base_sparsity == 0.9
