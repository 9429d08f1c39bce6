"""is_oom_error: what counts as running out of memory."""

import errno
import os

import numpy as np
import pytest
import torch

from bs_memory import PoolBudgetError, RecoveryError, is_oom_error

CPU_LINUX = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
        PoolBudgetError("budget"),
        RecoveryError("tried everything"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(CPU_LINUX),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:40],
)
def test_allocators_that_fail_are_recognised(error):
    assert is_oom_error(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
        ValueError("out of memory"),
        OSError(errno.ENOENT, "No such file"),
        KeyboardInterrupt("out of memory"),
        SystemExit(1),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_not(error):
    assert not is_oom_error(error)


def raised(outer, inner, *, cause):
    try:
        try:
            raise inner
        except BaseException as error:
            if cause:
                raise outer from error
            raise outer  # noqa: B904  (the implicit context is what is tested)
    except BaseException as error:
        return error


@pytest.mark.parametrize("cause", [True, False], ids=["cause", "context"])
def test_wrapped_failures_are_recognised(cause):
    once = raised(ValueError("while building the plan"), MemoryError(), cause=cause)
    assert is_oom_error(once)
    assert is_oom_error(raised(KeyError("further out"), once, cause=cause))


def test_a_suppressed_context_does_not_count():
    error = raised(ValueError(), MemoryError(), cause=False)
    error.__suppress_context__ = True
    assert not is_oom_error(error)


def test_groups_are_looked_into():
    assert is_oom_error(ExceptionGroup("ranks", [ValueError(), MemoryError()]))
    assert not is_oom_error(ExceptionGroup("ranks", [ValueError()]))


def test_an_interrupt_while_handling_is_an_interrupt():
    assert not is_oom_error(raised(KeyboardInterrupt(), MemoryError(), cause=False))


def test_a_circle_ends():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert not is_oom_error(one)


def test_the_real_allocators_are_recognised():
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_oom_error(caught.value)


def test_the_systems_own_words_are_recognised():
    assert is_oom_error(RuntimeError(f"unable to mmap 8 bytes: {os.strerror(errno.ENOMEM)} (12)"))
