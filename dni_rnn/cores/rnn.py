"""`--core rnn`: torch's tanh RNN."""

from __future__ import annotations

from torch import nn

from dni_rnn.cores._torch import OutputIsState


class RNN(OutputIsState, nn.RNN):
    """torch's fused `nn.RNN` as a `Core`; its weights are those of any `nn.RNN`.

    Args:
      input_size, hidden_size, num_layers: as in torch.

    Shapes: state (layers, B, H).
    """


CORE = RNN
