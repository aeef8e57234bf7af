"""Estimators of the gradient: how a stretch of windows becomes `.grad`. One interface for all.

    estimate = estimator(model, windows, state, weight)

adds to `.grad` of the model's parameters its estimate of

    ∂/∂θ  weight · Σ_windows Σ_scored targets  −log p(target)        (natural logarithm)

and returns what was measured on the way. The windows follow one another in time. The caller owns
zeroing, clipping and stepping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.pytree import Tree, detach, flatten, flatten_rows, map_tree, unflatten
from dni_rnn.recurrent import Boundary, SequenceModel

UNSCORED = -100
"""The target of a step that is not scored."""


class Window(NamedTuple):
    """T steps of a stream, B rows side by side.

    Attributes:
      inputs: (T, B) symbols.
      targets: (T, B) symbols, `UNSCORED` where a step does not count.
      start: what is known at the boundary before it.
      end: what is known at the boundary after it; `start` of the next window.
      scored: how many targets count.
    """

    inputs: Tensor
    targets: Tensor
    start: Boundary
    end: Boundary
    scored: int


class Estimate(NamedTuple):
    """What an estimator returns. Gradients are in `.grad`.

    Attributes:
      loss: sum over the windows' scored targets of −log p, in nats, detached (a scalar).
      state: after the last window, detached.
    """

    loss: Tensor
    state: Tree


def window_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of −log p(target) in nats over the scored targets: logits (T, B, V), targets (T, B)."""
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten().long(), ignore_index=UNSCORED, reduction="sum"
    )


class TruncatedBPTT(nn.Module):
    """Backpropagation within each window; nothing crosses a boundary.

    One window per update is the textbook form. Several accumulate their gradients, and the state is
    carried, so that methods with different T can update after the same number of symbols.

    Source: Williams & Peng 1990, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories".
    """

    def forward(
        self, model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float
    ) -> Estimate:
        losses = []
        for window in windows:
            state = self.enter(model, model.reset(state, window.start.done), window.start)
            outputs, state = model.unroll(window.inputs, state)
            loss = window_loss(model.readout(outputs), window.targets)
            objective = weight * loss
            for term in self.leave(model, window, outputs, state, weight):
                objective = objective + term
            objective.backward()
            losses.append(loss.detach())
            state = detach(state)
        return Estimate(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), state)

    def enter(self, model: SequenceModel, state: Tree, start: Boundary) -> Tree:
        """The state as the window takes it over."""
        return detach(state)

    def leave(
        self, model: SequenceModel, window: Window, outputs: Tensor, state: Tree, weight: float
    ) -> list[Tensor]:
        """Terms that stand for the loss after the window."""
        return []


class DNI(TruncatedBPTT):
    """Truncated BPTT with a synthetic gradient at each boundary, where truncation would put zero.

        window gradient = ∂/∂θ weight·loss(window) + (∂state_end/∂θ)ᵀ ĝ(state_end)
        target of M     = ∂/∂state_start weight·loss(window) + (∂state_end/∂state_start)ᵀ ĝ(state_end)

    (with `aux`, both also hold the gradient of its term). M and the scale of ĝ belong to the model's core
    (`RecurrentCore`). With M ≡ 0 this is `TruncatedBPTT`; with M exact it is `FullBPTT`, whatever T.

    Args:
      aux: the auxiliary task: a module A called as `A(output, context)` on the core's first output of
        the window, (B, H), that predicts M's output at the window's end, flattened per row (layers and
        tensors side by side: LSTM 2·layers·H, else layers·H). It adds

            aux_weight · T · B · weight · mean over rows and features of (A − M(state_end))²

        to the objective, that is, `aux_weight` times a dimensionless error (M's output is in units of
        its target's size) to the mean loss in nats. Its gradient reaches the core; M is a constant.
      aux_weight: see there.

    Source: Jaderberg et al. 2017, arXiv:1608.05343, eq. 3, and Fig. 3(b) for the auxiliary task.
    """

    def __init__(self, aux: nn.Module | None = None, aux_weight: float = 0.1) -> None:
        super().__init__()
        self.aux, self.aux_weight = aux, aux_weight

    def enter(self, model: SequenceModel, state: Tree, start: Boundary) -> Tree:
        return model.receive(state, start)

    def leave(
        self, model: SequenceModel, window: Window, outputs: Tensor, state: Tree, weight: float
    ) -> list[Tensor]:
        terms = [model.send(state, window.end)]
        if self.aux is not None:
            target = flatten_rows(model.predict_gradient(state, window.end))
            error = F.mse_loss(self.aux(outputs[0], window.start.context), target)
            terms.append(self.aux_weight * window.targets.numel() * weight * error)
        return terms


class FullBPTT(nn.Module):
    """Backpropagation through all the windows it is given, as if they were one: memory grows with them."""

    def forward(
        self, model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float
    ) -> Estimate:
        state = detach(state)
        losses = []
        for window in windows:
            state = model.reset(state, window.start.done)
            outputs, state = model.unroll(window.inputs, state)
            losses.append(window_loss(model.readout(outputs), window.targets))
        total = torch.stack(losses).sum()
        (weight * total).backward()
        return Estimate(total.detach(), detach(state))


def state_gradients(
    model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float, horizons: Sequence[int]
) -> dict[int, Tree]:
    """True gradients with respect to `state` of the loss of the next n windows, for each n of `horizons`.

    n = 0 stands for all of `windows`. The loss is weight · Σ −log p; each gradient is a tree like `state`.
    The graph of all windows is held in memory at once.
    """
    leaves, spec = flatten(map_tree(lambda leaf: leaf.detach().requires_grad_(), state))
    state, losses = unflatten(leaves, spec), []
    for window in windows:
        outputs, state = model.unroll(window.inputs, model.reset(state, window.start.done))
        losses.append(weight * window_loss(model.readout(outputs), window.targets))
    found = {}
    for horizon in horizons:
        coming = torch.stack(losses[: horizon or len(losses)]).sum()
        gradients = torch.autograd.grad(coming, leaves, retain_graph=True)
        found[horizon] = unflatten(list(gradients), spec)
    return found
