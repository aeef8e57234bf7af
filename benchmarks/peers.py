"""One training step of other DNI projects, of this one and of plain truncated BPTT, in turns in one process.

    python benchmarks/peers.py --koz4k DNI.PY --mtanghu DNI.PY --pytorch-dni

No code of another project is kept here. `--koz4k` is `dni.py` of https://github.com/koz4k/dni-pytorch
(b14a07c), `--mtanghu` that of https://github.com/mtanghu/DNI-RNN (3c3cca7), each in your own clone;
`--pytorch-dni` lets pip fetch pytorch-dni 0.0.1 from PyPI into a temporary folder. A project that is not
given is not measured. Each trains the same net with the same optimizer, as its own example does. The rows of
one call replace those of the last, and table.md is written from them (--report measures nothing).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn import Interface, MLPSynthesizer
from dni_rnn.errors import UsageError
from dni_rnn.experiments.bench import (
    EMBEDDING,
    METHODS,
    SYMBOLS,
    Cost,
    Size,
    learner,
    plain_step,
    time_in_turns,
)
from dni_rnn.experiments.report import markdown_table
from dni_rnn.files import read_jsonl, write_atomically, write_jsonl
from dni_rnn.training.run_directory import machine_name, source_commit

HIDDEN, BATCH, BPTT = 256, 32, 8
SIZE = Size(HIDDEN, BPTT, BATCH, "cpu", 1, "float32")
WINDOWS_PER_SEQUENCE = 10
"""After how many windows mtanghu's synthesizer makes its step."""

PYPI = "pytorch-dni==0.0.1"
PLAIN = "plain `nn.LSTM`, truncated BPTT"
State = tuple[Tensor, Tensor]


class Net(nn.Module):
    """The net that every step here trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(SYMBOLS, EMBEDDING), nn.LSTM(EMBEDDING, HIDDEN)
        self.readout = nn.Linear(HIDDEN, SYMBOLS)
        self.inputs = torch.randint(SYMBOLS, (BPTT + 1, BATCH))

    def forward(self, state: State) -> tuple[Tensor, State]:
        """The loss of a window, and the state at its end."""
        output, state = self.lstm(self.embedding(self.inputs[:-1]), state)
        return F.cross_entropy(self.readout(output).flatten(0, 1), self.inputs[1:].flatten()), state


def zero_state() -> State:
    return torch.zeros(1, BATCH, HIDDEN), torch.zeros(1, BATCH, HIDDEN)


def adam(*modules: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for module in modules for p in module.parameters()], 1e-3, fused=True)


def our_step() -> Callable[[], None]:
    """`Interface` in a user's loop, with the other projects' synthesizer: h and c, one layer of 2·256."""
    net, state = Net(), [zero_state()]
    interface = Interface(MLPSynthesizer(zero_state(), [2 * HIDDEN], bounded=False), scale=0.1)
    parameters, optimizer = list(net.parameters()), adam(net, interface)

    def step() -> None:
        loss, end = net(interface.receive(state[0]))
        optimizer.zero_grad()
        (loss + interface.send(end)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        state[0] = end

    return step


def load(name: str, path: Path, mend: Callable[[str], str] = str) -> ModuleType:
    """Another project's file as a module, with its source changed by `mend`."""
    if not path.is_file():
        raise UsageError(
            f"--{name} {path}: no file there; clone the repository (see --help) and give its dni.py"
        )
    module = ModuleType(name)
    exec(compile(mend(path.read_text(encoding="utf-8")), str(path), "exec"), module.__dict__)
    return module


def koz4k_step(path: Path, layers: int) -> Callable[[], None]:
    """As in its examples/rnn, which concatenates h and c and defers all gradients to one backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # init.constant is deprecated
        dni = load("koz4k", path)
        interface = dni.BackwardInterface(dni.BasicSynthesizer(2 * HIDDEN, n_hidden=layers))
    net, state = Net(), [zero_state()]
    parameters, optimizer = list(net.parameters()), adam(net, interface)

    def step() -> None:
        optimizer.zero_grad()
        with dni.defer_backward(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            h, c = interface.make_trigger(torch.cat(state[0], dim=2)).chunk(2, dim=2)
            loss, end = net((h.contiguous(), c.contiguous()))
            interface.backward(torch.cat(end, dim=2), factor=0.1)
            dni.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        state[0] = (end[0].detach(), end[1].detach())

    return step


def mtanghu_step(path: Path) -> Callable[[], None]:
    """As in its README. The last commit does not compile: a string has one quotation mark too many."""
    synthesizer = load("mtanghu", path, lambda source: source.replace('before""\n', 'before"\n')).Synthesizer(
        HIDDEN
    )
    net, state, windows = Net(), [zero_state()], [0]
    parameters, optimizer = list(net.parameters()), adam(net)

    def step() -> None:
        optimizer.zero_grad()
        loss, end = net(state[0])
        loss.backward(retain_graph=True)
        state[0] = synthesizer.backward_synthetic(end)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        windows[0] += 1
        if windows[0] % WINDOWS_PER_SEQUENCE == 0:
            synthesizer.step()

    return step


def try_pytorch_dni(folder: str) -> dict[str, Any]:
    """Wrap a net with the package that pip put into `folder`: what `backward` says, and what was learnt."""
    os.chdir(folder)  # importing it writes a log file
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    from dni import DNI  # pyright: ignore[reportMissingImports]

    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    wrapped, error = DNI(net), None
    for _ in range(20):
        loss = wrapped(torch.randn(4, 8)).square().mean()
        try:
            loss.backward()
        except RuntimeError as raised:
            error = str(raised).splitlines()[0]
    change = max(float((p - b).detach().abs().max()) for p, b in zip(net.parameters(), before, strict=True))
    return {"step": PYPI, "backward": error, "largest_change": change}


def fetch_pytorch_dni() -> dict[str, Any]:
    """Let pip fetch it, and try it in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, PYPI]
        if subprocess.run(pip).returncode:
            raise UsageError(f"pip could not fetch {PYPI}; leave --pytorch-dni out, or go on line")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(try_pytorch_dni, (folder,))


def measure(koz4k: Path | None, mtanghu: Path | None, rounds: int) -> dict[str, Cost]:
    """Milliseconds of a step, and its ratio to the plain one, for all projects given."""
    torch.set_num_threads(1)
    steps = {
        PLAIN: plain_step(SIZE),
        "ours, linear": learner(SIZE, METHODS["dni, linear, context none"]).update,
        "ours, one hidden layer": learner(SIZE, METHODS["dni, context none"]).update,
        "ours, `Interface` in a loop, the peers' synthesizer": our_step(),
    }
    if koz4k:
        steps["koz4k/dni-pytorch, n_hidden=1"] = koz4k_step(koz4k, 1)
        steps["koz4k/dni-pytorch, n_hidden=2 (its example)"] = koz4k_step(koz4k, 2)
    if mtanghu:
        steps["mtanghu/DNI-RNN, its syntax error mended"] = mtanghu_step(mtanghu)
    return time_in_turns(steps, rounds, block=40, clock=time.process_time)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """table.md."""
    steps: dict[str, list[dict[str, Any]]] = {}
    lines, about = [], {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
        about |= row.get("about", {})
    for name, found in steps.items():
        if "ratio" in found[0]:
            ratios = [row["ratio"] for row in found]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            milliseconds = f"{median(row['milliseconds'] for row in found):.2f}"
            lines.append([name, str(len(found)), milliseconds, f"{median(ratios):.2f}", spread])
        else:
            lines.append([f"PyPI {name}", "1", "–", "does not train", "–"])
    header = ["step", "processes", "ms", "ratio to plain", "of the processes"]
    parts = [HEADER, markdown_table(header, lines), NOTES]
    parts += [
        f"PyPI {row['step']}: `loss.backward()` says “{row['backward']}”; the largest change of a weight "
        f"after 20 passes is {row['largest_change']:g}.\n"
        for row in rows
        if "backward" in row
    ]
    made = "; ".join(f"{name} {value}" for name, value in about.items() if name != "command")
    parts.append(f"Made by `{about['command']}`: {made}.\n")
    return "\n".join(parts)


HEADER = "# A step of the peers that run\n"

NOTES = f"""LSTM {HIDDEN}, embedding {EMBEDDING}, {SYMBOLS} symbols, batch {BATCH}, T = {BPTT}, one thread.
Milliseconds of CPU time, with one thread that of a clock on a machine that is not shared. Medians over
processes of medians over rounds, blocks of steps of each in turn; ratios are to the plain step of the
same round. The peers' synthesizers read h and c and have layers of {2 * HIDDEN}; the third of ours has the
same layer, the two above it read h alone, as `dni-rnn train` does. mtanghu's makes a step every
{WINDOWS_PER_SEQUENCE} windows, the others every window. Whether a step is worth its time is not asked here.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--koz4k", type=Path, metavar="DNI.PY")
    parser.add_argument("--mtanghu", type=Path, metavar="DNI.PY")
    parser.add_argument("--pytorch-dni", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/peers"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / "rows.jsonl"
    if not args.report:
        # As in `dni_rnn.experiments.bench`: fixed allocator settings, and several processes.
        os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**30), MALLOC_TRIM_THRESHOLD_=str(2**32))
        words = ["/".join(Path(word).parts[-2:]) if word.endswith(".py") else word for word in sys.argv[1:]]
        about = {
            "command": shlex.join(["python", "benchmarks/peers.py", *words]),
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "commit": source_commit(),
            "machine": machine_name(),
        }
        rows: list[dict[str, Any]] = []
        for _ in range(args.processes):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(measure, (args.koz4k, args.mtanghu, args.rounds))
            rows += [
                {"step": name, "milliseconds": round(ms, 3), "ratio": round(ratio, 4), "about": about}
                for name, (ms, ratio) in found.items()
            ]
            print(json.dumps(rows[-1]), flush=True)
        if args.pytorch_dni:
            rows.append(fetch_pytorch_dni())
        args.out.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
    write_atomically(args.out / "table.md", render(read_jsonl(path)).encode())


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"peers.py: {error}")
