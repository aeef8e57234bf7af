"""A recurrent core with a trace, which is an edge of the autograd graph, like an interface."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dni_rnn.checks import Done, Layout, alike
from dni_rnn.interface import Interface
from dni_rnn.pytree import Tree, flatten, has_rows, unflatten
from dni_rnn.traces.edge import Passage, TraceEdge
from dni_rnn.traces.layer import Layer
from dni_rnn.traces.memory import EMBEDDING, Gradients, Plan, Scale
from dni_rnn.traces.received import ENDS, measured, received_by, sent_since
from dni_rnn.traces.rules import KINDS
from dni_rnn.traces.running import check, initial_state, no_autocast, rows_of, run, run_untraced

_LAYOUT = Layout(-2)  # of the state of any core that is traced


class Traced(nn.Module):
    """A recurrent core whose truncated gradient is completed by a trace of past steps.

    In a truncated-BPTT loop one line changes:

        core = Traced(lstm)                       # once
        output, state = core(x, state)            # was: output, state = lstm(x, detach(state))

    Call `loss.backward()` once per window, before the next window, or not at all for a window without a
    loss: its part then comes with the next. `.grad` of the core's own parameters holds, with g the gradient
    at the state where the window starts and E = ds/dθ of that state through all steps before it,

        (truncated gradient)  +  (g − ĝ) · E

    ĝ is what an `Interface` injected there one window earlier, 0 without one. The sum is full BPTT, for any
    ĝ, if E is exact and the weights are fixed: for a layer with an element-wise recurrence
    (`dni_rnn.cores`). For an LSTM, GRU or tanh RNN, E keeps the own path of each cell (c through the forget
    gate; h through the update gate; h through R_jj), which needs no learning and no knowledge of the future.
    In a stack each layer has a trace of its own state; paths from layer to layer across time are not
    included.

    With an interface in the loop nothing else changes: the state that `Interface.receive` returned is
    recognized, and the ĝ that `Interface.send` injected into it is subtracted:

        state = interface.receive(state)
        output, state = core(x, state)
        loss = criterion(output, y) + interface.send(state)

    Any other state is detached, except one that `StatePenalty.measure` has just returned. A penalty on the
    end state is an ordinary loss and stays. If the state was replaced, say so by `done`, None or `reset`.

    The trace's part is in the units of the scalar that is differentiated. Accumulation over windows,
    clipping, autocast, data parallelism and checkpoints of weights work unchanged. If no gradients are
    recorded, and in eval mode, it is only the core, and the trace does not change. In a function compiled by
    `torch.compile` it is a graph break.

    Traced steps are no longer in the graph, so modules before the core get no gradient through the trace,
    except `embedding`: with it the module is called with symbols (T, B), embeds them, and the gradient of the
    embedding is exact. It is also faster if there are fewer symbols than B·T.

    A stack of torch's layers runs layer by layer. The whole trace is kept in place, so an update can be
    recorded as a CUDA graph after the first one; `reset`, other shapes and other devices invalidate it.

    Args:
      core: `nn.LSTM`, `nn.GRU`, `nn.RNN` (tanh), a cell of these (one step per window), or a `Traceable`.
      steps: length of the trace: how long a step waits for later gradients, rounded up to whole windows (of
        the first one's length). The sum is truncated to these, and a correction comes up to so many steps
        late: see `dni_rnn.traces.memory.Deferred`. None: the carried form, any horizon, nothing late, memory
        rows × (size of the parameters): for small nets.
      decay: factor on E per step, as λ of TD(λ). 0 is not truncated BPTT: it keeps the last step.
      interface: the one whose `receive` returned the state, for a state that was changed since. The state is
        then not detached if it has a graph.
      embedding: see above. Plain: neither sparse, nor max_norm, nor scale_grad_by_freq.
      fused: run an `nn.LSTM` by torch's own kernel and recompute its gates for the trace; False: by one that
        keeps them (`dni_rnn.traces.lstm`), in the precision of its weights. None: False on a CPU, True
        elsewhere. On a GPU False is faster (an update 1.36 of a truncated one against 1.65: LSTM 1024, 256
        rows, T = 8, TF32, H200), but not yet the default: on a GPU its gradients have not been compared with
        a CPU's. Results are the same to rounding. Other cores ignore it.

    Attributes:
      loss_scale: as `Interface.loss_scale`; set both to the same value.

    Raises:
      ValueError: `steps` < 1, `decay` outside [0, 1], a core that cannot be traced (bidirectional, proj_size,
        relu), an embedding that is not plain; when called, another number of rows than before, or a state
        that was changed after `Interface.receive`.
      TypeError: `core` is none of the above.
      RuntimeError: backward twice through a window, or after the next one began.

    Sources: Williams & Zipser 1989, Neural Computation 1; Bellec et al. 2020, Nature Communications 11;
    Murray 2019, eLife 8; Menick et al. 2021, arXiv:2006.07232; Zucchet et al. 2023, arXiv:2305.15947; exact
    traces of other element-wise cores: Irie et al. 2023, arXiv:2305.19044.
    """

    loss_scale: Tensor | float | None

    def __init__(
        self,
        core: nn.Module,
        steps: int | None = 32,
        decay: float = 1.0,
        *,
        interface: Interface | None = None,
        embedding: nn.Embedding | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, or None to carry the trace, not {steps}")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], not {decay}")
        check(core)
        if embedding is not None and (
            embedding.sparse or embedding.max_norm is not None or embedding.scale_grad_by_freq
        ):
            raise ValueError(
                "the embedding of a trace must be plain: no sparse, max_norm or scale_grad_by_freq"
            )
        self.core, self.steps, self.decay = core, steps, decay
        self.embedding = embedding
        self._interface = (interface,)  # not a part of this module
        self.loss_scale, self.fused = None, fused
        self._layers: list[Layer] | None = None
        self._plan: Plan | None = None
        self._loading: list[list[Tensor]] | None = None
        self._latest: Passage | None = None
        self._owed: dict[str, Tensor] = {}  # gradients due from windows without a backward pass
        self._rows: int | None = None
        self._dtype: torch.dtype | None = None
        self._heard: tuple[list[Tensor] | None] | None = None  # `Interface.sent` of the last window

    def initial_state(self, batch: int) -> Tree:
        """Zeros, as torch uses for None, or the core's own initial state."""
        return initial_state(self.core, batch)

    @property
    def output_size(self) -> int:
        """Width of the outputs."""
        core: Any = self.core
        torch_s = isinstance(self.core, tuple(KINDS))
        return core.hidden_size if torch_s else core.output_size

    @property
    def output_leaf(self) -> Any:
        """Leaf of the state that is the last output; see `Core`."""
        if isinstance(self.core, tuple(KINDS)):
            return "hidden" if isinstance(self.core, nn.LSTM | nn.LSTMCell) else None
        return getattr(self.core, "output_leaf", None)

    def forward(
        self,
        inputs: Tensor,
        state: Tree = None,
        done: Done = None,
        sent: Sequence[Tensor] | None = None,
    ) -> Any:
        """The output of the core for one window; the state of an LSTM is an `LSTMState`, a named (h, c).

        Args:
          inputs: inputs of the core: (T, B, I), with `batch_first` (B, T, I), for a cell (B, I); with
            `embedding` symbols, without the last dimension.
          state: state after the last window, detached or not, or what `Interface.receive` returned. None:
            the initial one in all rows, whose traces end.
          done: (B,) or (B, 1), as for an `Interface`. Rows that begin a new sequence: their traces end. The
            caller has put an initial state there, and has given `done` to the interface, if there is one.
          sent: ĝ, if it comes from no interface: what was injected into the state, a list like its leaves,
            without `loss_scale`, 0 in rows of `done`.
        """
        if torch.compiler.is_compiling():
            return _not_compiled(self, inputs, state, done, sent)
        return self._window(inputs, state, done, sent)

    def _window(self, inputs: Tensor, state: Tree, done: Done, sent: Sequence[Tensor] | None) -> Any:
        anew, symbols = state is None, self.embedding is not None
        if anew:
            state = self.initial_state(rows_of(self.core, inputs, symbols, None))
        leaves, spec, done = _LAYOUT.enter(state, done)
        rows = rows_of(self.core, inputs, symbols, leaves)
        if sent is not None:
            alike(sent, leaves, "sent")
        if not (torch.is_grad_enabled() and self.training):
            vectors = inputs if self.embedding is None else self.embedding(inputs)
            return run_untraced(self.core, vectors, unflatten([leaf.detach() for leaf in leaves], spec))
        interface = received_by(leaves, self._interface[0])
        if interface is not None:
            interface.keeps_sent = True
        leaves = [leaf if interface is not None or measured(leaf) else leaf.detach() for leaf in leaves]
        dtype = next(self.core.parameters()).dtype
        self._check(rows, dtype)
        self._pass_over()
        if anew or (self._latest is not None and not self._latest.differentiated):
            sent = None  # into a loss that was not differentiated nothing was injected
        elif sent is None and interface is not None:
            sent = sent_since(interface, self._heard)
        known = None if sent is None else [s.clone() for s in sent]  # the next ones take their place
        parameters = self._parameters_traced()
        starts = [leaf.detach() for leaf in leaves]
        passage = Passage(starts, done, anew, known, parameters)
        leaves = list(TraceEdge.apply(self, passage, len(leaves), *leaves, *parameters.values()))  # type: ignore
        received = unflatten(leaves, spec)
        output, end, passage.records = run(
            self.core, inputs, received, self.embedding, self.fused, self.decay
        )
        # After `run`, so that a window refused by the core changes nothing.
        self._latest, self._rows, self._dtype = passage, rows, dtype
        self._heard = None if interface is None else (interface.sent,)
        for leaf in flatten(end, has_rows)[0]:
            setattr(leaf, ENDS, True)
        return end if isinstance(self.core, nn.RNNCellBase) else (output, end)

    def _parameters_traced(self) -> dict[str, Tensor]:
        # A weight shared by two layers appears under each name: it gets the sum.
        parameters: dict[str, Tensor] = dict(self.core.named_parameters(remove_duplicate=False))
        if self.embedding is not None:
            parameters[EMBEDDING] = self.embedding.weight
        return parameters

    def _check(self, rows: int, dtype: torch.dtype) -> None:
        if self._rows is not None and self._rows != rows:
            raise ValueError(f"the trace is of {self._rows} rows, not {rows}: call reset() before other rows")
        if self._dtype is not None and self._dtype != dtype:
            raise ValueError(f"the trace is of weights in {self._dtype}, not {dtype}: call reset() first")

    # Backward.

    @torch.no_grad()
    def _absorb(self, passage: Passage, gradients: Sequence[Tensor], scale: Scale) -> list[Tensor | None]:
        """Apply the gradients at the window's start to the trace, then add the window to the trace.

        Returns:
          The trace's part for each of the passage's parameters, times `scale`.
        """
        passage.absorbed = True
        device = next(self.core.parameters()).device
        windows = [record.window() for record in passage.records]
        if self._layers is None:
            symbols = None if self.embedding is None else self.embedding.num_embeddings
            self._layers = [
                Layer(record, window, number, self.steps, self.decay, symbols, device.type != "cpu")
                for number, (record, window) in enumerate(zip(passage.records, windows, strict=True))
            ]
            if self._loading is not None:
                for layer, tensors in zip(self._layers, self._loading, strict=True):
                    layer.load(tensors)
                self._loading = None
        if passage.anew or passage.done is not None:
            for layer in self._layers:
                layer.end(None if passage.anew else passage.done)
        residuals = self._residuals(gradients, passage.sent, windows[0].path)
        sums = self._gradients(self._plan, passage.parameters, windows[0].path[..., 0].numel(), scale)
        for number, layer in enumerate(self._layers):
            here = [r[number] if r.dim() == 3 else r for r in residuals]
            layer.correct(here, sums)
        found = sums.in_order()
        for layer, window in zip(self._layers, windows, strict=True):
            layer.push(window)
        passage.records, passage.starts, passage.sent, passage.parameters = [], [], None, {}
        return found

    def _pass_over(self) -> None:
        """Without a backward pass through the last window, the gradient at its start is g = 0.

        Gradients that leave the trace then are added in the next backward pass.
        """
        passage = self._latest
        if passage is None or passage.absorbed:
            return
        names = list(passage.parameters)
        nothing = [torch.zeros_like(leaf) for leaf in passage.starts]
        with no_autocast(nothing[0].device.type):
            found = self._absorb(passage, nothing, None)
        for name, part in zip(names, found, strict=True):
            if part is not None:
                self._owed[name] = part if name not in self._owed else self._owed[name] + part

    @torch.no_grad()
    def _with_owed(self, names: Iterable[str], found: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients of a backward pass for these parameters, plus those due from earlier windows."""
        owed, self._owed = self._owed, {}
        scale = 1.0 if self.loss_scale is None else self.loss_scale
        return [
            part if part is None or name not in owed else part + owed[name] * scale
            for name, part in zip(names, found, strict=True)
        ]

    def _gradients(
        self, plan: Plan | None, parameters: dict[str, Tensor], count: int, scale: Scale
    ) -> Gradients:
        if plan is None:
            layers = self._layers or []
            plan = Plan(parameters, [t for layer in layers for t in (*layer.terms, *layer.instant_terms)])
            self._plan = plan
        few = self.embedding is not None and self.embedding.num_embeddings < count
        return Gradients(parameters, plan, self.embedding, scale, few or self.steps is None)

    def _residuals(
        self, gradients: Sequence[Tensor], sent: list[Tensor] | None, like: Tensor
    ) -> list[Tensor]:
        """g − ĝ of each leaf, in units of the loss without its scale."""
        dtype = like.real.dtype if like.is_complex() else like.dtype
        residuals = [g.to(dtype) for g in gradients]
        if self.loss_scale is not None:
            residuals = [(r / self.loss_scale).to(dtype) for r in residuals]
            # A loss scaler sometimes produces a non-finite gradient; the trace would keep it.
            finite = torch.stack([torch.isfinite(r).all() for r in residuals]).all()
            residuals = [torch.where(finite, r, 0.0) for r in residuals]
        if sent is not None:
            residuals = [r - s.to(dtype) for r, s in zip(residuals, sent, strict=True)]
        return residuals

    def _backward(self, passage: Passage, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        if passage is not self._latest or passage.absorbed:
            raise RuntimeError(
                "a trace needs one backward pass for each window, before the next window begins: this was "
                + ("followed by another" if passage is not self._latest else "differentiated before")
            )
        passage.differentiated = True
        names = list(passage.parameters)
        with no_autocast(gradients[0].device.type):
            found = self._absorb(passage, gradients, self.loss_scale)
        return self._with_owed(names, found) if self._owed else found

    # Saving and restoring.

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle, which gets no backward pass through the last window."""
        return self._settled().__dict__ | {"_heard": None}

    def _settled(self) -> Traced:
        """This, or, if the last window had no backward pass yet, a copy as if there were none (g = 0)."""
        if self._latest is None or self._latest.absorbed:
            return self
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._layers, twin._latest = copy.deepcopy(self._layers), copy.copy(self._latest)
        twin._owed = dict(self._owed)
        twin._pass_over()
        return twin

    def trace_state(self) -> dict[str, list[Tensor]]:
        """The trace, rows in dimension −2 of every tensor, for a checkpoint or to share rows among processes.

        Empty before the first window. With an interface, save `Interface.sent` too. Waits for the device.

        Raises:
          RuntimeError: gradients of windows without a backward pass are due in the next one.
        """
        twin = self._settled()
        if any(bool(owed.any()) for owed in twin._owed.values()):
            raise RuntimeError(
                "gradients of windows without a backward pass are due in the next one: take the state after "
                "it, or call flush() first"
            )
        kept = (twin._loading or []) if twin._layers is None else [layer.tensors() for layer in twin._layers]
        return {f"layer{number}": tensors for number, tensors in enumerate(kept)}

    def load_trace_state(self, tree: dict[str, list[Tensor]]) -> None:
        """The inverse of `trace_state`, for a module built with the same arguments."""
        layers = self._layers
        loaded = [[t.clone() for t in tree[f"layer{number}"]] for number in range(len(tree))]
        rows = loaded[0][0].shape[-2] if loaded else None
        if layers is None or rows != self._rows:
            self.reset()
            self._loading, self._rows = loaded or None, rows
            return
        self._latest, self._owed, self._heard = None, {}, None
        for layer, tensors in zip(layers, loaded, strict=True):
            layer.load(tensors)  # in place, for what is recorded

    def named_state(self) -> dict[str, Tensor]:
        """`trace_state` as tensors by name."""
        state = self.trace_state()
        return {f"{layer}.{i}": t for layer, tensors in state.items() for i, t in enumerate(tensors)}

    def load_named_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `named_state`, in whatever order the tensors come."""
        state: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, number = name.partition(".")
            state.setdefault(layer, {})[int(number)] = tensor
        self.load_trace_state({layer: [t[i] for i in range(len(t))] for layer, t in state.items()})

    def reset(self) -> None:
        """Forget everything, as before the first window."""
        self._layers, self._plan, self._loading, self._latest, self._rows = None, None, None, None, None
        self._owed, self._dtype, self._heard = {}, None, None

    @torch.no_grad()
    def flush(self) -> None:
        """Add pending gradients to `.grad` and forget them: at the end of a text, before the last update.

        Afterwards `.grad` holds all gradients within `steps`. Nothing is pending in the carried form. With
        several processes each adds the part of its own rows, unseen by hooks that average gradients in
        backward: average `.grad` once more, or do not call `flush`.
        """
        self._pass_over()
        if self._layers is None:
            return
        terms = [term for layer in self._layers for term in layer.terms]
        parameters = self._parameters_traced()
        sums = self._gradients(Plan(parameters, terms), parameters, 0, self.loss_scale)
        for layer in self._layers:
            layer.flush(sums)
        found = self._with_owed(parameters, sums.in_order())
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            if gradient is not None and parameter.requires_grad:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


# As in `torch.compiler`, whose import takes seconds and is needed only when something is compiled.
@torch._disable_dynamo  # type: ignore[reportPrivateImportUsage]
def _not_compiled(traced: Traced, *arguments: Any) -> Any:
    return traced._window(*arguments)
