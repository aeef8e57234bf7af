"""Validation curves as pictures. The only module that imports matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from dni_rnn.errors import UsageError
from dni_rnn.metrics import Metric, Point

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""One per depth (T, or layers): Okabe and Ito's colour-blind-safe set, without the yellow lost on white."""

LINES = ("-", "--", ":", "-.")
"""One per method."""

MARKERS = ("", "o", "s", "^", "D", "v")
"""For curves of one method and one depth."""

FORMATS = (".png", ".svg", ".pdf")

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "dni-rnn",  # the same picture is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


class Curve(NamedTuple):
    """What one line of the plot shows: the validations of one run, or of one run per seed.

    Attributes:
      label: in the legend.
      method: decides the line style.
      depth: T or layers, decides the colour.
      runs: the validations of each run, in order.
    """

    label: str
    method: str
    depth: int
    runs: list[list[Point]]


class MeanPoint(NamedTuple):
    """What several runs have reached after the same number of symbols."""

    symbols: int
    seconds: float
    value: float
    sd: float  # of the values, n - 1 below the fraction; 0 for a single run


class Panel(NamedTuple):
    """One of the panels of `save_lines`."""

    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]  # by label
    logarithmic: bool = True  # the horizontal axis


def mean_curve(runs: Sequence[Sequence[Point]]) -> list[MeanPoint]:
    """Average runs wherever all of them were validated after the same number of symbols."""
    by_symbols = [{point.symbols: point for point in run} for run in runs]
    curve = []
    for symbols in sorted(set.intersection(*(set(points) for points in by_symbols))):
        points = [each[symbols] for each in by_symbols]
        values = [point.value for point in points]
        sd = stdev(values) if len(values) > 1 else 0.0
        curve.append(MeanPoint(symbols, fmean(point.seconds for point in points), fmean(values), sd))
    return curve


def check_format(path: Path) -> None:
    """Raises `UsageError` when the ending of `path` is none that can be drawn."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: a plot's name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def save_curves(paths: Sequence[Path], curves: Sequence[Curve], metric: Metric) -> None:
    """Draw `curves` against symbols and against seconds, and save that as each of `paths`.

    Lines are means over runs, bands one standard deviation to either side. Equal curves give equal
    SVG files.

    Args:
      paths: png, svg or pdf by their ending.
      curves: what to draw; those with nothing to average (`mean_curve`) are left out.
      metric: whose validations they are.
    Raises:
      UsageError: a file has another ending or cannot be written.
    """
    _save(paths, lambda: _draw([curve for curve in curves if mean_curve(curve.runs)], metric))


def save_lines(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels of plain lines side by side and save them as `path` (see `save_curves`)."""

    def draw() -> Figure:
        figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axes, panel)
        return figure

    _save([path], draw)


def save_surface(path: Path, surfaces: dict[str, Any], panel: Panel) -> None:
    """Draw heights (n, n) over [-1, 1] × [-1, 1] in the colours of the first, and a panel beside them."""

    def draw() -> Figure:
        figure = Figure(figsize=(4.2 * (len(surfaces) + 1), 3.8), layout="constrained")
        axes = figure.subplots(1, len(surfaces) + 1)
        first = next(iter(surfaces.values()))
        for place, (name, heights) in zip(axes, surfaces.items(), strict=False):
            image = place.imshow(
                heights.T, origin="lower", extent=(-1, 1, -1, 1), vmin=first.min(), vmax=first.max()
            )
            place.set_title(name)
            place.grid(visible=False)
        figure.colorbar(image, ax=axes[: len(surfaces)])
        _draw_panel(axes[-1], panel)
        axes[-1].set_yscale("log")
        return figure

    _save([path], draw)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for number, (label, points) in enumerate(panel.lines.items()):
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        style |= {"marker": "o", "markersize": 4} if panel.logarithmic else {}
        axes.plot(x, y, label=label, **style)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if panel.logarithmic:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}" if panel.logarithmic else EngFormatter(sep=""))
    axes.legend(frameon=False)


def _save(paths: Sequence[Path], draw: Callable[[], Figure]) -> None:
    for path in paths:
        check_format(path)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has configured
        matplotlib.rcParams.update(SETTINGS)
        figure = draw()
        for path in paths:
            # Neither dates nor versions, which would change the file although the picture is the same.
            nothing = {"Software": None} if path.suffix == ".png" else {"Creator": None}
            if path.suffix == ".svg":
                nothing["Date"] = None
            elif path.suffix == ".pdf":
                nothing |= {"CreationDate": None, "Producer": None}
            try:
                figure.savefig(path, dpi=150, metadata=nothing)
            except OSError as error:
                raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def _draw(curves: Sequence[Curve], metric: Metric) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    by_symbols, by_seconds = figure.subplots(1, 2, sharey=True)
    handles = []
    for curve, style in zip(curves, _styles(curves), strict=True):
        # Validations come after the same numbers of symbols in every run, so they can be averaged.
        lines = [mean_curve(curve.runs)] if metric.validated else [mean_curve([run]) for run in curve.runs]
        for points in lines:
            # A line of a single validation shows only as a marker.
            marker = style["marker"] or ("." if len(points) == 1 else "")
            low = [p.value - p.sd for p in points]
            high = [p.value + p.sd for p in points]
            for axes, x in (
                (by_symbols, [p.symbols for p in points]),
                (by_seconds, [p.seconds for p in points]),
            ):
                handle = axes.plot(x, [p.value for p in points], **style | {"marker": marker})[0]
                axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        handles.append(handle)
    label = f"validation {metric.label} ({metric.meaning})" if metric.validated else metric.label
    by_symbols.set(xlabel=f"{metric.unit}s of training", ylabel=label)
    by_symbols.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_seconds.set(xlabel="seconds of training (logarithmic)", xscale="log")  # T changes speed tenfold
    by_seconds.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_seconds.xaxis.set_major_formatter("{x:,g}")
    by_seconds.xaxis.set_minor_locator(NullLocator())
    figure.legend(
        handles,
        [curve.label for curve in curves],
        loc="outside lower center",
        ncols=4,
        handlelength=3.5,
        frameon=False,
    )
    return figure


def _styles(curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    lengths = sorted({curve.depth for curve in curves})
    methods = sorted({curve.method for curve in curves})
    drawn: Counter[tuple[str, int]] = Counter()
    for curve in curves:
        alike = drawn[curve.method, curve.depth]
        drawn[curve.method, curve.depth] += 1
        yield {
            "color": COLOURS[lengths.index(curve.depth) % len(COLOURS)],
            "linestyle": LINES[methods.index(curve.method) % len(LINES)],
            "marker": MARKERS[alike % len(MARKERS)],
            "markersize": 4,
        }
