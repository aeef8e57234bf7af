"""Learning from a stream that is read only once: standard input, a sensor, a log.

Training lags behind the newest symbol by as many symbols as the synthesizer is conditioned on (`--lag`).
Memory is constant: learnt symbols are discarded.
"""

from __future__ import annotations

import math
import os
import queue
import select
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dni_rnn.data.task import Data
from dni_rnn.errors import UsageError
from dni_rnn.metrics import BPC
from dni_rnn.training.learner import BITS
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn.window import Boundary, Window

if TYPE_CHECKING:
    from dni_rnn_tasks.live import LiveConfig

WAIT_SECONDS = 0.2
"""How long training waits for symbols before it checks whether to stop."""

READ_BYTES = 1 << 16


class Source(Protocol):
    """A source of symbols."""

    def read(self, seconds: float) -> np.ndarray | None:
        """The symbols that have arrived, after waiting up to `seconds` for the first; None at the end."""
        ...


class StandardInput:
    """The bytes of a file descriptor, by default standard input."""

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor

    def read(self, seconds: float) -> np.ndarray | None:
        try:
            data = self._read(seconds)
        except (OSError, ValueError) as error:
            raise UsageError(f"standard input cannot be read ({error}); pipe a stream into it") from None
        if data == b"":
            return None
        return np.frombuffer(data or b"", dtype=np.uint8)

    def _read(self, seconds: float) -> bytes | None:
        """The bytes that have arrived, empty at the end; None while there are none."""
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        return os.read(self._descriptor, READ_BYTES) if ready else None


class ThreadedInput(StandardInput):
    """The same where `select` supports only sockets, as on Windows: a thread waits for the next piece.

    It reads on request, one piece at a time, so nothing is taken from the stream that training did not
    request.
    """

    def __init__(self, descriptor: int = 0) -> None:
        super().__init__(descriptor)
        self._pieces: queue.SimpleQueue[bytes | OSError] = queue.SimpleQueue()
        self._asked = False
        if sys.platform == "win32":  # otherwise line ends would be translated
            import msvcrt

            msvcrt.setmode(descriptor, os.O_BINARY)

    def _read(self, seconds: float) -> bytes | None:
        if not self._asked:
            self._asked = True
            threading.Thread(target=self._wait, daemon=True).start()
        try:
            piece = self._pieces.get(timeout=seconds)
        except queue.Empty:
            return None
        self._asked = False
        if isinstance(piece, OSError):
            raise piece
        return piece

    def _wait(self) -> None:
        try:
            self._pieces.put(os.read(self._descriptor, READ_BYTES))
        except OSError as error:
            self._pieces.put(error)


def standard_input() -> StandardInput:
    """Standard input of this process, in the form that suits the system."""
    return ThreadedInput() if sys.platform == "win32" else StandardInput()


class LiveStream:
    """Windows of B rows over a source that is read once.

    With one row, the row is the source. Otherwise the source is distributed in turns: of each B·L symbols,
    row b gets L consecutive ones, after its previous ones. The target of a symbol is the one after it in the
    source. Between two segments of a row, every L steps, symbols went to other rows.

    The context at a boundary before input t is inputs t, t + 1, ..., t + W − 1 of the row, −1 past the end.
    So a window is returned once the W symbols after it have arrived. It may be shorter at the end of the
    source, where at most B symbols are not used.

    Args:
      source: source of symbols.
      batch_size: B.
      stretch: L.
    """

    curriculum = None
    size = 0

    def __init__(self, source: Source, batch_size: int, stretch: int) -> None:
        self.batch_size, self.stretch, self.closed = batch_size, stretch, False
        self._source, self._device = source, torch.device("cpu")
        self._dealt = torch.zeros(2, 0, batch_size, dtype=torch.long)  # inputs and targets by time
        self._coming = np.zeros(0, dtype=np.int64)  # read, not yet distributed

    def to(self, device: torch.device) -> LiveStream:
        self._device, self._dealt = device, self._dealt.to(device)
        return self

    def ready(self, steps: int, context: int, seconds: float) -> bool:
        """Whether `window` has `steps` steps, or the last ones; waits for them up to `seconds`."""
        until, needed = time.monotonic() + seconds, steps + max(context, 1)
        while not self.closed and self._dealt.shape[1] < needed:
            come = self._source.read(max(until - time.monotonic(), 0.0))
            if come is None:
                self.closed = True
            else:
                self._coming = np.concatenate([self._coming, come.astype(np.int64)])
            self._deal()
            if time.monotonic() >= until:
                break
        return self._dealt.shape[1] >= (1 if self.closed else needed)

    @property
    def ended(self) -> bool:
        """Whether the source has ended and all of it was returned."""
        return self.closed and not self._dealt.shape[1]

    def _deal(self) -> None:
        rows = self.batch_size
        while True:
            whole = len(self._coming) - 1
            length = whole // rows
            if rows > 1:
                length = min(length, self.stretch) if self.closed else self.stretch
            if length < 1 or rows * length > whole:
                return
            pair = np.stack([self._coming[: rows * length], self._coming[1 : rows * length + 1]])
            stretch = torch.from_numpy(pair.reshape(2, rows, length).transpose(0, 2, 1).copy())
            self._dealt = torch.cat([self._dealt, stretch.to(self._device)], dim=1)
            self._coming = self._coming[rows * length :]

    def window(self, steps: int, context: int) -> Window:
        """The next window; call `ready` first."""
        steps = min(steps, self._dealt.shape[1])
        inputs, targets = self._dealt[:, :steps]
        start, end = self._boundary(0, context), self._boundary(steps, context)
        self._dealt = self._dealt[:, steps:]
        return Window(inputs, targets, start, end, inputs.numel())

    def _boundary(self, position: int, context: int) -> Boundary:
        following = self._dealt[0, position : position + max(context, 1)]
        done = None if len(following) else torch.ones(self.batch_size, dtype=torch.bool, device=self._device)
        if not context:
            return Boundary(None, done)
        padding = following.new_full((context - len(following), self.batch_size), -1)
        return Boundary(torch.cat([following, padding]), done)

    def state_dict(self) -> dict[str, Any]:
        """The symbols that were read and not yet learnt."""
        return {"dealt": self._dealt.tolist(), "coming": self._coming.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore these symbols; those of the source follow."""
        self._dealt = torch.tensor(state["dealt"], dtype=torch.long, device=self._device)
        self._dealt = self._dealt.reshape(2, -1, self.batch_size)
        self._coming = np.array(state["coming"], dtype=np.int64)


class LiveLearner(RecurrentLearner):
    """Trains a recurrent model on a stream as it arrives.

    Every symbol is predicted before it is learnt, so the training loss is that of unseen text: "validation"
    is its mean since the previous one, "test" its mean over the whole stream (progressive validation). The
    last weights are kept.

    Source: Dawid 1984, "Present position and potential developments: the prequential approach".
    """

    keeps_best = False
    stream: LiveStream

    def __init__(self, config: LiveConfig, data: Data, device: torch.device) -> None:
        super().__init__(config, data, device)
        self.one_pass = math.inf
        # Nats and symbols, since the last validation and over all.
        self.recent, self.whole = torch.zeros(2, 2, dtype=torch.float64, device=device)

    def ready(self) -> bool:
        steps = self.config.bptt * self.config.accumulate
        return self.stream.ready(steps, self.config.context_window, WAIT_SECONDS)

    @property
    def ended(self) -> bool:
        return self.stream.ended

    def update(self) -> None:
        scored = self.counters.scored
        super().update()
        heard = torch.stack([self.window_loss.double(), self.whole.new_tensor(self.counters.scored - scored)])
        self.recent, self.whole = self.recent + heard, self.whole + heard

    def evaluate(self, split: str, level: int | None) -> dict[str, float]:
        """Bits per symbol since the last validation ("valid"), or since the beginning ("test")."""
        nats, symbols = (self.recent if split == "valid" and self.recent[1] else self.whole).tolist()
        if not symbols:
            raise UsageError("the stream ended before there was one window to learn; send more symbols")
        if split == "valid":
            self.recent = torch.zeros_like(self.recent)
        return {BPC.key: nats * BITS / symbols}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state_dict()
        return tensors | {"recent": self.recent, "whole": self.whole}, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        self.recent, self.whole = tensors["recent"].to(self.device), tensors["whole"].to(self.device)
