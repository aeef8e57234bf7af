"""`lookahead`: backpropagation through T + W steps, of which T advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dni_rnn.estimators import Estimate
from dni_rnn.estimators.bptt import TraceSteps, TruncatedBPTT
from dni_rnn.estimators.full import state_gradients
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import Tree, flatten, has_rows
from dni_rnn.recurrent import SequenceModel
from dni_rnn.window import Boundary, Window


class LookaheadBPTT(TruncatedBPTT):
    """Truncated BPTT with overlapping windows: each includes the loss of the `lookahead` steps after it.

        window gradient = ∂/∂θ weight·loss(window) + (∂state_end/∂θ)ᵀ ĝ
        ĝ               = ∂/∂state_end  weight·loss(the next W steps)

    with the weights of these W steps taken as constants, so that each step's use of the weights counts once:
    for all losses up to W steps beyond the end of its own window. It is `DNI` with an exact M that knows the
    next W steps: the bound of any method conditioned on W symbols, and the baseline that it has to beat. With
    W = 0 it is `TruncatedBPTT`; with W the rest of the sequence it is `FullBPTT`.

    Cost: 1 + W/T times truncated BPTT, forward and backward, in the memory of the longer of the two; training
    lags W steps behind the data.

    Args:
      steps: W.
      penalty, trace, trace_decay: see `TruncatedBPTT`. ĝ excludes the penalties of the next windows. The
        trace carries the residual g − ĝ.

    Source: Williams & Peng 1990, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories": BPTT(T + W; T) there. If T divides W and weights are fixed, both sum the
    same pairs of a step and a loss: here a step looks ahead, there a loss looks back.
    """

    def __init__(
        self,
        steps: int,
        penalty: StatePenalty | None = None,
        trace: TraceSteps = 0,
        trace_decay: float = 1.0,
    ) -> None:
        super().__init__(penalty, trace, trace_decay)
        if steps < 0:
            raise ValueError(f"steps must not be negative, not {steps}")
        self.lookahead = steps
        self._coming: deque[Window] = deque()
        self._sent: list[Tensor] | None = None
        self._device: torch.device | None = None

    def begin(self, model: SequenceModel, batch_size: int) -> None:
        super().begin(model, batch_size)
        self._sent, self._device = None, model.readout.weight.device

    def memory(self) -> dict[str, Tensor]:
        sent = self._sent if self.trace else None
        return super().memory() | {f"sent.{number}": leaf.clone() for number, leaf in enumerate(sent or ())}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        super().load_memory({name: t for name, t in tensors.items() if name.startswith("trace.")})
        sent = [t for name, t in tensors.items() if name.startswith("sent.")]
        self._sent = [t.to(self._device).clone() for t in sent] or None

    def forward(
        self,
        model: SequenceModel,
        windows: Sequence[Window],
        state: Tree,
        weight: float,
        ahead: Sequence[Window] = (),
    ) -> Estimate:
        """As every estimator; `ahead` are the windows after the last one, W steps or as many as there are."""
        self._coming = deque([*windows, *ahead])
        return super().forward(model, windows, state, weight)

    def unroll(self, model: SequenceModel, window: Window, state: Tree) -> tuple[Tensor, Tree]:
        for traced in self._traced:
            return traced(window.inputs, state, window.start.done, self._sent)
        return super().unroll(model, window, state)

    def leave(
        self, model: SequenceModel, window: Window, outputs: Tensor, state: Tree, weight: float
    ) -> list[Tensor]:
        terms = super().leave(model, window, outputs, state, weight)
        self._coming.popleft()
        coming, leaves = first_steps(self._coming, self.lookahead), flatten(state, has_rows)[0]
        if coming:
            sent = flatten(state_gradients(model, coming, state, weight, (0,))[0], has_rows)[0]
            terms += [(leaf * gradient).sum() for leaf, gradient in zip(leaves, sent, strict=True)]
        else:
            sent = [torch.zeros_like(leaf) for leaf in leaves]
        if self._traced:
            self._keep(sent)
        return terms

    def _keep(self, sent: Sequence[Tensor]) -> None:
        """In place, so that a recorded update finds it."""
        if self._sent is None:
            self._sent = [gradient.detach().clone() for gradient in sent]
        for kept, gradient in zip(self._sent, sent, strict=True):
            kept.copy_(gradient)


def first_steps(windows: Iterable[Window], steps: int) -> list[Window]:
    """Their first `steps` steps, merged into windows that end only where a row begins a new sequence."""
    found: list[Window] = []
    for window in windows:
        if not steps:
            break
        inputs, targets = window.inputs[:steps], window.targets[:steps]
        steps -= len(inputs)
        if found and window.start.done is None:
            before = found.pop()
            inputs, targets = torch.cat([before.inputs, inputs]), torch.cat([before.targets, targets])
            window = before
        found.append(Window(inputs, targets, Boundary(None, window.start.done), Boundary(), 0))
    return found


ESTIMATOR = LookaheadBPTT
