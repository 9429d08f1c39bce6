"""Recognising that memory ran out, in whatever exception that arrives."""

import errno

import torch

# What allocators say in a plain RuntimeError. Lower case; one that matches any is an out-of-memory error.
_MESSAGES = (
    "out of memory",  # CUDA, HIP, XPU, MPS, Triton and NCCL, as in "CUDA error: out of memory"
    "can't allocate memory",  # torch's CPU allocator on Linux and macOS
    "not enough memory",  # the same on Windows, and oneDNN
    "cannot allocate memory",  # ENOMEM in words
    "could not allocate memory",
    "failed to allocate memory",
    "unable to allocate",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "cudaerrormemoryallocation",
    "std::bad_alloc",
    "bad allocation",
)


def is_oom_error(error: BaseException) -> bool:
    """Whether memory ran out: in the exception itself, in one it was raised from, or in a group's members.

    Args:
        error: any exception. `torch.OutOfMemoryError`, `MemoryError` (numpy's included), `OSError` with `ENOMEM` and
            the allocators' `RuntimeError`s count, as does an exception whose `__cause__`, or visible `__context__`,
            does. `KeyboardInterrupt` and its like never do.

    Returns:
        True if memory ran out.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if not isinstance(current, Exception | BaseExceptionGroup):
            if current is error:
                return False
            continue
        if _is_oom_itself(current):
            return True
        if isinstance(current, BaseExceptionGroup):
            queue += current.exceptions
        queue.append(current.__cause__)
        if not current.__suppress_context__:
            queue.append(current.__context__)
    return False


def _is_oom_itself(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        return any(message in text for message in _MESSAGES)
    return False
