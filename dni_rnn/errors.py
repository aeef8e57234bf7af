"""The two ways a command fails on purpose. Everything else is a bug and keeps its traceback."""


class UsageError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. Exit code 2."""


class DivergedError(Exception):
    """Training ran away: the step, the cause and the last good checkpoint. Exit code 3."""


class ReportedElsewhere(UsageError):  # noqa: N818
    """The same, in a process that leaves it to another one to say so. Exit code 2."""


class LostError(Exception):
    """A process that trains with this one has died or hangs. Exit code 1."""
