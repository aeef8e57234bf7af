"""Messages between processes: their layout in memory, bounded queues, and threads that send and receive.

One thread sends and another receives while the main one computes: gloo's operations block.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dni_rnn.distributed.processes import reaching
from dni_rnn.errors import LostError

MESSAGE, GRADIENT, GATHER, SAVE, END = range(5)
"""Kinds of packets: a message, its gradient, or an order that all parts carry out and acknowledge."""

NOTES = 3
"""Numbers sent with a packet."""


class Packet(NamedTuple):
    """One transmission between two parts.

    Attributes:
      kind: one of the above.
      number: number of the message; a gradient has that of its message.
      tensors: its tensors; none for an order.
      notes: `NOTES` numbers.
      sent: time of sending, in seconds of this machine's monotonic clock.
    """

    kind: int
    number: int
    tensors: Sequence[Tensor] = ()
    notes: tuple[float, ...] = (0.0,) * NOTES
    sent: float = 0.0


class PacketLayout:
    """Layout of packets with tensors of fixed shapes in one buffer of bytes.

    Args:
      examples: tensors of the shapes and types of all packets of a link.
    """

    def __init__(self, examples: Sequence[Tensor]) -> None:
        self._shapes = [(t.shape, t.dtype, t.numel() * t.element_size()) for t in examples]
        self._header = 8 * (3 + NOTES)
        # Each tensor starts at a multiple of eight bytes, so that it can be viewed as any type.
        self.bytes = self._header + sum(-(-size // 8) * 8 for _, _, size in self._shapes)

    def pack(self, packet: Packet) -> Tensor:
        """The packet as bytes, in host memory."""
        buffer = torch.zeros(self.bytes, dtype=torch.uint8)
        header = [packet.kind, packet.number, packet.sent, *packet.notes]
        buffer[: self._header].view(torch.float64).copy_(torch.tensor(header, dtype=torch.float64))
        if packet.tensors:
            for space, tensor in zip(self._spaces(buffer), packet.tensors, strict=True):
                space.copy_(tensor)
        return buffer

    def unpack(self, buffer: Tensor) -> Packet:
        """The packet back from `pack`; its tensors share the memory of `buffer`."""
        kind, number, sent, *notes = buffer[: self._header].view(torch.float64).tolist()
        tensors = self._spaces(buffer) if kind in (MESSAGE, GRADIENT) else []
        return Packet(int(kind), int(number), tensors, tuple(notes), sent)

    def _spaces(self, buffer: Tensor) -> list[Tensor]:
        spaces, start = [], self._header
        for shape, dtype, size in self._shapes:
            spaces.append(buffer[start : start + size].view(dtype).view(shape))
            start += -(-size // 8) * 8
        return spaces


class Mailbox:
    """A queue between two threads that holds at most `capacity` messages: a further one drops the oldest.

    Orders are never dropped and do not count. With no more than `capacity` messages in flight none is lost.

    Args:
      changed: notified of every packet. Mailboxes that share it can be waited for together.
    """

    def __init__(self, capacity: int, changed: threading.Condition | None = None) -> None:
        self.capacity = capacity
        self._packets: deque[Packet] = deque()
        self._lost: LostError | None = None
        self._changed = changed or threading.Condition()

    def put(self, packet: Packet) -> None:
        """Add a packet at the end.

        Raises:
          LostError: the other side is gone.
        """
        with self._changed:
            if self._lost:
                raise self._lost
            self._packets.append(packet)
            messages = [place for place, p in enumerate(self._packets) if p.kind in (MESSAGE, GRADIENT)]
            if len(messages) > self.capacity:
                del self._packets[messages[0]]
            self._changed.notify()

    def take(self, timeout: float | None, *others: Mailbox) -> Packet | None:
        """The oldest packet, or None when none comes within `timeout` seconds.

        Args:
          others: mailboxes that share `changed`; None is also returned as soon as one of them, but not this
            one, has a packet for `poll`.

        Raises:
          LostError: the other side is gone.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._packets or self._lost or any(other._pollable for other in others), timeout
            )
            if self._packets:
                return self._packets.popleft()
            if self._lost:
                raise self._lost
            return None

    def poll(self) -> Packet | None:
        """The oldest packet, if there is one now and it is not an order; `take` returns orders."""
        with self._changed:
            return self._packets.popleft() if self._pollable else None

    @property
    def _pollable(self) -> bool:
        return bool(self._packets) and self._packets[0].kind in (MESSAGE, GRADIENT)

    def fail(self, lost: LostError) -> None:
        """Mark the other side as gone."""
        with self._changed:
            self._lost = lost
            self._changed.notify()


class _Link:
    """One direction between this process and a neighbour, served by a thread until an `END` has passed.

    Args:
      peer: rank of the neighbour.
      layout: layout of all packets.
      capacity: capacity of the mailbox.
      group: the process group of all links in this direction.
      changed: see `Mailbox`.
    """

    def __init__(
        self,
        peer: int,
        layout: PacketLayout,
        capacity: int,
        group: dist.ProcessGroup,
        changed: threading.Condition | None = None,
    ) -> None:
        self.peer, self.layout, self.group = peer, layout, group
        self.box = Mailbox(capacity, changed)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the `END` has passed."""
        self._thread.join()

    def _run(self) -> None:
        try:
            with reaching(f"process {self.peer}"):
                while not self._carry():
                    pass
        except LostError as lost:
            self.box.fail(lost)

    def _carry(self) -> bool:
        """Transfer one packet. Whether it was the last."""
        raise NotImplementedError


class Outgoing(_Link):
    """A link to a neighbour: `put` returns at once."""

    def put(self, packet: Packet) -> None:
        self.box.put(packet._replace(sent=time.monotonic()))

    def _carry(self) -> bool:
        packet = self.box.take(None)
        assert packet is not None
        dist.send(self.layout.pack(packet), self.peer, group=self.group)
        return packet.kind == END


class Incoming(_Link):
    """A link from a neighbour: `take` returns what has arrived.

    Args:
      delay: minimum seconds from `put` there to `take` here, to simulate a slow network.
    """

    def __init__(
        self,
        peer: int,
        layout: PacketLayout,
        capacity: int,
        group: dist.ProcessGroup,
        delay: float = 0.0,
        changed: threading.Condition | None = None,
    ) -> None:
        self.delay = delay
        super().__init__(peer, layout, capacity, group, changed)

    def take(self, timeout: float | None, *others: Incoming) -> Packet | None:
        return self.box.take(timeout, *[other.box for other in others])

    def poll(self) -> Packet | None:
        return self.box.poll()

    def _carry(self) -> bool:
        buffer = torch.empty(self.layout.bytes, dtype=torch.uint8)
        dist.recv(buffer, self.peer, group=self.group)
        packet = self.layout.unpack(buffer)
        if self.delay:
            time.sleep(max(0.0, packet.sent + self.delay - time.monotonic()))
        self.box.put(packet)
        return packet.kind == END
