"""The decoupled neural interface: two edges of the autograd graph.

A message passes from a producer to a consumer. In the backward pass the two sides do not wait for each
other:

    producer:   ∂L/∂message  :=  ĝ = target RMS · M(message, context)   (`send`)
    consumer:   M is regressed on the true gradient g                    (`receive`)

Source: Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients",
arXiv:1608.05343.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.agreement import trust_of
from dni_rnn.checks import Done, Layout, alike
from dni_rnn.edges import Edge, Send, times, without
from dni_rnn.pytree import Spec, Tree, flatten, has_rows, unflatten
from dni_rnn.running_rms import ASKED, AllReduce, Running, follow, sum_of_squares
from dni_rnn.synthesizer_call import Critique, ask, batch_dim_of, dtype_of

__all__ = ["Critique", "Interface"]

RECEIVED_BY = "_received_by"
"""Attribute of a tensor that `Interface.receive` returned in compiled code, where `grad_fn` does not show the
interface to a trace."""

AUDIT_DECAY = 0.8
"""Decay of an audit's weight with each later audit."""


class Interface(Running):
    """A decoupled neural interface with its synthesizer M.

    In a truncated-BPTT loop, two lines change:

        state = interface.receive(state)                      # was: detach
        output, state = lstm(x, state)
        loss = criterion(output, y) + interface.send(state)   # was: criterion(output, y)

    One `loss.backward()` then does everything: the parameters of the net get their truncated gradient plus
    that of ĝ through the boundary, and the parameters of M get `.grad` like any others, for an optimizer of
    the user's choice.

    M is called as `M(message, context)` and returns a tensor or tree like `message`, or one tensor
    (B, features) with the tensors of each row concatenated. It predicts in units of the running RMS of its
    target, so that it and its learning rate do not depend on the scale of the loss (an M that returns a
    `Critique` predicts in units of the loss itself, and ĝ has no factor `target RMS`):

        target RMS² = running mean of g² over rows and features
        ĝ           = trust · scale · target RMS · M(message, context)
        loss of M   = mean over rows and features of (M(message, context) − g / target RMS)²
                      + mean over rows of `Critique.losses`, if M returns them

    so predicting zero gives a first term of 1, and a perfect prediction 0. g is in units of the scalar on
    which backward is called (for a loss that is a mean over a batch, it shrinks with the batch), and so is ĝ.
    M gets the message in the dtype of its own parameters (under autocast, unconverted), and ĝ has that of the
    message; the running RMS is kept in float32 or wider. M is called twice for every message, by `send` and
    by `receive`, so dropout in it is drawn twice.

    A message is a tensor or a tree of tensors (`dni_rnn.pytree.flatten`), with rows in each. None, numbers,
    tensors of integers and 0-d tensors in it have no gradient and pass through. A message with nothing else,
    such as None for the initial state of `nn.LSTM`, passes `receive` unchanged, and `send` is 0.

    The same backward pass carries ĝ on to the previous boundary, where it is part of M's next target. `trust`
    is 1 unless `audit` is called, which measures how well ĝ matches. So `scale` is the weight of ĝ and also
    the factor by which the future is discounted at every boundary that it is bootstrapped across.

    `loss_scale` is for a loss that is multiplied before backward and divided out of `.grad` after it, as
    `torch.amp.GradScaler` does for float16. Set it whenever the factor may have changed:

        interface.loss_scale = scaler.scale(torch.ones((), device=device))

    Then ĝ and M's `.grad` are multiplied by it, and g is divided by it, so that after unscaling the result is
    as without a scaler. None, the default, is 1. bfloat16 needs no scaler.

    Args:
      synthesizer: M, any module.
      centre: subtract from ĝ in `send` its mean over the rows that are not done. A component common to all
        rows is mostly M's own bias, and makes a cell state drift: Adam turns it into full steps, and the
        bootstrapped target then confirms it. A single row is not centred.
      scale: factor on ĝ. 0 makes the interface a plain detach that trains M. Published: 0.1.
      normalize: let M predict in units of the running RMS of its target; else the target RMS is 1.
      decay: decay of the running RMS, per backward pass (`dni_rnn.running_rms.follow`).
      batch_dim: batch dimension of a message: -2 for the states of recurrent cores, (layers, B, H) or (B, H),
        and for vectors (B, F); 0 for feature maps (B, C, height, width) and for states (B, layers, H). A tree
        of numbers in the shape of the message, `{"lstm": (-2, -2), "memory": 0}`, if leaves differ; does not
        matter for a leaf (B,). None: M's `batch_dim` if it has one, else -2, for tensors of up to three
        dimensions.

    Attributes:
      loss_scale: see above; a scalar tensor or number set by the caller, or None.
      regression_loss: the last loss of M, only its first term (a scalar tensor; not synchronised).
      trust: see above; a scalar tensor between 0 and 1.
      keeps_sent: set by a trace (`dni_rnn.traces`): `send` then keeps what it injects.
      sent: ĝ as the last `send` injected it, without `loss_scale`: a list like the leaves of the message, 0
        in rows of `done`; None before the first. It belongs to the rows, not to the weights: `state_dict`
        leaves it out. Every `send` makes it a new list; the one before is `sent_before`.
      all_reduce: tensor -> its sum over the processes that share the rows of a message; None if there is one
        process. Means over rows are then over all processes, and `.grad` of M's parameters is each process's
        share: the sum over processes is the gradient.

    Raises:
      ValueError: `decay` does not lie in [0, 1); or, when called, the tensors of a message differ in their
        number of rows or are on another device than the interface, `done` is not one value per row, or M does
        not return tensors of the shapes of the message, changes the message in place, or returns tensors
        without a graph although it has parameters to train.
      TypeError: a message contains a value of another type (`dni_rnn.pytree.flatten`).

    Source: Jaderberg et al. 2017, arXiv:1608.05343, §2.
    """

    loss_scale: Tensor | float | None
    all_reduce: AllReduce | None = None
    target_square: Tensor
    target_count: Tensor
    regression_loss: Tensor
    trust: Tensor
    audited: Tensor
    sent: list[Tensor] | None
    sent_before: list[Tensor] | None
    keeps_sent: bool
    batch_dim: Tree
    _reached: list[bool]

    def __init__(
        self,
        synthesizer: nn.Module,
        *,
        scale: float = 1.0,
        centre: bool = False,
        normalize: bool = True,
        decay: float = 0.99,
        batch_dim: int | Tree | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), not {decay}")
        self.synthesizer = synthesizer
        self.scale, self.centre = scale, centre
        self.normalize = normalize
        self.decay = decay
        self.batch_dim = batch_dim_of(synthesizer) if batch_dim is None else batch_dim
        self._layout = Layout(self.batch_dim)
        self.loss_scale = None
        self.keeps_sent, self.sent, self.sent_before = False, None, None
        # Whether backward from the next `send` reaches M's parameters, by a `receive` before it.
        self._reached = [False]
        self._dtype = dtype_of(synthesizer)
        self.register_buffer("target_square", torch.zeros(()))
        self.register_buffer("target_count", torch.zeros(()))
        self.register_buffer("regression_loss", torch.ones(()))
        self.register_buffer("trust", torch.ones(()))
        self.register_buffer("audited", torch.zeros(2))  # Σ ĝ·s, Σ ĝ·ĝ

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._dtype = dtype_of(self.synthesizer)
        return self

    def target_rms(self) -> Tensor:
        """Running root mean square of M's targets (a scalar); 0 before the first one."""
        return self.target_square.sqrt() if self.normalize else torch.ones_like(self.target_square)

    def receive(self, message: Tree, context: Any = None, done: Done = None) -> Tree:
        """Receive a message from its producer: the same values, detached.

        In the backward pass its gradient g becomes M's regression target.

        Args:
          message: what was sent, for example the state at the end of the previous window.
          context: what M is conditioned on besides the message; as given to `send`. It is not detached:
            what it was computed from is trained on M's loss, like M.
          done: (B,) or (B, 1), booleans or numbers, a tensor, array or list. Rows whose sequence ended at
            this boundary: the caller has put an initial state there, and M is not trained on its gradient.

        The result may be changed in place without changing the message. If no gradients are recorded, this is
        only a detach.
        """
        leaves, spec, done = self._enter(message, done)
        leaves = [leaf.detach() for leaf in leaves]
        if not (leaves and torch.is_grad_enabled()):
            return unflatten(leaves, spec)
        leaves = self._edge(leaves, spec, context, done)
        if torch.compiler.is_compiling():
            for leaf in leaves:
                setattr(leaf, RECEIVED_BY, self)
        return unflatten(leaves, spec)

    def send(self, message: Tree, context: Any = None, done: Done = None, *, discount: float = 1.0) -> Tensor:
        """Send a message: a scalar of value 0 whose gradient with respect to the message is ĝ.

        Add it to the loss. Multiplying it by a factor has no effect (ĝ is already in the units of the loss
        that is differentiated); use `scale`.

        Args:
          message: for example the state at the end of this window, with its graph.
          context: what M is conditioned on besides the message, for example the next symbols.
          done: as for `receive`. Rows whose sequence ends here: they have no future, so ĝ is 0.
          discount: factor on ĝ at this boundary alone, such as γ^T after a window of T steps.

        If no gradients are recorded, this is only a zero.
        """
        leaves, spec, done = self._enter(message, done)
        if not torch.is_grad_enabled():
            return (leaves[0] if leaves else self.target_square).new_zeros(())
        synthetic: list[Tensor] = []
        if leaves:
            rows = self._synthesize(leaves, spec, context, done, discount, self.loss_scale)
            if self.keeps_sent:
                self._keep(rows, leaves)
            synthetic = self._like(rows, leaves)
        # Data parallelism expects every parameter in every backward pass; M's come in at `receive`.
        parameters = [] if self._reached[0] else [p for p in self.synthesizer.parameters() if p.requires_grad]
        self._reached[0] = False
        tensors = (*synthetic, *leaves, *parameters)
        return Send.apply(len(leaves), *tensors) if tensors else self.target_square.new_zeros(())  # type: ignore

    def _keep(self, rows: Tensor, leaves: list[Tensor]) -> None:
        """In place if possible, so that a recorded update finds it."""
        unscaled = rows if self.loss_scale is None else (rows / self.loss_scale).to(rows.dtype)
        sent = self._layout.like(unscaled, leaves)
        before = self.sent_before = self.sent
        if before is None or [s.shape for s in before] != [s.shape for s in sent]:
            before = [torch.empty_like(s) for s in sent]
        self.sent = [kept.copy_(s) for kept, s in zip(before, sent, strict=True)]

    def forward(self, message: Tree, context: Any = None) -> Tree:
        """Send and receive at one place, as between two layers: identity; backward trains M and returns ĝ.

        The layer below gets trust · scale · target RMS · M, not centred, with the target RMS before this
        backward pass.
        """
        if not torch.is_grad_enabled():
            return message
        leaves, spec, _ = self._enter(message, None)
        return unflatten(self._edge(leaves, spec, context, None) if leaves else leaves, spec)

    def synthetic_gradient(self, message: Tree, context: Any = None, done: Done = None) -> Tree:
        """ĝ as `send` injects it: a tree like `message`, in the units of the loss, 0 in rows of `done`."""
        leaves, spec, done = self._enter(message, done)
        if not leaves:
            return unflatten(leaves, spec)
        return unflatten(self._like(self._synthesize(leaves, spec, context, done), leaves), spec)

    @torch.no_grad()
    def audit(
        self,
        message: Tree,
        real: Tree,
        context: Any = None,
        done: Done = None,
        *,
        discount: float = 1.0,
    ) -> None:
        """Update `trust` by a comparison of ĝ with a true, backpropagated gradient s.

            trust = Σ ĝ·s / Σ ĝ·ĝ, clipped to [0, 1]

        the least-squares coefficient of the true gradient on the synthetic one. The sums are over rows,
        features and audits, with decaying weights; ĝ is what `send` would inject at trust 1. It is small if ĝ
        has another direction, or is larger than true gradients. An s of few windows misses the loss beyond
        them, which counts against ĝ: `trust` is then a lower bound.

        Args:
          message, context, done, discount: as for `send`.
          real: s, a tree like the message, in units of the loss, 0 in rows of `done`.
        """
        leaves, spec, done = self._enter(message, done)
        if not leaves:
            return
        reals = flatten(real, has_rows)[0]
        alike(reals, leaves, "a real gradient")
        predicted, critique = self._centred(leaves, spec, context, done)
        synthetic = times(self._untrusted_factor(critique, discount), predicted).to(self.audited.dtype)
        true = self._layout.rows(reals)
        self.audited.mul_(AUDIT_DECAY)
        self.audited += self._summed(torch.stack([(synthetic * true).sum(), synthetic.square().sum()]))
        self.trust.copy_(trust_of(self.audited[0], self.audited[1]))

    def predict(self, message: Tree, context: Any = None, done: Done = None) -> Tree:
        """M's prediction in units of the target RMS: like `message`, in its dtypes, 0 in rows of `done`."""
        leaves, spec, done = self._enter(message, done)
        if not leaves:
            return unflatten(leaves, spec)
        predicted, critique = self._predict(leaves, spec, context, done)
        if critique:
            predicted = times(_inverse(self.target_rms()), predicted)
        return unflatten(self._like(predicted, leaves), spec)

    # Below, messages and predictions are rows: one tensor (B, features), the tensors concatenated. This runs
    # at every boundary: few and small tensor operations, none that waits for a device.

    def _enter(self, message: Tree, done: Done) -> tuple[list[Tensor], Spec, Tensor | None]:
        return self._layout.enter(message, done, self.target_square.device)

    def _like(self, rows: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Rows as tensors of the shapes and dtypes of `leaves`."""
        parts = self._layout.like(rows, leaves)
        return [part.to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]

    def _untrusted_factor(self, critique: bool, discount: float) -> Tensor:
        """ĝ as a multiple of M's output, at trust 1."""
        unit = torch.ones_like(self.target_square) if critique else self.target_rms()
        return (self.scale * discount) * unit

    def _factor(self, critique: bool, discount: float, loss_scale: Tensor | float | None) -> Tensor:
        """ĝ, multiplied by the factor of a loss scaler, as a multiple of M's output."""
        factor = self.trust * self._untrusted_factor(critique, discount)
        return factor if loss_scale is None else loss_scale * factor

    @torch.no_grad()
    def _synthesize(
        self,
        leaves: list[Tensor],
        spec: Spec,
        context: Any,
        done: Tensor | None,
        discount: float = 1.0,
        loss_scale: Tensor | float | None = None,
    ) -> Tensor:
        """ĝ, in a dtype wide enough that values which a loss scaler protects do not underflow."""
        predicted, critique = self._centred(leaves, spec, context, done)
        return times(self._factor(critique, discount, loss_scale), predicted)

    @torch.no_grad()
    def _centred(
        self, leaves: list[Tensor], spec: Spec, context: Any, done: Tensor | None
    ) -> tuple[Tensor, bool]:
        """`_predict`, with `centre` minus the mean over the rows that are not done."""
        predicted, critique = self._predict(leaves, spec, context, done)
        if not self.centre:
            return predicted, critique
        if predicted.dtype is not torch.float32:
            predicted = predicted.to(torch.promote_types(predicted.dtype, self.target_square.dtype))
        if done is None and self.all_reduce is None:
            alone = predicted.shape[0] == 1
            return predicted if alone else predicted - predicted.mean(0, keepdim=True), critique
        summed = predicted.sum(0)
        rows = len(predicted) if done is None else (~done).sum()
        both = self._summed(torch.cat([summed, summed.new_zeros(1) + rows]))
        count = F.threshold(both[-1], 1.0, torch.inf)  # the mean of a single row counts as 0
        return without(done, predicted - both[:-1] / count), critique

    @torch.no_grad()
    def _predict(
        self, leaves: list[Tensor], spec: Spec, context: Any, done: Tensor | None
    ) -> tuple[Tensor, bool]:
        """M's output, 0 in rows of `done`; and whether it is a `Critique`, in units of the loss."""
        predicted, *losses = self._call(leaves, spec, context)
        return without(done, predicted), bool(losses)

    def _edge(self, leaves: list[Tensor], spec: Spec, context: Any, done: Tensor | None) -> list[Tensor]:
        answers = self._call(leaves, spec, context)
        if not answers[0].requires_grad and any(p.requires_grad for p in self.synthesizer.parameters()):
            raise ValueError(
                "what the synthesizer returns has no graph, so its parameters would never be trained: is "
                "there a detach or a no_grad in it? (If it should not be trained: requires_grad_(False))"
            )
        asked = None if answers[0].requires_grad else ASKED  # the targets of a constant M are measured too
        tensors = (*leaves, *answers)
        self._reached[0] = True
        return list(Edge.apply(self, done, asked, len(leaves), *tensors))  # type: ignore[arg-type]

    def _call(self, leaves: list[Tensor], spec: Spec, context: Any) -> list[Tensor]:
        return ask(self.synthesizer, self._layout, leaves, spec, context, self._dtype)

    def _regress(
        self, predicted: Tensor, gradients: Sequence[Tensor], done: Tensor | None, losses: Tensor | None
    ) -> list[Tensor]:
        """The gradient of M's loss with respect to its outputs. Also updates the running RMS."""
        target = self._layout.rows(gradients).to(self.target_square.dtype)
        if self.loss_scale is not None:
            target = target / self.loss_scale
        target = without(done, target)
        # A loss scaler sometimes produces a non-finite gradient; M must not be trained on it.
        trained, count = follow(
            self.target_square, self.target_count, target, done, self.decay, self.all_reduce
        )
        inverse = _inverse(self.target_rms())
        answer = predicted.to(target.dtype)
        if losses is None:
            residual, mean = torch.addcmul(answer, target, inverse, value=-1.0), 1.0 / count
        else:  # in units of the loss: its square and its slope are divided
            residual, mean = answer - target, inverse.square() / count
        residual = without(done, residual)
        loss = mean * self._summed(sum_of_squares(residual))
        self.regression_loss.copy_(torch.where(trained > 0, loss, self.regression_loss))
        factor = 2.0 * mean * trained
        if self.loss_scale is not None:
            factor = self.loss_scale * factor
        slopes = [(residual * factor).nan_to_num_(0.0, 0.0, 0.0).to(predicted.dtype)]
        if losses is not None:
            rows = torch.ones_like(losses) if done is None else (~done).to(losses.dtype)
            slope = rows / self._summed(rows.sum()).clamp_min(1.0)
            slopes.append(slope if self.loss_scale is None else self.loss_scale * slope)
        return slopes

    def _summed(self, tensor: Tensor) -> Tensor:
        return tensor if self.all_reduce is None else self.all_reduce(tensor)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, normalize={self.normalize}, batch_dim={self.batch_dim}"


torch.serialization.add_safe_globals([Interface])


def _inverse(rms: Tensor) -> Tensor:
    """1 / rms; 0 if rms is 0: so far all targets may have been zero."""
    return torch.where(rms > 0, rms.reciprocal(), 0.0)
