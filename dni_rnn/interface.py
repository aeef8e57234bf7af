"""The decoupled neural interface: two edges of the autograd graph.

A message passes from a producer to a consumer. Forward, it passes. Backward, the two sides do not
wait for each other:

    producer:   ∂L/∂message  :=  ĝ = size · M(message, context)        (`send`)
    consumer:   M is regressed on the gradient g that arrives there      (`receive`)

Source: Jaderberg et al. 2017, "Decoupled Neural Interfaces using Synthetic Gradients",
arXiv:1608.05343.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dni_rnn.trees import Spec, Tree, detach, flatten, per_row, unflatten

AUDIT_DECAY = 0.8
"""Of an audit's weight when the next one comes."""

RESTORE_BEYOND = 3.0
"""tanh is flat beyond it: a cell state gains nothing there."""


class Critique(NamedTuple):
    """What M returns when it predicts the loss to come, and its gradient as the derivative of that.

    Attributes:
      gradient: a tree like the message, in units of the loss (not of `Interface.size`); while gradients
        are recorded, with its graph, through which its match trains M (a second derivative).
      losses: (B,), what M is trained on besides the match: row by row, weighted as M sees fit against a
        match loss of 1 for predicting zero.
    """

    gradient: Tree
    losses: Tensor


class _Edge(torch.autograd.Function):
    """Identity forward. Backward: trains M on what arrives, and hands ĝ to a message that asks for it.

    A detached message asks for nothing: then the edge is `receive`, and the graph ends here.
    """

    @staticmethod
    def forward(ctx: Any, interface: Interface, done: Tensor | None, count: int, *tensors: Tensor) -> Any:
        messages = tensors[:count]
        ctx.interface, ctx.done = interface, done
        ctx.passes_on = any(ctx.needs_input_grad[3 : 3 + count])
        # The size as it is now: backward moves it.
        ctx.factor = None
        if ctx.passes_on:
            scale = 1.0 if interface.loss_scale is None else interface.loss_scale
            ctx.factor = scale * interface.trust * interface._factor(len(tensors) > 2 * count)
        ctx.save_for_backward(*tensors[count:])
        return tuple(message.view_as(message) for message in messages)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        predictions = list(ctx.saved_tensors[: len(gradients)])
        losses = ctx.saved_tensors[-1] if len(ctx.saved_tensors) > len(gradients) else None
        onward: list[Tensor | None] = [None] * len(gradients)
        if ctx.passes_on:
            onward = [_times(ctx.factor, p).to(g.dtype) for p, g in zip(predictions, gradients, strict=True)]
        trained = ctx.interface._regress(predictions, gradients, ctx.done, losses)
        return None, None, None, *onward, *trained


class _Send(torch.autograd.Function):
    """Zero forward. Backward: the synthetic gradients, as the gradients of the messages."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        # The incoming factor is left out on purpose. `receive` sees gradients of whatever the user
        # calls backward on, so M already speaks in those units: with (loss + sent) / 4, g comes
        # divided by 4, M learns it so, and dividing ĝ once more would be wrong.
        synthetic = ctx.saved_tensors
        return None, *[None] * len(synthetic), *synthetic


def attach(loss: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient with respect to the scalar `loss` is 1, whatever it is added to."""
    return _Send.apply(1, torch.ones_like(loss), loss)  # type: ignore[return-value]


class Interface(nn.Module):
    """A decoupled neural interface with its synthesizer M.

    In a truncated-BPTT loop, two lines change:

        state = interface.receive(state)                      # was: detach
        output, state = lstm(x, state)
        loss = criterion(output, y) + interface.send(state)   # was: criterion(output, y)

    One `loss.backward()` then does everything: the parameters of the net get their truncated
    gradient plus what ĝ adds through the boundary, and the parameters of M get `.grad` like any
    others, for an optimizer of the user's choice.

    M is called as `M(message, context)` and returns a tensor or tree like `message`. It works in
    units of the running size of its target, so that it and its learning rate do not depend on the
    scale of the loss (one that returns a `Critique` speaks in units of the loss itself, and the same
    holds with `size` left out of ĝ):

        size² = running mean of g² over rows and features
        ĝ     = trust · scale · size · M(message, context)
        loss of M = mean over rows and features of (M(message, context) − g / size)²
                    + mean over rows of `Critique.losses`, where M has such

    so a first term of 1 is what predicting zero gives, and 0 is a perfect prediction. g is in the units
    of the scalar on which backward is called (for a loss that is a mean over a batch, it shrinks
    with the batch), and so is ĝ. Keep the interface itself in float32 or float64 (autocast is fine): its
    running size moves by small steps. M is called twice for every message, by `send` and by `receive`, so
    one with dropout draws twice.

    The same backward that brings ĝ to the parameters carries it on to the previous boundary, where it
    is part of M's next target. `trust` is 1 unless `audit` is called, which measures how far ĝ can be
    relied on. So `scale` is the weight of ĝ and, with it, the factor by which the
    future is discounted at every boundary it is bootstrapped across.

    `loss_scale` is for a loss that is multiplied before backward and divided out of `.grad` after it, as
    `torch.amp.GradScaler` does for float16. Set it whenever the factor may have changed:

        interface.loss_scale = scaler.scale(torch.ones((), device=device))

    Then ĝ and M's `.grad` are multiplied by it, and g is divided by it, so that after unscaling all is as
    without a scaler. None, the default, is 1. bfloat16 needs no scaler.

    Args:
      synthesizer: M, any module.
      centre: subtract from what `send` injects its mean over the rows that are not done. What is the same in
        every row of a batch is mostly M's own bias, and a consistent push is what drives a cell state
        away: Adam turns it into full steps, and the bootstrapped target then confirms it.
      restore: strength of a force that turns back a message that runs away. It adds

            restore · size · (message − message clamped to ±RESTORE_BEYOND)

        to what `send` injects: nothing inside the bound, so it cannot shut a cell down, and it
        grows without limit outside.
      scale: factor on ĝ. 0 makes the interface a plain detach that trains M. Published: 0.1.
      normalize: keep M in units of the running size of its target. Without it size is 1.
      decay: of the running size, per backward pass: the mean of all targets until there are
        1 / (1 − decay) of them, exponential from then on.
      batch_dim: where the rows of a message lie: -2 for the states of recurrent cores, (layers, B, H)
        or (B, H), and for vectors (B, F); 0 for feature maps (B, C, height, width).

    Attributes:
      loss_scale: see above; a scalar tensor or number that is set from outside, or None.
      regression_loss: the last loss of M, its first term alone (a scalar tensor; no wait for a device).
      trust: see above; a scalar tensor between 0 and 1.
      total: tensor -> its sum over the processes among which the rows of a message are spread; None when
        they are all here. Means over rows are then over all of them, and `.grad` of M's parameters is each
        process's share: the sum over processes is the gradient.

    Raises:
      ValueError: `decay` does not lie in [0, 1); or, when it is called, M does not return tensors of the
        shapes of the message.
      TypeError: a message holds something that is neither a tensor nor a tuple, list or dict of such.

    Source: Jaderberg et al. 2017, arXiv:1608.05343, §2.
    """

    loss_scale: Tensor | float | None
    total: Callable[[Tensor], Tensor] | None = None
    target_square: Tensor
    target_count: Tensor
    regression_loss: Tensor
    trust: Tensor
    audited: Tensor

    def __init__(
        self,
        synthesizer: nn.Module,
        *,
        scale: float = 1.0,
        centre: bool = False,
        restore: float = 0.0,
        normalize: bool = True,
        decay: float = 0.99,
        batch_dim: int = -2,
    ) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), not {decay}")
        self.synthesizer = synthesizer
        self.scale, self.centre, self.restore = scale, centre, restore
        self.normalize = normalize
        self.decay = decay
        self.batch_dim = batch_dim
        self.loss_scale = None
        self.register_buffer("target_square", torch.zeros(()))
        self.register_buffer("target_count", torch.zeros(()))
        self.register_buffer("regression_loss", torch.ones(()))
        self.register_buffer("trust", torch.ones(()))
        self.register_buffer("audited", torch.zeros(2))  # Σ ĝ·s, Σ ĝ·ĝ

    def size(self) -> Tensor:
        """Running root mean square of M's targets (a scalar); 0 before the first one."""
        return self.target_square.sqrt() if self.normalize else torch.ones_like(self.target_square)

    def receive(self, message: Tree, context: Any = None, done: Tensor | None = None) -> Tree:
        """Take a message over from its producer: the same values, cut from its history.

        Backward, the gradient g that arrives here becomes M's regression target.

        Args:
          message: what was sent, for example the state at the end of the previous window.
          context: what M may know besides the message; what `send` was given for it.
          done: boolean (B,). Rows whose sequence ended at this boundary: the caller has put an
            initial state there, its gradient is not theirs, and M is not trained on it.

        Where no gradients are recorded it is a detach and nothing else.
        """
        if not torch.is_grad_enabled():
            return detach(message)
        return self._edge(detach(message), context, done)

    def send(self, message: Tree, context: Any = None, done: Tensor | None = None) -> Tensor:
        """Hand a message on: a scalar of value 0 whose gradient with respect to the message is ĝ.

        Add it to the loss. A factor in front of it changes nothing (ĝ is already in the units of the
        loss that is differentiated); `scale` is the place for one.

        Args:
          message: for example the state at the end of this window, with its graph.
          context: what M may know besides the message, for example the next symbols.
          done: boolean (B,). Rows whose sequence ends here: they have no future, so ĝ is 0.

        Where no gradients are recorded it is a zero and nothing else.
        """
        leaves, spec = flatten(message)
        if not torch.is_grad_enabled():
            return leaves[0].new_zeros(())
        synthetic = self._synthesize(leaves, spec, context, done, self.loss_scale)
        return _Send.apply(len(leaves), *synthetic, *leaves)  # type: ignore[return-value]

    def forward(self, message: Tree, context: Any = None) -> Tree:
        """Both halves at one place, as between two layers: identity; backward trains M and passes on ĝ.

        What the layer below gets is trust · scale · size · M, neither centred nor restored, with the size
        before this backward pass.
        """
        if not torch.is_grad_enabled():
            return message
        return self._edge(message, context, None)

    def synthetic_gradient(self, message: Tree, context: Any = None, done: Tensor | None = None) -> Tree:
        """ĝ as `send` injects it: a tree like `message`, in the units of the loss, 0 in rows of `done`."""
        leaves, spec = flatten(message)
        return unflatten(self._synthesize(leaves, spec, context, done), spec)

    @torch.no_grad()
    def audit(self, message: Tree, real: Tree, context: Any = None, done: Tensor | None = None) -> None:
        """Set `trust` by one more comparison of ĝ with a gradient s that was really backpropagated.

            trust = Σ ĝ·s / Σ ĝ·ĝ, kept within 0 and 1

        The sums are over rows, features and audits, older ones fading; ĝ is what `send` would inject at
        trust 1, without the restoring force. It is the multiple of ĝ that comes nearest to s: small when ĝ
        points elsewhere, and when it is larger than real gradients are. An s of few windows knows
        nothing of what lies beyond, which counts against ĝ: `trust` is then a lower bound.

        Args:
          message, context, done: as for `send`.
          real: s, a tree like the message, in units of the loss, 0 in rows of `done`.
        """
        leaves, spec = flatten(message)
        synthetic = self._untrusted(leaves, spec, context, done)
        self.audited.mul_(AUDIT_DECAY)
        for ours, true in zip(synthetic, flatten(real)[0], strict=True):
            ours = ours.to(self.audited.dtype)
            self.audited += self._total(torch.stack([(ours * true).sum(), ours.square().sum()]))
        self.trust.copy_((self.audited[0] / self.audited[1]).nan_to_num(0.0).clamp(0.0, 1.0))

    def predict(self, message: Tree, context: Any = None, done: Tensor | None = None) -> Tree:
        """M's output in units of `size`: a tree like `message`, in its dtypes, 0 in rows of `done`."""
        leaves, spec = flatten(message)
        predictions, critique = self._predict(leaves, spec, context, done)
        if critique:
            inverse = _inverse(self.size())
            predictions = [(inverse * prediction).to(prediction.dtype) for prediction in predictions]
        return unflatten(predictions, spec)

    def _factor(self, critique: bool) -> Tensor:
        """ĝ as a multiple of M's output, at trust 1."""
        return self.scale * (torch.ones_like(self.target_square) if critique else self.size())

    @torch.no_grad()
    def _synthesize(
        self,
        leaves: list[Tensor],
        spec: Spec,
        context: Any,
        done: Tensor | None,
        loss_scale: Tensor | float | None = None,
    ) -> list[Tensor]:
        synthetic = self._untrusted(leaves, spec, context, done)
        for number, leaf in enumerate(leaves):
            gradient = self.trust * synthetic[number]
            if self.restore:
                excess = leaf - leaf.clamp(-RESTORE_BEYOND, RESTORE_BEYOND)
                gradient = gradient + _times(self.restore * self.size(), excess)
                gradient = gradient if done is None else self._without(done, gradient)
            if loss_scale is not None:
                gradient = (
                    loss_scale * gradient
                )  # before the cast: what it is there to save must not underflow
            synthetic[number] = gradient.to(leaf.dtype)
        return synthetic

    def _untrusted(self, leaves: list[Tensor], spec: Spec, context: Any, done: Tensor | None) -> list[Tensor]:
        """ĝ at trust 1, without the restoring force."""
        predictions, critique = self._predict(leaves, spec, context, done)
        factor = self._factor(critique)
        return [_times(factor, self._centred(p, done) if self.centre else p) for p in predictions]

    @torch.no_grad()
    def _predict(
        self, leaves: list[Tensor], spec: Spec, context: Any, done: Tensor | None
    ) -> tuple[list[Tensor], bool]:
        """M's output as it is, and whether it is a `Critique`, in units of the loss."""
        predictions, losses = self._call(leaves, spec, context)
        predictions = [p.to(leaf.dtype) for p, leaf in zip(predictions, leaves, strict=True)]
        if done is not None:
            predictions = [self._without(done, p) for p in predictions]
        return predictions, bool(losses)

    def _edge(self, message: Tree, context: Any, done: Tensor | None) -> Tree:
        leaves, spec = flatten(message)
        predictions, losses = self._call(leaves, spec, context)
        tensors = (*leaves, *predictions, *losses)
        return unflatten(_Edge.apply(self, done, len(leaves), *tensors), spec)  # type: ignore[arg-type]

    def _call(self, leaves: list[Tensor], spec: Spec, context: Any) -> tuple[list[Tensor], list[Tensor]]:
        """M's output for a detached message, checked to be a tree like it; and its losses if it has them."""
        said = self.synthesizer(unflatten([leaf.detach() for leaf in leaves], spec), context)
        said, losses = (said.gradient, [said.losses]) if isinstance(said, Critique) else (said, [])
        predictions, _ = flatten(said)
        if [p.shape for p in predictions] != [leaf.shape for leaf in leaves]:
            got, wanted = [tuple(p.shape) for p in predictions], [tuple(leaf.shape) for leaf in leaves]
            raise ValueError(f"the synthesizer must return tensors like the message, {wanted}, not {got}")
        return predictions, losses

    def _regress(
        self,
        predictions: list[Tensor],
        gradients: tuple[Tensor, ...],
        done: Tensor | None,
        losses: Tensor | None,
    ) -> list[Tensor]:
        """The gradient of M's loss with respect to its outputs. Moves the running size on the way.

        Few and small tensor operations, none that waits for a device: this runs at every boundary.
        """
        targets = [gradient.to(self.target_square.dtype) for gradient in gradients]
        if self.loss_scale is not None:
            targets = [target / self.loss_scale for target in targets]
        elements = sum(target.numel() for target in targets)
        count: Tensor | float = float(elements)
        if done is not None:
            targets = [self._without(done, target) for target in targets]
            count = ((~done).sum() * (elements / done.numel())).to(self.target_square.dtype)
        square = _square_sum(targets)
        if self.total is not None:
            square, count = self.total(torch.stack([square, square.new_zeros(()) + count]))
        square = square / count  # not a number when no row is left
        # A loss scaler lets a non-finite gradient through now and then; M must not see it.
        trained = (square < torch.inf).to(square.dtype)
        self.target_count.add_(trained)
        rate = trained / self.target_count.clamp(1.0, 1.0 / (1.0 - self.decay))
        self.target_square.lerp_(square.nan_to_num(0.0, 0.0), rate)
        inverse = _inverse(self.size())
        said = [prediction.to(square.dtype) for prediction in predictions]
        if losses is not None:
            said = [prediction * inverse for prediction in said]
        residuals = [
            torch.addcmul(prediction, target, inverse, value=-1.0)
            for prediction, target in zip(said, targets, strict=True)
        ]
        if done is not None:
            residuals = [self._without(done, residual) for residual in residuals]
        loss = self._total(_square_sum(residuals)) / count
        self.regression_loss.copy_(torch.where(trained > 0, loss, self.regression_loss))
        factor = (2.0 * trained) / count
        if losses is not None:
            factor = factor * inverse
        if self.loss_scale is not None:
            factor = self.loss_scale * factor
        slopes = [
            (residual * factor).nan_to_num_(0.0, 0.0, 0.0).to(prediction.dtype)
            for residual, prediction in zip(residuals, predictions, strict=True)
        ]
        if losses is not None:
            rows = torch.ones_like(losses) if done is None else (~done).to(losses.dtype)
            slope = rows / self._total(rows.sum()).clamp_min(1.0)
            slopes.append(slope if self.loss_scale is None else self.loss_scale * slope)
        return slopes

    def _centred(self, leaf: Tensor, done: Tensor | None) -> Tensor:
        """Minus the mean over the rows that are not done; zero in the others, where `leaf` is zero too."""
        if done is None and self.total is None:
            return leaf - leaf.mean(self.batch_dim, keepdim=True)
        summed = leaf.sum(self.batch_dim, keepdim=True)
        rows = leaf.shape[self.batch_dim] if done is None else (~done).sum()
        both = self._total(torch.cat([summed.flatten(), summed.new_zeros(1) + rows]))
        centred = leaf - both[:-1].view_as(summed) / both[-1].clamp_min(1.0)
        return centred if done is None else self._without(done, centred)

    def _total(self, tensor: Tensor) -> Tensor:
        return tensor if self.total is None else self.total(tensor)

    def _without(self, done: Tensor, leaf: Tensor) -> Tensor:
        """Zero in the rows of `done`."""
        return leaf.masked_fill(per_row(done, leaf, self.batch_dim), 0.0)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, normalize={self.normalize}, batch_dim={self.batch_dim}"


def _times(factor: Tensor, tensor: Tensor) -> Tensor:
    """A scalar tensor times another, in the wider dtype: a small factor would underflow in float16."""
    return factor * tensor.to(torch.promote_types(tensor.dtype, factor.dtype))


def _inverse(size: Tensor) -> Tensor:
    """1 / size; 0 where size is 0: all targets may have been zero so far, in a net that is cut everywhere."""
    return torch.where(size > 0, size.reciprocal(), 0.0)


def _square_sum(tensors: list[Tensor]) -> Tensor:
    """Sum of squares over all elements of all tensors."""
    flat = [t.flatten() for t in tensors]
    return functools.reduce(torch.add, [torch.dot(t, t) for t in flat])
