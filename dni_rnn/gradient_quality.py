"""Gradient quality: how close an estimate comes to full BPTT. High agreement between a synthesizer and
its own bootstrapped target proves nothing; the reference is the true gradient.

For a stretch of S steps of held-out text, read by B rows from a carried state, with windows of T:

    g_full      = ∂/∂θ  weight · Σ losses of the stretch           θ: the core's recurrent weights
    g           = sum of an estimator's gradients with windows of T over the same stretch
    cosine      = g·g_full / (|g| |g_full|),      relative error = |g − g_full| / |g_full|
    bias        = √(e_1·e_2 / g_full,1·g_full,2),  e_i = g_i − g_full,i on either half of the rows

The error of one sample mostly measures whether sampling noise was reproduced; in the product of two
independent errors the noise averages out and what is common to all rows stays (negative products count as 0).

At a boundary, with s the true gradient of the future loss (of the next n windows, or of the rest of the
stretch) with respect to the state there, and ĝ = target RMS · M (M's prediction of it, before `scale`):

    cosine      = ĝ·s / (|ĝ| |s|),      explained = 1 − |ĝ − s|² / |s|²     over all rows and features

`explained` is 0 for predicting zero and 1 for a perfect synthesizer; it may be far below 0. `weight` is
that of training, 1 / (T·accumulate·B), the unit of M's predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from dni_rnn.agreement import agreement_of, cosine_similarity, frozen
from dni_rnn.estimators import Estimator
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.estimators.full import FullBPTT, state_gradients
from dni_rnn.estimators.lookahead import LookaheadBPTT
from dni_rnn.interface import Interface
from dni_rnn.pytree import Tree, flatten_rows, map_tree
from dni_rnn.recurrent import SequenceModel
from dni_rnn.traces import why_not_traced
from dni_rnn.window import Window

HORIZONS = (1, 2, 4, 8, 16)
BOUNDARIES = 8
TRACE = 120
"""Length of the measured trace: a whole stretch."""

AHEAD = 8
"""Steps that `LookaheadBPTT` looks ahead: the bound of an M conditioned on as many symbols."""

Stretches = Callable[[int], Sequence[tuple[Sequence[Window], Tree]]]
"""T -> stretches of held-out data cut into windows of T steps, each with the state carried to its start."""


@dataclass(frozen=True)
class Quality:
    """One estimator at one T, on the core's parameter gradient (see the module): means over the stretches.

    Attributes:
      estimator: "truncated", "lookahead:8", "trace", "synthetic" or "synthetic+trace".
      bptt: T.
      cosine, relative_error: of one sample against full BPTT on the same sample.
      bias: relative bias of the expected gradient, which no larger batch would reduce.
      gain: how much of the true gradient is in the estimate, g·g_full / |g_full|²; 1 is ideal.
      cost: seconds, relative to truncated BPTT at this T.
    """

    estimator: str
    bptt: int
    cosine: float
    relative_error: float
    bias: float
    gain: float
    cost: float


@dataclass(frozen=True)
class BoundaryQuality:
    """Quality of the synthetic gradient itself: means over boundaries and stretches.

    Attributes:
      bptt: T.
      horizon: n, in windows; 0 for the rest of the stretch.
      cosine, explained: see the module.
    """

    bptt: int
    horizon: int
    cosine: float
    explained: float


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`."""

    parameters: list[Quality]
    boundaries: list[BoundaryQuality]


def core_gradient(
    model: SequenceModel, estimator: Estimator, windows: Sequence[Window], state: Tree, weight: float
) -> Tensor:
    """An estimator's gradient with respect to the core's recurrent weights over a stretch, flat.

    The model's `.grad`, the statistics of its interface and what it has sent are left as they were.
    """
    rows, interface = windows[0].inputs.shape[1], model.core.interface
    with frozen(model, estimator), _sent_kept(interface) if interface is not None else nullcontext():
        estimator.begin(model, rows)
        estimator(model, windows, state, weight)
        estimator.flush()
        found = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in model.core.rnn.parameters()  # type: ignore[attr-defined]
        ]
    return torch.cat(found)


@contextmanager
def _sent_kept(interface: Interface) -> Iterator[None]:
    """What a trace of the model reads after its last window is as before on exit."""
    before = interface.sent, interface.sent_before, interface.keeps_sent
    interface.sent = None  # else it is written in place
    try:
        yield
    finally:
        interface.sent, interface.sent_before, interface.keeps_sent = before


def diagnose(
    model: SequenceModel, stretches: Stretches, weight: float, bptts: Sequence[int], discount: float = 1.0
) -> Diagnosis:
    """Measure a model: truncated BPTT at each T, overlapping windows, a trace, and its own synthesizer.

    The reference is full BPTT over each stretch; means over the stretches.

    Args:
      stretches: see `Stretches`.
      weight: weight of a symbol's loss, as in training.
      bptts: the truncation lengths T to measure.
      discount: discount per step, as in training (`DNI`).
    """
    estimators: dict[str, Estimator] = {
        "truncated": TruncatedBPTT(),
        f"lookahead:{AHEAD}": LookaheadBPTT(AHEAD),
    }
    traced = why_not_traced(model.core.rnn) is None
    if traced:
        estimators["trace"] = TruncatedBPTT(trace=TRACE)
    if model.core.interface is not None:
        estimators["synthetic"] = DNI(discount=discount)
        if traced:
            estimators["synthetic+trace"] = DNI(discount=discount, trace=TRACE)
    parameters, boundaries = [], []
    for bptt in bptts:
        samples: dict[str, list[_Sample]] = {name: [] for name in estimators}
        at_boundaries: dict[int, list[tuple[float, float]]] = {}
        for windows, state in stretches(bptt):
            halves = _halves(windows, state)
            full = [core_gradient(model, FullBPTT(), *half, weight) for half in halves]
            for name, estimator in estimators.items():
                start = time.perf_counter()
                estimates = [core_gradient(model, estimator, *half, weight) for half in halves]
                samples[name].append(_Sample(estimates, full, time.perf_counter() - start))
            if "synthetic" in estimators:
                _measure_boundaries(model, windows, state, weight, at_boundaries)
        once = fmean(sample.seconds for sample in samples["truncated"])
        parameters += [_quality(name, bptt, found, once) for name, found in samples.items()]
        boundaries += [BoundaryQuality(bptt, n, *_means(values)) for n, values in at_boundaries.items()]
    return Diagnosis(parameters, boundaries)


class _Sample(NamedTuple):
    """Gradients of two halves of the rows of one stretch, estimated and true."""

    estimates: list[Tensor]
    full: list[Tensor]
    seconds: float


def _halves(windows: Sequence[Window], state: Tree) -> list[tuple[list[Window], Tree]]:
    """The stretch for either half of the rows; a single row counts as both halves."""
    rows = windows[0].inputs.shape[1]
    cuts = [slice(0, max(rows // 2, 1)), slice(rows // 2, rows)]
    return [
        ([w.of_rows(cut) for w in windows], map_tree(lambda leaf, cut=cut: leaf[..., cut, :], state))
        for cut in cuts
    ]


def _quality(name: str, bptt: int, samples: Sequence[_Sample], once: float) -> Quality:
    """Means over stretches; the bias from sums over them, as its terms have both signs."""
    cosines, errors, gains = [], [], []
    product, power = 0.0, 0.0
    for sample in samples:
        estimate, full = sum(sample.estimates), sum(sample.full)
        assert isinstance(estimate, Tensor)
        assert isinstance(full, Tensor)
        cosines.append(cosine_similarity(estimate, full))
        errors.append(float((estimate - full).norm() / full.norm()))
        gains.append(float(estimate @ full / full.square().sum()))
        first, second = (e - f for e, f in zip(sample.estimates, sample.full, strict=True))
        product += float(first @ second)
        power += float(sample.full[0] @ sample.full[1])
    bias = math.sqrt(max(product, 0.0) / power) if power > 0 else math.nan
    cost = fmean(sample.seconds for sample in samples) / once
    return Quality(name, bptt, fmean(cosines), fmean(errors), bias, fmean(gains), cost)


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
