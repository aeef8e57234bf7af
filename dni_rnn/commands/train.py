"""`dni-rnn train`: one run, in one process or in several."""

from __future__ import annotations

import dataclasses
import os
import sys
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated, Any, Literal, NoReturn

import tyro

from dni_rnn.config import Preset, RecurrentConfig, RunConfig, to_json
from dni_rnn.config.spelling import flag
from dni_rnn.data.task import Task, config_of
from dni_rnn.distributed import processes as distributed

PRESET_HELP = "Defaults of all other options, by name; paper: the size and the method as published."


def train_command(name: str, task: type[Task], arguments: list[str]) -> type:
    """`train NAME`: the options of the task and of the run, with the defaults of a preset."""
    presets = {"default": Preset(), **getattr(task, "presets", {})}
    chosen = presets.get(_preset(arguments), Preset())
    kind, settings = config_of(task), dict(chosen.run)
    if hasattr(kind, "dni") and "--dni" in arguments:
        settings |= {"dni": True, **chosen.dni}
    if any(word.partition("=")[0].removeprefix("--") in kind.budgets() for word in arguments):
        settings = {name: value for name, value in settings.items() if name not in kind.budgets()}
    return dataclasses.make_dataclass(
        f"Train{task.__name__}",
        [
            ("task", tyro.conf.OmitArgPrefixes[task], task(**chosen.task)),
            ("config", tyro.conf.OmitArgPrefixes[kind], kind(**settings)),
            ("preset", Annotated[Literal[tuple(presets)], tyro.conf.arg(help=PRESET_HELP)], "default"),
        ],
        namespace={"name": name, "arguments": arguments, "__call__": train_run, "__doc__": task.__doc__},
        frozen=True,
    )


def _preset(arguments: list[str]) -> str:
    """The value of the last `--preset`, read first because it sets the defaults of all other options."""
    name = "default"
    for word, following in pairwise([*arguments, ""]):
        if word == "--preset":
            name = following
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    return name


def train_run(self: Any, processes: distributed.Processes | None = None) -> None:
    """Train the run of a `train_command`, and print its result."""
    config: RunConfig = self.config.resolved
    if processes is None:
        config.for_world_size(config.processes or 1)
        if config.processes is not None:
            leave(distributed.launch(self.arguments, config.processes))
    from dni_rnn.training.loop import Interrupted, train
    from dni_rnn.training.run_directory import Run, default_path

    if config.out is None:
        config = dataclasses.replace(config, out=default_path(self.name, config))
    assert config.out is not None
    run = Run(config.out, self.name, self.task, config)
    if processes is not None:
        run.config = _config_among(processes, self.task, config)
    try:
        if processes is None or processes.size == 1:
            summary = train(run)
        elif isinstance(config, RecurrentConfig):
            from dni_rnn.distributed.data_parallel import train_rows

            summary = train_rows(run, processes)
        else:
            from dni_rnn.distributed.train_parts import train_part

            summary = train_part(run, processes)
    except Interrupted as stop:
        print(f"dni-rnn: saved; go on with the same command and --resume --out {config.out}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    if summary is None:
        return
    metric = config.metric
    count = summary.get("unknown_symbols", 0)
    unknown = f"; {count:,} symbols of validation and test are unknown to it" if count else ""
    print(
        f"{summary['data']} {summary['method']} {config.depth_name}={config.depth}: "
        f"valid {summary[f'best_valid_{metric.key}']:.4f}, test {summary[f'test_{metric.key}']:.4f} "
        f"{metric.key} after {summary['symbols']:,} {metric.unit}s in {summary['seconds']:.0f} s "
        f"({summary['symbols_per_second']:,} {metric.unit}s/s) -> {config.out}{unknown}"
    )


def _config_among(processes: distributed.Processes, task: Task, config: RunConfig) -> Any:
    """The configuration, after checking that all processes have the same, for so many processes."""
    versions = {name: version(name) for name in ("dni-rnn", "torch")}
    options = {flag(k): v for k, v in (to_json(task) | to_json(config)).items()}
    processes.agree(versions | options)
    config = processes.together(lambda: config.for_world_size(processes.size))
    return dataclasses.replace(config, resume=config.resume or distributed.attempt() > 0)


def leave(code: int) -> NoReturn:
    """End the process now: threads of torch.distributed may still run, and would abort a normal end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
