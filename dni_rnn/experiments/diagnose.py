"""`dni-rnn diagnose`: gradient quality of a run on held-out data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.task import Data, Split
from dni_rnn.errors import UsageError
from dni_rnn.experiments.plots import Panel, save_lines
from dni_rnn.experiments.report import markdown_table
from dni_rnn.files import write_atomically
from dni_rnn.gradient_quality import Diagnosis, Stretches, diagnose
from dni_rnn.recurrent import SequenceModel
from dni_rnn.training.inference import load_run
from dni_rnn.training.run_directory import Run

ROWS = 128
STRETCH = 120
STRETCHES = 6


def held_out_stretches(model: SequenceModel, data: Data, context: int, split: Split = "valid") -> Stretches:
    """6 segments of 120 steps of up to 128 rows, with the states that the model carries there.

    For a T that does not divide 120, a segment is the largest multiple of T below it.

    Raises:
      UsageError: the split is too short.
    """
    device = next(model.parameters()).device
    rows = min(ROWS, data.stream(split, 1, 0).size // (2 * STRETCH * STRETCHES))
    if rows < 1:
        need = 2 * STRETCH * STRETCHES
        raise UsageError(
            f"{data.name}: its {split} split is too short to measure on; it takes {need} symbols"
        )
    stream = data.stream(split, rows, 0).to(device)
    state, places = model.initial_state(rows), []
    with torch.no_grad():
        for _ in range(STRETCHES):
            places.append((stream.state_dict(), state))
            for _ in range(2):
                window = stream.window(STRETCH, context)
                _, state = model(window.inputs, model.reset(state, window.start.done))

    def stretches(bptt: int) -> list:
        found = []
        for position, at in places:
            stream.load_state_dict(position)
            found.append(([stream.window(bptt, context) for _ in range(STRETCH // bptt)], at))
        return found

    return stretches


def diagnose_model(
    model: SequenceModel,
    data: Data,
    context: int,
    weight: float,
    bptts: Sequence[int],
    discount: float = 1.0,
) -> Diagnosis:
    """`diagnose` on `held_out_stretches`.

    Args:
      context: how many symbols the synthesizer is conditioned on.
      weight: weight of a symbol's loss, as in training (`RecurrentConfig.weight`).
      bptts: the truncation lengths T to measure.
      discount: discount per step, as in training.
    """
    return diagnose(model, held_out_stretches(model, data, context), weight, bptts, discount)


def diagnose_run(path: Path, bptts: str, device: torch.device, data_dir: Path | None = None) -> Diagnosis:
    """`diagnose` a run's best weights: prints two tables, writes diagnostics.json and diagnostics.png.

    If training measured trust (`--audit`), the plot shows it too.

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
    if not isinstance(config, RecurrentConfig):
        raise UsageError(f"{path}: not a recurrent run; there is no truncation to diagnose")
    found = diagnose_model(
        run.model, run.data, config.context_window, config.weight, lengths, config.discount
    )
    print(f"{path}: {run.data.name}, {config.method}, trained with T={config.bptt}, validation split")
    columns = ["core gradient against full BPTT", "T", "cosine", "relative error", "bias", "gain", "cost"]
    lines = [
        [
            q.estimator,
            str(q.bptt),
            *(f"{value:.3f}" for value in (q.cosine, q.relative_error, q.bias, q.gain)),
            f"{q.cost:.1f}",
        ]
        for q in found.parameters
    ]
    print(markdown_table(columns, lines))
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
