"""Export a run's net for plain torch: weights, a description of its modules, and a model card.

model.safetensors   the weights, as `state_dict` of the modules by name
model.json          the modules and their arguments, the symbols, and the history of the run
README.md           the model card, with a program that loads the net with torch and safetensors alone
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dni_rnn.config import to_json
from dni_rnn.config.spelling import flag
from dni_rnn.cores.gru import GRU
from dni_rnn.cores.lstm import LSTM
from dni_rnn.cores.rnn import RNN
from dni_rnn.data.labelled import Examples
from dni_rnn.data.texts import BYTES
from dni_rnn.errors import UsageError
from dni_rnn.feedforward import Decoupled
from dni_rnn.files import read_json, write_atomically
from dni_rnn.recurrent import SequenceModel
from dni_rnn.training import checkpoint
from dni_rnn.training.inference import LoadedRun, load_run, load_writer
from dni_rnn.training.learners import learner_class
from dni_rnn.training.run_directory import Run

FORMAT = "dni-rnn export 1"
WEIGHTS, SIZES, CARD = "model.safetensors", "model.json", "README.md"
OF_THE_MACHINE = ("data_dir", "out", "device", "threads", "resume", "processes", "timeout")
"""Settings of the machine, which do not affect the weights and are left out."""

LOAD = """import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

card = json.loads(Path("model.json").read_text())
made = {name: getattr(nn, kind)(**arguments) for name, (kind, arguments) in card["modules"].items()}
"""
RECURRENT = """net = nn.ModuleDict(made)
net.load_state_dict(load_file("model.safetensors"))


def step(numbers, state=None):  # symbols (T, B) -> logits (T, B, symbols), and the next state
    output, state = net.rnn(net.embedding(numbers), state)
    return net.readout(output), state


"""
WRITE = """ids = {start}
logits, state = step(torch.tensor(ids)[:, None])
for _ in range(200):
    ids.append(int(torch.distributions.Categorical(logits=logits[-1, 0] / 0.8).sample()))
    logits, state = step(torch.tensor([ids[-1:]]), state)
print({end})
"""
PREDICT = """logits, state = step(torch.tensor([[0], [1], [0]]))  # the numbers of three symbols
print(logits[-1, 0].softmax(-1))
"""
FEEDFORWARD = """net = nn.Sequential(*made.values())
net.load_state_dict(load_file("model.safetensors"))
net.eval()
inputs = card["inputs"]
x = torch.zeros(1, *inputs["shape"])  # a row: put yours here{range}
logits = net((x - torch.tensor(inputs["mean"])) / torch.tensor(inputs["deviation"]))
print({end})
"""


class Exported(NamedTuple):
    """Contents of the exported folder."""

    weights: dict[str, Tensor]
    sizes: dict[str, Any]
    card: str


def export_run(path: Path, out: Path, overwrite: bool = False, data_dir: Path | None = None) -> str:
    """Write the folder `out`, whole or not at all. Returns a line that describes it.

    Raises:
      UsageError: plain torch modules cannot represent the net, the run or its data are missing, or `out`
        exists or cannot be written.
    """
    _check_free(out, overwrite)
    made = exported(path, data_dir)
    beside = [out.with_name(f".{out.name}.{what}{os.getpid()}") for what in ("new", "old")]
    new, old = beside
    try:
        new.mkdir(parents=True)
        write_atomically(new / WEIGHTS, save(made.weights))
        write_atomically(new / SIZES, (json.dumps(made.sizes, indent=1) + "\n").encode())
        write_atomically(new / CARD, made.card.encode())
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)
    except OSError as error:
        if old.exists():
            os.replace(old, out)
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); give another") from None
    finally:
        for folder in beside:
            shutil.rmtree(folder, ignore_errors=True)
    count = sum(tensor.numel() for tensor in made.weights.values() if tensor.is_floating_point())
    names = ", ".join(kind for kind, _ in made.sizes["modules"].values())
    return f"{out}: {names} with {count:,} numbers; {CARD} has a program that loads it without dni_rnn"


def exported(path: Path, data_dir: Path | None = None) -> Exported:
    """What `export_run` writes.

    Raises:
      UsageError: as `export_run`.
    """
    run, device = Run.open(path), torch.device("cpu")
    loaded = load_run(path, device, data_dir) if run.alphabet() is None else load_writer(path, device)
    modules = plain_modules(loaded.model)
    described = {name: describe(module) for name, module in modules.items()}
    weights = {
        f"{name}.{key}": tensor.contiguous().clone()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    sizes = {"format": FORMAT, "modules": described, **_sides(loaded), **_history(run, loaded)}
    return Exported(weights, sizes, _card(run, sizes))


def plain_modules(model: Any) -> dict[str, nn.Module]:
    """The net as a sequence of torch modules, without synthesizers.

    Raises:
      UsageError: it is not such a sequence.
    """
    if isinstance(model, SequenceModel):
        rnn: Any = model.core.rnn
        if type(rnn) not in (LSTM, GRU, RNN):
            raise UsageError(
                f"torch has no module for the core {type(rnn).__name__}; lstm, gru and rnn can be exported"
            )
        return {"embedding": model.embedding, "rnn": rnn, "readout": model.readout}
    if isinstance(model, Decoupled):
        return {str(number): module for number, module in enumerate(_chain(model.parts))}
    raise UsageError(f"a {type(model).__name__} is more than one net; only a single one can be exported")


def _chain(modules: Any) -> list[nn.Module]:
    found = []
    for module in modules:
        found += _chain(module) if type(module) is nn.Sequential else [module]
    return found


def describe(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name in `torch.nn`, and the arguments that differ from their defaults.

    Raises:
      UsageError: torch has no such module, or it cannot be rebuilt from its attributes.
    """
    if isinstance(module, nn.RNNBase):
        kind = next(base for base in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, base))
        names = ("input_size", "hidden_size", "num_layers")
        arguments = {name: getattr(module, name) for name in names}
    else:
        kind, arguments = type(module), {}
        for name, parameter in inspect.signature(kind).parameters.items():
            value = getattr(module, name, parameter.default)
            if name == "bias":  # an attribute that is a parameter, or None
                value = value is not None and value is not False
            if isinstance(value, tuple) and len(set(value)) == 1:
                value = value[0]
            if value != parameter.default:
                arguments[name] = value
    try:
        if getattr(nn, kind.__name__, None) is not kind:
            raise TypeError("not in torch.nn")
        again = getattr(nn, kind.__name__)(**json.loads(json.dumps(arguments)))
        again.load_state_dict(module.state_dict())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"the net has a {type(module).__name__}, which torch.nn alone cannot build ({error})"
        ) from None
    return kind.__name__, arguments


def _sides(loaded: LoadedRun) -> dict[str, Any]:
    """Description of inputs and outputs."""
    data = loaded.data
    if isinstance(loaded.model, SequenceModel):
        symbols = list(getattr(data, "symbols", ()))
        if tuple(symbols) == BYTES or getattr(data, "of_bytes", False):
            return {"symbols": "bytes"}
        return {"symbols": symbols or None}
    if not isinstance(data, Examples):
        return {
            "inputs": {"shape": [data.input_symbols], "mean": 0.0, "deviation": 1.0},
            "outputs": {"numbers": 1},
        }
    mean, deviation = (each.reshape(-1, *[1] * (len(data.shape) - 1)).tolist() for each in data.moments)
    classes = data.train[1].ndim == 1
    return {
        "inputs": {"shape": list(data.shape), "mean": mean, "deviation": deviation},
        "outputs": {"classes": list(data.symbols)} if classes else {"bits": data.outputs},
    }


def _history(run: Run, loaded: LoadedRun) -> dict[str, Any]:
    """The history of the run, and its figures."""
    key, values = run.config.metric.key, checkpoint.load_checkpoint(run.best)[1]
    summary = read_json(run.summary) if run.summary.exists() else {}
    ended = summary.get("best_symbols") == values["symbols"]
    figures = {name: values.get(name) for name in (f"valid_{key}", "level")}
    if ended:  # otherwise its test score is that of other weights
        figures |= {name: summary.get(name) for name in (f"test_{key}", "solved", "seconds")}
    written = read_json(run.path / "config.json")
    settings = {name: value for name, value in to_json(run.config).items() if name not in OF_THE_MACHINE}
    trained = {
        "task": run.task_name,
        "data": loaded.data.name,
        "content": written.get("content"),
        "method": run.config.method,
        run.config.depth_name: run.config.depth,
        f"{run.config.metric.unit}s": loaded.symbols,
        "command": _public(written.get("command") or []),
        "versions": written.get("versions"),
        "commit": written.get("commit"),
        "machines": written.get("machines"),
        "settings": settings,
    }
    return {"figures": {name: v for name, v in figures.items() if v is not None}, "trained": trained}


def _public(command: list[str]) -> str:
    """The command without local paths and other settings of the machine."""
    private = {flag(name) for name in OF_THE_MACHINE}
    kept = []
    for before, word in pairwise(["", *map(str, command)]):
        option = word.partition("=")[0]
        if option not in private and not (before in private and not word.startswith("--")):
            kept.append(word)
    return shlex.join(kept)


def example(sizes: dict[str, Any]) -> str:
    """A program that loads and uses the net with torch and safetensors alone; run it in the folder."""
    if "inputs" in sizes:
        outputs = sizes["outputs"]
        ends = {
            "classes": 'card["outputs"]["classes"][int(logits.argmax())]',
            "bits": "(logits > 0).int()",
            "numbers": "logits",
        }
        (what,) = outputs
        of_bytes = f", numbers as the data have them: {_range(sizes)}" * bool(_range(sizes))
        return LOAD + FEEDFORWARD.format(range=of_bytes, end=ends[what])
    symbols = sizes["symbols"]
    if symbols is None:
        return LOAD + RECURRENT + PREDICT
    if symbols == "bytes":
        write = WRITE.format(start='[*b"The "]', end='bytes(ids).decode(errors="replace")')
    else:
        prompts = [text for text in ("The ", "the ", "the_") if {*text} <= {*symbols}]
        start = (
            f'[card["symbols"].index(symbol) for symbol in {json.dumps(prompts[0])}]' if prompts else "[0]"
        )
        write = WRITE.format(start=start, end='"".join(card["symbols"][i] for i in ids)')
    return LOAD + RECURRENT + write


def _range(sizes: dict[str, Any]) -> str:
    if "numbers" in sizes["outputs"]:
        return ""
    return "0 or 1" if "bits" in sizes["outputs"] else "0 to 255"


def _card(run: Run, sizes: dict[str, Any]) -> str:
    trained, figures, metric = sizes["trained"], sizes["figures"], run.config.metric
    kept = learner_class(run.task, run.config).keeps_best
    names = {
        f"valid_{metric.key}": "validation" if kept else "latest, each predicted before it was learnt",
        f"test_{metric.key}": "test" if kept else "all, each predicted before it was learnt",
    }
    rows = [
        f"| {metric.meaning}, {name} | {figures[key]:.4f} |" for key, name in names.items() if key in figures
    ]
    if "solved" in figures:
        rows.append(f"| longest solved in training | {figures['solved']} |")
    content = trained["content"] or {}
    of = f", {content['length']:,} symbols or examples, SHA-256 `{content['sha256']}`" if content else ""
    unit = f"{metric.unit}s"
    about = " ".join((type(run.task).__doc__ or "").strip().split("\n\n")[0].split())
    versions = ", ".join(f"{name} {number}" for name, number in (trained["versions"] or {}).items() if number)
    depth = f"{run.config.depth_name} = {run.config.depth}"
    commit = f", commit {trained['commit']}" if trained["commit"] else ""
    machines = "; ".join(trained["machines"] or ["an unknown machine"])
    modules = [
        f"| `{name}` | `nn.{kind}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})` |"
        for name, (kind, arguments) in sizes["modules"].items()
    ]
    seconds = f" in {figures['seconds']:.0f} s" if "seconds" in figures else ""
    if f"test_{metric.key}" not in figures:
        rows.append("| test | the run had not ended |")
    kinds = [*dict.fromkeys(kind for kind, _ in sizes["modules"].values())]
    tags = ["pytorch", "synthetic-gradients", *(["recurrent-neural-network"] if "symbols" in sizes else [])]
    return f"""---
tags: [{", ".join(tags)}]
---

# {trained["data"]}: {", ".join(kinds)}

Plain modules of torch, trained with `dni_rnn` by the method `{trained["method"]}`, {depth}.
Synthesizers, which training alone needs, are left out.

## Use

In this folder, with torch and safetensors:

```python
{example(sizes)}```

| module | is |
|---|---|
{chr(10).join(modules)}

## Data

`{trained["task"]}`: {about} Here `{trained["data"]}`{of}.

## Figures

| of these weights | |
|---|--:|
{chr(10).join(rows)}

They say nothing of other data.

## Training

{trained[unit]:,} {unit}{seconds}, on {machines}, with {versions}{commit}:

```bash
{trained["command"]}
```

`model.json` has every setting (`trained`).
"""


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"--out {out}: already there; add --overwrite to replace an export, or give another")
    ours = {WEIGHTS, SIZES, CARD}
    if not out.is_dir() or out.is_symlink() or not {file.name for file in out.iterdir()} <= ours:
        raise UsageError(f"--out {out}: holds other things than an export; give another")
