"""One update as a recording: on a GPU, a small core waits for its host, which a CUDA graph does not need."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]

WARM_UP = 3
"""Calls before a recording: optimizers and libraries allocate what they keep."""

MOST = 32
"""Recordings; each holds memory. Windows of episodes come in many shapes."""


def cuda_graph(work: Work) -> Work:
    """Record what `work` asks of the current device, without doing it; the result does it, as one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Recorded:
    """`function(*tensors)`, done by a recording of it once it has been called with such tensors before.

    There is one recording per signature: which arguments are given, their shapes and dtypes. Python runs
    when it is made and never again. So `function` returns nothing and reads the host's variables as they are
    then; what it keeps from call to call are tensors that it changes in place; and it waits for no
    value from the device (`float`, `if`, `nonzero`).

    A function that cannot be recorded is called as it is, with a line on standard error.

    Args:
      function: of tensors, or None where there is nothing.
      record: makes a recording of its argument, a function of nothing.
    """

    def __init__(self, function: Callable[..., object], record: Callable[[Work], Work] = cuda_graph) -> None:
        self._function, self._record = function, record
        self._calls: dict[Any, int] = {}
        self._most = MOST
        self._recordings: dict[Any, tuple[list[Tensor], Work]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        signature = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
        if signature not in self._recordings and not self._make(signature, tensors):
            self._function(*tensors)
            return
        given = [t for t in tensors if t is not None]
        places, replay = self._recordings[signature]
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        replay()

    def _make(self, signature: Any, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether there is a recording now."""
        calls = self._calls.get(signature, 0)
        if calls < WARM_UP or len(self._recordings) == self._most:
            self._calls[signature] = calls + 1
            return False
        fixed = [None if t is None else t.clone() for t in tensors]
        try:
            replay = self._record(lambda: self._function(*fixed))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(f"dni-rnn: updates are not recorded as a CUDA graph: {reason}", file=sys.stderr)
            self._most = len(self._recordings)
            return False
        self._recordings[signature] = ([t for t in fixed if t is not None], replay)
        return True
