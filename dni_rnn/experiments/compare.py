"""Compare runs, finished or not, by what they have written so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dni_rnn.config import RecurrentConfig, from_json
from dni_rnn.data.task import config_of, installed_tasks
from dni_rnn.errors import UsageError
from dni_rnn.experiments.plots import Curve, Panel, check_format, save_curves, save_lines
from dni_rnn.experiments.report import markdown_table
from dni_rnn.files import name_of, read_json, read_jsonl, understood
from dni_rnn.metrics import BPC, LOGGED, Metric, Point, number


@dataclass(frozen=True)
class RunSoFar:
    """A run as far as it got.

    Attributes:
      name: its name in tables and plots.
      data, method, depth, depth_name: of the run and its configuration.
      symbols, seconds: symbols trained on and seconds of training so far.
      points: its validations.
      test: the metric on the test split; None while the run is unfinished.
      metric: its metric.
    """

    name: str
    data: str
    method: str
    depth: int
    symbols: int
    seconds: float
    points: list[Point]
    test: float | None
    metric: Metric = BPC
    depth_name: str = "T"

    @property
    def best(self) -> float | None:
        """The best validation; None before the first."""
        return self.metric.best(point.value for point in self.points) if self.points else None


def read_run(path: Path, name: str) -> RunSoFar:
    """Read a run directory; the run is called `name`.

    Raises:
      UsageError: there is no run, or its files cannot be read.
    """
    file = path / "config.json"
    if not file.exists():
        raise UsageError(f"{path}: no run there (config.json is missing)")
    about, summary, metrics = read_json(file), path / "summary.json", path / "metrics.jsonl"
    ended = read_json(summary) if summary.exists() else None
    rows = read_jsonl(metrics) if metrics.exists() else []
    with understood(path):
        last = rows[-1] if rows else {"symbols": 0, "seconds": 0.0}
        if ended is not None and last["symbols"] > ended["symbols"]:
            ended = None  # resumed with a larger budget: the summary is that of the smaller one
        kind = installed_tasks().get(str(about.get("task")))
        config = from_json(RecurrentConfig if kind is None else config_of(kind), about["config"], file)
        return RunSoFar(
            name,
            str(about["data"]),
            config.method,
            config.depth,
            number(last["symbols"]),
            number(last["seconds"]),
            config.metric.points(rows),
            None if ended is None else number(ended[f"test_{config.metric.key}"]),
            config.metric,
            config.depth_name,
        )


def render_comparison(runs: Sequence[RunSoFar]) -> str:
    """A table of runs with the same metric. Characters/s excludes validation."""
    metric = runs[0].metric
    header = [
        "run", "data", "method", runs[0].depth_name, f"{metric.unit}s", f"best valid {metric.label}",
        f"test {metric.label}", f"{metric.unit}s/s", "seconds",
    ]  # fmt: skip
    lines = [
        [
            run.name,
            run.data,
            run.method,
            str(run.depth),
            f"{run.symbols:,}",
            "–" if run.best is None else f"{run.best:.{metric.digits}f}",
            "unfinished" if run.test is None else f"{run.test:.{metric.digits}f}",
            f"{run.symbols / run.seconds:,.0f}" if run.seconds else "–",
            f"{run.seconds:,.1f}",
        ]
        for run in runs
    ]
    return markdown_table(header, lines)


def plot_runs(runs: Sequence[RunSoFar], out: Path) -> bool:
    """Overlay the validation curves; False, and no plot, when no run has been validated yet."""
    curves = [Curve(run.name, run.method, run.depth, [run.points]) for run in runs]
    if not any(run.points for run in runs):
        return False
    save_curves([out], curves, runs[0].metric)
    return True


def plot_layers(path: Path) -> bool:
    """Draw the logged diagnostics of a run's synthetic gradients, per cut, to layers.svg in its directory.

    Against updates, a line per cut: cosine similarity with the true gradient, explained variance, trust, and
    the loss of the synthesizer. False, and no plot, without logged agreement (`--agreement-every`).
    """
    rows = read_jsonl(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    panels = []
    for name in LAYERED:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for key, value in row.items():
                if key.startswith(f"{name}_"):
                    cut = f"cut {key.removeprefix(f'{name}_')}"
                    lines.setdefault(cut, []).append((float(row["step"]), value))
        panels.append(Panel("updates", LOGGED[name], lines))
    if not all(panel.lines for panel in panels):
        return False
    save_lines(path / "layers.svg", panels)
    return True


LAYERED = ("cosine", "explained", "trust", "synthesizer_loss")
"""Diagnostics logged per cut (`LOGGED`)."""


def compare_runs(paths: Sequence[Path], out: Path) -> None:
    """Print a table of runs and save the plot of their validation curves."""
    check_format(out)
    names = [name_of(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    if len({run.metric for run in runs}) > 1:
        raise UsageError(f"{paths[0]} and others are judged by different metrics; compare runs of one kind")
    print(render_comparison(runs), end="")
    for path in paths:
        with understood(path / "metrics.jsonl"):
            if plot_layers(path):
                print(f"synthetic gradients layer by layer: {path / 'layers.svg'}")
    print(f"validation curves: {out}" if plot_runs(runs, out) else "no validation yet: no plot")
