"""The command line `dni-rnn`: parses arguments and calls `dni_rnn.commands`, which import torch if needed."""

from __future__ import annotations

import dataclasses
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import reduce
from importlib.metadata import version
from itertools import pairwise
from typing import Annotated, Any, Union

import tyro

from dni_rnn.commands.bench import Bench
from dni_rnn.commands.compare import Compare
from dni_rnn.commands.demo import Demo
from dni_rnn.commands.diagnose import Diagnose
from dni_rnn.commands.eval import Eval
from dni_rnn.commands.export import Export
from dni_rnn.commands.output import never_fail
from dni_rnn.commands.report import Report
from dni_rnn.commands.sample import Sample
from dni_rnn.commands.sweep import Sweep
from dni_rnn.commands.tasks import Tasks
from dni_rnn.commands.train import leave, train_command, train_run
from dni_rnn.config import RunConfig
from dni_rnn.data.task import Task, installed_tasks
from dni_rnn.distributed import processes as distributed
from dni_rnn.errors import DivergedError, LostError, ReportedElsewhere, UsageError, of_files
from dni_rnn.parent_process import end_with_starter

TASKS = installed_tasks()

VERBS: dict[str, type] = {
    "eval": Eval,
    "sample": Sample,
    "export": Export,
    "compare": Compare,
    "diagnose": Diagnose,
    "demo": Demo,
    "sweep": Sweep,
    "report": Report,
    "bench": Bench,
    "tasks": Tasks,
}
"""All but `train`, whose options depend on the task."""


def _union(commands: dict[str, type]) -> Any:
    named: list[Any] = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()]
    return reduce(lambda a, b: Union[a, b], named)  # noqa: UP007


def _parser(arguments: list[str]) -> Any:
    train = _union({name: train_command(name, task, arguments) for name, task in TASKS.items()})
    train_group = dataclasses.make_dataclass(
        "Train",
        [("command", train)],
        namespace={"__call__": lambda self: self.command(), "__doc__": "Train a model on a task."},
        frozen=True,
    )
    return _union({"train": train_group, **VERBS})


def _parse(arguments: list[str]) -> Any:
    _check_words(arguments)
    return tyro.cli(
        _parser(arguments),
        prog="dni-rnn",
        description="Learning beyond the truncation window: synthetic gradients and traces.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )


def _check_words(arguments: list[str]) -> None:
    """Refuse unknown commands or tasks and empty arguments, each in one line.

    An empty path would mean the working directory.
    """
    for before, word in pairwise(["dni-rnn", *arguments]):
        option, equals, value = word.partition("=")
        empty = not word or (option.startswith("--") and equals and not value)
        if empty and "--prompt" not in (before, option):
            raise UsageError(f"{option or before}: empty value; is a shell variable not set?")
    if arguments[:1] == ["train"] and arguments[1:2] and arguments[1].startswith("-"):
        if {"-h", "--help"} & {*arguments}:
            return
        raise UsageError(f"train: name a task first, dni-rnn train TASK; known: {', '.join(TASKS)}")
    known = {0: ("command", ["train", *VERBS]), 1: ("task", list(TASKS))}
    for place, (what, names) in known.items():
        if len(arguments) <= place or arguments[place].startswith("-"):
            return
        if arguments[place] not in names:
            raise UsageError(f"{arguments[place]}: no such {what}; known: {', '.join(names)}")
        if arguments[0] != "train":
            return


def _among_others(arguments: list[str]) -> None:
    """Run the command in one of several processes; only one of them reports errors."""
    command, error, output = None, "only dni-rnn train runs in several processes", io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            command = getattr(_parse(arguments), "command", None)
    except UsageError as failed:
        error = str(failed)
    except SystemExit:
        error = output.getvalue().strip()

    def check() -> Any:
        if command is None:
            raise UsageError(error)
        return command

    config = getattr(command, "config", RunConfig())
    with distributed.joined(config.timeout, config.device) as processes:
        train_run(processes.together(check), processes)


def parse_train(arguments: list[str]) -> tuple[str, Task, Any]:
    """The task's name, the task and the configuration that `dni-rnn train ARGUMENTS` would run."""
    command = _parse(["train", *arguments]).command
    return command.name, command.task, command.config.resolved


def script() -> None:
    """The command `dni-rnn`: `main`, and the end of the process with its exit code."""
    never_fail()
    end_with_starter()
    if not distributed.launched():
        sys.exit(main())
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    leave(code)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for a usage error, 3 for a diverged run."""
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
    except OSError as error:
        said = of_files(error)
        if said is None:
            raise
        print(f"dni-rnn: {said}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    script()
