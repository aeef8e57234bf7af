"""Look-up of the learner of a run: the task's own, or that of its kind of configuration."""

from __future__ import annotations

from typing import Any

from dni_rnn.config import FeedforwardConfig
from dni_rnn.training.learner import Learner


def learner_class(task: Any, config: Any) -> type[Learner]:
    """The learner of a task with a configuration: `task.learner()` if the task has its own."""
    if hasattr(task, "learner"):
        return task.learner()
    if isinstance(config, FeedforwardConfig):
        from dni_rnn.training.feedforward import FeedforwardLearner

        return FeedforwardLearner
    from dni_rnn.training.recurrent import RecurrentLearner

    return RecurrentLearner
