"""The errors a user of the trainer can cause or meet; the command prints them as one line."""


class InputError(ValueError):
    """Something given (data, config, run folder, checkpoint) cannot be used: exit status 2."""


class RunError(RuntimeError):
    """Training cannot go on (NaN loss, a full disk): exit status 1."""


class NotFinite(RunError):
    """The loss is NaN or infinite; on every process of a team alike."""


class Interruption(Exception):
    """Stopped by a signal after saving.

    Attributes:
        status: Exit status: 128 + the signal's number.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
