"""Updates recorded as CUDA graphs: without them a GPU that runs a small core waits for its host."""

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
"""Calls before a recording, in which optimizers and libraries allocate their buffers."""

MOST = 32
"""Maximum number of recordings: each holds memory, and windows of episodes come in many shapes."""


def cuda_graph(work: Work) -> Work:
    """Record the device work of `work` without running it; the result runs it in one launch."""
    graph = torch.cuda.CUDAGraph()
    # Collecting an older recording meanwhile would free memory, which is not allowed while recording.
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
    """`function(tree)`, replayed from a recording after `WARM_UP` calls with trees of the same signature.

    There is one recording per signature: the structure of the tree, shapes and dtypes. Python runs only when
    it is made. So `function` must return nothing, sees Python variables as they were at that time, keeps
    state only in tensors that it changes in place, and must not wait for a value from the device (`float`,
    `if`, `nonzero`).

    A function that cannot be recorded is called normally, with a line on standard error.

    Args:
      function: a function of a tree of tensors.
      record: records its argument, a function without arguments.
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
        """Make a recording if it is time for one. Whether there is one now."""
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
