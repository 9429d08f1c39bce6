"""MemoryPressure: levels, hysteresis, adaptation, callbacks, cost."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bs_memory import BufferPool, MemoryPressure, MemoryReading, PressureLevel, default_pressure
from bs_memory.testing import FakeClock, FakeMemory

CPU = torch.device("cpu")
NORMAL, HIGH, CRITICAL = PressureLevel


@pytest.fixture
def memory():
    return FakeMemory(total=1000)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def pressure(memory, clock):
    """HIGH below 150 free of 1,000, CRITICAL below 50; left above 187.5 and 62.5."""
    return MemoryPressure(reader=memory, clock=clock, interval=1.0)


def test_levels_have_hysteresis_on_a_fake_clock(pressure, memory, clock):
    story = [
        (1000, NORMAL),
        (150, NORMAL),
        (149, HIGH),
        (170, HIGH),  # above the watermark, not yet well above
        (187, HIGH),
        (188, NORMAL),
        (60, HIGH),
        (49, CRITICAL),
        (62, CRITICAL),
        (63, HIGH),
        (49, CRITICAL),
        (500, NORMAL),  # two levels at once
        (0, CRITICAL),
    ]
    for free, expected in story:
        memory.free = free
        clock.advance(1.0)
        assert pressure.level("cpu") is expected, free


@given(st.lists(st.integers(0, 1000), max_size=30), st.floats(0, 1))
def test_a_level_changes_only_across_its_band(frees, hysteresis):
    memory = FakeMemory(total=1000)
    pressure = MemoryPressure(reader=memory, clock=FakeClock(), interval=0, hysteresis=hysteresis)
    level = NORMAL
    for free in frees:
        memory.free = free
        before, level = level, pressure.level(CPU)
        for watched, bound in ((HIGH, 150), (CRITICAL, 50)):
            if before < watched <= level:
                assert free < bound
            if level < watched <= before:
                assert free >= bound * (1 + hysteresis)


def test_a_reading_is_kept_for_the_interval(pressure, memory, clock):
    for _ in range(1000):
        pressure.level(CPU)
    assert memory.reads == 1
    memory.free = 0
    clock.advance(0.99)
    assert pressure.level(CPU) is NORMAL
    clock.advance(0.02)
    assert pressure.level(CPU) is CRITICAL
    assert memory.reads == 2
    memory.free = 1000
    assert pressure.refresh(CPU) is NORMAL
    assert pressure.reading("cpu") == MemoryReading(1000, 1000, "fake")


def test_a_failure_widens_the_watermarks_and_time_narrows_them(pressure, memory, clock):
    memory.free = 200
    assert pressure.level(CPU) is NORMAL
    pressure.note_failure(CPU)
    assert pressure.level(CPU) is HIGH
    assert pressure.watermark(HIGH, CPU) == 300
    for _ in range(5):
        pressure.note_failure(CPU)
    assert pressure.watermark(HIGH, CPU) == 600
    clock.advance(60)  # one half-life: ×4 is ×2.5 now
    assert pressure.watermark(HIGH, CPU) == 375
    clock.advance(6000)
    assert pressure.watermark(HIGH, CPU) == 150
    assert pressure.level(CPU) is NORMAL


@given(st.lists(st.floats(0, 50), max_size=10))
def test_decay_does_not_depend_on_how_often_somebody_asks(steps):
    clock = FakeClock()
    pressure = MemoryPressure(reader=FakeMemory(total=10**9), clock=clock, interval=0, ceiling=10**9)
    pressure.note_failure(CPU)
    for step in steps:
        clock.advance(step)
        pressure.level(CPU)
    expected = 150_000_000 * (1 + 0.5 ** (sum(steps) / 60))
    assert pressure.watermark(HIGH, CPU) == pytest.approx(expected, rel=1e-6)


def test_a_large_machine_is_not_scarce_at_fifteen_percent():
    memory = FakeMemory(total=1 << 40, free=9 << 30)
    pressure = MemoryPressure(reader=memory, clock=FakeClock())
    assert pressure.level(CPU) is NORMAL
    assert pressure.watermark(HIGH) == 8 << 30
    assert pressure.watermark(CRITICAL) == pytest.approx((8 << 30) / 3, abs=1)


def test_would_fit_keeps_clear_of_critical(pressure):
    assert pressure.would_fit(950)
    assert not pressure.would_fit(951)


def test_an_unreadable_memory_is_normal():
    pressure = MemoryPressure(reader=lambda device: MemoryReading(0, 0, "unknown"))
    assert pressure.level(CPU) is NORMAL
    assert pressure.would_fit(1 << 60)


def test_devices_are_apart(clock):
    frees = {"cpu": 10, "meta": 1000}
    pressure = MemoryPressure(reader=lambda device: MemoryReading(frees[device.type], 1000, "fake"), clock=clock)
    assert pressure.level("cpu") is CRITICAL
    assert pressure.level("meta") is NORMAL


def test_callbacks_hear_of_changes_only(pressure, memory, clock):
    heard, heard_elsewhere = [], []
    stop = pressure.subscribe(lambda *change: heard.append(change))
    pressure.subscribe(lambda *change: heard_elsewhere.append(change), device="meta")
    for free in (1000, 100, 90, 10, 1000):
        memory.free = free
        clock.advance(1.0)
        pressure.level(CPU)
    assert [(device, old, new, reading.free) for device, old, new, reading in heard] == [
        (CPU, NORMAL, HIGH, 100),
        (CPU, HIGH, CRITICAL, 10),
        (CPU, CRITICAL, NORMAL, 1000),
    ]
    assert heard_elsewhere == []
    stop()
    stop()
    memory.free = 0
    pressure.refresh(CPU)
    assert len(heard) == 3


def test_a_failing_callback_is_logged_and_the_others_run(pressure, memory, caplog):
    heard = []

    def fail(*_):
        raise KeyError("in the callback")

    pressure.subscribe(fail)
    pressure.subscribe(lambda *_: heard.append(1))
    memory.free = 0
    assert pressure.level(CPU) is CRITICAL
    assert heard == [1]
    assert "callback failed" in caplog.text


def test_a_callback_may_ask_again(pressure, memory):
    asked = []
    pressure.subscribe(lambda device, *_: asked.append(pressure.level(device)))
    memory.free = 0
    pressure.level(CPU)
    assert asked == [CRITICAL]


def test_a_slow_reading_holds_up_nobody_else(clock):
    inside, leave = threading.Event(), threading.Event()
    slow = threading.Event()

    def reader(device):
        if slow.is_set():
            inside.set()
            assert leave.wait(60)
        return MemoryReading(1000, 1000, "fake")

    pressure = MemoryPressure(reader=reader, clock=clock)
    pressure.level(CPU)
    slow.set()
    clock.advance(1)
    thread = threading.Thread(target=pressure.level, args=(CPU,))
    thread.start()
    assert inside.wait(60)
    assert pressure.level(CPU) is NORMAL  # the old reading, at once
    leave.set()
    thread.join()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"high": 0}, ValueError, "high: .*got 0"),
        ({"high": 1.0}, ValueError, "high: .*got 1.0"),
        ({"critical": 0.2}, ValueError, "critical: .*got 0.2"),
        ({"hysteresis": -0.1}, ValueError, "hysteresis: .*got -0.1"),
        ({"ceiling": 0}, ValueError, "ceiling: .*got 0"),
        ({"interval": -1}, ValueError, "interval: .*got -1"),
        ({"half_life": 0}, ValueError, "half_life: .*got 0"),
        ({"hysteresis": float("nan")}, ValueError, "hysteresis: .*got nan"),
        ({"half_life": "60"}, TypeError, "half_life: .*got str"),
        ({"ceiling": 1e9}, TypeError, "ceiling: .*got float"),
        ({"reader": 3}, TypeError, "reader: expected a callable, got int"),
        ({"clock": None}, TypeError, "clock: expected a callable, got NoneType"),
    ],
)
def test_bad_thresholds_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        MemoryPressure(**options)


def test_copies_of_a_gauge_are_the_gauge(pressure):
    assert copy.deepcopy([pressure])[0] is copy.copy(pressure) is pressure
    assert pickle.loads(pickle.dumps(default_pressure())) is default_pressure()
    twin = pickle.loads(pickle.dumps(MemoryPressure(high=0.3)))
    assert twin.watermark(HIGH) == MemoryPressure(high=0.3).watermark(HIGH)


def test_misuse_is_named(pressure):
    with pytest.raises(TypeError, match="callback: expected a callable, got int"):
        pressure.subscribe(3)
    with pytest.raises(ValueError, match=r"nbytes: .*got -1"):
        pressure.would_fit(-1)
    with pytest.raises(ValueError, match="level: expected HIGH or CRITICAL"):
        pressure.watermark(NORMAL)


def test_the_default_gauge_is_one_and_reads_this_machine():
    assert default_pressure() is default_pressure()
    reading = default_pressure().reading()
    assert 0 < reading.free <= reading.total


# --------------------------------------------------------------------------- the pool listens


def fill(pool, count=8):
    leases = [pool.lease((1024,), torch.uint8, CPU) for _ in range(count)]
    for lease in leases:
        lease.release()


def test_the_pool_halves_its_idle_bytes_when_memory_gets_scarce(pressure, memory, clock):
    pool = BufferPool(pressure=pressure)
    fill(pool)
    memory.free = 100
    clock.advance(1)
    with pool.lease((64,), torch.uint8, CPU):  # a miss asks
        assert pool.stats().bytes_idle <= 4096


def test_the_pool_keeps_nothing_while_memory_is_critical(pressure, memory, clock):
    pool = BufferPool(pressure=pressure)
    fill(pool)
    memory.free = 10
    clock.advance(1)
    assert pressure.level(CPU) is CRITICAL  # whoever asks: here the test, else a cache or a miss
    assert pool.stats().bytes_held == 0
    fill(pool)
    assert pool.stats().bytes_held == 0
    memory.free = 1000
    clock.advance(1)
    fill(pool)
    assert pool.stats().buffers == 8


def test_a_closed_pool_stays_closed_when_memory_comes_back(pressure, memory, clock):
    pool = BufferPool(pressure=pressure)
    lease = pool.lease((1024,), torch.uint8, CPU)
    pool.close()
    pool._relieve(CPU, NORMAL)
    lease.release()
    assert pool.stats().bytes_held == 0


def test_a_closed_pool_ignores_pressure(pressure, memory, clock, caplog):
    pool = BufferPool(pressure=pressure)
    fill(pool)
    pool.close()
    memory.free = 10
    clock.advance(1)
    pressure.level(CPU)
    assert caplog.text == ""
