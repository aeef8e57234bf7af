"""Standard output and standard error that never end a command."""

from __future__ import annotations

import errno
import io
import os
import sys


class Output(io.TextIOWrapper):
    """A standard stream on which writing never fails.

    Characters that its encoding lacks are replaced. If its reader is gone or its disk is full, the rest is
    discarded and the command goes on: training must not end with the pager of its output.
    """

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())
        os.close(nothing)
        if error.errno not in (errno.EPIPE, errno.EINVAL) and self is sys.stdout:
            print(f"dni-rnn: output is lost ({error.strerror})", file=sys.stderr)


def never_fail() -> None:
    """Replace standard output and standard error of this process by an `Output`.

    Standard streams that were closed at the start are opened on the null device: else the next file to be
    opened gets their number, and whatever torch's own code prints would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # may be None, or another type under a debugger
            how = {"encoding": stream.encoding, "line_buffering": stream.line_buffering}
            stream.flush()
            made = Output(stream.detach(), errors="replace", write_through=stream.write_through, **how)
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)
