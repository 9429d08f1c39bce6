"""What goes wrong in this package, by name."""


class LeaseError(RuntimeError):
    """A lease was used against its contract: read or released twice, or handed to a pool that did not issue it."""


class PoolClosedError(RuntimeError):
    """A closed pool was asked for a buffer, or to free one."""


class PoolBudgetError(MemoryError):
    """A buffer would not fit in the pool's byte budget next to the buffers that are leased now.

    It is a `MemoryError`, so `oom_recovery` meets it the way it meets an allocator that ran out: smaller pieces fit a
    budget too.
    """


class RecoveryError(MemoryError):
    """Every permitted step of `oom_recovery` ran out of memory; the text says what was tried and what would fit.

    Attributes:
        report: the `RecoveryReport` of the steps taken.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report
