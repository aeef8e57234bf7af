"""Training the parts of a net, each in its own process."""

from __future__ import annotations

from typing import Any

from dni_rnn.data.task import content_of
from dni_rnn.distributed.chain import ChainPart
from dni_rnn.distributed.part import ProcessPart
from dni_rnn.distributed.processes import Processes, device_of, lead_or_follow
from dni_rnn.training.loop import load_data, prepare
from dni_rnn.training.run_directory import Run


def train_part(run: Run, processes: Processes) -> dict[str, Any] | None:
    """Train the part of this process; returns the summary in process 0, None in the others.

    Raises:
      UsageError, DivergedError, Interrupted: as `dni_rnn.training.loop.train`. Other processes raise
        `ReportedElsewhere` for errors before training, and exit with the exit code after it.
      LostError: another process has died or hangs.
    """
    config: Any = run.config
    rank = processes.rank
    device = processes.together(lambda: device_of(processes, config.device))
    data = processes.together(lambda: load_data(run))
    processes.agree({"the data": content_of(data)})
    own = run if rank == 0 else Run(run.path / f"part{rank}", run.task_name, run.task, config)
    learner = part_class(run.task, config)(own, config, data, device, processes)
    progress = processes.together(lambda: prepare(run, learner) if rank == 0 else None)
    start = processes.gather(learner.counters.step)[0]
    processes.together(lambda: learner.prepare_part(start) if rank else None)
    learner.connect()
    learner.connect_weights()
    return lead_or_follow(run, learner, progress)


def part_class(task: Any, config: Any) -> type[ProcessPart]:
    """The class that trains the parts of a task: `task.part()` if the task has its own."""
    if hasattr(task, "part"):
        return task.part()
    return ChainPart
