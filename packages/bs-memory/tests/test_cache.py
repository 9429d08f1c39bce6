"""DeviceCache: bounds, hot keys, single flight, threads."""

import copy
import pickle
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch._subclasses.fake_tensor import FakeTensorMode

from bs_memory import DeviceCache


def new_cache(**options):
    return DeviceCache(**{"pressure": None, **options})


def sized(**options):
    """A cache in which an integer value weighs itself."""
    return new_cache(size_of=lambda value: value, **options)


def never():
    raise AssertionError("built again")


# --------------------------------------------------------------------------- the basics


def test_a_value_is_built_once():
    cache = new_cache()
    value = cache.get_or_build("key", object)
    assert cache.get_or_build("key", never) is value
    assert cache.get("key") is value
    assert "key" in cache
    assert len(cache) == 1


def test_none_is_a_value():
    cache = new_cache()
    assert cache.get_or_build("key", lambda: None) is None
    assert cache.get_or_build("key", never) is None


def test_get_of_a_missing_key_gives_the_default():
    cache = new_cache()
    assert cache.get("key") is None
    assert cache.get("key", 3) == 3
    assert "key" not in cache


def test_put_replaces():
    cache = sized()
    cache.put("key", 3)
    cache.put("key", 5)
    assert (cache.get("key"), len(cache), cache.stats().bytes_held) == (5, 1, 5)


def test_a_failed_build_leaves_nothing_and_may_be_tried_again():
    cache = new_cache()
    with pytest.raises(ZeroDivisionError):
        cache.get_or_build("key", lambda: 1 / 0)
    assert len(cache) == 0
    assert cache.get_or_build("key", lambda: 2) == 2
    assert cache.stats().failures == 1


def test_a_build_may_use_the_cache_for_other_keys():
    cache = new_cache()
    assert cache.get_or_build("a", lambda: cache.get_or_build("b", lambda: 1) + 1) == 2
    assert len(cache) == 2


def test_a_build_that_needs_itself_is_an_error():
    cache = new_cache()
    with pytest.raises(RuntimeError, match="circle at 'a'"):
        cache.get_or_build("a", lambda: cache.get_or_build("b", lambda: cache.get_or_build("a", never)))
    assert cache.get_or_build("a", lambda: 1) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_builds_carry_no_history_and_serve_training(grad):
    cache = new_cache()
    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode(not grad):
        value = cache.get_or_build("key", lambda: weight * 2)
    assert not value.requires_grad
    assert not value.is_inference()
    (weight * value).sum().backward()


def test_fake_values_are_not_kept():
    cache = new_cache()
    with FakeTensorMode():
        fake = cache.get_or_build("key", lambda: [torch.ones(3)])
        with pytest.raises(TypeError, match="expected real tensors"):
            cache.put("key", fake)
    assert type(fake[0]) is not torch.Tensor
    assert "key" not in cache
    assert type(cache.get_or_build("key", lambda: torch.ones(3))) is torch.Tensor


def test_copies_of_a_cache_are_the_cache():
    cache = new_cache(max_entries=3)
    cache.put("key", 1)
    assert copy.deepcopy([cache])[0] is copy.copy(cache) is cache
    twin = pickle.loads(pickle.dumps(cache))
    assert (len(twin), twin._options) == (0, cache._options)


def test_statistics_count_every_look_up():
    cache = sized(max_bytes=10)
    cache.get_or_build("a", lambda: 4)
    cache.get_or_build("a", never)
    cache.get("b")
    cache.get_or_build("big", lambda: 11)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.promotions, stats.oversize) == (1, 3, 1, 1)
    assert (stats.entries, stats.bytes_held, stats.high_water_bytes, stats.evictions) == (1, 4, 4, 0)
    assert repr(cache) == "DeviceCache(1 entries, 4 bytes, max_bytes=10, max_entries=None)"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_bytes": 0}, ValueError, "max_bytes: .*got 0"),
        ({"max_entries": -1}, ValueError, "max_entries: .*got -1"),
        ({"max_entries": 1.5}, TypeError, "max_entries: .*got float"),
        ({"weak_keys": 1}, TypeError, "weak_keys: expected a bool, got int"),
        ({"size_of": 8}, TypeError, "size_of: expected a callable, got int"),
        ({"pressure": 3}, TypeError, "pressure: .*got 3"),
    ],
)
def test_bad_caches_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        DeviceCache(**options)


def test_bad_arguments_are_named():
    cache = new_cache()
    with pytest.raises(TypeError, match="key: expected something hashable, got list"):
        cache.get_or_build([], never)
    with pytest.raises(ValueError, match="device: "):
        cache.get_or_build("key", never, device="nowhere")
    with pytest.raises(ValueError, match="target_bytes: "):
        cache.trim(-1)


# --------------------------------------------------------------------------- bounds and hot keys


def test_the_least_recently_used_goes_first():
    cache = sized(max_entries=3)
    for key in "abc":
        cache.put(key, 1)
    for key in "abc":
        cache.get(key)
    cache.put("d", 1)
    assert [key for key in "abcd" if key in cache] == ["b", "c", "d"]


def test_a_hot_key_survives_a_flood_of_keys_used_once():
    cache = sized(max_entries=10)
    for hot in range(8):
        cache.put(("hot", hot), 1)
        cache.get(("hot", hot))
    for cold in range(1000):
        cache.put(cold, 1)
    assert all(("hot", hot) in cache for hot in range(8))
    assert len(cache) == 10


def test_hot_keys_cannot_lock_newcomers_out():
    cache = sized(max_entries=10)
    for key in range(10):
        cache.put(key, 1)
        cache.get(key)
    cache.put("new", 1)
    assert "new" in cache


def test_the_byte_bound_holds():
    cache = sized(max_bytes=10)
    for key, size in enumerate([4, 4, 4, 9, 1]):
        cache.put(key, size)
    assert [key for key in range(5) if key in cache] == [3, 4]
    assert cache.stats().high_water_bytes <= 10


def test_one_large_hot_value_does_not_push_the_other_hot_ones_out():
    cache = sized(max_bytes=100)
    cache.put("small", 5)
    cache.get("small")
    cache.put("large", 90)
    cache.get("large")
    cache.put("other", 50)
    assert "small" in cache
    assert "large" not in cache


def test_trim_takes_probation_before_protected():
    cache = sized()
    cache.put("hot", 3)
    cache.get("hot")
    cache.put("cold", 4)
    assert cache.trim(3) == 4
    assert "hot" in cache
    assert cache.clear() == 3
    assert len(cache) == 0


class CacheMachine(RuleBasedStateMachine):
    """Against an exact model of a segmented LRU."""

    keys = st.integers(0, 7)

    @initialize(max_entries=st.sampled_from([None, 1, 2, 5]), max_bytes=st.sampled_from([None, 10, 25]))
    def start(self, max_entries, max_bytes):
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.cache = sized(max_entries=max_entries, max_bytes=max_bytes)
        self.probation, self.protected = OrderedDict(), OrderedDict()
        self.lookups = 0

    def held(self):
        return {**self.probation, **self.protected}

    def over(self, segment, share):
        entries = None if self.max_entries is None else int(share * self.max_entries)
        nbytes = None if self.max_bytes is None else int(share * self.max_bytes)
        return (entries is not None and len(segment) > entries) or (
            nbytes is not None and sum(segment.values()) > nbytes
        )

    def model_hit(self, key):
        if key in self.protected:
            self.protected.move_to_end(key)
            return
        self.probation.move_to_end(key)
        if self.over({key: self.probation[key]}, 0.8):
            return
        self.protected[key] = self.probation.pop(key)
        while self.over(self.protected, 0.8):
            coldest, size = self.protected.popitem(last=False)
            self.probation[coldest] = size

    @rule(key=keys, size=st.integers(1, 12))
    def look_up(self, key, size):
        self.lookups += 1
        held = self.held()
        value = self.cache.get_or_build(key, lambda: size)
        if key in held:
            assert value == held[key]
            self.model_hit(key)
            return
        assert value == size
        if self.max_bytes is not None and size > self.max_bytes:
            return
        self.probation[key] = size
        while self.over(self.held(), 1):
            (self.probation if len(self.probation) > 1 else self.protected).popitem(last=False)

    @rule(key=keys)
    def invalidate(self, key):
        assert self.cache.invalidate(key) == (key in self.held())
        self.probation.pop(key, None)
        self.protected.pop(key, None)

    @rule()
    def clear(self):
        assert self.cache.clear() == sum(self.held().values())
        self.probation.clear()
        self.protected.clear()

    @invariant()
    def holds_exactly_what_the_model_holds(self):
        if not hasattr(self, "cache"):
            return
        held = self.held()
        assert {key for key in range(8) if key in self.cache} == set(held)
        stats = self.cache.stats()
        assert (stats.entries, stats.bytes_held) == (len(held), sum(held.values()))
        assert stats.hits + stats.misses == self.lookups
        assert [key for key, _ in self.cache._segments.probation] == list(self.probation)
        assert [key for key, _ in self.cache._segments.protected] == list(self.protected)


TestCacheMachine = CacheMachine.TestCase


# --------------------------------------------------------------------------- single flight


def test_threads_that_miss_build_once():
    cache = new_cache()
    count, builds = 8, []
    gate = threading.Barrier(count)
    building, waiting = threading.Event(), threading.Event()

    def build():
        builds.append(1)
        building.set()
        assert waiting.wait(60)
        return object()

    def ask(_):
        gate.wait()
        return cache.get_or_build("key", build)

    with ThreadPoolExecutor(count) as threads:
        results = threads.map(ask, range(count))
        assert building.wait(60)
        while cache.stats().waits < count - 1:
            pass
        waiting.set()
        assert len(set(map(id, results))) == 1
    assert len(builds) == 1
    stats = cache.stats()
    assert (stats.misses, stats.waits, stats.hits) == (1, count - 1, 0)


def test_another_key_is_not_held_up():
    cache = new_cache()
    with ThreadPoolExecutor(1) as threads:
        inside, leave = threading.Event(), threading.Event()

        def build():
            inside.set()
            assert leave.wait(60)
            return "slow"

        slow = threads.submit(cache.get_or_build, "slow", build)
        assert inside.wait(60)
        assert cache.get_or_build("fast", lambda: "fast") == "fast"
        leave.set()
        assert slow.result() == "slow"


def test_after_a_failed_build_a_waiting_thread_builds_for_itself():
    cache = new_cache()
    inside, leave = threading.Event(), threading.Event()

    def fail():
        inside.set()
        assert leave.wait(60)
        raise KeyError("first")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get_or_build, "key", fail)
        assert inside.wait(60)
        second = threads.submit(cache.get_or_build, "key", lambda: "second")
        while cache.stats().waits < 1:
            pass
        leave.set()
        with pytest.raises(KeyError, match="first"):
            first.result()
        assert second.result() == "second"


@pytest.mark.parametrize("how", ["invalidate", "clear", "put"])
def test_what_is_forgotten_during_its_build_is_not_kept(how):
    cache = new_cache()

    def build():
        {"invalidate": lambda: cache.invalidate("key"), "clear": cache.clear, "put": lambda: cache.put("key", "put")}[
            how
        ]()
        return "stale"

    assert cache.get_or_build("key", build) == "stale"
    assert cache.get("key") == ("put" if how == "put" else None)


def test_two_threads_that_need_each_other_are_told():
    one, two = new_cache(), new_cache()  # across caches, too
    gate = threading.Barrier(2)

    def ask(first, second):
        def build():
            gate.wait()
            return second.get_or_build("key", never_reached)

        def never_reached():
            raise AssertionError

        return first.get_or_build("key", build)

    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(ask, one, two), threads.submit(ask, two, one)]
        errors = [result.exception(60) for result in results]
    assert any(isinstance(error, RuntimeError) and "circle" in str(error) for error in errors)


def test_hammering_keeps_the_books():
    cache = sized(max_entries=5, max_bytes=40)

    def hammer(index):
        for round_ in range(400):
            key = (index * 7 + round_ * 3) % 11
            assert cache.get_or_build(key, lambda key=key: key + 1) == key + 1
            if round_ % 17 == 0:
                cache.invalidate(key)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hammer, range(8)))
    stats = cache.stats()
    assert stats.bytes_held == sum(entry.nbytes for _, entry in cache._segments.coldest_first())
    assert stats.entries <= 5
    assert stats.high_water_bytes <= 40
    assert not cache._flights
