"""`--core lstm`: torch's LSTM."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dni_rnn.cores import zero_layers
from dni_rnn.pytree import LSTMState


class LSTM(nn.LSTM):
    """torch's fused `nn.LSTM` as a `Core`; its weights are those of any `nn.LSTM`.

    Args:
      input_size, hidden_size, num_layers: as in torch.

    Shapes: state `LSTMState`, each (layers, B, H).
    """

    output_leaf = "hidden"

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__(input_size, hidden_size, num_layers)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def initial_state(self, batch_size: int) -> LSTMState:
        """Zeros."""
        return LSTMState(zero_layers(self, batch_size), zero_layers(self, batch_size))

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, LSTMState]:  # pyright: ignore
        """See `Core`."""
        outputs, after = super().forward(inputs, state)
        return outputs, LSTMState(*after)


CORE = LSTM
