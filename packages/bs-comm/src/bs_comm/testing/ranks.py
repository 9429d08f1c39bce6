"""A persistent pool of real processes, each a rank of a gloo group."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..health import has_failed


class RankError(AssertionError):
    """Functions raised on some ranks; the message holds every rank's traceback.

    Attributes:
        errors: The exceptions by rank, where they could be pickled, else their text.
    """

    def __init__(self, errors: dict[int, Any], text: str) -> None:
        super().__init__(text)
        self.errors = errors


class RankPool:
    """Processes that stay up between calls, so that a test costs milliseconds and not the import of torch.

    The store that groups meet in lives here, in the parent, so it outlives every rank. Use as a context manager.

    Args:
        world_size: Processes to start; a call may use fewer.
        threads: Of torch, per process.
    """

    def __init__(self, world_size: int, *, threads: int = 1) -> None:
        self.world_size = world_size
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = _context()
        self._groups = 0
        self._group_size = 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(theirs, rank, self._store.port, threads), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, world_size: int | None = None, timeout: float = 120.0
    ) -> list[Any]:
        """Call ``function(rank, world_size, *args)`` on every rank and return the results in rank order.

        The default process group has ``world_size`` ranks; it is kept while that number stays the same and no ring of
        it fails.

        Args:
            function: A top-level function of an importable module or of a file.
            args: Pickled to every rank.
            world_size: Ranks to use; default all.
            timeout: Seconds until the pool is killed.

        Raises:
            RankError: A function raised.
            TimeoutError: Ranks did not answer; the pool is closed.
        """
        self.start(function, *args, world_size=world_size)
        return self.collect(timeout)

    def start(self, function: Callable[..., Any], *args: Any, world_size: int | None = None) -> None:
        """Begin a call; `collect` ends it. Meanwhile ``pids`` may be sent signals."""
        size = self.world_size if world_size is None else world_size
        if not 1 <= size <= self.world_size:
            raise ValueError(f"world_size: expected 1 … {self.world_size}, got {world_size}")
        if size != self._group_size:
            self._groups, self._group_size = self._groups + 1, size
        job = pickle.dumps((_address(function), self._groups, size, args))
        for pipe in self._pipes[:size]:
            pipe.send_bytes(job)

    def collect(self, timeout: float = 120.0, *, ranks: list[int] | None = None) -> list[Any]:
        """Wait for the call that `start` began.

        Args:
            timeout: Seconds until the pool is killed.
            ranks: Whose answers are expected; default all that take part. Others may be dead.

        Returns:
            Results in the order of ``ranks``.

        Raises:
            RankError: As in `run`.
            TimeoutError: As in `run`.
        """
        expected = list(range(self._group_size)) if ranks is None else ranks
        pending = {self._pipes[rank]: rank for rank in expected}
        answers: dict[int, Any] = {}
        errors: dict[int, Any] = {}
        texts = []
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(pending.values())
                self.close()
                raise TimeoutError(f"ranks {late} did not answer within {timeout:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    good, value, text, is_spent = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    good, value, text, is_spent = False, None, "the process died", True
                if is_spent or not good:
                    self._group_size = 0  # A failed group is not used again.
                if good:
                    answers[rank] = value
                else:
                    errors[rank] = value
                    texts.append(f"rank {rank}: {text}")
        if errors:
            raise RankError(errors, "\n".join(texts))
        return [answers[rank] for rank in expected]

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid or 0 for process in self._processes]

    def close(self) -> None:
        """Kill every process."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _context() -> Any:
    """Fresh processes that share one import of torch where the platform has a fork server, else spawned ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # DDP and custom ops import dynamo at their first use, seconds in every rank anew.
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo", __name__])
    return context


def _address(function: Callable[..., Any]) -> tuple[str, str, str]:
    """Module, file and name; test files have module names that other processes cannot import."""
    if "<locals>" in function.__qualname__:
        raise ValueError(f"function: expected one at the top level of a file, got {function.__qualname__}")
    return function.__module__, function.__code__.co_filename, function.__qualname__


def _find(address: tuple[str, str, str]) -> Callable[..., Any]:
    module_name, file, name = address
    key = f"_ranks_{Path(file).stem}_{abs(hash(file))}"
    module = sys.modules.get(key)
    if module is None:
        try:
            spec = importlib.util.find_spec(module_name)
        except (ImportError, ValueError):
            spec = None
        if spec is not None and spec.origin and os.path.samefile(spec.origin, file):
            module = importlib.import_module(module_name)
        else:
            spec = importlib.util.spec_from_file_location(key, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            spec.loader.exec_module(module)
    return getattr(module, name)


def _rank_main(pipe: Connection, rank: int, port: int, threads: int) -> None:
    """Serve jobs until the parent goes away."""
    torch.set_num_threads(threads)
    store = TCPStore("127.0.0.1", port, is_master=False)
    current = 0
    while True:
        try:
            address, group, size, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if group != current:
                if dist.is_initialized():
                    dist.destroy_process_group()
                dist.init_process_group(
                    "gloo", store=PrefixStore(f"group{group}", store), rank=rank, world_size=size,
                    timeout=timedelta(seconds=60),
                )  # fmt: skip
                current = group
            answer = (True, _find(address)(rank, size, *args), "", has_failed(dist.group.WORLD))
        except BaseException as error:
            answer = (False, error, traceback.format_exc(), True)
        try:
            text = pickle.dumps(answer)
            pickle.loads(text)
        except Exception as error:
            text = pickle.dumps((False, None, f"{answer[2]}\n(its answer cannot be pickled: {error})", True))
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(text)
