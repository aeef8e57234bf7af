"""Recurrent cores, one file each, found by name (`dni_rnn.registry`): the protocol, and what fulfils it.

`--core NAME` builds `dni_rnn.cores.NAME`, an entry point of the group `dni_rnn.cores`, or
`package.module:Cell`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dni_rnn.pytree import Tree


@runtime_checkable
class Core(Protocol):
    """What a recurrent net has to give to be trained by this package: an `nn.Module` with four members.

    `dni-rnn train --core` builds one as `Cell(input_size, hidden_size, num_layers)`.

    Attributes:
      output_size: width of an output.
      output_leaf: which part of the state is the output of the last step, if one is: the field of a named
        tuple, the key of a dict, the index of a tuple; None when the state is one tensor, or no part is.
        A synthesizer that reads the hidden state alone reads this.
    """

    @property
    def output_size(self) -> int: ...

    @property
    def output_leaf(self) -> str | int | None: ...

    def initial_state(self, batch_size: int) -> Tree:
        """The state before the first step: tensors of the dtype and device of the weights, rows in
        dimension -2. Rows that begin a new sequence are put back to it. Weights of its own learn only by
        full BPTT: a truncated window takes its state as a constant.
        """
        ...

    def __call__(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Run over inputs (T, B, input_size): outputs (T, B, output_size), and the state after them."""
        ...


def zero_layers(rnn: nn.RNNBase, batch_size: int) -> Tensor:
    """Zeros (layers, B, H) like the weights of one of torch's recurrent nets."""
    weight = next(rnn.parameters())
    return weight.new_zeros(rnn.num_layers, batch_size, rnn.hidden_size)
