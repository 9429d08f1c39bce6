"""What tests of this package, and of code that uses it, share: fakes, a model, strategies, memory limits."""

from bs_memory.testing._fakes import FakeClock, FakeMemory, FakeStreams
from bs_memory.testing._limits import limited_memory
from bs_memory.testing._model import PoolModel
from bs_memory.testing._strategies import dtypes, shapes

__all__ = ["FakeClock", "FakeMemory", "FakeStreams", "PoolModel", "dtypes", "limited_memory", "shapes"]
