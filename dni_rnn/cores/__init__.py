"""Recurrent cores, one file each, found by name (`dni_rnn.registry`), and their protocol.

`--core NAME` builds `dni_rnn.cores.NAME`, an entry point of the group `dni_rnn.cores`, or
`package.module:Cell`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dni_rnn.pytree import Tree


@runtime_checkable
class Core(Protocol):
    """The protocol of a recurrent net for this package: an `nn.Module` with four members.

    `dni-rnn train --core` builds one as `Cell(input_size, hidden_size, num_layers)`.

    Attributes:
      output_size: width of an output.
      output_leaf: the part of the state that is the output of the last step: the field of a named tuple, the
        key of a dict or the index of a tuple; None if the state is one tensor, or no part is the output. A
        synthesizer that reads only the hidden state reads this.
    """

    @property
    def output_size(self) -> int: ...

    @property
    def output_leaf(self) -> str | int | None: ...

    def initial_state(self, batch_size: int) -> Tree:
        """The state before the first step: tensors of the dtype and device of the weights, rows in
        dimension -2. Rows that begin a new sequence are reset to it. If it has weights, only full BPTT
        trains them: a truncated window treats its initial state as a constant.
        """
        ...

    def __call__(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Run over inputs (T, B, input_size): outputs (T, B, output_size), and the state after them."""
        ...


def zero_layers(rnn: nn.RNNBase, batch_size: int) -> Tensor:
    """Zeros (layers, B, H) of the dtype and device of one of torch's recurrent nets."""
    weight = next(rnn.parameters())
    return weight.new_zeros(rnn.num_layers, batch_size, rnn.hidden_size)
