"""One pool of real processes for all tests whose modules talk."""

import os

import pytest

from bs_comm.testing import RankPool


@pytest.fixture(scope="session")
def ranks():
    with RankPool(8 if os.environ.get("BS_SOAK") else 4) as pool:
        yield pool
