"""Feed-forward nets cut by interfaces between layers, the same `Interface` as in recurrent nets.

Source: Jaderberg et al. 2017, arXiv:1608.05343, §2 and §3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.agreement import Agreement, agreement_of, frozen
from dni_rnn.edges import attach
from dni_rnn.interface import Interface
from dni_rnn.local_loss import LocalLoss
from dni_rnn.pytree import has_rows
from dni_rnn.synthesizers import ContextMLP, Critic, OneHotTokens, Rows, units

Method = Literal["bprop", "none", "dni", "cdni", "critic", "local", "local+critic"]


class Decoupled(nn.Module):
    """A net in parts, with an interface at each cut; trains in an ordinary loop.

        logits = model(x, labels)
        loss = criterion(logits, labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()

    This one backward pass gives each part the gradient of its own objective: the last part that of the
    loss, every other the synthetic gradient at its output, that of its local loss, or the sum of both; no
    gradient crosses a cut. In evaluation mode, or if no gradients are recorded, the parts are simply chained.

    Args:
      parts: in order; a part maps a tensor (B, ...) to a tensor (B, ...).
      interfaces: one per cut, or none: no synthetic gradients.
      losses: one per cut, or none. Without interfaces and losses, only the last part learns.
      update_probability: p. In every training step each part, independently, takes part in the backward
        pass with probability p; the gradients of the others stay None, so an optimizer skips them. The
        synthesizer at a cut is trained if the part after it takes part. With p = 1 nothing is drawn.
      guesses: one module per cut, x -> a synthetic input for the part after it, trained on the mean squared
        error to the output of the part before it: complete unlock, in which a part waits for neither of its
        neighbours. A `loss_scale` is that of the interface, or else of the local loss, at the cut.

    Source: Jaderberg et al. 2017, §3.1: feed-forward nets, sparse updates, complete unlock.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        interfaces: Sequence[Interface] = (),
        *,
        losses: Sequence[LocalLoss] = (),
        update_probability: float = 1.0,
        guesses: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        given = {"interfaces": interfaces, "local losses": losses, "synthetic inputs": guesses}
        for name, modules in given.items():
            if modules and len(modules) != len(parts) - 1:
                raise ValueError(f"{len(parts)} parts need {len(parts) - 1} {name}, not {len(modules)}")
        if not 0.0 < update_probability <= 1.0:
            raise ValueError(
                f"update_probability must lie above 0 and at most at 1, not {update_probability}"
            )
        if (update_probability < 1.0 or guesses) and not (interfaces or losses):
            raise ValueError(
                "sparse updates and synthetic inputs need parts that learn by themselves, with interfaces "
                "or local losses"
            )
        self.parts, self.interfaces = nn.ModuleList(parts), nn.ModuleList(interfaces)
        self.losses, self.guesses = nn.ModuleList(losses), nn.ModuleList(guesses)
        self.update_probability = update_probability

    def net_parameters(self) -> list[nn.Parameter]:
        """The parameters of the parts."""
        return list(self.parts.parameters())

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """The parameters at the cuts: synthesizers of gradients and of inputs, local losses."""
        return [p for each in (self.interfaces, self.losses, self.guesses) for p in each.parameters()]

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """The output of the last part. `context` conditions the synthesizers, for example the labels."""
        if not (self.training and torch.is_grad_enabled()):
            for part in self.parts:
                x = part(x)
            return x
        updates = self._draw()
        terms: list[Tensor] = []  # zeros with gradients
        message, out = x, x
        for number, part in enumerate(self.parts):
            with torch.set_grad_enabled(updates[number]):
                out = part(message)
            if number < len(self.parts) - 1:
                message = self._cross(number, out, x, context, updates, terms)
        if self.update_probability < 1.0:
            # No part may have been drawn, and the user's backward needs a graph.
            terms.append(out.new_zeros((), requires_grad=True))
        return out + torch.stack(terms).sum() if terms else out

    def _draw(self) -> list[bool]:
        """Which parts take part in this step."""
        if not (self.interfaces or self.losses):
            return [False] * (len(self.parts) - 1) + [True]
        if self.update_probability == 1.0:
            return [True] * len(self.parts)
        return (torch.rand(len(self.parts)) < self.update_probability).tolist()

    def _cross(
        self, cut: int, out: Tensor, x: Tensor, context: Any, updates: list[bool], terms: list[Tensor]
    ) -> Tensor:
        """The input of the part after the cut."""
        interface: Any = self.interfaces[cut] if self.interfaces else None
        if updates[cut] and self.losses:
            loss: Any = self.losses[cut]
            terms.append(loss.send(out, context))
        if interface is not None and updates[cut] and updates[cut + 1] and not self.guesses:
            return interface(out, context)
        if interface is not None and updates[cut]:
            terms.append(interface.send(out, context))
        message = out.detach()
        if self.guesses:
            message = self.guesses[cut](x.detach())
            scale: Any = (self.losses[cut] if interface is None else interface).loss_scale
            terms.append(attach(F.mse_loss(message, out.detach()), scale))
        if interface is not None and updates[cut + 1]:
            return interface.receive(message, context)
        return message.detach()

    def gradient(self, cut: int, message: Tensor, context: Any = None) -> Tensor:
        """The gradient that replaces the true one at a cut: ĝ, that of the local loss, or their sum."""
        found = torch.zeros_like(message)
        if self.interfaces:
            interface: Any = self.interfaces[cut]
            found = interface.synthetic_gradient(message, context)
        if self.losses:
            with torch.enable_grad():
                leaf = message.detach().requires_grad_()
                loss = self.losses[cut](leaf, context)
            found = found + torch.autograd.grad(loss, leaf)[0]
        return found

    def extra_repr(self) -> str:
        return f"update_probability={self.update_probability}"


def split(net: nn.Sequential, cuts: Sequence[int]) -> list[nn.Sequential]:
    """`net` in parts, cut before each module numbered in `cuts`: net[:2], net[2:5], net[5:] for [2, 5].

    Raises:
      ValueError: cuts are not in rising order or not within the net.
    """
    edges = [0, *cuts, len(net)]
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(
            f"cuts must rise and lie between 1 and {len(net) - 1} for {len(net)} modules, not {list(cuts)}"
        )
    modules = list(net)
    return [nn.Sequential(*modules[a:b]) for a, b in pairwise(edges)]


def decouple(
    net: nn.Sequential,
    cuts: Sequence[int],
    example: Tensor,
    classes: int = 0,
    method: Method = "critic",
    *,
    hidden: Sequence[int | Fraction] | None = None,
    norm: bool | None = None,
    window: int = 1,
    update_probability: float = 1.0,
    unlock: Sequence[int] | None = None,
    synthesizer: Callable[[Tensor], nn.Module] | None = None,
) -> Decoupled:
    """Cut a sequential net, with a synthesizer at each cut that suits the message there.

    Args:
      net: any `nn.Sequential` whose modules return one tensor (B, ...): vectors (B, F), feature maps of one
        to three dimensions, channels in dimension 1, or sequences (B, T, F), for which M predicts step by
        step. A critic takes any. The last layer before a cut shows what a message of three dimensions is.
      cuts: before which modules, as in slicing: [2, 5] makes net[:2], net[2:5] and net[5:].
      example: an input of one row or more, on the net's device; its values do not matter.
      classes: number of labels, for methods conditioned on them.
      method: `bprop` (no cut), `none` (no gradient crosses the cuts), `dni` (regression on the message
        alone), `cdni` (regression on the message and the label), `critic` (the derivative of a predicted
        loss, `Critic`), `local` (a loss at each cut, `LocalLoss`), `local+critic` (both, added).
      hidden: widths of the hidden layers of the synthesizers; a `Fraction` is relative to the message. The
        default is none for a critic, one layer as wide as the message for cdni (without it, a label could
        only add a constant to the prediction, and the true gradient is not of that form) and two such for
        dni.
      norm: batch normalisation in them; by default only for dni.
      window: targets per row (W of `Critic` and `OneHotTokens`).
      update_probability: see `Decoupled`.
      unlock: use synthetic inputs (`guesses` of `Decoupled`) with hidden layers of these widths; messages
        must be vectors.
      synthesizer: message -> M, in place of the above.

    Raises:
      ValueError: the arguments contradict each other, or a message is none of the above: then give a
        `synthesizer`.
      TypeError: a part returns anything but one tensor.
    """
    if method == "bprop" or not cuts:
        if update_probability < 1.0 or unlock is not None:
            raise ValueError("sparse updates and unlock need a cut net: method dni, cdni, critic or local")
        return Decoupled([net])
    parts = split(net, cuts)
    if method == "none":
        if unlock is not None:
            raise ValueError("unlock needs parts that learn: method dni, cdni, critic or local")
        return Decoupled(parts, update_probability=update_probability)
    if method != "dni" and synthesizer is None and classes < 2:
        raise ValueError(f"method {method} is conditioned on the labels: give their number, classes")
    if method == "local" and not synthesizer is hidden is norm is None:
        raise ValueError("method local has no synthesizer: use local+critic, or leave its options out")
    messages: list[Tensor] = []
    for cut, message in zip(cuts, messages_of(parts, example), strict=True):
        _check_message(cut, message, len(example))
        messages.append(message)
    makers: list[Callable[[Tensor], nn.Module]] = []
    if synthesizer is not None:
        makers = [synthesizer] * len(messages)
    elif method != "local":
        if hidden is None:
            hidden = [Fraction(1)] * {"dni": 2, "cdni": 1}.get(method, 0)
        if any(width <= 0 for width in hidden):
            raise ValueError(f"widths of hidden layers must be positive, not {list(hidden)}")
        norm = method == "dni" if norm is None else norm
        make = functools.partial(_synthesizer, method, classes, window, hidden, norm)
        makers = [functools.partial(make, below=list(net)[:cut]) for cut in cuts]
    losses: list[LocalLoss] = []
    if method in ("local", "local+critic"):
        for cut, message in zip(cuts, messages, strict=True):
            if message.dim() == 3 and _sequence(message, list(net)[:cut]):
                raise ValueError(f"a local loss reads no sequences, and cut {cut} hands on one")
            losses.append(LocalLoss(message, classes, window).to(message))
    guesses: list[nn.Module] = []
    if unlock is not None:
        if any(message.dim() != 2 for message in messages):
            raise ValueError("unlock needs messages that are vectors, and here some are feature maps")
        features = example[0].numel()
        guesses = [
            nn.Sequential(nn.Flatten(), ContextMLP(features, unlock, m.shape[1], norm=True)).to(m)
            for m in messages
        ]
    interfaces = [
        Interface(make(message), batch_dim=0).to(example.device)
        for make, message in zip(makers, messages if makers else [], strict=True)
    ]
    return Decoupled(parts, interfaces, losses=losses, update_probability=update_probability, guesses=guesses)


@torch.no_grad()
def messages_of(parts: Sequence[nn.Module], example: Tensor) -> Iterator[Tensor]:
    """The messages at each cut for the input `example`; the net is not changed."""
    for part in parts[:-1]:
        modes = [(module, module.training) for module in part.modules()]
        example = part.eval()(example)
        for module, training in modes:
            module.training = training
        yield example


def _check_message(cut: int, message: Any, rows: int) -> None:
    if not isinstance(message, Tensor):
        raise TypeError(f"modules hand on one tensor, and before cut {cut} it is a {type(message).__name__}")
    if not has_rows(message):
        raise ValueError(f"what passes cut {cut} has no gradient: {message.dtype} {tuple(message.shape)}")
    if len(message) != rows:
        raise ValueError(f"rows lie in dimension 0, and cut {cut} turns {rows} into {tuple(message.shape)}")


def _synthesizer(
    method: Method,
    classes: int,
    window: int,
    hidden: Sequence[int | Fraction],
    norm: bool,
    message: Tensor,
    below: Sequence[nn.Module],
) -> nn.Module:
    if method in ("critic", "local+critic"):
        rows = Rows(batch_dim=0)
        inputs, features = rows(message).shape[1], message.shape[1] if message.dim() > 1 else 1
        classifier = ContextMLP(inputs, units(hidden, features), window * classes, norm=norm)
        return Critic(nn.Sequential(rows, classifier), classes)
    places = message.dim() - 2
    if not 0 <= places <= 3:
        raise ValueError(
            f"no synthesizer of method {method} reads {tuple(message.shape)}: give a `synthesizer`"
        )
    context = OneHotTokens(classes, window) if method == "cdni" else None
    steps = places == 1 and _sequence(message, below)
    features = message.shape[2 if steps else 1]
    widths = units(hidden, features)
    if not places:
        return ContextMLP(features, widths, features, context, norm=norm)
    kernel = 1 if steps else 5
    mlp = ContextMLP(features, widths, features, context, norm=norm, kernel=kernel, places=places)
    return StepByStep(mlp) if steps else mlp


def _sequence(message: Tensor, below: Sequence[nn.Module]) -> bool:
    """Whether a message of three dimensions is (B, T, F), not (B, C, length)."""
    for module in reversed([inner for layer in below for inner in layer.modules()]):
        if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
            return False
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding | nn.RNNBase):
            return True
    raise ValueError(
        f"a message {tuple(message.shape)} is a sequence or a feature map, and no layer before the cut tells "
        "which: give a `synthesizer`"
    )


class StepByStep(nn.Module):
    """M for sequences (B, T, F), from an M for feature maps (B, F, T)."""

    def __init__(self, synthesizer: nn.Module) -> None:
        super().__init__()
        self.synthesizer = synthesizer

    def forward(self, message: Tensor, context: Any = None) -> Tensor:
        return self.synthesizer(message.transpose(1, 2), context).transpose(1, 2)


def agreement(model: Decoupled, x: Tensor, context: Any, loss: Callable[[Tensor], Tensor]) -> list[Agreement]:
    """Agreement at each cut with the gradient of full backpropagation, on one batch.

    Costs a training step. The model stays in its mode (in training mode with batch statistics), and keeps its
    weights, statistics and gradients.

    Args:
      loss: output of the last part -> the training loss, a scalar.
    """
    messages: list[Tensor] = []
    with frozen(model), torch.enable_grad():
        message = model.parts[0](x)
        for part in model.parts[1:]:
            # That of a frozen part has no graph.
            messages.append(message if message.requires_grad else message.detach().requires_grad_())
            message = part(messages[-1])
        true = torch.autograd.grad(loss(message), messages)
        return [
            agreement_of(model.gradient(cut, message.detach(), context), g)
            for cut, (message, g) in enumerate(zip(messages, true, strict=True))
        ]
