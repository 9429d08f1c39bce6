"""One pool of real processes for all tests whose modules talk."""

import os

import pytest

from bs_comm.testing import RankPool


@pytest.fixture(scope="session")
def ranks():
    with RankPool(8 if os.environ.get("BS_SOAK") else 4) as pool:
        pool.run(imported, timeout=300)
        yield pool


def imported(rank, world):
    """What tests need, so that no rank waits out a hop's deadline while another one still imports."""
    import bs_kernels.testing
    import bs_kernels.testing.strategies
    import bs_modules.testing.rings

    return bs_kernels.testing.__name__, bs_modules.__name__
