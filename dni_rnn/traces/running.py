"""Run one window of a traced core, with a record of each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from dni_rnn.cores.lstm import LSTM
from dni_rnn.pytree import LSTMState, Tree, flatten
from dni_rnn.traces.lstm import kernel_steps
from dni_rnn.traces.lstm import steps as steps_of_lstm
from dni_rnn.traces.rules import (
    KINDS,
    LayerWindow,
    Record,
    Traceable,
    Weights,
    lstm_terms,
    lstm_window_kept,
    lstm_window_steps,
    project,
)

BY_STEP = "cuda"
"""Device where an LSTM that keeps its gates runs by `kernel_steps`."""

Ran = tuple[Any, Tree, list[Record]]
"""Outputs (None of a cell), the state after them, records of the layers."""

FUSED: dict[type[nn.Module], Callable[..., Any]] = {
    nn.LSTM: torch._VF.lstm,  # type: ignore[attr-defined]
    nn.GRU: torch._VF.gru,  # type: ignore[attr-defined]
    nn.RNN: torch._VF.rnn_tanh,  # type: ignore[attr-defined]
}


def why_not_traced(core: Any) -> str | None:
    """Why a core cannot be traced, in words; None if it can."""
    try:
        check(core)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def check(core: nn.Module) -> None:
    """Refuse a core that cannot be traced.

    Raises:
      ValueError, TypeError: see `Traced`.
    """
    if isinstance(core, nn.RNNBase):
        if core.bidirectional:
            raise ValueError("a trace looks back along time: a bidirectional core has none")
        if core.proj_size:
            raise ValueError("the own path of an LSTM with proj_size is not known")
    if isinstance(core, nn.RNN | nn.RNNCell) and core.nonlinearity != "tanh":
        raise ValueError("the own path of an RNN is that of tanh, not of relu")
    kind = next((kind for kind in KINDS if isinstance(core, kind)), None)
    if kind is not None:
        # That of `LSTM` only names the state.
        if getattr(core.forward, "__func__", None) not in (kind.forward, LSTM.forward):
            raise TypeError(
                f"{type(core).__name__} has a forward of its own, of which a trace knows nothing: trace the "
                f"{kind.__name__} in it, or write a dni_rnn.traces.Traceable"
            )
        if core._forward_pre_hooks or is_parametrized(core):
            raise ValueError(
                f"a trace is of the weights that the {kind.__name__} has, not of ones that are made for each "
                "call: remove the weight norm, parametrization or forward pre-hook"
            )
    elif not isinstance(core, Traceable):
        raise TypeError(
            f"{type(core).__name__} does not say how it is traced: it needs run(inputs, state) and "
            "initial_state(batch) as in dni_rnn.traces.Traceable"
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(core, name, None) for name in hooks):
        raise ValueError(
            f"a trace runs the {type(core).__name__} itself, so its hooks would not be called: remove them, "
            "or register them on Traced"
        )


def initial_state(core: Any, batch: int) -> Tree:
    """Zeros, as torch uses for None, or the core's own initial state."""
    if not isinstance(core, nn.RNNBase | nn.RNNCellBase):
        return core.initial_state(batch)
    shape = (core.num_layers, batch) if isinstance(core, nn.RNNBase) else (batch,)
    zeros = next(core.parameters()).new_zeros(*shape, core.hidden_size)
    return LSTMState(zeros, zeros.clone()) if isinstance(core, nn.LSTM | nn.LSTMCell) else zeros


def rows_of(core: nn.Module, inputs: Any, embedded: bool, leaves: Sequence[Tensor] | None) -> int:
    """How many rows a window has.

    Args:
      inputs: inputs of the core, or `embedded` symbols.
      leaves: leaves of its state; None for the initial one.

    Raises:
      TypeError, ValueError: the inputs have no rows or no step, or the state does not fit them or the core.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs are a tensor, not a {type(inputs).__name__}")
    cell = isinstance(core, nn.RNNCellBase)
    batch_dim = 0 if cell or getattr(core, "batch_first", False) else 1
    if inputs.dim() + embedded < (2 if cell else 3):
        raise ValueError(f"inputs must have rows: got {tuple(inputs.shape)}")
    if not cell and not inputs.shape[1 - batch_dim]:
        raise ValueError(f"a window has one step at least: got {tuple(inputs.shape)}")
    rows = inputs.shape[batch_dim]
    if leaves is None:
        return rows
    shapes = [tuple(leaf.shape) for leaf in leaves]
    if isinstance(core, nn.RNNBase | nn.RNNCellBase):
        shape = (rows, core.hidden_size) if cell else (core.num_layers, rows, core.hidden_size)
        wanted = [shape] * (2 if isinstance(core, nn.LSTM | nn.LSTMCell) else 1)
        if shapes != wanted:
            raise ValueError(f"inputs {tuple(inputs.shape)} go with a state {wanted}, not {shapes}")
    elif leaves and shapes[0][-2] != rows:
        raise ValueError(f"inputs {tuple(inputs.shape)} have {rows} rows, and the state is {shapes}")
    return rows


def run_untraced(core: nn.Module, vectors: Tensor, state: Tree) -> Any:
    """The core without a trace; the state of an LSTM is named, as by `run`."""
    returned = core(vectors, state)
    if isinstance(core, nn.LSTMCell):
        return LSTMState(*returned)
    return (returned[0], LSTMState(*returned[1])) if isinstance(core, nn.LSTM) else returned


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Disable autocast inside."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def run(
    core: nn.Module,
    inputs: Tensor,
    state: Tree,
    embedding: nn.Embedding | None,
    fused: bool | None,
    decay: float,
) -> Ran:
    """One window.

    Args:
      core: one that passes `check`.
      inputs: inputs of the core; with `embedding`, symbols.
      state: state of the core, its tensors in the order of `flatten` (h, c of an LSTM).
      fused, decay: see `Traced`.
    """
    if isinstance(core, nn.LSTM) and not (inputs.device.type != "cpu" if fused is None else fused):
        return _run_kept(core, inputs, flatten(state)[0], embedding, decay)
    x = inputs if embedding is None else embedding(inputs)
    symbols = None if embedding is None else inputs
    if isinstance(core, nn.RNNCellBase):
        end = core(x, state)
        end = LSTMState(*end) if isinstance(core, nn.LSTMCell) else end
        seen = (x if symbols is None else symbols).detach().unsqueeze(0)
        starts, ends = ([leaf.detach() for leaf in flatten(s)[0]] for s in (state, end))
        return None, end, [_record(core, "", seen, embedding, None, starts, ends)]
    if isinstance(core, nn.RNNBase):
        return _run_fused(core, x, flatten(state)[0], embedding, symbols)
    output, end, records = core.run(x, state)  # type: ignore[operator]
    if symbols is not None:
        records = [_with_symbols(records[0], symbols), *records[1:]]
    return output, end, records


def _run_fused(
    core: nn.RNNBase, x: Tensor, leaves: list[Tensor], embedding: nn.Embedding | None, symbols: Tensor | None
) -> Ran:
    """Layer by layer, since torch's stack does not return the outputs of lower layers."""
    lstm = isinstance(core, nn.LSTM)
    if core.batch_first:
        x, symbols = x.transpose(0, 1), None if symbols is None else symbols.transpose(0, 1)
    ends: list[list[Tensor]] = []
    records: list[Record] = []
    for layer in range(core.num_layers):
        if layer and core.dropout:
            x = F.dropout(x, core.dropout, core.training)
        start = [leaf[layer : layer + 1] for leaf in leaves]
        hidden: Any = (start[0], start[1]) if lstm else start[0]
        table = embedding if layer == 0 else None
        seen = symbols if table is not None and symbols is not None else x.detach()
        if core.num_layers == 1 and not core.batch_first:
            x, after = core(x, hidden)
            end: list[Tensor] = list(after) if lstm else [after]
        else:
            weights = [getattr(core, name) for name in core._all_weights[layer]]
            kernel = FUSED[next(kind for kind in FUSED if isinstance(core, kind))]
            with _one_layer_of_a_stack():
                x, *end = kernel(x, hidden, weights, core.bias, 1, 0.0, core.training, False, False)
        before, behind = ([leaf.detach()[0] for leaf in s] for s in (start, end))
        records.append(_record(core, f"_l{layer}", seen, table, x.detach(), before, behind))
        ends.append(end)
    out = [_stacked(list(leaf)) for leaf in zip(*ends, strict=True)]
    return x.transpose(0, 1) if core.batch_first else x, LSTMState(*out) if lstm else out[0], records


@contextmanager
def _one_layer_of_a_stack() -> Iterator[None]:
    """Silence cuDNN's warning that one layer's weights are not those of the whole stack and are copied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        yield


def _run_kept(
    core: nn.LSTM, inputs: Tensor, leaves: list[Tensor], embedding: nn.Embedding | None, decay: float
) -> Ran:
    """An LSTM that keeps its gates (`dni_rnn.traces.lstm`)."""
    x = inputs.transpose(0, 1) if core.batch_first else inputs
    seen, table = x, None
    by_step = x.device.type == BY_STEP
    if embedding is not None:
        # The gradient of a look-up is a sum by symbol, on a GPU slower than the product that it saves.
        if embedding.padding_idx is None and not by_step:
            table = embedding.weight
        else:
            x = embedding(x)
    hiddens, cells, records = [], [], []
    for layer in range(core.num_layers):
        if layer and core.dropout:
            x = F.dropout(x, core.dropout, core.training)
        suffix = f"_l{layer}"
        w = _weights(core, suffix)
        if layer or embedding is None:
            seen = x.detach().to(w.w_hh.dtype)
        of_x = project(x, w.w_ih, w.bias(slice(None)), None if layer else table).to(w.w_hh.dtype)
        with no_autocast(of_x.device.type):
            start = leaves[0][layer], leaves[1][layer]
            if by_step:
                x, cell, kept = kernel_steps(of_x, *start, w.w_hh)
                window = partial(lstm_window_steps, kept, seen, decay)
            else:
                x, cell, kept = steps_of_lstm(of_x, *start, w.w_hh)
                window = partial(lstm_window_kept, kept, seen)
        terms, instant = lstm_terms(lambda name, end=suffix: name + end, core.hidden_size, core.bias)
        records.append(Record(terms, window, instant))
        hiddens.append(x[-1:])
        cells.append(cell.unsqueeze(0))
    return (
        x.transpose(0, 1) if core.batch_first else x,
        LSTMState(_stacked(hiddens), _stacked(cells)),
        records,
    )


def _stacked(leaves: list[Tensor]) -> Tensor:
    return leaves[0] if len(leaves) == 1 else torch.cat(leaves)


def _weights(core: nn.Module, suffix: str) -> Weights:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return Weights(*(getattr(core, name + suffix, None) for name in names))  # type: ignore[arg-type]


def _record(
    core: Any,
    suffix: str,
    seen: Tensor,
    embedding: nn.Embedding | None,
    output: Tensor | None,
    starts: list[Tensor],
    ends: list[Tensor],
) -> Record:
    """Record of a torch layer, whose gates are recomputed. `seen`: symbols if there is an embedding."""
    terms_of, window_of = KINDS[next(kind for kind in KINDS if isinstance(core, kind))]
    terms, instant = terms_of(lambda name: name + suffix, core.hidden_size, bool(core.bias))
    # The weights that the window ran with: `functional_call` has removed them when backward runs.
    w, table = _weights(core, suffix), None if embedding is None else embedding.weight

    def window() -> LayerWindow:
        dtype = w.w_hh.dtype
        first = starts[0].unsqueeze(0).to(dtype)
        h = first if output is None else torch.cat([first, output[:-1].to(dtype)])
        x = seen.to(dtype) if table is None else seen
        before, after = ([leaf.to(dtype) for leaf in state] for state in (starts, ends))
        return window_of(w, x, table, h, before, after)

    return Record(terms, window, instant)


def _with_symbols(record: Record, symbols: Tensor) -> Record:
    """Its first input replaced by the symbols that were embedded."""

    def window() -> LayerWindow:
        window = record.window()
        return window._replace(inputs=(symbols, *window.inputs[1:]))

    return record._replace(window=window)
