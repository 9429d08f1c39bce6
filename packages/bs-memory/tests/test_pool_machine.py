"""BufferPool against a model: whatever the order of calls, no aliasing, the budget kept, every lease accounted for."""

from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from bs_memory import BufferPool, LeaseError, MemoryPressure, PoolBudgetError, PressureLevel
from bs_memory._storage import Bucket
from bs_memory.testing import FakeClock, FakeMemory, FakeStreams, PoolModel, dtypes, shapes

CPU = torch.device("cpu")


def nbytes_of(shape, dtype):
    return torch.Size(shape).numel() * dtype.itemsize


class PoolMachine(RuleBasedStateMachine):
    """Every leased byte is written with the lease's own mark and must read the same when the lease ends."""

    leases = Bundle("leases")
    abandoned = Bundle("abandoned")

    @initialize(max_bytes=st.sampled_from([None, 1 << 10, 1 << 13]), poison=st.booleans())
    def start(self, max_bytes, poison):
        self.memory = FakeMemory(total=1000)
        pressure = MemoryPressure(reader=self.memory, clock=FakeClock(), interval=0)
        self.pool = BufferPool(max_bytes=max_bytes, poison=poison, pressure=pressure)
        self.model = PoolModel(max_bytes)
        self.marks = 0
        self.lost = 0

    @rule(target=leases, shape=shapes(max_dims=3, max_size=12), dtype=dtypes(), priority=st.integers(-1, 1))
    def lease(self, shape, dtype, priority):
        nbytes = nbytes_of(shape, dtype)
        must_fit = self.model.must_fit(nbytes)
        try:
            lease = self.pool.lease(shape, dtype, CPU, priority=priority)
        except PoolBudgetError:
            assert not must_fit
            return multiple()
        assert must_fit
        self.marks = self.marks % 100 + 1
        lease.tensor.fill_(self.marks if dtype != torch.bool else True)
        self.model.lease(id(lease), lease.tensor.data_ptr(), nbytes)
        return lease, lease.tensor.clone()

    def finish(self, lease, expected):
        assert torch.equal(lease.tensor, expected)
        self.model.release(id(lease))

    @rule(held=consumes(leases))
    def release(self, held):
        self.finish(*held)
        held[0].release()
        with pytest.raises(LeaseError):
            held[0].release()

    @rule(held=consumes(leases))
    def release_through_the_pool(self, held):
        self.finish(*held)
        self.pool.release(held[0])

    @rule(held=consumes(leases))
    def release_to_another_pool(self, held):
        with pytest.raises(LeaseError):
            BufferPool(pressure=None).release(held[0])
        self.finish(*held)
        held[0].release()

    @rule(target=abandoned, held=consumes(leases))
    def abandon(self, held):
        self.model.release(id(held[0]))
        self.lost += 1
        tensor = held[0].tensor
        held[0]._block = None  # as the collector would: Hypothesis keeps references to the lease itself
        return tensor, held[1]

    @rule(pair=abandoned)
    def an_abandoned_tensor_is_left_alone(self, pair):
        assert torch.equal(*pair)

    @rule(leave=st.sampled_from([0, 100, 5000]))
    def trim(self, leave):
        idle = self.pool.stats().bytes_idle
        freed = self.pool.trim(leave)
        assert self.pool.stats().bytes_idle == idle - freed <= leave

    @rule()
    def clear(self):
        self.pool.clear()
        assert self.pool.stats().bytes_idle == 0

    @rule(free=st.sampled_from([1000, 100, 10]))
    def memory_changes(self, free):
        self.memory.free = free
        level = self.pool._pressure.refresh(CPU)
        if level is PressureLevel.CRITICAL:
            assert self.pool.stats().bytes_idle == 0

    @invariant()
    def statistics_agree_with_the_model(self):
        if hasattr(self, "pool"):
            stats = self.pool.stats()
            self.model.check(stats)
            assert stats.abandoned == self.lost
            held = sum(account.held for account in self.pool._accounts.values())
            assert held == stats.bytes_held


def ordinary_memory(bucket):
    return torch.empty(bucket.nbytes, dtype=bucket.dtype)


class StreamMachine(RuleBasedStateMachine):
    """The same on fake streams: a buffer comes back only to work that is ordered after all work it was used for."""

    leases = Bundle("leases")
    streams = st.sampled_from(["main", "side", "copy"])

    @initialize(max_bytes=st.sampled_from([None, 256]), pinned=st.booleans())
    def start(self, max_bytes, pinned):
        self.pinned = pinned
        self.patch = None
        self.fake = FakeStreams()
        self.pool = BufferPool(max_bytes=max_bytes, streams=self.fake, pressure=None)
        self.model = PoolModel(max_bytes)
        self.used = {}  # address → work issued on it
        if pinned:  # page-locked memory needs a driver; here the rules of reuse are what counts
            self.patch = mock.patch.object(Bucket, "allocate", ordinary_memory)
            self.patch.start()

    @rule(stream=streams)
    def switch(self, stream):
        self.fake.current_stream = stream

    @rule(stream=streams, count=st.sampled_from([1, 2, None]))
    def finish_work(self, stream, count):
        self.fake.finish(stream, count)

    @rule(target=leases)
    def lease(self):
        try:
            lease = self.pool.lease((4,), torch.uint8, "cpu", pinned=self.pinned)
        except PoolBudgetError:
            assert not self.model.must_fit(4)
            return multiple()
        address = lease.tensor.data_ptr()
        self.model.lease(id(lease), address, 4)
        recycled = self.pool.stats().misses < self.model.hits_and_misses and address in self.used
        if recycled:
            for work in self.used[address]:
                if self.pinned:
                    assert self.fake.happened(work)  # the host writes it right now
                else:
                    assert self.fake.ordered(work, self.fake.current_stream)
        self.used[address] = [self.fake.issue()]
        return lease

    @rule(lease=leases)
    def use_on_current_stream(self, lease):
        lease.record_stream(self.fake.current_stream)
        self.used[lease.tensor.data_ptr()].append(self.fake.issue())

    @rule(lease=consumes(leases))
    def release(self, lease):
        self.model.release(id(lease))
        self.used[lease.tensor.data_ptr()].append(self.fake.issue())
        lease.release()

    @rule()
    def trim(self):
        # Memory that goes back to the allocator while other streams use it must have been announced to it.
        idle = {block.flat.data_ptr(): block for account in self.pool._accounts.values() for block in account._idle()}
        kept = len(self.fake.kept)
        self.pool.trim()
        remaining = {block.flat.data_ptr() for account in self.pool._accounts.values() for block in account._idle()}
        announced = set(self.fake.kept[kept:])
        for address in set(idle) - remaining:
            for work in self.used.pop(address):
                if self.pinned:
                    assert self.fake.happened(work)
                else:
                    origin = idle[address].origin
                    assert self.fake.happened(work) or work[0] == origin or (address, work[0]) in announced

    @invariant()
    def statistics_agree_with_the_model(self):
        if hasattr(self, "pool"):
            self.model.check(self.pool.stats())

    def teardown(self):
        if self.patch is not None:
            self.patch.stop()


TestPoolMachine = PoolMachine.TestCase
TestStreamMachine = StreamMachine.TestCase
# It takes a hundredth of a second, and what it looks for takes several steps in one order.
TestStreamMachine.settings = settings(max_examples=8 * settings().max_examples)
