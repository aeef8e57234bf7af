"""The ways a command fails on purpose. Everything else is a bug and keeps its traceback."""

import errno

ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
ACCESS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip


def of_files(error: OSError) -> str | None:
    """What to tell the user of a file that cannot be read or written; None where it is something else."""
    if error.errno not in (*ROOM, *ACCESS):
        return None
    file = "" if error.filename is None else f"{error.filename}: "
    if error.errno in ROOM:
        return f"{file}cannot be written ({error.strerror}); make room and give the same command again"
    return f"{file}cannot be read or written ({error.strerror})"


class UsageError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. Exit code 2."""


class DivergedError(Exception):
    """Training ran away: the step, the cause and the last good checkpoint. Exit code 3."""


class ReportedElsewhere(UsageError):  # noqa: N818
    """The same, in a process that leaves it to another one to say so. Exit code 2."""


class LostError(Exception):
    """A process that trains with this one has died or hangs. Exit code 1."""
