"""One pool of real processes for all tests whose modules talk."""

import pytest

from bs_comm.testing import RankPool


@pytest.fixture(scope="session")
def ranks():
    with RankPool(4) as pool:
        yield pool
