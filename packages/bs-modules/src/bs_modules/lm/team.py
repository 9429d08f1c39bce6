"""Processes of one machine that share every sequence: the first leads, the others do what it tells them.

The leader is the process that was started; it alone prints, saves and listens to signals. Each process holds all the
weights. A worker ends with its leader, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from .errors import InputError, NotFinite, RunError

if TYPE_CHECKING:
    from .settings import Settings

#: Seconds without an answer after which a process is given up.
PATIENCE = 120.0
_PEERS = "lost its peers"


class Team:
    """One process's view of all.

    Attributes:
        rank: This process; 0 leads.
        world_size: Processes.
    """

    def __init__(self, rank: int, world_size: int, workers: Sequence[Worker] = ()) -> None:
        self.rank, self.world_size = rank, world_size
        self._workers = workers

    def tell(self, name: str, *arguments: Any) -> None:
        """The leader tells the workers to do something with it; a worker tells nobody.

        Raises:
            RunError: A worker is gone.
        """
        for worker in self._workers:
            try:
                worker.orders.send((name, arguments))
            except OSError as error:
                raise RunError(self.what_happened(error)) from error

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Adds up an array over all processes."""
        total = torch.from_numpy(array.copy())
        dist.all_reduce(total)
        return total.numpy()

    def sum_gradients(self, loss: float, gradients: Sequence[Tensor]) -> float:
        """Adds gradients up in place, and returns the sum of the losses: one message for all of them."""
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([loss], dtype=gradients[0].dtype)])
        dist.all_reduce(flat)
        *summed, total = flat.split([*(g.numel() for g in gradients), 1])
        for gradient, values in zip(gradients, summed, strict=True):
            gradient.copy_(values.view_as(gradient))
        return total.item()

    def what_happened(self, error: BaseException) -> str:
        """One line on why a call failed: which process ended, and how, where one did."""
        words = {worker.rank: said for worker in self._workers if (said := worker.last_words()) is not None}
        # One that fails takes the others with it, which then complain about their peers.
        for rank, said in sorted(words.items(), key=lambda item: _PEERS in item[1]):
            return f"process {rank} of {self.world_size} {said}"
        return " ".join(str(error).split())


class Worker:
    """A worker as its leader sees it."""

    def __init__(self, rank: int, world_size: int, port: int, threads: int, trainer: Callable[..., Any]) -> None:
        context = _context(trainer.__module__)
        self.rank = rank
        theirs, self.orders = context.Pipe(duplex=True)
        self.process = context.Process(
            target=_work,
            args=(rank, world_size, port, threads, theirs, trainer),
            name=f"bsattn train {rank}",
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def last_words(self) -> str | None:
        """How the process ended; None while it lives."""
        self.process.join(2.0)
        with contextlib.suppress(EOFError, OSError):
            if self.orders.poll():
                return str(self.orders.recv())
        code = self.process.exitcode
        if code is None:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


@contextlib.contextmanager
def assemble(settings: Settings, trainer: Callable[..., Any]) -> Iterator[Team | None]:
    """The team of a run while it trains; None where one process trains alone.

    Args:
        settings: Of the run.
        trainer: Makes what a worker does its work with, from (settings, corpus, team); importable by its name.

    Raises:
        InputError: This process is in a process group already.
        RunError: A worker did not come up.
    """
    if settings.nproc == 1:
        yield None
        return
    if dist.is_initialized():
        raise InputError(f"nproc: expected 1 inside a process group, which shares already, got {settings.nproc}")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers: list[Worker] = []
    try:
        with _signals_held():
            for rank in range(1, settings.nproc):
                workers.append(Worker(rank, settings.nproc, store.port, settings.threads or 1, trainer))
        team = Team(0, settings.nproc, workers)
        try:
            _join_group(store, 0, settings.nproc)
        except RuntimeError as error:
            raise RunError(team.what_happened(error)) from error
        yield team
    finally:
        for worker in workers:
            worker.orders.close()
        for worker in workers:
            worker.process.join(0.5)
            worker.process.kill()
            worker.process.join()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def gathered_attention(model: nn.Module) -> Iterator[None]:
    """While entered, every attention of the model takes whole sequences, in this process alone."""
    blocks: list[Any] = [block for block in model.modules() if hasattr(getattr(block, "attention", None), "attention")]
    spread = [block.attention for block in blocks]
    try:
        for block in blocks:
            block.attention = block.attention.attention
        yield
    finally:
        for block, attention in zip(blocks, spread, strict=True):
            block.attention = attention


def _context(module: str) -> Any:
    """Fresh processes that share one import of a module (and of torch) where there is a fork server; else spawned."""
    import multiprocessing

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _join_group(store: Any, rank: int, world_size: int) -> None:
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE)
    )  # fmt: skip


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started meanwhile do not see Ctrl-C, which a terminal sends to all: the leader decides."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(rank: int, world_size: int, port: int, threads: int, orders: Any, make_trainer: Callable[..., Any]) -> None:
    """A worker's life: one order after another, until the leader is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    inbox: list[Any] = []
    ready = threading.Condition()

    def listen() -> None:
        """Reads orders while the worker computes, so that it notices the end of its leader at any time."""
        while True:
            try:
                order = orders.recv()
            except (EOFError, OSError):
                os._exit(0)
            with ready:
                inbox.append(order)
                ready.notify()

    threading.Thread(target=listen, name="orders", daemon=True).start()
    trainer: Any = None
    try:
        _join_group(TCPStore("127.0.0.1", port, is_master=False), rank, world_size)
        team = Team(rank, world_size)
        while True:
            with ready:
                while not inbox:
                    ready.wait()
                name, arguments = inbox.pop(0)
            if name == "begin":
                settings, corpus = arguments
                trainer = make_trainer(settings, corpus, team)
            elif name == "train_step":
                rate, trainer.step = arguments
                with contextlib.suppress(NotFinite):  # the leader says so
                    trainer.train_step(rate)
            else:
                getattr(trainer, name)(*arguments)
    except RunError as error:
        _leave(orders, f"{_PEERS}: {error}")
    except BaseException as error:
        _leave(orders, f"failed: {type(error).__name__}: {error}")


def _leave(orders: Any, words: str) -> None:
    with contextlib.suppress(OSError):
        orders.send(" ".join(words.split())[:500])
    os._exit(1)
