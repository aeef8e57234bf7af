"""What started this process: a sweep its runs, a launcher its processes. Without it they end."""

from __future__ import annotations

import os
import threading
import time

STARTED_BY = "DNI_RNN_STARTED_BY"
"""Environment variable with the number of the process that starts others, for these."""

LOOK_SECONDS = 0.2


def environment() -> dict[str, str]:
    """For a process that is to end when this one does, however this one ends."""
    return {**os.environ, STARTED_BY: str(os.getpid())}


def end_with_starter() -> None:
    """End this process soon after what started it has died: with `kill -9` that could not say so.

    It ends as by `kill -9` itself, which leaves whole files, so the same command goes on from the last
    checkpoint, and finds nobody at work there. Processes that a shell started are left alone, and so are
    all on Windows, where a process does not learn of it.
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
