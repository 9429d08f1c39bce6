"""Buffer pool, caches, memory pressure and out-of-memory recovery for torch."""

from bs_memory._buckets import bucket_bytes
from bs_memory._cache import CacheStats, DeviceCache
from bs_memory._errors import LeaseError, PoolBudgetError, PoolClosedError, RecoveryError
from bs_memory._lease import Lease
from bs_memory._oom import is_oom_error
from bs_memory._pool import BufferPool, default_pool
from bs_memory._pressure import MemoryPressure, PressureLevel, default_pressure
from bs_memory._readings import MemoryReading, read_memory
from bs_memory._reclaim import free_memory
from bs_memory._recovery import Approximation, oom_recovery
from bs_memory._report import RecoveryReport, RecoveryStep
from bs_memory._stats import PoolStats

__version__ = "0.1.0"

__all__ = [
    "Approximation",
    "BufferPool",
    "CacheStats",
    "DeviceCache",
    "Lease",
    "LeaseError",
    "MemoryPressure",
    "MemoryReading",
    "PoolBudgetError",
    "PoolClosedError",
    "PoolStats",
    "PressureLevel",
    "RecoveryError",
    "RecoveryReport",
    "RecoveryStep",
    "__version__",
    "bucket_bytes",
    "default_pool",
    "default_pressure",
    "free_memory",
    "is_oom_error",
    "oom_recovery",
    "read_memory",
]
