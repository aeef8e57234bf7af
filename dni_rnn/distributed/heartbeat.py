"""Heartbeats of the processes that train together, and requests to stop."""

from __future__ import annotations

import signal
import time

from dni_rnn.distributed.processes import Processes, reaching
from dni_rnn.errors import LostError

BEAT_SECONDS = 1.0
"""Between two heartbeats."""

STOP = "stop"
STARTER = "the parent process"


class Heartbeat:
    """Reports that this process is alive, and finds the process that is not.

    A waiting process gives heartbeats too, so that the silent one is the one that hangs.

    Args:
      timeout: seconds without a heartbeat after which a process counts as hanging.
    """

    def __init__(self, processes: Processes, timeout: float) -> None:
        self.processes, self.timeout = processes, timeout
        self._next = 0.0
        self.beat()

    def beat(self) -> None:
        """Give a heartbeat, if it is time for one.

        Raises:
          LostError: the parent process is gone.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + BEAT_SECONDS
        with reaching(STARTER):
            self.processes.store.set(f"alive{self.processes.rank}", repr(time.time()))
            if self.processes.rank == 0 and self.processes.store.check([STOP]):
                signal.raise_signal(int(self.processes.store.get(STOP)))

    def check(self) -> None:
        """Check, in a process that waits, whether another one hangs.

        Raises:
          LostError: a process gave no heartbeat in time.
        """
        store, now = self.processes.store, time.time()
        with reaching(STARTER):
            known = [rank for rank in range(self.processes.size) if store.check([f"alive{rank}"])]
            silent = {rank: now - float(store.get(f"alive{rank}")) for rank in known}
        rank = max(silent, key=lambda rank: silent[rank])
        if silent[rank] > self.timeout:
            raise LostError(
                f"process {rank} hangs: no sign of life for {silent[rank]:.0f} s (--timeout {self.timeout:g})"
            )

    def ask_to_stop(self, signal_number: int) -> None:
        """Ask process 0 to stop all processes, as if it had received the signal itself."""
        with reaching(STARTER):
            self.processes.store.set(STOP, str(signal_number))
