"""The metrics of tasks. Nothing here imports torch or matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dni_rnn.errors import UsageError


class Point(NamedTuple):
    """One validation."""

    symbols: int  # trained on so far
    seconds: float  # of training so far
    value: float
    step: float | None = None  # updates so far; None where it is not known


@dataclass(frozen=True)
class Metric:
    """The number that a task is judged by.

    Attributes:
      key: rows and summaries hold `valid_KEY`, `best_valid_KEY` and `test_KEY`; plots are named after it.
      label: what tables and plots call it.
      meaning: the label in words.
      lower_is_better: whether a smaller number is a better one.
      unit: what `symbols` counts in rows and summaries.
      digits: decimals in a table.
      logarithmic: drawn on a logarithmic axis where values differ more than tenfold.
      validated: whether it is measured on held-out data; if not, rows and summaries hold one number, KEY.
    """

    key: str
    label: str
    meaning: str
    lower_is_better: bool = True
    unit: str = "character"
    digits: int = 3
    validated: bool = True
    logarithmic: bool = False

    @property
    def score_key(self) -> str:
        """Key of the final score in rows and summaries."""
        return f"test_{self.key}" if self.validated else self.key

    @property
    def score_label(self) -> str:
        """Label of the final score in tables."""
        return f"test {self.label}" if self.validated else self.label

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return min(values) if self.lower_is_better else max(values)

    def reached(self, value: float, target: float) -> bool:
        """Whether `value` is as good as `target` or better."""
        return value <= target if self.lower_is_better else value >= target

    def points(self, validations: Iterable[Mapping[str, Any]]) -> list[Point]:
        """The validation curve, from rows of `curve`, `climbs` or metrics.jsonl; other rows are skipped."""
        name = f"valid_{self.key}" if self.validated else self.key
        return [
            Point(number(row["symbols"]), number(row["seconds"]), number(row[name]), row.get("step"))
            for row in validations
            if name in row
        ]


def number(value: Any) -> Any:
    """The same value; raises `TypeError` where a damaged file holds anything but a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


BPC = Metric("bpc", "BPC", "bits per character")
ERROR = Metric(
    "error", "error %", "wrongly classified examples, in percent", unit="example", logarithmic=True
)

COUNTS = Metric("error", "error %", "wrong counts, in percent, mean of networks A and B", unit="digit")
COUNTS_OF_EACH = (
    Metric("error_fast", "A error %", "wrong counts of network A, in percent", unit="digit"),
    Metric("error_slow", "B error %", "wrong counts of network B, in percent", unit="digit"),
)
"""For two networks at different rates: COUNTS selects the best weights, these are reported."""

RMSE = Metric(
    "rmse", "RMS error", "root mean square error, in standard deviations of what is learnt", unit="point"
)

SOLVED = Metric(
    "solved", "longest solved", "what the task got to before the end, by the training loss",
    lower_is_better=False, unit="symbol", digits=1, validated=False,
)  # fmt: skip
"""For tasks with a curriculum. Their rows also hold a loss at the current level, which says little."""


def metric_of(row: Mapping[str, Any]) -> Metric:
    """The metric that a finished row, or a summary, is judged by.

    Raises:
      UsageError: it holds no known metric.
    """
    if SOLVED.key in row:
        return SOLVED
    if f"test_{COUNTS_OF_EACH[0].key}" in row:
        return COUNTS
    for metric in (BPC, ERROR, RMSE):
        if f"test_{metric.key}" in row:
            return metric
    raise UsageError(f"a row of the task {row.get('task')!r} holds no test score that a report knows")


def metrics_of(row: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metrics that a finished row is reported by: one per network."""
    metric = metric_of(row)
    return COUNTS_OF_EACH if metric is COUNTS else (metric,)


LOGGED: Mapping[str, str] = {
    "trust": "trust: coefficient of the true on the synthetic gradient",
    "cosine": "cosine similarity with the true gradient",
    "explained": "explained variance of the true gradient",
    "synthesizer_loss": "loss of the synthesizer",
    "state_rms": "root mean square of the state",
}
"""Logged diagnostics and their labels; those of a cut are called NAME_CUT.

Trust is a least-squares coefficient, clipped to [0, 1]; explained variance is 1 − |ĝ − g|² / |g|², uncentred.
"""
