"""`--core rnn`: torch's tanh RNN."""

from __future__ import annotations

from torch import Tensor, nn

from dni_rnn.cores import zero_layers


class RNN(nn.RNN):
    """`nn.RNN`, fused as it is, as a `Core`; weights go in and out of it as of any `nn.RNN`.

    Args:
      input_size, hidden_size, num_layers: as in torch.

    Shapes: state (layers, B, H).
    """

    output_leaf = None

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, num_layers)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros."""
        return zero_layers(self, batch_size)


CORE = RNN
