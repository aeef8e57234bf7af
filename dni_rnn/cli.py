"""`dni-rnn`: the command line. Torch is imported only by the commands that compute."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union

import tyro

from dni_rnn.config import BUDGETS, Preset, RunConfig, TrainConfig, to_json
from dni_rnn.data.task import Task, config_of, installed_tasks
from dni_rnn.distributed import processes as distributed
from dni_rnn.errors import DivergedError, LostError, ReportedElsewhere, UsageError

TASKS = installed_tasks()


@dataclass(frozen=True)
class Eval:
    """Evaluate a run's best weights (lowest validation loss) on a split."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    split: Literal["valid", "test"] = "test"
    """Which split."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder that holds the data files; the default is the run's."""

    def __call__(self) -> None:
        from dni_rnn.training.inference import load_run
        from dni_rnn.training.loop import choose_device, learner_class
        from dni_rnn.training.run_directory import Run

        loaded = load_run(self.run, choose_device(self.device), self.data_dir)
        config = Run.open(self.run).config
        scores = learner_class(config).score(
            loaded.model, loaded.data, self.split, loaded.device, loaded.level
        )
        print(
            f"{loaded.data.name} {self.split}: {', '.join(f'{v:.4f} {name}' for name, v in scores.items())} "
            f"after {loaded.symbols:,} training {config.metric.unit}s"
        )


@dataclass(frozen=True)
class Sample:
    """Let a run's best weights write text."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    prompt: str = ""
    """Text that the model reads first. Empty: it starts from a random character of the training text."""
    chars: int = 300
    """How many characters to write."""
    temperature: float = 0.8
    """Below 1 the model prefers what it finds likely; 1 samples its own distribution."""
    seed: int = 0
    """Of the sampling."""
    data_dir: Path | None = None
    """Folder that holds the data files; the default is the run's."""

    def __call__(self) -> None:
        from dni_rnn.training.inference import load_run
        from dni_rnn.training.loop import choose_device
        from dni_rnn.training.sampling import sample

        loaded = load_run(self.run, choose_device("cpu"), self.data_dir)
        print(sample(loaded.model, loaded.data, self.prompt, self.chars, self.temperature, self.seed))


@dataclass(frozen=True)
class Demo:
    """Train short truncation without and with synthetic gradients, and a longer one, and compare them.

    Three small models on the text that comes with Python, on the CPU, in about three minutes.
    """

    out: Path = Path("runs/demo")
    """Where the runs and the plot go; those of an earlier demo are replaced."""
    chars: int = 1_200_000
    """Characters that each model trains on."""

    def __call__(self) -> None:
        from dni_rnn.experiments.demo import run_demo
        from dni_rnn.training.loop import Interrupted

        try:
            run_demo(self.out, self.chars)
        except Interrupted as stop:
            print("dni-rnn: demo stopped; the same command starts it afresh", file=sys.stderr)
            sys.exit(128 + stop.signal)


@dataclass(frozen=True)
class Diagnose:
    """Measure a run's gradients, and its synthetic ones, against full BPTT on held-out text."""

    run: tyro.conf.Positional[Path]
    """Run directory; diagnostics.json and diagnostics.png go there too."""
    bptt: str = "1,2,4,8,20,40"
    """The T to measure, separated by commas."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder that holds the data files; the default is the run's."""

    def __call__(self) -> None:
        from dni_rnn.gradient_quality import diagnose_run
        from dni_rnn.training.loop import choose_device

        diagnose_run(self.run, self.bptt, choose_device(self.device), self.data_dir)


@dataclass(frozen=True)
class Sweep:
    """Run a grid of training commands with seeds; can be stopped, killed and started again at any point."""

    folder: tyro.conf.Positional[Path]
    """Folder with a sweep.toml; finished rows are appended to its rows.jsonl."""
    work: Path = Path("runs/sweeps")
    """Where the run directories go, in a folder named after the sweep's."""
    budget: str | None = None
    """Stop after this long (90s, 9m, 1h30m), with checkpoints; all cells share the time, in rounds."""
    parallel: int = 1
    """Processes at a time."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute, for cells that do not say so."""
    carry: Path | None = None
    """Folder to carry unfinished runs elsewhere: read at the start, written at the end, parts below 16 MB."""

    def __call__(self) -> None:
        from dni_rnn.experiments.sweep import parse_duration, run_sweep

        failed = run_sweep(
            self.folder,
            self.work / self.folder.resolve().name,
            self.parallel,
            budget=None if self.budget is None else parse_duration(self.budget),
            device=self.device,
            carry=self.carry,
        )
        if failed:
            sys.exit(1)


@dataclass(frozen=True)
class Report:
    """Write the table, the plots and the page of a sweep, or the overview of a folder of sweeps."""

    folder: tyro.conf.Positional[Path]
    """Folder with a sweep.toml and its rows.jsonl, or with an about.toml: table.md, report.html and more go
    there too. A folder of such folders: all of them, and their README.md."""

    def __call__(self) -> None:
        from dni_rnn.experiments.results_page import write_reports

        write_reports(self.folder)


@dataclass(frozen=True)
class Compare:
    """Print a table of runs, finished or not, and plot their validation curves over each other."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("compare.png")
    """Where the plot goes: png, svg or pdf by its ending."""

    def __call__(self) -> None:
        from dni_rnn.experiments.compare import compare_runs

        compare_runs(self.runs, self.out)


@dataclass(frozen=True)
class Bench:
    """Measure training: characters per second and memory, without and with synthetic gradients.

    Every combination of --hidden and --bptt, beside a hand-written loop on nn.LSTM.
    """

    hidden: tuple[int, ...] = (256, 1024)
    """Units of the LSTM."""
    bptt: tuple[int, ...] = (8,)
    """T: steps per window."""
    batch_size: int = 32
    """Rows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int = 1
    """CPU threads."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the products."""
    processes: int = 3
    """One after the other; figures are medians over them."""
    rounds: int = 5
    """Turns of each method in a process."""
    out: Path | None = None
    """Markdown file to write the report to as well."""

    def __call__(self) -> None:
        from dni_rnn.experiments.bench import write_report

        write_report(self)


@dataclass(frozen=True)
class Tasks:
    """List the installed tasks."""

    def __call__(self) -> None:
        width = max(map(len, TASKS))
        for name, task in TASKS.items():
            print(f"{name:{width}}  {(task.__doc__ or '').strip().splitlines()[0]}")


def _train(self: Any, processes: distributed.Processes | None = None) -> None:
    config: RunConfig = self.config.resolved
    if processes is None:
        config.among(config.processes or 1)
        if config.processes is not None:
            _leave(distributed.launch(self.arguments, config.processes))
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
        elif isinstance(config, TrainConfig):
            from dni_rnn.distributed.data_parallel import train_rows

            summary = train_rows(run, processes)
        else:
            from dni_rnn.distributed.part import train_part

            summary = train_part(run, processes)
    except Interrupted as stop:
        print(f"dni-rnn: saved; go on with the same command and --resume --out {config.out}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    if summary is None:
        return
    metric = config.metric
    print(
        f"{summary['data']} {summary['method']} {config.depth_name}={config.depth}: "
        f"valid {summary[f'best_valid_{metric.key}']:.4f}, test {summary[f'test_{metric.key}']:.4f} "
        f"{metric.key} after {summary['symbols']:,} {metric.unit}s in {summary['seconds']:.0f} s "
        f"({summary['symbols_per_second']:,} {metric.unit}s/s) -> {config.out}"
    )


def _config_among(processes: distributed.Processes, task: Task, config: RunConfig) -> Any:
    """The configuration that all of the processes have, as it is in so many."""
    versions = {name: version(name) for name in ("dni-rnn", "torch")}
    options = {f"--{k.replace('_', '-')}": v for k, v in (to_json(task) | to_json(config)).items()}
    processes.agree(versions | options)
    config = processes.together(lambda: config.among(processes.size))
    return dataclasses.replace(config, resume=config.resume or distributed.attempt() > 0)


def _train_command(name: str, task: type[Task], arguments: list[str]) -> type:
    """`train NAME`: the task's options and the run's, side by side, with the defaults of a preset."""
    presets = {"default": Preset(), **getattr(task, "presets", {})}
    chosen = presets.get(_preset(arguments), Preset())
    kind, settings = config_of(task), dict(chosen.run)
    if hasattr(kind, "dni") and "--dni" in arguments:
        settings |= {"dni": True, **chosen.dni}
    if any(word.partition("=")[0] in ("--chars", "--minutes", "--steps") for word in arguments):
        settings = {name: value for name, value in settings.items() if name not in BUDGETS}
    return dataclasses.make_dataclass(
        f"Train{task.__name__}",
        [
            ("task", tyro.conf.OmitArgPrefixes[task], task(**chosen.task)),
            ("config", tyro.conf.OmitArgPrefixes[kind], kind(**settings)),
            ("preset", Annotated[Literal[tuple(presets)], tyro.conf.arg(help=PRESET_HELP)], "default"),
        ],
        namespace={"name": name, "arguments": arguments, "__call__": _train, "__doc__": task.__doc__},
        frozen=True,
    )


PRESET_HELP = "Defaults of all other options, by name; paper: the size and the method as published."


def _preset(arguments: list[str]) -> str:
    """What the last `--preset` names: it decides the defaults of all other options, so it is read first."""
    name = "default"
    for word, following in pairwise([*arguments, ""]):
        if word == "--preset":
            name = following
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    return name


def _union(commands: dict[str, type]) -> Any:
    named: list[Any] = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()]
    return reduce(lambda a, b: Union[a, b], named)  # noqa: UP007


def _parser(arguments: list[str]) -> Any:
    train = _union({name: _train_command(name, task, arguments) for name, task in TASKS.items()})
    train_group = dataclasses.make_dataclass(
        "Train",
        [("command", train)],
        namespace={"__call__": lambda self: self.command(), "__doc__": "Train a model on a task."},
        frozen=True,
    )
    return _union(
        {
            "train": train_group,
            "eval": Eval,
            "sample": Sample,
            "compare": Compare,
            "diagnose": Diagnose,
            "demo": Demo,
            "sweep": Sweep,
            "report": Report,
            "bench": Bench,
            "tasks": Tasks,
        }
    )


def _parse(arguments: list[str]) -> Any:
    return tyro.cli(
        _parser(arguments),
        prog="dni-rnn",
        description="Truncated backpropagation through time with synthetic gradients.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )


def _among_others(arguments: list[str]) -> None:
    """The command in one of several processes: what fails is said by one of them."""
    command, error, said = None, "only dni-rnn train runs in several processes", io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            command = getattr(_parse(arguments), "command", None)
    except UsageError as failed:
        error = str(failed)
    except SystemExit:
        error = said.getvalue().strip()

    def check() -> Any:
        if command is None:
            raise UsageError(error)
        return command

    config = getattr(command, "config", RunConfig())
    with distributed.joined(config.timeout, config.device) as processes:
        _train(processes.together(check), processes)


def parse_train(arguments: list[str]) -> tuple[str, Task, Any]:
    """The task's name, the task and the configuration that `dni-rnn train ARGUMENTS` would run."""
    command = _parse(["train", *arguments]).command
    return command.name, command.task, command.config.resolved


def _leave(code: int) -> NoReturn:
    """End the process now: threads of torch.distributed may still run, and would abort a normal end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def script() -> None:
    """The command `dni-rnn`: `main`, and the end of the process with its exit code."""
    if not distributed.launched():
        sys.exit(main())
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    _leave(code)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for what the user can mend, 3 for a diverged run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"dni-rnn {version('dni-rnn')}")
        return 0
    try:
        if distributed.launched():
            _among_others(arguments)
        else:
            _parse(arguments)()
    except ReportedElsewhere:
        return 2
    except UsageError as error:
        print(f"dni-rnn: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"dni-rnn: stopped: {error}", file=sys.stderr)
        return 3
    except LostError as error:
        print(f"dni-rnn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    script()
