"""Gradient quality: how close an estimate comes to full BPTT. High agreement between a synthesizer and
its own bootstrapped target proves nothing; the yardstick is the true gradient.

For a stretch of S steps of held-out text, read by B rows from a carried state, with windows of T:

    g_full      = ∂/∂θ  weight · Σ losses of the stretch           θ: the core's recurrent weights
    g           = what an estimator with windows of T adds up to over the same stretch
    cosine      = g·g_full / (|g| |g_full|),      relative error = |g − g_full| / |g_full|

and at a boundary, with s the true gradient of the loss to come (of the next n windows, or of the rest of
the stretch) with respect to the state there, and ĝ = target RMS · M (M's estimate of it, before `scale`):

    cosine      = ĝ·s / (|ĝ| |s|),      explained = 1 − |ĝ − s|² / |s|²     over all rows and features

`explained` is 0 for predicting zero and 1 for a perfect synthesizer; it may be far below 0. `weight` is
that of training, 1 / (T·accumulate·B), because that is the unit M has learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dni_rnn.agreement import agreement_of, cosine_similarity, frozen
from dni_rnn.estimators import Estimator
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.estimators.full import FullBPTT, state_gradients
from dni_rnn.pytree import Tree, flatten_rows
from dni_rnn.recurrent import SequenceModel
from dni_rnn.window import Window

HORIZONS = (1, 2, 4, 8, 16)
BOUNDARIES = 8

Stretches = Callable[[int], Sequence[tuple[Sequence[Window], Tree]]]
"""T -> stretches of held-out data cut into windows of T steps, each with the state carried to its start."""


@dataclass(frozen=True)
class Quality:
    """One estimator at one T: means over the stretches.

    Attributes:
      estimator: "truncated" or "synthetic".
      bptt: T.
      cosine, relative_error: of the core's parameter gradient (see the module).
    """

    estimator: str
    bptt: int
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class BoundaryQuality:
    """The synthetic gradient itself: means over boundaries and stretches.

    Attributes:
      bptt: T.
      horizon: n, in windows; 0 for all the rest of the stretch.
      cosine, explained: see the module.
    """

    bptt: int
    horizon: int
    cosine: float
    explained: float


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measures."""

    parameters: list[Quality]
    boundaries: list[BoundaryQuality]


def core_gradient(
    model: SequenceModel, estimator: Estimator, windows: Sequence[Window], state: Tree, weight: float
) -> Tensor:
    """An estimator's gradient with respect to the core's recurrent weights over a stretch, flat.

    The model's `.grad` and the statistics of its interface are left as they were.
    """
    rows = windows[0].inputs.shape[1]
    with frozen(model, estimator):
        estimator.begin(model, rows)
        estimator(model, windows, state, weight)
        estimator.flush()
        found = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in model.core.rnn.parameters()  # type: ignore[attr-defined]
        ]
    return torch.cat(found)


def diagnose(
    model: SequenceModel, stretches: Stretches, weight: float, bptts: Sequence[int], discount: float = 1.0
) -> Diagnosis:
    """Measure a model: truncated BPTT at each T, and its own synthesizer where it has one.

    The yardstick is full BPTT over each stretch; means over the stretches.

    Args:
      stretches: see `Stretches`.
      weight: of a symbol's loss, as in training.
      bptts: the T to measure.
      discount: of the future per step, as in training (`DNI`).
    """
    estimators: dict[str, Estimator] = {"truncated": TruncatedBPTT()}
    if model.core.interface is not None:
        estimators["synthetic"] = DNI(discount=discount)
    parameters, boundaries = [], []
    for bptt in bptts:
        agreements: dict[str, list[tuple[float, float]]] = {name: [] for name in estimators}
        at_boundaries: dict[int, list[tuple[float, float]]] = {}
        for windows, state in stretches(bptt):
            full = core_gradient(model, FullBPTT(), windows, state, weight)
            for name, estimator in estimators.items():
                estimate = core_gradient(model, estimator, windows, state, weight)
                error = float((estimate - full).norm() / full.norm())
                agreements[name].append((cosine_similarity(estimate, full), error))
            if "synthetic" in estimators:
                _measure_boundaries(model, windows, state, weight, at_boundaries)
        parameters += [Quality(name, bptt, *_means(values)) for name, values in agreements.items()]
        boundaries += [BoundaryQuality(bptt, n, *_means(values)) for n, values in at_boundaries.items()]
    return Diagnosis(parameters, boundaries)


def _measure_boundaries(
    model: SequenceModel,
    windows: Sequence[Window],
    state: Tree,
    weight: float,
    found: dict[int, list[tuple[float, float]]],
) -> None:
    """Append (cosine, explained) for each horizon, at up to 8 boundaries of a stretch."""
    interface = model.core.interface
    assert interface is not None
    every = max(1, len(windows) // BOUNDARIES)
    for number, window in enumerate(windows[:-1], start=1):
        with torch.no_grad():
            _, state = model.unroll(window.inputs, model.reset(state, window.start.done))
        if number % every:
            continue
        predicted = interface.predict(state, window.end.context, window.end.done)
        synthetic = interface.target_rms() * flatten_rows(predicted)
        horizons = [0, *(n for n in HORIZONS if n < len(windows) - number)]
        gradients = state_gradients(model, windows[number:], state, weight, horizons)
        for n, true in ((n, flatten_rows(gradient)) for n, gradient in gradients.items()):
            found.setdefault(n, []).append(agreement_of(synthetic, true)[:2])


def _means(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*values, strict=True)
    return sum(first) / len(values), sum(second) / len(values)
