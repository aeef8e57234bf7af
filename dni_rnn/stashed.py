"""A forward pass that can be differentiated after the weights have moved."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class Stashed:
    """A forward pass with a copy of the current weights; gradients go to `.grad` of the weights themselves.

    Source: Harlap et al. 2018, PipeDream, arXiv:1806.03377 (weight stashing).

    Attributes:
      inputs, out: inputs and output of `net`.
      weights: the copy, by name.
    """

    def __init__(self, net: nn.Module, *inputs: Any) -> None:
        # Copies in the graph: an optimizer changes the parameters in place, and not these.
        self.weights: dict[str, Tensor] = {name: p.clone() for name, p in net.named_parameters()}
        self.inputs = inputs
        self.out: Any = functional_call(net, self.weights, inputs)
