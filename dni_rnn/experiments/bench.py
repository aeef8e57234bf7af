"""Cost of training: characters per second and memory, with and without synthetic gradients.

The baseline is a hand-written truncated-BPTT loop on `nn.LSTM` that uses nothing of this package. Methods
take turns in one process, so that changes of the machine's speed affect all of them; several processes are
run one after the other, because memory layout makes some processes faster than others throughout.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.task import Corpus
from dni_rnn.errors import UsageError
from dni_rnn.experiments.report import markdown_table
from dni_rnn.files import write_atomically
from dni_rnn.training.cuda_graph import cuda_graph
from dni_rnn.training.learner import choose_device
from dni_rnn.training.loop import device_name, peak_memory
from dni_rnn.training.recurrent import RecurrentLearner

SYMBOLS, EMBEDDING = 50, 128

PLAIN = "plain `nn.LSTM`, truncated BPTT"
DEFAULT = "dni"
METHODS: dict[str, dict[str, Any]] = {
    "bptt": {},
    "bptt+trace": {"trace": 32},
    "dni, linear, context none": {"dni": True, "synthesizer": "linear", "context": "none"},
    "dni, context none": {"dni": True, "context": "none"},
    DEFAULT: {"dni": True},
    "dni+trace": {"dni": True, "trace": 32},
    "dni, as wide as the core": {"dni": True, "synthesizer": "mlp"},
}
"""Rows besides the plain one, and their settings. `dni` alone: the defaults of `--dni`."""


@dataclass(frozen=True)
class Size:
    """One setting to measure: a table row for each method."""

    hidden: int
    bptt: int
    batch_size: int
    device: str
    threads: int
    precision: Literal["float32", "tf32", "bf16"]

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds of the net in one update, forward and backward; those of M are not counted."""
        weights = 4 * self.hidden * (EMBEDDING + self.hidden) + self.hidden * SYMBOLS
        return 3.0 * self.bptt * self.batch_size * weights

    @property
    def symbols(self) -> int:
        return self.bptt * self.batch_size


class Cost(NamedTuple):
    """Cost of one update.

    Attributes:
      milliseconds: median.
      ratio: relative to the first method, median over rounds.
    """

    milliseconds: float
    ratio: float


def time_in_turns(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    block: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Cost]:
    """Time the steps in turn, `rounds` times a block of each; ratios are relative to the first."""
    medians: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(block):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times = []
            for _ in range(block):
                start = clock()
                step()
                times.append(clock() - start)
            medians[name].append(statistics.median(times))
    first = next(iter(medians.values()))
    return {
        name: Cost(
            1e3 * statistics.median(values),
            statistics.median(v / f for v, f in zip(values, first, strict=True)),
        )
        for name, values in medians.items()
    }


def plain_step(size: Size) -> Callable[[], None]:
    """The baseline: an update of truncated BPTT on `nn.LSTM`, without this package."""
    device = torch.device(size.device)
    embedding, readout = nn.Embedding(SYMBOLS, EMBEDDING), nn.Linear(size.hidden, SYMBOLS)
    net = nn.ModuleList([embedding, nn.LSTM(EMBEDDING, size.hidden), readout]).to(device)
    lstm, parameters = net[1], list(net.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True)
    inputs = torch.randint(SYMBOLS, (size.bptt + 1, size.batch_size), device=device)
    state = [torch.zeros(1, size.batch_size, size.hidden, device=device) for _ in range(2)]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=size.precision == "bf16"):
            output, after = lstm(embedding(inputs[:-1]), tuple(state))
            loss = F.cross_entropy(readout(output).flatten(0, 1), inputs[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        state[:] = [leaf.detach() for leaf in after]

    return step


def learner(size: Size, settings: dict[str, Any], graph: bool = True) -> RecurrentLearner:
    """The learner that `dni-rnn train` would use, on random symbols."""
    config = RecurrentConfig(
        hidden=size.hidden, bptt=size.bptt, batch_size=size.batch_size, embedding=EMBEDDING,
        precision=size.precision, graph=graph, **settings,
    )  # fmt: skip
    length = size.batch_size * (200 * size.bptt) + 1
    text = np.random.default_rng(0).integers(0, SYMBOLS, length, dtype=np.uint8)
    symbols = tuple(chr(ord("A") + i) for i in range(SYMBOLS))
    return RecurrentLearner(config, Corpus("random", symbols, text, text, text), torch.device(size.device))


def _steps(size: Size) -> dict[str, Callable[[], object]]:
    steps: dict[str, Callable[[], object]] = {PLAIN: plain_step(size)}
    for name, settings in METHODS.items():
        steps[name] = learner(size, settings).update
    if size.device == "cuda":
        for name in ("bptt", DEFAULT):
            steps[f"{name}, --no-graph"] = learner(size, METHODS[name], graph=False).update
    return steps


def _clock(size: Size) -> Callable[[], float]:
    if size.device == "cuda":
        return _synchronized
    # With one thread, process time excludes what other processes take of a shared machine.
    return time.process_time if size.threads == 1 else time.perf_counter


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(size: Size, rounds: int) -> dict[str, Cost]:
    """All methods at one size, in this process."""
    torch.set_num_threads(size.threads)
    # On a GPU many updates per measurement, so that synchronisation does not count.
    at_once = 20 if size.device == "cuda" else 1
    steps = {name: functools.partial(_repeat, step, at_once) for name, step in _steps(size).items()}
    seconds = time_in_turns({PLAIN: steps[PLAIN]}, 1, 1, _clock(size))[PLAIN].milliseconds / 1e3
    block = max(3, min(40, round(0.25 / seconds)))
    found = time_in_turns(steps, rounds, block, _clock(size))
    return {name: Cost(cost.milliseconds / at_once, cost.ratio) for name, cost in found.items()}


def _repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def memory(size: Size, name: str) -> float:
    """Peak megabytes of a method beyond those of a tiny model; call it in a fresh process."""
    torch.set_num_threads(size.threads)
    device = torch.device(size.device)
    plain_step(replace(size, hidden=4, bptt=1))()  # libraries allocate their memory
    before = peak_memory(device)
    step = plain_step(size) if name == PLAIN else learner(size, METHODS[name]).update
    _repeat(step, 6)
    return max(0, peak_memory(device) - before) / 1e6


def matmul_rate(size: Size) -> float:
    """Multiply-adds per second of one large square matrix multiplication, the best of several."""
    torch.set_num_threads(size.threads)
    edge = 8192 if size.device == "cuda" else 1536
    dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
    if size.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    a, b = (torch.randn(edge, edge, device=size.device).to(dtype) for _ in range(2))
    clock, best = _clock(size), float("inf")
    for _ in range(6):
        start = clock()
        torch.mm(a, b)
        best = min(best, clock() - start)
    return edge**3 / best


def floor(size: Size) -> float:
    """Milliseconds of 2 T consecutive matrix multiplications, (B, H) times (H, 4 H)."""
    torch.set_num_threads(size.threads)
    weight = torch.randn(size.hidden, 4 * size.hidden, device=size.device) * 1e-3
    start_from = torch.randn(size.batch_size, size.hidden, device=size.device)

    def chain() -> None:
        x = start_from
        for _ in range(2 * size.bptt):
            x = (x @ weight)[:, : size.hidden]

    chain()
    work = cuda_graph(chain) if size.device == "cuda" else chain
    return time_in_turns({"floor": work}, 5, 5, _clock(size))["floor"].milliseconds


def shares(size: Size, updates: int = 30) -> dict[str, float]:
    """Time of the parts of an update by the default method, as fractions of it; on a GPU without a graph."""
    torch.set_num_threads(size.threads)
    clock, spent = _clock(size), {}
    trained = learner(size, METHODS[DEFAULT], graph=False)

    def watch(owner: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = inner(*args, **kwargs)
            spent.setdefault(name, []).append(clock() - start)
            return result

        setattr(owner, method, timed)

    model = trained.model
    watch(model.core.interface, "receive", "M at the start of the window")
    watch(model, "unroll", "embedding and LSTM, forward")
    watch(model.core.interface, "send", "M at its end")
    watch(trained.record.optimizer, "zero_grad", "zeroing")
    watch(trained.record.optimizer, "step", "Adam")
    with _watched_backward(clock, spent):
        watch(trained, "update", "all")
        _repeat(lambda: trained.update(), updates)
    medians = {name: statistics.median(times[5:]) for name, times in spent.items()}
    whole = medians.pop("all")
    medians["read-out, loss, clipping, the rest"] = whole - sum(medians.values())
    return {name: value / whole for name, value in medians.items()}


@contextmanager
def _watched_backward(clock: Callable[[], float], spent: dict[str, list[float]]) -> Iterator[None]:
    inner = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        start = clock()
        inner(self, *args, **kwargs)
        spent.setdefault("backward, M's included", []).append(clock() - start)

    Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.backward = inner  # type: ignore[method-assign]


def _elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run_bench(
    *,
    hidden: Sequence[int],
    bptt: Sequence[int],
    batch_size: int,
    device: str,
    threads: int,
    precision: Literal["float32", "tf32", "bf16"],
    processes: int,
    rounds: int,
    out: Path | None,
) -> None:
    """Measure every combination of `hidden` and `bptt`, and print the report piece by piece; also write it to
    `out`, if given. The arguments are the options of `dni-rnn bench`.

    Raises:
      UsageError: a number is not positive, there is no such device, or the file cannot be written.
    """
    given = {"hidden": hidden, "bptt": bptt, "batch-size": [batch_size], "threads": [threads]}
    given |= {"processes": [processes], "rounds": [rounds]}
    for name, values in given.items():
        if not values or min(values) < 1:
            raise UsageError(f"--{name} must be positive")
    if min(hidden) < 4 or batch_size < 2:
        raise UsageError("--hidden must be at least 4 and --batch-size at least 2")
    kind = choose_device(device).type
    sizes = [Size(units, steps, batch_size, kind, threads, precision) for units in hidden for steps in bptt]
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: cannot be written (no such folder); make it or give another")
    text = ""
    for piece in report(sizes, processes, rounds):
        print(piece, end="", flush=True)
        text += piece
    if out is not None:
        write_atomically(out, text.encode())


def report(
    sizes: Sequence[Size], processes: int, rounds: int, elsewhere: Callable[..., Any] = _elsewhere
) -> Iterator[str]:
    """The report in Markdown, piece by piece; `elsewhere` calls a function in a fresh process."""
    first = sizes[0]
    device = torch.device(first.device)
    # By default the C allocator maps and unmaps larger tensors at every update, in some processes only, which
    # costs as much as what is measured here. Processes read these variables when they start.
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**30), MALLOC_TRIM_THRESHOLD_=str(2**32))
    rate = elsewhere(matmul_rate, first)
    about = [
        f"torch {torch.__version__}",
        device_name(device) if device.type == "cuda" else f"{first.threads} CPU thread(s)",
        first.precision,
        f"batch {first.batch_size}",
        f"medians of {processes} processes",
    ]
    if _clock(first) is time.process_time:
        about.append("time that the process computed")
    yield f"# Speed and memory\n\n`{shlex.join(['dni-rnn', *sys.argv[1:]])}`: {', '.join(about)}. One large "
    yield f"matrix product runs at {2e-9 * rate:,.1f} GFLOP/s.\n\n"
    lines, floors = [], []
    for size in sizes:
        runs = [elsewhere(measure, size, rounds) for _ in range(processes)]
        lines += [_line(size, name, [run[name] for run in runs], rate, elsewhere) for name in runs[0]]
        floors.append(f"{elsewhere(floor, size):.2f} ms at hidden {size.hidden} and T {size.bptt}")
    yield markdown_table(COLUMNS, lines)
    yield NOTES.format(floors="; ".join(floors))
    parts = {size: elsewhere(shares, size) for size in sizes}
    rows = [[name, *(f"{100 * parts[size][name]:.0f} %" for size in sizes)] for name in parts[first]]
    yield markdown_table(["", *(f"hidden {size.hidden}, T {size.bptt}" for size in sizes)], rows)


COLUMNS = [
    "hidden", "T", "method", "ms", "ratio to plain", "of the processes", "characters/s", "MB", "matmul",
]  # fmt: skip

NOTES = """
*Ratio*: medians over rounds, then over processes; the range is that of the processes. *MB*: the most that a
process needs beyond what a tiny model needs. *Matmul*: multiply-adds of the net, forward and backward,
without the synthesizer's, as a share of what the large multiplication does in that time (above 1 where
oneDNN, which computes an LSTM on a CPU, is faster than the library of other multiplications). Alone, 2 T
multiplications of the state with the recurrent weights, one after the other, take {floors}.

Where the time of an update with `--dni` goes:

"""


def _line(size: Size, name: str, costs: list[Cost], rate: float, elsewhere: Callable[..., Any]) -> list[str]:
    milliseconds = statistics.median(cost.milliseconds for cost in costs)
    ratios = [cost.ratio for cost in costs]
    return [
        str(size.hidden),
        str(size.bptt),
        name,
        f"{milliseconds:.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{1e3 * size.symbols / milliseconds:,.0f}",
        f"{elsewhere(memory, size, name):.0f}" if name == PLAIN or name in METHODS else "–",
        f"{1e3 * size.multiply_adds / milliseconds / rate:.2f}",
    ]
