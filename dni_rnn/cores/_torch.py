"""Common base of torch's GRU and tanh RNN as cores: their state is their output."""

from __future__ import annotations

from torch import Tensor, nn

from dni_rnn.cores import zero_layers


class OutputIsState(nn.RNNBase):
    """Mix-in before torch's class: a `Core` whose state is one tensor (layers, B, H)."""

    output_leaf = None

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, num_layers)  # type: ignore[call-arg]

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros."""
        return zero_layers(self, batch_size)
