"""The parent process: runs of a sweep and processes of a launcher end when their parent dies."""

from __future__ import annotations

import os
import threading
import time

STARTED_BY = "DNI_RNN_STARTED_BY"
"""Environment variable with the process id of the parent, for its children."""

LOOK_SECONDS = 0.2


def environment() -> dict[str, str]:
    """The environment of a child process that is to end when this one does, however this one ends."""
    return {**os.environ, STARTED_BY: str(os.getpid())}


def end_with_starter() -> None:
    """End this process soon after its parent has died, even by `kill -9`.

    It ends at once, as by `kill -9`: files stay whole and locks are released, so the same command resumes
    from the last checkpoint. Does nothing for a process started by a shell, nor on Windows, where the death
    of a parent cannot be seen.
    """
    number = os.environ.get(STARTED_BY, "")
    starter = int(number) if number.isascii() and number.isdigit() else None
    if starter is None and "TORCHELASTIC_RUN_ID" in os.environ:
        starter = os.getppid()
    if os.name != "posix" or starter is None:
        return

    def look() -> None:
        while os.getppid() == starter:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=look, name="starter", daemon=True).start()
