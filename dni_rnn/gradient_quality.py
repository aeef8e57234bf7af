"""Gradient quality: how close an estimate comes to full BPTT. High agreement between a synthesizer and
its own bootstrapped target proves nothing; the yardstick is the true gradient.

For a stretch of S steps of held-out text, read by B rows from a carried state, with windows of T:

    g_full      = ∂/∂θ  weight · Σ losses of the stretch           θ: the core's recurrent weights
    g           = what an estimator with windows of T adds up to over the same stretch
    cosine      = g·g_full / (|g| |g_full|),      relative error = |g − g_full| / |g_full|

and at a boundary, with s the true gradient of the loss to come (of the next n windows, or of the rest of
the stretch) with respect to the state there, and ĝ = size · M (M's estimate of it, before `scale`):

    cosine      = ĝ·s / (|ĝ| |s|),      explained = 1 − |ĝ − s|² / |s|²     over all rows and features

`explained` is 0 for predicting zero and 1 for a perfect synthesizer; it may be far below 0. `weight` is
that of training, 1 / (T·accumulate·B), because that is the unit M has learnt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dni_rnn.atomic_files import write_atomically
from dni_rnn.config import TrainConfig
from dni_rnn.data.streams import Stream
from dni_rnn.data.task import Data, Split
from dni_rnn.errors import UsageError
from dni_rnn.estimators import DNI, FullBPTT, TruncatedBPTT, Window, state_gradients
from dni_rnn.experiments.plots import Panel, save_lines
from dni_rnn.experiments.report import markdown_table
from dni_rnn.pytree import Tree, flatten_rows
from dni_rnn.recurrent import SequenceModel
from dni_rnn.training.inference import load_run
from dni_rnn.training.run_directory import Run

ROWS = 128
STRETCH = 120
STRETCHES = 6
HORIZONS = (1, 2, 4, 8, 16)
BOUNDARIES = 8


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
    model: SequenceModel, estimator: nn.Module, windows: Sequence[Window], state: Tree, weight: float
) -> Tensor:
    """An estimator's gradient with respect to the core's recurrent weights over a stretch, flat.

    The model's `.grad` and the statistics of its interface are left as they were.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    estimator(model, windows, state, weight)
    flat = torch.cat([_gradient(parameter) for parameter in model.core.rnn.parameters()])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return flat


def _gradient(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.flatten()


def _stretches(model: SequenceModel, data: Data, split: Split, context: int) -> list[tuple[Stream, Tree]]:
    """Streams that stand at the start of each stretch, and the states carried there."""
    device = next(model.parameters()).device
    rows = min(ROWS, data.stream(split, 1, 0).size // (2 * STRETCH * STRETCHES))
    if rows < 1:
        need = 2 * STRETCH * STRETCHES
        raise UsageError(
            f"{data.name}: its {split} split is too short to measure on; it takes {need} symbols"
        )
    probe = data.stream(split, rows, 0).to(device)
    position = probe.state_dict()
    state = model.initial_state(rows)
    found = []
    for _ in range(STRETCHES):
        stream = data.stream(split, rows, 0).to(device)
        stream.load_state_dict(position)
        found.append((stream, state))
        with torch.no_grad():
            for _ in range(2):
                window = probe.window(STRETCH, context)
                _, state = model(window.inputs, model.reset(state, window.start.done))
        position = probe.state_dict()
    return found


def _windows(stream: Stream, bptt: int, context: int) -> list[Window]:
    """The stretch cut into windows of `bptt`, the stream put back to its start."""
    position = stream.state_dict()
    windows = [stream.window(bptt, context) for _ in range(STRETCH // bptt)]
    stream.load_state_dict(position)
    return windows


def diagnose(
    model: SequenceModel,
    data: Data,
    *,
    context: int,
    weight: float,
    bptts: Sequence[int],
    split: Split = "valid",
) -> Diagnosis:
    """Measure a model on held-out data: truncated BPTT at each T, and its own synthesizer where it has one.

    The yardstick is full BPTT over stretches of 120 steps of up to 128 rows, mean over 6 stretches. Of a T
    that does not divide 120 the stretch is the largest multiple below it, for the yardstick too.

    Args:
      context: how many symbols the synthesizer is told.
      weight: of a symbol's loss, as in training (`TrainConfig.weight`).
      bptts: the T to measure.

    Raises:
      UsageError: the split is too short.
    """
    stretches = _stretches(model, data, split, context)
    estimators: dict[str, nn.Module] = {"truncated": TruncatedBPTT()}
    if model.core.interface is not None:
        estimators["synthetic"] = DNI()
    parameters, boundaries = [], []
    for bptt in bptts:
        agreements: dict[str, list[tuple[float, float]]] = {name: [] for name in estimators}
        at_boundaries: dict[int, list[tuple[float, float]]] = {}
        for stream, state in stretches:
            windows = _windows(stream, bptt, context)
            full = core_gradient(model, FullBPTT(), windows, state, weight)
            for name, estimator in estimators.items():
                estimate = core_gradient(model, estimator, windows, state, weight)
                agreements[name].append(
                    (_cosine(estimate, full), float((estimate - full).norm() / full.norm()))
                )
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
        guess = interface.size() * flatten_rows(model.predict_gradient(state, window.end))
        horizons = [0, *(n for n in HORIZONS if n < len(windows) - number)]
        gradients = state_gradients(model, windows[number:], state, weight, horizons)
        for n, true in ((n, flatten_rows(gradient)) for n, gradient in gradients.items()):
            explained = 1.0 - (guess - true).square().sum() / true.square().sum()
            found.setdefault(n, []).append((_cosine(guess, true), float(explained)))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def _means(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*values, strict=True)
    return sum(first) / len(values), sum(second) / len(values)


def diagnose_run(path: Path, bptts: str, device: torch.device, data_dir: Path | None = None) -> Diagnosis:
    """`diagnose` a run's best weights: prints two tables, writes diagnostics.json and diagnostics.png.

    Where training measured its trust (`--audit`), the plot shows it too.

    Raises:
      UsageError: there is no such run, or `bptts` is not a list of lengths from 1 to 60.
    """
    try:
        lengths = sorted({int(text) for text in bptts.split(",")})
    except ValueError:
        lengths = [0]
    if not 1 <= lengths[0] <= lengths[-1] <= STRETCH // 2:
        raise UsageError(f"--bptt {bptts}: give lengths from 1 to {STRETCH // 2}, separated by commas")
    run, config = load_run(path, device, data_dir), Run.open(path).config
    if not isinstance(config, TrainConfig):
        raise UsageError(f"{path}: not a recurrent run; there is no truncation to diagnose")
    context = config.context_spec.window
    found = diagnose(run.model, run.data, context=context, weight=config.weight, bptts=lengths)
    print(f"{path}: {run.data.name}, {config.method}, trained with T={config.bptt}, validation split")
    print(
        markdown_table(
            ["core gradient against full BPTT", "T", "cosine", "relative error"],
            (
                [q.estimator, str(q.bptt), f"{q.cosine:.3f}", f"{q.relative_error:.3f}"]
                for q in found.parameters
            ),
        )
    )
    if found.boundaries:
        print(
            markdown_table(
                ["synthetic gradient against the gradient of", "T", "cosine", "explained"],
                (
                    [_horizon(q.horizon), str(q.bptt), f"{q.cosine:.3f}", f"{q.explained:.3f}"]
                    for q in found.boundaries
                ),
            )
        )
    write_atomically(path / "diagnostics.json", (json.dumps(asdict(found), indent=1) + "\n").encode())
    trust = [(row["symbols"], row["trust"]) for row in Run.open(path).rows() if "trust" in row]
    panels = [Panel("symbols trained on", "trust", {"trust": trust}, logarithmic=False)] if trust else []
    save_lines(path / "diagnostics.png", [*_panels(found), *panels])
    return found


def _horizon(windows: int) -> str:
    return "all that follows" if windows == 0 else f"the next {windows} window{'s' if windows > 1 else ''}"


def _panels(found: Diagnosis) -> list[Panel]:
    errors: dict[str, list[tuple[float, float]]] = {}
    for quality in found.parameters:
        errors.setdefault(quality.estimator, []).append((quality.bptt, quality.relative_error))
    panels = [Panel("T", "relative error of the core's gradient", errors)]
    reach: dict[str, list[tuple[float, float]]] = {}
    for boundary in found.boundaries:
        if boundary.horizon:
            steps = boundary.horizon * boundary.bptt
            reach.setdefault(f"T={boundary.bptt}", []).append((steps, boundary.explained))
    if reach:
        panels.append(Panel("steps ahead", "explained share of the true state gradient", reach))
    return panels
