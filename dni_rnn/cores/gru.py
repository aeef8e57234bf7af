"""`--core gru`: torch's GRU."""

from __future__ import annotations

from torch import nn

from dni_rnn.cores._torch import OutputIsState


class GRU(OutputIsState, nn.GRU):
    """torch's fused `nn.GRU` as a `Core`; its weights are those of any `nn.GRU`.

    Args:
      input_size, hidden_size, num_layers: as in torch.

    Shapes: state (layers, B, H).
    """


CORE = GRU
