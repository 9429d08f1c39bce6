"""Training steps with the distributed module under the engines people use, launched by `torchrun` over gloo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("engine_steps.py")
#: Ranks; four of them in a thorough run.
WORLDS = [2] + [4] * (os.environ.get("HYPOTHESIS_PROFILE", "dev") != "dev" or bool(os.environ.get("BS_SOAK")))


def steps_module():
    spec = importlib.util.spec_from_file_location("engine_steps", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def by_one_process():
    steps = steps_module()
    return {dtype: steps.alone(dtype) for dtype in (torch.float64, torch.float32)}


def launch(names, world, file, **environment):
    """Run the steps under `torchrun`; one launch serves several engines."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    result = subprocess.run(
        [*command, str(SCRIPT), ",".join(names), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(file)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def launched(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("engines") / "results.pt"
    return launch(["plain", "ddp", "fsdp2"], request.param, file)


def check(found, by_one_process):
    """Losses and weights are as near to exact ones as those of one process are, twice over, and a rounding."""
    losses, weights, calls, sent = found
    exact_losses, exact = by_one_process[torch.float64]
    one_losses, one = by_one_process[torch.float32]
    eps = torch.finfo(torch.float32).eps
    for got, single, want in zip(losses, one_losses, exact_losses, strict=True):
        assert abs(got - want) <= 2 * abs(single - want) + 4 * eps * abs(want)
    assert set(weights) == set(exact)
    moved = 0
    start = steps_module().Model().state_dict()
    for name, want in exact.items():
        error, yardstick = ((x[name].double() - want).abs().max() for x in (weights, one))
        assert error <= 2 * yardstick + 4 * eps * want.abs().max(), name
        moved += int((want - start[name]).abs().max() > 1e3 * error)
    assert moved == len(exact), "steps too small to tell a right one from none"
    assert calls == [2 * len(losses)] * 2, "each layer of each step ran on the native backend, forward and backward"
    assert sent > 0


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2"])
def test_a_step_is_that_of_one_process(launched, by_one_process, engine):
    check(launched[engine], by_one_process)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("world", WORLDS)
def test_a_zero_3_step_is_that_of_one_process(by_one_process, tmp_path, world):
    found = launch(["deepspeed"], world, tmp_path / "results.pt", DS_ACCELERATOR="cpu")
    check(found["deepspeed"], by_one_process)
