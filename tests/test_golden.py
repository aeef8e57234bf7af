"""Golden loss curves: 20 updates in float32 on the CPU, over a text that is the same everywhere.

A change that was not meant to alter numbers must leave these alone, to one part in 10,000 (a different
processor or torch may round differently). To renew them after a change that was meant to alter them:

    DNI_RNN_RENEW=1 pytest tests/test_cli.py tests/test_golden.py
"""

import itertools
import json
import math
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dni_rnn.config import PUBLISHED_DNI, RecurrentConfig
from dni_rnn.cores.lstm import LSTM
from dni_rnn.data.task import Corpus, Data
from dni_rnn.training.builders import build_estimator, build_synthesizer
from dni_rnn.training.learner import BITS
from dni_rnn.training.recurrent import RecurrentLearner

GOLDEN = Path(__file__).parent / "golden"
RENEW = os.environ.get("DNI_RNN_RENEW") == "1"
TOLERANCE = 1e-4
UPDATES = 20

SETTINGS = {
    "bptt": RecurrentConfig(hidden=16, embedding=8, batch_size=4, bptt=3, lr=0.02),
    # As published: scale 0.1, one hidden layer. M learns fast, so that it matters within 20 updates.
    "dni": RecurrentConfig(
        hidden=16, embedding=8, batch_size=4, bptt=3, lr=0.02, synthesizer_lr=0.1,
        dni=True, **PUBLISHED_DNI,
    ),
    # Everything else that is on offer, told the next symbols.
    "dni_context": RecurrentConfig(
        hidden=16, embedding=8, batch_size=4, bptt=3, lr=0.02, synthesizer_lr=0.1,
        dni=True, synthesizer="mlp", scale=1.0, context="next-tokens:4", centre=True, restore=0.5, aux=True,
    ),
}  # fmt: skip
STEPS_PER_ROW = 40
"""A pass of 14 windows, the last one shorter, so that the curves cross the end of the text."""


def synthetic_text() -> Data:
    """Random words, by a generator that gives the same on every platform and Python."""
    random, words = Random(0), ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "no", "dog")
    text = " ".join(words[int(random.random() * len(words))] for _ in range(100))[: 4 * STEPS_PER_ROW + 1]
    corpus: Any = Corpus.from_texts("synthetic", text, text[:100], text[:100])
    return corpus


def at_the_start(config, data):
    """A learner with the weights that the curves begin with.

    Those of the net are drawn as for "bptt", whatever the method; those of the synthesizer before them and
    those of the auxiliary task after them, each behind the draws of a core with one input: so it was when the
    curves were recorded.
    """
    cpu = torch.device("cpu")
    net = RecurrentLearner(SETTINGS["bptt"], data, cpu).model.state_dict()
    learner = RecurrentLearner(config, data, cpu)
    left_out = learner.model.load_state_dict(net, strict=False)
    assert not left_out.unexpected_keys
    assert all("interface" in name for name in left_out.missing_keys)
    interface, symbols = learner.model.core.interface, data.input_symbols
    if interface is not None:
        torch.manual_seed(config.seed)
        LSTM(1, config.hidden)
        drawn = build_synthesizer(config, learner.model.core.rnn, data)
        interface.synthesizer.load_state_dict(drawn.state_dict())
        LSTM(config.embedding, config.hidden)
        torch.nn.Embedding(symbols, config.embedding)
        torch.nn.Linear(config.hidden, symbols)
        LSTM(1, config.hidden)
        learner.estimator.load_state_dict(build_estimator(config, learner.model, data).state_dict())
    return learner


def curve(config):
    """Per update: the loss in bits per symbol, and for DNI the running RMS of M's target."""
    learner = at_the_start(config, synthetic_text())
    losses, sizes = [], []
    for _ in range(UPDATES):
        learner.reset_metrics()
        learner.update()
        losses.append(float(learner.record.averages["loss"]) * BITS / learner.counters.scored)
        if learner.model.core.interface is not None:
            sizes.append(float(learner.model.core.interface.target_rms()))
    return {"bits_per_symbol": losses, "target_size": sizes}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses(name):
    found, path = curve(SETTINGS[name]), GOLDEN / f"losses_{name}.json"
    if RENEW:
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert found.keys() == golden.keys()
    for quantity in golden:
        assert found[quantity] == pytest.approx(golden[quantity], rel=TOLERANCE, abs=1e-9), quantity


def test_the_curves_can_tell_methods_apart():
    """They learn, they start alike (M ≡ 0), and they differ by far more than the tolerance."""
    golden = {name: json.loads((GOLDEN / f"losses_{name}.json").read_text()) for name in SETTINGS}
    losses = {name: curve["bits_per_symbol"] for name, curve in golden.items()}
    symbols = synthetic_text().input_symbols
    for curve_ in losses.values():
        assert len(curve_) == UPDATES
        assert curve_[0] == pytest.approx(math.log2(symbols), abs=0.5)
        assert curve_[-1] < curve_[0] - 0.5
    for one, other in itertools.combinations(SETTINGS, 2):
        assert losses[one][0] == pytest.approx(losses[other][0], rel=TOLERANCE)
        apart = max(abs(a - b) / b for a, b in zip(losses[one], losses[other], strict=True))
        assert apart > 10 * TOLERANCE, (one, other)
