"""Build a recurrent model, its synthesizer and its estimator from a configuration."""

from __future__ import annotations

import inspect

from torch import nn

from dni_rnn.config import RecurrentConfig
from dni_rnn.cores import Core
from dni_rnn.data.task import Data
from dni_rnn.errors import UsageError
from dni_rnn.estimators import Estimator
from dni_rnn.estimators.dni import DNI
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import flatten_rows
from dni_rnn.recurrent import RecurrentCore, SequenceModel
from dni_rnn.registry import built, find, imported, is_import
from dni_rnn.synthesizers import ContextEncoder, ContextMLP, Critic, MLPSynthesizer, OneHotTokens, Rows, units
from dni_rnn.traces import why_not_traced


def build_model(config: RecurrentConfig, data: Data) -> SequenceModel:
    """The model that `config` describes, for the symbols of `data`."""
    rnn = build_core(config)
    interface = None
    if config.dni:
        interface = Interface(build_synthesizer(config, rnn, data), scale=config.scale, centre=config.centre)
    core = RecurrentCore(rnn, interface)
    return SequenceModel(data.input_symbols, data.target_symbols, config.embedding, core)


def build_core(config: RecurrentConfig) -> Core:
    """The core of `--core`, built as `Cell(input_size, hidden_size, num_layers)`.

    Raises:
      UsageError: it is not a `Core`.
    """
    name, options = config.core_spec
    sizes = config.embedding, config.hidden, config.layers
    core = built("--core", config.core, find("cores", name), *sizes, **options)
    if not (isinstance(core, nn.Module) and isinstance(core, Core)):
        raise UsageError(
            f"--core {config.core}: not a core; it must be an nn.Module with initial_state, output_size and "
            "output_leaf (see dni_rnn.cores.Core)"
        )
    return core


def build_estimator(config: RecurrentConfig, model: SequenceModel, data: Data) -> Estimator:
    """The estimator that `config` describes, for a model from `build_model`.

    Raises:
      UsageError: it does not accept the given options, or `penalty` when --restore is given.
    """
    restore = config.resolved.restore
    penalty = StatePenalty(restore) if restore else None
    if config.trace and (why_not := why_not_traced(model.core.rnn)):
        raise UsageError(f"--trace {config.trace} with --core {config.core}: {why_not}")
    trace = {"trace": config.trace, "trace_decay": config.trace_decay} if config.trace else {}
    if not config.dni:
        name, options = config.estimator_spec
        kind, given = find("estimators", name), {"penalty": penalty} if penalty else {}
        options = options | given | trace
        try:
            inspect.signature(kind).bind(**options)
        except TypeError as error:
            raise UsageError(f"--estimator {config.estimator}: {error}") from None
        return built("--estimator", config.estimator or name, kind, **options)
    aux = None
    if config.aux:
        state = model.core.initial_state(1)
        width = model.core.rnn.output_size
        hidden = units(config.synthesizer_hidden, width)
        aux = ContextMLP(width, hidden, flatten_rows(state).shape[1], _context_encoder(config, data))
    return DNI(aux, config.aux_weight, discount=config.discount, penalty=penalty, **trace)


def build_synthesizer(config: RecurrentConfig, rnn: Core, data: Data) -> nn.Module:
    """M for the states of `rnn`. A custom one is built from a state of one row and a `ContextEncoder`."""
    state = rnn.initial_state(1)
    hidden = units(config.synthesizer_hidden, rnn.output_size)
    whole = config.synthesizer_reads == "state"
    leaf = None if whole else rnn.output_leaf
    if is_import(config.synthesizer):
        kind = imported("--synthesizer", config.synthesizer)
        return built("--synthesizer", config.synthesizer, kind, state, _context_encoder(config, data))
    if not config.critic:
        return MLPSynthesizer(state, hidden, context=_context_encoder(config, data), leaf=leaf, bounded=whole)
    rows = Rows(leaf=leaf, bounded=whole)
    places = config.context_window * data.target_symbols
    classifier = nn.Sequential(rows, ContextMLP(rows(state).shape[1], hidden, places))
    # Its own loss has a low weight: once the task is learnt it would go on pushing M where the true gradient
    # is zero.
    return Critic(classifier, data.target_symbols, weight=config.weight, loss_weight=1.0)


def _context_encoder(config: RecurrentConfig, data: Data) -> ContextEncoder | None:
    window = config.context_window
    return OneHotTokens(data.target_symbols, window) if window else None
