"""The learner of recurrent models, on streams of windows."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.task import Corpus, Data, Split
from dni_rnn.errors import DivergedError, UsageError
from dni_rnn.estimators.full import state_gradients
from dni_rnn.estimators.lookahead import first_steps
from dni_rnn.metrics import BPC
from dni_rnn.pytree import flatten, flatten_rows
from dni_rnn.recurrent import SequenceModel
from dni_rnn.training import checkpoint
from dni_rnn.training.builders import build_estimator, build_model
from dni_rnn.training.learner import BITS, Learner, TrainingRecord, adam, begin, cosine_schedule
from dni_rnn.training.sampling import sample
from dni_rnn.window import Window, window_loss

EVAL_ROWS, EVAL_STEPS = 128, 100

SAMPLED = 200
"""Characters that a text run samples at its end."""

AUDIT_STEPS = 32
"""Steps of backpropagation for the gradient that a synthetic one is compared with."""


class RecurrentLearner(Learner):
    """Trains a recurrent model on a stream of windows.

    Attributes:
      state: state of the model, all batch rows, after the last window.
    """

    model: SequenceModel

    def __init__(self, config: RecurrentConfig, data: Data, device: torch.device) -> None:
        super().__init__(config, data, device)
        begin(config)
        self.model = build_model(config, data).to(device)
        self.estimator = build_estimator(config, self.model, data).to(device)
        net = self.model.net_parameters()
        synthesizer = [*self.model.synthesizer_parameters(), *self.estimator.parameters()]
        groups = [(net, config.lr), (synthesizer, config.synthesizer_lr)]
        if config.synthesizer_lr == config.lr:  # one group is one call less
            groups = [([*net, *synthesizer], config.lr)]
        optimizer = adam(groups, device, betas=(0.9, config.beta2))
        modules = {"model": self.model, "estimator": self.estimator}
        self.record = TrainingRecord(modules, net, synthesizer, optimizer, ("loss", "norm"), device)
        self.stream = data.stream("train", config.batch_size, config.seed).to(device)
        self.begin_rows(config.batch_size)
        self.one_pass = self.stream.size
        # Fetched early for an estimator that looks ahead; each with the stream's position before it.
        self._fetched: deque[tuple[dict[str, Any], Window]] = deque()
        self.window_loss = torch.zeros((), device=device)
        self._run = self.recorded(self._work)

    def begin_rows(self, rows: int) -> None:
        """Set the state to the initial one, with so many rows."""
        self.state = self.model.initial_state(rows)
        self.estimator.begin(self.model, rows)

    @staticmethod
    def build(config: Any, data: Any) -> SequenceModel:
        return build_model(config, data)

    @staticmethod
    def score(
        model: SequenceModel, data: Data, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        return {BPC.key: evaluate(model, data, split, device, level)}

    def update(self) -> None:
        """One update: `accumulate` windows forward and backward, clip, step."""
        config, counters = self.config, self.counters
        if config.audit and counters.step % config.audit == 0:
            self._audit()
        if config.anneal:
            self.record.set_rates(self.rate())
        windows, ahead = self._windows()
        self._run([[window[:-1] for window in each] for each in (windows, ahead)])
        scored, steps = (sum(w.scored for w in windows), sum(len(w.inputs) for w in windows))
        if self.stream.curriculum is not None:
            level = self.level
            self.stream.curriculum.note(self.window_loss, scored, steps)
            if self.level != level:
                self._take_back()
        counters.scored += scored
        counters.advance(steps * config.batch_size)

    def rate(self) -> float:
        """Factor on the learning rates of the next update of an annealed run: a cosine schedule to zero."""
        unit, amount = self.config.budget or ("symbols", self.one_pass)
        return cosine_schedule((self.counters.step if unit == "steps" else self.counters.symbols) / amount)

    def _windows(self) -> tuple[list[Window], list[Window]]:
        """The windows of the next update, and those that the estimator looks ahead to."""
        config, asked = self.config, self.estimator.lookahead
        if not asked:
            lengths = self._lengths(self.counters.step)
            return [self.stream.window(steps, config.context_window) for steps in lengths], []
        count = config.accumulate
        while sum(len(window.inputs) for _, window in list(self._fetched)[count:]) < asked:
            later, number = divmod(len(self._fetched), count)
            steps, place = self._lengths(self.counters.step + later)[number], self.stream.state_dict()
            self._fetched.append((place, self.stream.window(steps, config.context_window)))
        windows = [self._fetched.popleft()[1] for _ in range(count)]
        return windows, first_steps((window for _, window in self._fetched), asked)

    def _take_back(self) -> None:
        """Move the stream back to the training position, so that fetched windows are read again."""
        if not self._fetched:
            return
        place, _ = self._fetched[0]
        self._fetched.clear()
        if self.stream.curriculum is None:
            self.stream.load_state_dict(place)
            return
        learnt = self.stream.curriculum.state_dict()
        self.stream.load_state_dict(place)
        self.stream.curriculum.load_state_dict(learnt)

    def _lengths(self, update: int) -> list[int]:
        """Lengths of the windows of an update, drawn from its number alone."""
        config = self.config
        if not config.random_truncation:
            return [config.bptt] * config.accumulate
        random = np.random.default_rng([config.seed, update])
        short = random.integers(1, config.bptt, config.accumulate, endpoint=True)
        early = random.random(config.accumulate) < config.random_truncation
        return np.where(early, short, config.bptt).tolist()

    def _work(self, tensors: list[Any]) -> None:
        """The device work of an update, in place; `tensors` are those of its windows, and of those ahead."""
        config, record = self.config, self.record
        windows, ahead = ([Window(*window, scored=0) for window in each] for each in tensors)
        record.optimizer.zero_grad()
        with self.autocast():
            asked = [ahead] if self.estimator.lookahead else []
            estimate = self.estimator(self.model, windows, self.state, config.weight, *asked)
        loss = self.all_reduce(estimate.loss)
        if config.clip:
            record.averages["norm"].add_(nn.utils.clip_grad_norm_(record.net, config.clip))
        record.optimizer.step()
        for kept, new in zip(flatten(self.state)[0], flatten(estimate.state)[0], strict=True):
            kept.copy_(new)
        self.window_loss.copy_(loss)
        record.averages["loss"].add_(loss)

    def by_row(self) -> dict[str, Tensor]:
        """Everything per row that is carried from window to window; rows in dimension -2."""
        state = {f"state.{i}": leaf for i, leaf in enumerate(flatten(self.state)[0])}
        return state | checkpoint.nest("memory", self.estimator.memory())

    def all_reduce(self, loss: Tensor) -> Tensor:
        """Sum `.grad` over all processes and return the summed loss; here there is one process."""
        return loss

    def _audit(self) -> None:
        """Compare ĝ at the current boundary with the true gradient of the next steps."""
        config, place = self.config, self.stream.state_dict()
        count = -(-AUDIT_STEPS // config.bptt)
        windows = [self.stream.window(config.bptt, config.context_window) for _ in range(count)]
        self.stream.load_state_dict(place)
        real = state_gradients(self.model, windows, self.state, config.weight, (0,))[0]
        start, interface = windows[0].start, self.model.core.interface
        assert interface is not None
        discount = config.discount**config.bptt
        interface.audit(self.state, real, start.context, start.done, discount=discount)

    def metrics(self) -> dict[str, float]:
        """Averages since `reset_metrics`: training bits per scored symbol, and diagnostics."""
        averages, counters = self.record.averages, self.counters
        row = {
            "bpc": float(averages["loss"]) * BITS / max(counters.scored, 1),
            "state_rms": self.state_rms(),
        }
        if self.config.clip:
            row["gradient_norm"] = float(averages["norm"]) / counters.updates
        interface = self.model.core.interface
        if interface is not None:
            row["synthesizer_loss"] = float(interface.regression_loss)
            row["target_rms"] = float(interface.target_rms())
            if self.config.audit:
                row["trust"] = float(interface.trust)
        if self.stream.curriculum is not None:
            row |= {"level": self.stream.curriculum.level, "solved": self.stream.curriculum.solved}
        return row

    def state_rms(self) -> float:
        """Root mean square of the recurrent state, over rows and features."""
        return float(flatten_rows(self.state).square().mean().sqrt())

    @property
    def level(self) -> int | None:
        """The level being learnt, for a task with a curriculum."""
        return None if self.stream.curriculum is None else self.stream.curriculum.level

    def check(self, row: dict[str, float]) -> None:
        super().check(row)
        if not row["state_rms"] <= self.config.state_limit:
            raise DivergedError(
                f"the recurrent state has run away (root mean square {row['state_rms']:.3g}, "
                f"limit {self.config.state_limit:g})"
            )

    def summary(self) -> dict[str, Any]:
        values: dict[str, Any] = {"state_rms": self.state_rms()}
        if self.stream.curriculum is not None:
            values["solved"] = self.stream.curriculum.solved
        if isinstance(self.data, Corpus):
            how = {"characters": SAMPLED, "temperature": 0.8, "seed": 0}
            values["sample"] = {"text": sample(self.model, self.data, "", **how), **how}
            if self.data.unknown:
                values["unknown_symbols"] = self.data.unknown
        return values

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._take_back()
        tensors, values = super().state_dict()
        return tensors | self.by_row(), values | {"stream": self.stream.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        for number, leaf in enumerate(flatten(self.state)[0]):
            leaf.copy_(tensors[f"state.{number}"])
        self.estimator.load_memory(checkpoint.under("memory", tensors))
        self._fetched.clear()
        self.stream.load_state_dict(values["stream"])


@torch.no_grad()
def evaluate(
    model: SequenceModel, data: Data, split: Split, device: torch.device, level: int | None = None
) -> float:
    """Bits per scored symbol over one pass of `split`, at `level` for a task with a curriculum.

    The split is read as up to 128 parallel rows, each with its state carried from beginning to end, so at
    most 128 symbols are predicted without history.
    """
    rows = EVAL_ROWS
    while True:
        try:
            stream = data.stream(split, rows, 0).to(device)
            break
        except UsageError:
            if rows == 1:
                raise
            rows //= 2
    if stream.curriculum is not None and level is not None:
        stream.curriculum.level = level
    state = model.initial_state(rows)
    loss, scored, seen = torch.zeros((), device=device, dtype=torch.float64), 0, 0
    while seen < stream.size:
        window = stream.window(EVAL_STEPS, 0)
        logits, state = model(window.inputs, model.reset(state, window.start.done))
        loss += window_loss(logits, window.targets)
        scored += window.scored
        seen += window.inputs.numel()
    return float(loss) * BITS / scored
