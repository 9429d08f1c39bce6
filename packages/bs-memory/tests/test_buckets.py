"""Size buckets: a request always fits, and little is wasted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_memory import bucket_bytes


@given(st.integers(0, 1 << 50))
def test_a_bucket_holds_the_request_and_wastes_at_most_an_eighth(nbytes):
    size = bucket_bytes(nbytes)
    assert size >= max(nbytes, 64)
    assert size % 64 == 0
    assert size - nbytes <= max(64, nbytes / 8)


@given(st.integers(0, 1 << 50))
def test_a_bucket_is_its_own_bucket(nbytes):
    assert bucket_bytes(bucket_bytes(nbytes)) == bucket_bytes(nbytes)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_buckets_grow_with_requests(nbytes, more):
    assert bucket_bytes(nbytes) <= bucket_bytes(nbytes + more)


def test_there_are_eight_buckets_per_doubling():
    assert len({bucket_bytes(nbytes) for nbytes in range((1 << 20) + 1, (2 << 20) + 1, 997)}) == 8


def test_a_request_that_is_no_count_is_an_error():
    with pytest.raises(ValueError, match=r"nbytes: .*got -1"):
        bucket_bytes(-1)
    with pytest.raises(TypeError, match=r"nbytes: .*got float"):
        bucket_bytes(1.5)  # pyright: ignore[reportArgumentType]
