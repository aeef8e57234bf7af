"""`dni`: a synthetic gradient where truncation would put zero."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.estimators.bptt import TraceSteps, TruncatedBPTT
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import Tree, flatten_rows
from dni_rnn.recurrent import SequenceModel
from dni_rnn.window import Boundary, Window


class DNI(TruncatedBPTT):
    """Truncated BPTT with a synthetic gradient at each boundary, where truncation would put zero.

        window gradient = ∂/∂θ weight·loss(window) + (∂state_end/∂θ)ᵀ γ^T ĝ(state_end)
        target of M     = ∂/∂state_start weight·loss(window) + (∂state_end/∂state_start)ᵀ γ^T ĝ(state_end)

    with T the steps of the window (with `aux` and `penalty`, both include the gradients of these terms). M
    and the scale of ĝ belong to the interface of the model's core. With M ≡ 0 this is `TruncatedBPTT`; with M
    exact and γ = 1 it is `FullBPTT`, for any T.

    Args:
      aux: the auxiliary task: a module A called as `A(output, context)` on the core's first output of
        the window, (B, H), that predicts M's output at the window's end, flattened per row (layers and
        tensors concatenated: LSTM 2·layers·H, else layers·H). It adds

            aux_weight · T · B · weight · mean over rows and features of (A − M(state_end))²

        to the objective, that is, `aux_weight` times a dimensionless error (M's output is in units of
        its target's RMS) to the mean loss in nats. Its gradient reaches the core; M is a constant.
      aux_weight: see `aux`.
      discount: γ, the discount per step.
      penalty: see `TruncatedBPTT`; it uses the RMS that the interface measures.
      trace, trace_decay: see `TruncatedBPTT`. The trace carries what ĝ got wrong, g − ĝ.

    Source: Jaderberg et al. 2017, arXiv:1608.05343, eq. 3, and Fig. 3(b) for the auxiliary task.
    """

    def __init__(
        self,
        aux: nn.Module | None = None,
        aux_weight: float = 0.1,
        *,
        discount: float = 1.0,
        penalty: StatePenalty | None = None,
        trace: TraceSteps = 0,
        trace_decay: float = 1.0,
    ) -> None:
        super().__init__(penalty, trace, trace_decay)
        self.aux, self.aux_weight, self.discount = aux, aux_weight, discount
        self._sender: list[Interface] = []  # in a list, since it belongs to the model

    def begin(self, model: SequenceModel, batch_size: int) -> None:
        super().begin(model, batch_size)
        self._sender = [_interface(model)]
        self._sender[0].sent = None

    def memory(self) -> dict[str, Tensor]:
        sent = self._sender[0].sent if self._sender else None
        own = {f"sent.{number}": leaf for number, leaf in enumerate(sent or ())}
        return super().memory() | own

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        super().load_memory({name: t for name, t in tensors.items() if name.startswith("trace.")})
        for interface in self._sender:
            sent = [t for name, t in tensors.items() if name.startswith("sent.")]
            interface.sent = [t.to(interface.target_square.device).clone() for t in sent] or None

    def enter(self, model: SequenceModel, state: Tree, start: Boundary) -> Tree:
        return _interface(model).receive(state, start.context, start.done)

    def leave(
        self, model: SequenceModel, window: Window, outputs: Tensor, state: Tree, weight: float
    ) -> list[Tensor]:
        interface, end = _interface(model), window.end
        discount = self.discount ** len(window.inputs)
        terms = [interface.send(state, end.context, end.done, discount=discount)]
        if self.penalty is not None:
            terms.append(self.penalty(state, end.done, rms=interface.target_square.sqrt()))
        if self.aux is not None:
            target = flatten_rows(interface.predict(state, end.context, end.done))
            error = F.mse_loss(self.aux(outputs[0], window.start.context), target)
            terms.append(self.aux_weight * window.targets.numel() * weight * error)
        return terms


def _interface(model: SequenceModel) -> Interface:
    if model.core.interface is None:
        raise ValueError("the model's core has no interface: give it one with a synthesizer")
    return model.core.interface


ESTIMATOR = DNI
