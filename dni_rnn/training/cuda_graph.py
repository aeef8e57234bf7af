"""One update as a recording: on a GPU, a small core waits for its host, which a CUDA graph does not need."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dni_rnn.pytree import Spec, Tree, flatten, unflatten

Work = Callable[[], object]

WARM_UP = 3
"""Calls before a recording: optimizers and libraries allocate what they keep."""

MOST = 32
"""Recordings; each holds memory. Windows of episodes come in many shapes."""


def cuda_graph(work: Work) -> Work:
    """Record what `work` asks of the current device, without doing it; the result does it, as one launch."""
    graph = torch.cuda.CUDAGraph()
    # An older recording that is collected meanwhile frees what a device may not free while it records.
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            work()
    finally:
        if collects:
            gc.enable()
    return graph.replay


class Recorded:
    """`function(tree)`, done by a recording of it once it has been called with such a tree of tensors before.

    There is one recording per signature: the structure of the tree, shapes and dtypes. Python runs
    when it is made and never again. So `function` returns nothing and reads the host's variables as they are
    then; what it keeps from call to call are tensors that it changes in place; and it waits for no
    value from the device (`float`, `if`, `nonzero`).

    A function that cannot be recorded is called as it is, with a line on standard error.

    Args:
      function: of a tree of tensors.
      record: makes a recording of its argument, a function of nothing.
    """

    def __init__(self, function: Callable[..., object], record: Callable[[Work], Work] = cuda_graph) -> None:
        self._function, self._record = function, record
        self._calls: dict[Any, int] = {}
        self._most = MOST
        self._recordings: dict[Any, tuple[list[Tensor], Work]] = {}

    def __call__(self, tree: Tree) -> None:
        leaves, spec = flatten(tree)
        signature = (repr(spec), *((leaf.shape, leaf.dtype) for leaf in leaves))
        if signature not in self._recordings and not self._make(signature, leaves, spec):
            self._function(tree)
            return
        places, replay = self._recordings[signature]
        for place, leaf in zip(places, leaves, strict=True):
            place.copy_(leaf)
        replay()

    def _make(self, signature: Any, leaves: list[Tensor], spec: Spec) -> bool:
        """Whether there is a recording now."""
        calls = self._calls.get(signature, 0)
        if calls < WARM_UP or len(self._recordings) == self._most:
            self._calls[signature] = calls + 1
            return False
        fixed = [leaf.clone() for leaf in leaves]
        try:
            replay = self._record(lambda: self._function(unflatten(fixed, spec)))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(f"dni-rnn: updates are not recorded as a CUDA graph: {reason}", file=sys.stderr)
            self._most = len(self._recordings)
            return False
        self._recordings[signature] = fixed, replay
        return True
