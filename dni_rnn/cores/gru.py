"""`--core gru`: torch's GRU."""

from __future__ import annotations

from torch import nn

from dni_rnn.cores._torch import OutputIsState


class GRU(OutputIsState, nn.GRU):
    """`nn.GRU`, fused as it is, as a `Core`; weights go in and out of it as of any `nn.GRU`.

    Args:
      input_size, hidden_size, num_layers: as in torch.

    Shapes: state (layers, B, H).
    """


CORE = GRU
