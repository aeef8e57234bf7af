"""Chains of element-wise operations as one kernel: on a GPU passes over memory and launches count."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

MOST = 6
"""Shapes that a function is compiled for; a window of another one is computed step by step."""


class Compiled:
    """A function of tensors, compiled by `torch.compile` where that makes it faster: on a GPU with Triton.

    Each set of shapes is compiled when it first comes, in a second or two; never within the recording of a
    CUDA graph, before which an update is made a few times. Where it cannot be compiled, and of complex
    numbers, the function is called as it is: the result is the same to rounding.

    Args:
      function: of tensors of fixed shape, without gradients; may change its arguments in place.

    Attributes:
      enabled: None: by device; True: on a CPU as well; False: nowhere.
    """

    enabled: bool | None = None
    # A pool of processes would take longer to start than these kernels take to compile.
    how: Mapping[str, Any] = MappingProxyType({"options": {"compile_threads": 1}})

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._fast: Callable[..., Tensor] | None = None
        self._seen: set[Any] = set()

    def __call__(self, *tensors: Tensor) -> Tensor:
        if not _worth_it(tensors):
            return self._function(*tensors)
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        if key not in self._seen and (len(self._seen) == MOST or _recording(tensors[0])):
            return self._function(*tensors)
        if self._fast is None:
            self._fast = torch.compile(self._function, dynamic=False, fullgraph=True, **self.how)
        try:
            found = self._fast(*tensors)
        except Exception as error:
            compiling = key not in self._seen or type(error).__module__.startswith("torch._dynamo")
            if isinstance(error, torch.OutOfMemoryError) or not compiling:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"traces are not compiled, which only costs time: {reason}", stacklevel=2)
            Compiled.enabled = False
            return self._function(*tensors)
        self._seen.add(key)
        return found


def _worth_it(tensors: tuple[Tensor, ...]) -> bool:
    if Compiled.enabled is False or any(t.is_complex() for t in tensors):
        return False
    return Compiled.enabled is True or (tensors[0].is_cuda and find_spec("triton") is not None)


def _recording(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
