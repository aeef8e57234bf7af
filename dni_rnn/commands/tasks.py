"""`dni-rnn tasks`: list the installed tasks."""

from __future__ import annotations

from dataclasses import dataclass

from dni_rnn.data.task import installed_tasks


@dataclass(frozen=True)
class Tasks:
    """List the installed tasks."""

    def __call__(self) -> None:
        tasks = installed_tasks()
        width = max(map(len, tasks))
        for name, task in tasks.items():
            print(f"{name:{width}}  {(task.__doc__ or '').strip().splitlines()[0]}")
