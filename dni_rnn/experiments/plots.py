"""Plots. The only module that imports matplotlib.

The metadata of a picture hold a `fingerprint` of its data, so that a stale one is recognised although another
version of matplotlib would write another file. SVG files follow the reader's choice of a light or dark page;
PNG files are light.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from dni_rnn.errors import UsageError
from dni_rnn.files import write_atomically
from dni_rnn.metrics import Metric, Point

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""One per depth (T, or layers), or per method where there is a single depth: Okabe and Ito's set
for the colour-blind, without the yellow lost on white, and with a grey for the black lost on a dark page.
"""

LINES = ("-", "--", ":", "-.")
"""One per method, or, where there is a single depth, for curves of one method."""

MARKERS = ("", "o", "s", "^", "D", "v")
"""For curves of one method and one depth."""

LEGEND_COLUMNS = 4

FORMATS = (".png", ".svg", ".pdf")

INK, INK_ON_DARK = "#1f2328", "#e6edf3"
DARK = "".join(f'[style*="{what}: {INK}"]{{{what}:{INK_ON_DARK}!important}}' for what in ("fill", "stroke"))

SETTINGS: dict[Any, Any] = {
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor", "titlecolor")},
    "axes.facecolor": "none",
    "svg.hashsalt": "dni-rnn",  # the same picture is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


Logged = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""Logged diagnostics, by quantity and label: pairs (updates, value)."""


class Curve(NamedTuple):
    """One line of the plot: the validations of one run, or of one run per seed.

    If all points have their update, they are drawn against updates too.

    Attributes:
      label: in the legend.
      method: decides the line style, or the colour where there is a single depth.
      depth: T or layers, decides the colour.
      runs: the validations of each run, in order.
    """

    label: str
    method: str
    depth: int
    runs: list[list[Point]]


class MeanPoint(NamedTuple):
    """Mean over several runs after the same number of symbols."""

    symbols: int
    seconds: float
    value: float
    sd: float  # of the values, with n - 1 in the denominator; 0 for a single run
    step: float | None = None  # updates, mean over the runs


class Panel(NamedTuple):
    """One of the panels of `save_lines`."""

    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]  # by label
    logarithmic: bool = True  # the horizontal axis


class Dot(NamedTuple):
    """One line of a `DotPanel`: a mean, its standard deviation (0 for a single value) and both as text."""

    label: str
    value: float
    sd: float
    text: str


class DotPanel(NamedTuple):
    """One of the panels of `save_dots`."""

    title: str
    x: str
    dots: list[Dot]  # from top to bottom


def mean_curve(runs: Sequence[Sequence[Point]]) -> list[MeanPoint]:
    """Average runs wherever all of them were validated after the same number of symbols."""
    by_symbols = [{point.symbols: point for point in run} for run in runs]
    curve = []
    for symbols in sorted(set.intersection(*(set(points) for points in by_symbols))):
        points = [each[symbols] for each in by_symbols]
        values = [point.value for point in points]
        sd = stdev(values) if len(values) > 1 else 0.0
        steps = [point.step for point in points if point.step is not None]
        step = fmean(steps) if len(steps) == len(points) else None
        curve.append(MeanPoint(symbols, fmean(point.seconds for point in points), fmean(values), sd, step))
    return curve


def check_format(path: Path) -> None:
    """Raises `UsageError` when `path` has no suffix of `FORMATS`."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: a plot's name must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def save_curves(paths: Sequence[Path], curves: Sequence[Curve], metric: Metric) -> None:
    """Draw `curves` against symbols, seconds and updates, and save that as each of `paths`.

    Lines are means over runs, bands one standard deviation to either side. Equal curves give equal
    SVG files.

    Args:
      paths: png, svg or pdf by their ending.
      curves: what to draw; those with nothing to average (`mean_curve`) are left out.
      metric: metric of the validations.
    Raises:
      UsageError: a file has another suffix.
    """
    drawn = [curve for curve in curves if mean_curve(curve.runs)]
    _save(paths, lambda: _draw(drawn, metric), fingerprint(curves, metric))


def save_logged(paths: Sequence[Path], curves: Sequence[Curve], logged: Logged) -> None:
    """Draw logged diagnostics, a panel for each quantity, against updates (see `save_curves`).

    Args:
      paths: png, svg or pdf by their ending.
      curves: label, method and depth of the lines.
      logged: the diagnostics.
    """

    def draw() -> Figure:
        columns = min(len(logged), 3)
        rows = -(-len(logged) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.8 * rows + 0.8), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        handles = {}
        for axes, (quantity, lines) in zip(grid, logged.items(), strict=False):
            for curve, style in zip(curves, _styles(curves), strict=True):
                if curve.label in lines:
                    x, y = zip(*lines[curve.label], strict=True)
                    style["markevery"] = max(1, len(x) // 8)
                    handles[curve.label] = axes.plot(x, y, **style)[0]
            axes.set(xlabel="updates", title=quantity)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in [*grid][len(logged) :]:
            axes.remove()
        _legend(figure, handles)
        return figure

    _save(paths, draw, fingerprint(curves, logged))


def fingerprint(*content: Any) -> str:
    """A hash of the contents of a picture."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def fingerprint_of(path: Path) -> str | None:
    """The `fingerprint` that a png or svg file was drawn from."""
    found = re.search(rb"(?:<dc:description>|Description\0)([0-9a-f]{16})", path.read_bytes())
    return found and found[1].decode()


def save_lines(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels of plain lines side by side and save them as `path` (see `save_curves`)."""

    def draw() -> Figure:
        figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axes, panel)
        return figure

    _save([path], draw, fingerprint(panels))


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

    _save([path], draw, fingerprint([panel]))


def save_dots(path: Path, panels: Sequence[DotPanel]) -> None:
    """Draw means with one standard deviation to either side, panels side by side (see `save_curves`).

    The part of a label before its first comma decides the colour.
    """
    kinds = list(dict.fromkeys(dot.label.split(",")[0] for panel in panels for dot in panel.dots))

    def draw() -> Figure:
        most = max(len(panel.dots) for panel in panels)
        figure = Figure(figsize=(3.7 * len(panels), 1.5 + 0.36 * most), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            low, high = (edge(dot.value for dot in panel.dots) for edge in (min, max))
            for y, dot in enumerate(panel.dots):
                colour = COLOURS[kinds.index(dot.label.split(",")[0]) % len(COLOURS)]
                axes.errorbar(dot.value, y, xerr=dot.sd, fmt="o", color=colour, capsize=3)
                # The text of the outermost dots stays inside the panel.
                place = (dot.value - low) / ((high - low) or 1.0)
                side = "left" if place < 0.25 else "right" if place > 0.75 else "center"
                axes.annotate(dot.text, (dot.value, y), (0, 6), textcoords="offset points", ha=side)
            axes.set_yticks(range(len(panel.dots)), [dot.label for dot in panel.dots])
            axes.set_ylim(len(panel.dots) - 0.6, -0.7)
            axes.margins(x=0.18)
            axes.set_xlabel(panel.x, loc="right")
            axes.set_title(panel.title, fontsize="medium", loc="right")
        return figure

    _save([path], draw, fingerprint(panels))


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for number, (label, points) in enumerate(panel.lines.items()):
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        style |= {"marker": "o", "markersize": 4} if panel.logarithmic else {}
        axes.plot(x, y, label=label, **style)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}" if panel.logarithmic else EngFormatter(sep=""))
    axes.legend(frameon=False)


def _save(paths: Sequence[Path], draw: Callable[[], Figure], content: str) -> None:
    for path in paths:
        check_format(path)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's configuration
        matplotlib.rcParams.update(SETTINGS)
        figure = draw()
        for path in paths:
            # No dates or versions, which would change the file of an unchanged picture.
            about = {
                ".png": {"Software": None, "Description": content},
                ".svg": {"Creator": None, "Date": None, "Description": content},
                ".pdf": {"Creator": None, "CreationDate": None, "Producer": None, "Subject": content},
            }[path.suffix]
            picture = io.BytesIO()
            paper = "none" if path.suffix == ".svg" else "white"
            figure.savefig(picture, format=path.suffix[1:], dpi=110, metadata=about, facecolor=paper)
            drawn = picture.getvalue()
            if path.suffix == ".svg":
                style = f"<style>@media (prefers-color-scheme: dark) {{{DARK}}}</style>"
                drawn = drawn.replace(b" <metadata>", f" {style}\n <metadata>".encode(), 1)
            write_atomically(path, drawn)


def _draw(curves: Sequence[Curve], metric: Metric) -> Figure:
    # Every run is validated after the same numbers of symbols, so validations can be averaged.
    lines = {
        curve.label: [mean_curve(curve.runs)]
        if metric.validated
        else [mean_curve([run]) for run in curve.runs]
        for curve in curves
    }
    points = [point for each in lines.values() for line in each for point in line]
    axis = {"symbols": f"{metric.unit}s of training", "seconds": "seconds of training (logarithmic)"}
    if all(point.step is not None for point in points):
        axis["step"] = "updates (logarithmic)"
    rows = -(-len(curves) // LEGEND_COLUMNS)
    figure = Figure(figsize=(5.5 * len(axis), 4.5 + 0.25 * rows), layout="constrained")
    panels = figure.subplots(1, len(axis), sharey=True)
    handles = {}
    for axes, (attribute, label) in zip(panels, axis.items(), strict=True):
        for curve, style in zip(curves, _styles(curves), strict=True):
            for line in lines[curve.label]:
                x = [getattr(p, attribute) for p in line]
                # A line of a single validation shows only as a marker.
                marker = style["marker"] or ("." if len(line) == 1 else "")
                drawn = axes.plot(x, [p.value for p in line], **style | {"marker": marker})
                low, high = ([p.value + sign * p.sd for p in line] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
                handles[curve.label] = drawn[0]
        axes.set_xlabel(label)
        if attribute == "seconds":  # T changes speed tenfold
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            if attribute == "step":  # and the number of updates as much
                axes.set_xscale("log")
                axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    text = f"validation {metric.label}\n({metric.meaning})" if metric.validated else metric.label
    panels[0].set_ylabel(text)
    values = [point.value for point in points]
    if metric.logarithmic and 0 < 10 * min(values) < max(values):
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_locator(NullLocator())
    _legend(figure, handles)
    return figure


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Below the panels, in as many columns as fit the figure; more rows make the figure taller."""
    for columns in range(LEGEND_COLUMNS, 0, -1):
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            handlelength=3.5,
            frameon=False,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    more = -(-len(handles) // columns) - -(-len(handles) // LEGEND_COLUMNS)
    figure.set_figheight(figure.get_figheight() + 0.25 * more)


def _styles(curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    lengths = sorted({curve.depth for curve in curves})
    methods = sorted({curve.method for curve in curves})
    drawn: Counter[tuple[str, int]] = Counter()
    for curve in curves:
        alike = drawn[curve.method, curve.depth]
        drawn[curve.method, curve.depth] += 1
        method = methods.index(curve.method)
        # With a single depth, colours show the methods, and line styles curves of one method.
        colour, line = (lengths.index(curve.depth), method) if len(lengths) > 1 else (method, alike)
        yield {
            "color": COLOURS[colour % len(COLOURS)],
            "linestyle": LINES[line % len(LINES)],
            "marker": MARKERS[alike % len(MARKERS)],
            "markersize": 4,
        }
