"""DeviceCache: values on devices, weak keys, invalidation, what values weigh, pressure."""

import gc
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bs_memory import DeviceCache, MemoryPressure, PressureLevel
from bs_memory.testing import FakeClock, FakeMemory


def new_cache(**options):
    return DeviceCache(**{"pressure": None, **options})


def sized(**options):
    """A cache in which an integer value weighs itself."""
    return new_cache(size_of=lambda value: value, **options)


class Key:
    """Weakly referable, equal to itself only."""


# --------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Plan:
    rows: torch.Tensor
    name: str


def test_devices_have_values_of_their_own():
    cache = new_cache()
    assert cache.get_or_build("key", lambda: 1) == 1
    assert cache.get_or_build("key", lambda: 2, device="cpu") == 2
    assert cache.get_or_build("key", lambda: 3, device="meta") == 3
    assert cache.get("key", device=torch.device("cpu", 0)) == 2
    assert len(cache) == 3


@pytest.mark.parametrize(
    "host",
    [torch.ones(2), {"a": [torch.ones(2)]}, Plan(torch.ones(2), "x"), [Plan(torch.ones(2), "y")]],
    ids=["tensor", "containers", "dataclass", "nested"],
)
def test_a_host_value_is_copied_once_per_device(host):
    cache = new_cache()
    builds = []

    def build():
        builds.append(1)
        return host

    copy = cache.get_or_copy("key", build, device="meta")
    assert cache.get_or_copy("key", build, device="meta") is copy
    assert cache.get_or_copy("key", build, device="cpu") is host
    assert len(builds) == 1
    assert type(copy) is type(host)
    found = []
    while not isinstance(copy, torch.Tensor):
        copy = copy.rows if isinstance(copy, Plan) else next(iter(copy.values() if isinstance(copy, dict) else copy))
        found.append(copy)
    assert copy.device.type == "meta"


def test_a_copy_function_is_used_on_every_device():
    cache = new_cache()
    copy = cache.get_or_copy("key", lambda: np.ones(3), device="cpu", copy=lambda host, _: torch.from_numpy(host))
    assert torch.equal(copy, torch.ones(3, dtype=torch.float64))
    assert isinstance(cache.get("key"), np.ndarray)


def test_what_cannot_be_moved_is_an_error():
    with pytest.raises(TypeError, match="to_device: expected a function, since ndarray"):
        new_cache().get_or_copy("key", lambda: np.ones(3), device="meta")


# --------------------------------------------------------------------------- weak keys, invalidation


def test_a_weak_key_takes_its_values_along():
    cache = new_cache(weak_keys=True)
    key, other = Key(), Key()
    values = [cache.get_or_build(key, lambda: Key(), device=device) for device in (None, "cpu")]
    cache.put(other, 1)
    watches = [weakref.ref(value) for value in values]
    del values, key
    gc.collect()
    assert [watch() for watch in watches] == [None, None]
    assert len(cache) == 1
    assert cache.get(other) == 1


def test_weak_keys_go_by_equality_while_they_live():
    @dataclass(frozen=True)
    class Named:
        name: str

    cache = new_cache(weak_keys=True)
    key = Named("a")
    cache.put(key, 1)
    assert cache.get(Named("a")) == 1
    assert Named("a") in cache


def test_strong_keys_stay():
    cache = new_cache()
    cache.put(Key(), 1)
    gc.collect()
    assert len(cache) == 1


def test_a_key_that_cannot_be_weak_is_an_error():
    with pytest.raises(TypeError, match=r"key: expected something weakly referable .* got int"):
        new_cache(weak_keys=True).put(3, 1)


def test_a_key_that_dies_under_the_lock_is_cleared_later():
    cache = new_cache(weak_keys=True)
    key = Key()
    cache.put(key, 1)
    with cache._lock:
        del key
        gc.collect()
    assert len(cache) == 0


def test_invalidation_reaches_every_device_or_one():
    cache = new_cache()
    for device in (None, "cpu", "meta"):
        cache.put("key", 1, device=device)
    assert cache.invalidate("key", device="cpu") == 1
    assert cache.invalidate("key", device=None) == 1
    assert cache.get("key", device="meta") == 1
    assert cache.invalidate("key") == 1
    assert cache.invalidate("key") == 0


def test_a_finaliser_that_strikes_under_the_lock_may_use_the_cache():
    cache = new_cache(max_entries=2)
    with cache._lock:
        for key in range(4):
            assert cache.get_or_build(key, lambda key=key: key) == key
        cache.invalidate(3)
    assert cache.stats().entries == 1


def test_a_destructor_may_call_the_cache():
    cache = new_cache(max_entries=1)

    class Value:
        def __del__(self):
            cache.get("key")

    cache.put("key", Value())
    cache.put("other", 1)
    assert len(cache) == 1


def test_a_dropped_cache_is_collected():
    cache = DeviceCache()
    cache.put("key", 1)
    watch = weakref.ref(cache)
    del cache
    gc.collect()
    assert watch() is None


# --------------------------------------------------------------------------- footprint


def test_values_weigh_what_their_tensors_keep_alive():
    cache = new_cache()
    base = torch.zeros(1000)
    cache.put("view", [base[:1], base[1:2]])
    assert 4000 <= cache.stats().bytes_held < 4500
    cache.put("view", {"array": np.zeros(500), "sparse": torch.eye(100).to_sparse()})
    sparse = 2 * 100 * 8 + 100 * 4
    assert 4000 + sparse <= cache.stats().bytes_held < 4500 + sparse
    cache.put("view", Plan(torch.zeros(1000, device="meta"), "name"))
    assert cache.stats().bytes_held < 500


# --------------------------------------------------------------------------- pressure


def test_the_cache_shrinks_under_pressure():
    memory = FakeMemory(total=1000)
    pressure = MemoryPressure(reader=memory, clock=FakeClock(), interval=0)
    cache = sized(pressure=pressure)
    for key in range(8):
        cache.put(key, 10)
    memory.free = 100
    assert pressure.level("cpu") is PressureLevel.HIGH
    assert cache.stats().bytes_held == 40
    memory.free = 10
    cache.put("new", 10)
    assert (len(cache), "new" in cache) == (1, True)


def test_a_small_working_set_is_not_rebuilt_for_ever_while_memory_is_scarce():
    memory = FakeMemory(total=1000, free=1000)
    pressure = MemoryPressure(reader=memory, clock=FakeClock(), interval=0)
    cache = sized(pressure=pressure)
    cache.put("large", 80)
    memory.free = 10
    for _ in range(3):
        for key in range(5):
            cache.get_or_build(key, lambda: 2)
    assert cache.stats().misses == 5
