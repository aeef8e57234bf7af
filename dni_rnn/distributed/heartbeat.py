"""Signs of life of the processes that train together, and requests to stop."""

from __future__ import annotations

import signal
import time

from dni_rnn.distributed.processes import Processes, reaching
from dni_rnn.errors import LostError

BEAT_SECONDS = 1.0
"""Between two signs of life."""

STOP = "stop"
STARTER = "what started the processes"


class Heartbeat:
    """Says that this process is alive, and finds out which one is not.

    Whoever waits says so too: a process that hangs is the one that says nothing, and not the one that
    waits for it.

    Args:
      timeout: seconds without a sign of life after which a process counts as hanging.
    """

    def __init__(self, processes: Processes, timeout: float) -> None:
        self.processes, self.timeout = processes, timeout
        self._next = 0.0
        self.beat()

    def beat(self) -> None:
        """Give a sign of life, if it is time for one.

        Raises:
          LostError: whoever started the processes is gone.
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
        """For a process that has been waiting: who hangs?

        Raises:
          LostError: a process gave no sign of life in time.
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
        """Let process 0 stop all, as if it had got the signal itself."""
        with reaching(STARTER):
            self.processes.store.set(STOP, str(signal_number))
