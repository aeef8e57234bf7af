"""The ways a command fails on purpose. Everything else is a bug and keeps its traceback."""

import errno

ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
ACCESS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip


def of_files(error: OSError) -> str | None:
    """The message for a file that cannot be read or written; None for any other error."""
    if error.errno not in (*ROOM, *ACCESS):
        return None
    file = "" if error.filename is None else f"{error.filename}: "
    if error.errno in ROOM:
        return f"{file}cannot be written ({error.strerror}); make room and give the same command again"
    return f"{file}cannot be read or written ({error.strerror})"


class UsageError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. Exit code 2."""


class DivergedError(Exception):
    """Training diverged; the message names update, cause and last good checkpoint. Exit code 3."""


class ReportedElsewhere(UsageError):  # noqa: N818
    """A `UsageError` that another process prints. Exit code 2."""


class LostError(Exception):
    """Another process of this training run died or hangs. Exit code 1."""
