"""Two networks that run at different rates, decoupled by interfaces.

    network A, fast:   (x_t, state) -> state, at every step; after every T steps an answer and a message
    network B, slow:   (message, state) -> state, once in T steps; after T messages an answer

A block of T² steps is one sequence: both states begin at zero. Joint backpropagation has to unroll the whole
block before either net can learn; with an interface on the message and one at the window boundaries of each
net, A unrolls T steps and B some of its own ticks, and neither waits for the other's gradient.

Source: Jaderberg et al. 2017, arXiv:1608.05343, §3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.cores import Core
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import Tree, detach, flatten, unflatten
from dni_rnn.stashed import Stashed


class DigitBlock(NamedTuple):
    """T windows of T steps of B batch rows.

    Attributes:
      inputs: (T, T, B, ...), windows first, then steps.
      fast: (T, B), A's targets after each window; integers.
      slow: (B,), B's targets at the end; integers.
    """

    inputs: Tensor
    fast: Tensor
    slow: Tensor

    def coming_slow(self, tick: int) -> Tensor:
        """The context of B's synthesizers at `tick`: B's target, at the position of the tick; (T, B)."""
        known = torch.full_like(self.fast, -1)
        known[tick] = self.slow
        return known

    def coming(self, tick: int) -> Tensor:
        """The context of A's synthesizer before window `tick`: A's further targets, and B's; (2T, B)."""
        fast = self.fast.clone()
        fast[:tick] = -1
        return torch.cat([fast, self.coming_slow(tick)])


class Cut(nn.Module):
    """A place where a gradient would have to wait, with an interface, a penalty, both, or neither.

    Args:
      interface: None: no gradient crosses the cut.
      penalty: on the message (`StatePenalty`), in units of the gradients here.
    """

    def __init__(self, interface: Interface | None = None, penalty: StatePenalty | None = None) -> None:
        super().__init__()
        self.interface, self.penalty = interface, penalty

    def receive(self, message: Tree, context: Tensor) -> Tree:
        """The message as its consumer receives it."""
        if self.interface is not None:
            return self.interface.receive(message, context)
        return detach(message) if self.penalty is None else self.penalty.measure(message)

    def send(self, message: Tree, context: Tensor) -> list[Tensor]:
        """Terms of its producer's objective."""
        terms, rms = [], None
        if self.interface is not None:
            terms.append(self.interface.send(message, context))
            rms = self.interface.target_square.sqrt()
        if self.penalty is not None:
            terms.append(self.penalty(message, rms=rms))
        return terms


class Sent:
    """A message at a cut, from when it is sent until its true gradient g is known.

    Attributes:
      terms: of its producer's objective.
      taken: the message as its consumer receives it; its `.grad` becomes g.
    """

    def __init__(self, cut: Cut, message: Tree, context: Tensor) -> None:
        self.cut, self.message, self.context = cut, message, context
        interface = cut.interface
        if interface is not None:
            interface.keeps_sent = True
        self.terms = cut.send(message, context)
        # What was sent, for M may change meanwhile, or never say the same twice.
        self.synthetic = None if interface is None else [leaf.clone() for leaf in interface.sent or ()]
        leaves, spec = flatten(message)
        self.taken = unflatten([leaf.detach().requires_grad_() for leaf in leaves], spec)

    def residual(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors of the message, each with its residual g − ĝ; also trains the cut on g."""
        found: list[Tensor] = []
        for leaf in flatten(self.taken)[0]:
            assert leaf.grad is not None
            found.append(leaf.grad)
        received = flatten(self.cut.receive(self.message, self.context))[0]
        if any(leaf.requires_grad for leaf in received):
            torch.autograd.backward(received, found)
        if self.synthetic is not None:
            found = [g - s for g, s in zip(found, self.synthetic, strict=True)]
        return list(zip(flatten(self.message)[0], found, strict=True))


class Turn(NamedTuple):
    """One update of one net, or of both.

    Attributes:
      objective: a scalar to differentiate; None in a turn that only corrects.
      fast, slow: logits and targets of the answers in this turn.
      kept: the graph is needed once more, by the last turn.
      late: messages sent from each window, in order, whose gradients are known by now.
    """

    objective: Tensor | None = None
    fast: tuple[Tensor, Tensor] | None = None
    slow: tuple[Tensor, Tensor] | None = None
    kept: bool = False
    late: Sequence[Sequence[Sent]] = ()

    def backward(self) -> None:
        """Add the gradients of this turn to `.grad`."""
        if self.objective is not None:
            self.objective.backward(retain_graph=self.kept)
        for window in reversed(self.late):
            pairs = [pair for sent in window for pair in sent.residual()]
            torch.autograd.backward([tensor for tensor, _ in pairs], [residual for _, residual in pairs])


class FastNet(nn.Module):
    """Network A: two layers of Linear-LayerNorm-ReLU, an LSTM, a readout, and the message to B.

    As published, except for the normalisation: the published one was over the batch, with statistics per
    step. Over the features, rows are independent of each other, and windows of where they are cut.
    """

    def __init__(self, features: int, outputs: int, hidden: int, core: Core) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(2),
            nn.Linear(features, hidden), nn.LayerNorm(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(),
        )  # fmt: skip
        self.core = core
        self.readout = nn.Linear(hidden, outputs)
        self.message = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden))

    def forward(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tensor, Tree]:
        """inputs (T, B, ...) -> after them: logits (B, outputs), the message (B, H) and the state."""
        outputs, state = self.core(self.encoder(inputs), state)
        return self.readout(outputs[-1]), self.message(outputs[-1]), state


class SlowNet(nn.Module):
    """Network B: an LSTM on messages, and a readout."""

    def __init__(self, outputs: int, hidden: int, core: Core) -> None:
        super().__init__()
        self.core = core
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, messages: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """messages (ticks, B, H) -> after them: logits (B, outputs) and the state."""
        outputs, state = self.core(messages, state)
        return self.readout(outputs[-1]), state


class TwoRates(nn.Module):
    """Both networks, with three cuts between them and their own windows.

    The objective of a block is (mean over A's answers of −log p) + (−log p of B's answer), in nats, mean
    over rows. `lock_step` differentiates it as a whole; `decoupled` in turns, each of which can be followed
    by an optimizer step. With exact synthesizers and no steps in between, the gradients of the turns add up
    to that of `lock_step`.

    Args:
      fast, slow: the networks.
      cuts: by name: the states of A and B, "fast" and "slow", and the "message".
      period: T.
      ticks: ticks of B between its window boundaries; a divisor of T.

    Raises:
      ValueError: `ticks` does not divide T; or, when called, a block does not have T windows.
    """

    def __init__(self, fast: FastNet, slow: SlowNet, cuts: dict[str, Cut], period: int, ticks: int) -> None:
        super().__init__()
        if ticks < 1 or period % ticks:
            raise ValueError(f"ticks must divide the period, {period}, and {ticks} does not")
        self.fast, self.slow, self.cuts = fast, slow, nn.ModuleDict(cuts)
        self.period, self.ticks = period, ticks

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (T, T, B, ...) -> A's logits (T, B, outputs), B's logits (B, outputs)."""
        rows = inputs.shape[2]
        state = self.fast.core.initial_state(rows)
        answers, messages = [], []
        for window in inputs:
            logits, message, state = self.fast(window, state)
            answers.append(logits)
            messages.append(message)
        logits, _ = self.slow(torch.stack(messages), self.slow.core.initial_state(rows))
        return torch.stack(answers), logits

    def lock_step(self, block: DigitBlock) -> Iterator[Turn]:
        """One turn for both, through all T² steps."""
        fast, slow = self(block.inputs)
        objective = F.cross_entropy(fast.flatten(0, 1), block.fast.flatten())
        objective = objective + F.cross_entropy(slow, block.slow)
        yield Turn(objective, (fast.flatten(0, 1), block.fast.flatten()), (slow, block.slow))

    def decoupled(self, block: DigitBlock, correct: bool = False) -> Iterator[Turn]:
        """A turn of A after every window, and one of B after every `ticks` of them.

        Args:
          correct: keep the graph of every window, at its weights, until the block ends and every true
            gradient g is known, and backpropagate the residuals g − ĝ in one more turn. So the gradients of
            the turns add up to that of the block for any synthesizers, and without any (ĝ = 0), only late.
        """
        period, rows = self.period, len(block.slow)
        if len(block.inputs) != period:
            raise ValueError(f"a block has {period} windows, not {len(block.inputs)}")
        fast_state, slow_state = (net.core.initial_state(rows) for net in (self.fast, self.slow))
        heard: list[Tensor] = []
        late: list[list[Sent]] = []

        def send(name: str, message: Tree, context: Tensor) -> tuple[list[Tensor], Callable[[], Tree]]:
            """Terms of the producer's objective; and the message as received, to be called after its turn."""
            cut = self.cut(name)
            if not correct:
                return cut.send(message, context), lambda: cut.receive(message, context)
            sent = Sent(cut, message, context)
            late[-1].append(sent)
            return sent.terms, lambda: sent.taken

        for tick in range(period):
            last = tick == period - 1
            late.append([])
            logits, message, state = _pass(self.fast, correct, block.inputs[tick], fast_state)
            terms = [F.cross_entropy(logits, block.fast[tick]) / period]
            of_message, hear = send("message", message, block.coming_slow(tick))
            of_state, go_on = ([], None) if last else send("fast", state, block.coming(tick + 1))
            yield Turn(_sum([*terms, *of_message, *of_state]), fast=(logits, block.fast[tick]), kept=correct)
            if go_on is not None:
                fast_state = go_on()
            heard.append(hear())
            if (tick + 1) % self.ticks:
                continue
            late.append([])
            logits, state = _pass(self.slow, correct, torch.stack(heard), slow_state)
            heard = []
            if last:
                yield Turn(F.cross_entropy(logits, block.slow), slow=(logits, block.slow))
                continue
            terms, go_on = send("slow", state, block.coming_slow(tick + 1))
            if terms:
                yield Turn(_sum(terms), kept=correct)
            slow_state = go_on()
        if correct:
            yield Turn(late=late[:-1])

    def cut(self, name: str) -> Cut:
        """One of the three cuts."""
        cut = self.cuts[name]
        assert isinstance(cut, Cut)
        return cut

    def interfaces(self) -> dict[str, Interface]:
        """The interfaces by the names of their cuts."""
        found = {name: self.cut(name).interface for name in self.cuts}
        return {name: interface for name, interface in found.items() if interface is not None}

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """The parameters of the synthesizers."""
        return [p for interface in self.interfaces().values() for p in interface.parameters()]

    def net_parameters(self) -> list[nn.Parameter]:
        """All other parameters."""
        theirs = {id(p) for p in self.synthesizer_parameters()}
        return [p for p in self.parameters() if id(p) not in theirs]


def _pass(net: nn.Module, kept: bool, *inputs: Tree) -> Any:
    """`net(*inputs)`; with `kept` it can be differentiated after the weights have changed."""
    return Stashed(net, *inputs).out if kept else net(*inputs)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
