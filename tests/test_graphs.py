"""Updates as recordings: what is replayed is what runs step by step, and never waits for the device."""

import functools

import pytest
import torch
from reference import CellOfAnLSTM
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dni_rnn.config import FeedforwardConfig, RecurrentConfig
from dni_rnn.cores.diagonal import Diagonal
from dni_rnn.cores.mingru import MinGRU
from dni_rnn.data.labelled import Examples
from dni_rnn.pytree import flatten, map_tree
from dni_rnn.traces import lstm, running
from dni_rnn.traces import traced as traced_module
from dni_rnn.traces.layer import Layer
from dni_rnn.traces.traced import Traced
from dni_rnn.training.cuda_graph import WARM_UP, Recorded, cuda_graph
from dni_rnn.training.feedforward import FeedforwardLearner
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn.window import Boundary
from dni_rnn_tasks.addition import Addition
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.repeat import Copy
from dni_rnn_tasks.text import Text

CPU = torch.device("cpu")
SMALL = {"hidden": 16, "embedding": 8, "batch_size": 8, "lr": 0.01}
METHODS = {
    "bptt": {"bptt": 5},
    "dni": {"bptt": 3, "dni": True},
    "aux, windows accumulated": {"bptt": 2, "accumulate": 2, "dni": True, "aux": True},
    "annealed": {"bptt": 3, "dni": True, "synthesizer_lr": 0.003, "anneal": True, "steps": 30},
    "gru, windows cut short": {"bptt": 3, "dni": True, "core": "gru", "random_truncation": 0.5},
    "bptt, restore": {"bptt": 3, "restore": 0.1},
    "full, restore": {"bptt": 2, "accumulate": 3, "estimator": "full", "restore": 0.1},
    "trace": {"bptt": 2, "trace": 6},
    "trace, one step, two layers": {"bptt": 1, "trace": 4, "layers": 2, "restore": 0.1},
    "trace, gru, dni": {"bptt": 3, "trace": 6, "core": "gru", "dni": True},
    "trace, diagonal": {"bptt": 2, "trace": 6, "core": "diagonal"},
    "trace, all steps": {"bptt": 1, "trace": "all", "core": "diagonal", "restore": 0.1},
    "trace, mingru, windows cut short": {"bptt": 3, "trace": 6, "core": "mingru", "random_truncation": 0.5},
    "lookahead": {"bptt": 2, "lookahead": 4, "restore": 0.1},
}


class Operations(TorchDispatchMode):
    """Notes what is computed, in order, with the addresses of what is changed."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return [name for name in self.names if name in self.WAITS]


def replayed(work):
    """A recording where there is no graph: the function again, with the arguments it was recorded with."""
    return work


class Tape(TorchDispatchMode):
    """A recording of a CPU's: the operations with their tensors, done again as a graph would do them."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if all(alias is None or alias.is_write for alias in aliases):  # views stay what they are
            self.done.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, found in self.done:
            places, values = (tree_leaves(each) for each in (found, func(*args, **kwargs)))
            for place, value in zip(places, values, strict=True):
                if isinstance(value, torch.Tensor) and value.data_ptr() != place.data_ptr():
                    place.copy_(value)


def taped(work):
    """Unlike a graph's, this recording does the work; so the first replay is none."""
    tape, replays = Tape(), []
    with tape:
        work()

    def replay():
        if replays:
            tape.replay()
        replays.append(1)

    return replay


def with_recordings(learner, record=replayed):
    recorded = Recorded(learner._work, record)
    learner._run = recorded
    return recorded


def kept(learner):
    """Every tensor that an update reads and that the one before it has changed."""
    tensors, _ = learner.state_dict()
    own = {name: t for name, t in tensors.items() if not name.startswith(("random", "memory.trace"))}
    return own | {f"{traced}.{name}": t for traced, owner in traces(learner) for name, t in buffers(owner)}


def traces(learner):
    """`Traced` modules with their names."""
    found = getattr(getattr(learner, "estimator", None), "_traced", [])
    return [(f"traced{number}", traced) for number, traced in enumerate(found)]


def buffers(traced):
    """The tensors of a trace themselves, of which its state has copies."""
    for number, layer in enumerate(traced._layers or []):
        for owner in (layer, layer.memory):
            for name, value in vars(owner).items():
                values = list(value.values()) if isinstance(value, dict) else value
                for place, tensor in enumerate(values if isinstance(values, list) else [values]):
                    if isinstance(tensor, torch.Tensor):
                        yield f"{number}.{type(owner).__name__}.{name}.{place}", tensor


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Traces as they are where graphs are recorded: the place in the ring is a number of the device's, and an
    LSTM is torch's own, or goes by cells."""

    def layer(record, window, number, steps, decay, symbols, _):
        return Layer(record, window, number, steps, decay, symbols, True)

    def run(core, inputs, state, embedding, fused, decay):
        return running.run(core, inputs, state, embedding, fused is not False, decay)

    monkeypatch.setattr(traced_module, "Layer", layer)
    monkeypatch.setattr(traced_module, "run", run)
    monkeypatch.setattr(running, "BY_STEP", "cpu")
    monkeypatch.setattr(lstm, "KERNEL", CellOfAnLSTM)


def recurrent(task=None, device=CPU, **settings):
    task = task or Text()
    return RecurrentLearner(RecurrentConfig(**SMALL, **settings), task.load(None), device)


def by_cells(learner):
    for _, traced in traces(learner):
        traced.fused = False
    return learner


def layered(device=CPU, **settings):
    config = FeedforwardConfig(model="sigmoid", layers=3, batch_size=16, epochs=1, **settings)
    data = Addition().load(None)
    assert isinstance(data, Examples)
    return FeedforwardLearner(config, data, device)


LEARNERS = {
    **{name: (lambda s: lambda **k: recurrent(**s, **k))(settings) for name, settings in METHODS.items()},
    "trace, by cells": lambda **k: by_cells(recurrent(bptt=2, trace=6, layers=2, dni=True, **k)),
    "episodes": lambda **k: recurrent(Copy(), bptt=3, dni=True, **k),
    "episodes, trace": lambda **k: recurrent(Copy(), bptt=3, trace=9, **k),
    "growing, trace": lambda **k: recurrent(Recall(grow=True), bptt=1, trace=8, dni=True, **k),
    "growing, critic": lambda **k: recurrent(Recall(grow=True), bptt=2, dni=True, critic=True, **k),
    "critic": lambda **k: layered(method="critic", **k),
    "error feedback": lambda **k: layered(method="cdni", synthesizer="error", **k),
    "layers, bprop": lambda **k: layered(method="bprop", **k),
}


def trained_alike(name, updates, *record):
    """A learner, and another by recordings; they are bit for bit the same after so many updates."""
    plain, other = LEARNERS[name](), LEARNERS[name]()
    recorded = with_recordings(other, *record)
    for _ in range(updates):
        plain.update()
        other.update()
    assert recorded._recordings
    ours, theirs = kept(plain), kept(other)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    return plain, other


@pytest.mark.parametrize("name", LEARNERS)
def test_recordings_train_as_plain_updates_do(name, as_on_a_device):
    plain, other = trained_alike(name, 25)
    assert plain.metrics() == other.metrics()


@pytest.mark.parametrize(
    "name", ["trace", "trace, by cells", "trace, gru, dni", "aux, windows accumulated", "growing, critic"]
)
def test_an_update_reads_nothing_that_its_recording_does_not_hold(name, as_on_a_device, monkeypatch):
    """What Python would decide or remember from update to update is not there when a graph is replayed."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its kernels keep addresses of their own
    trained_alike(name, 9, taped)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_an_update_changes_stays_where_it_is(name, as_on_a_device):
    """A graph reads and writes the addresses it was recorded with."""
    learner = LEARNERS[name]()
    learner.update()
    if "trace" in name:
        assert all(len(list(buffers(traced))) >= 4 for _, traced in traces(learner))
        assert len(traces(learner)) == 1
    before = {key: tensor.data_ptr() for key, tensor in kept(learner).items()}
    values = {key: tensor.clone() for key, tensor in kept(learner).items()}
    for _ in range(3):
        learner.update()
    learner.metrics()
    learner.reset_metrics()
    tensors, numbers = learner.state_dict()
    learner.load_state_dict({key: t.clone() for key, t in tensors.items()}, numbers)
    after = kept(learner)
    moved = {key for key in after if after[key].data_ptr() != before[key]}
    assert not {key for key in moved if not key.startswith(("optimizer", "memory.sent"))}  # loaded before
    assert any(not torch.equal(after[key], values[key]) for key in after if key.startswith("model"))


@pytest.mark.parametrize("name", LEARNERS)
def test_an_update_waits_for_no_value(name, as_on_a_device):
    learner = LEARNERS[name]()
    arguments = []
    learner._run = arguments.append
    learner.update()
    learner._work(arguments[0])
    with Operations() as operations:
        learner._work(arguments[0])
    assert len(operations.names) > 20
    assert operations.waits == []
    with Operations() as operations:
        learner.metrics()
    assert operations.waits  # the instrument does see them


def test_one_recording_for_each_signature():
    """Of a tree: its structure, with what is None in it, and shapes and dtypes."""
    mask, twos = torch.tensor([True, False]), torch.ones(2)
    trees = [
        lambda x: (x.expand(2), None),
        lambda x: (x.expand(2), mask),
        lambda x: (x.expand(3), None),
        lambda x: (x.expand(2), twos),
        lambda x: (x.expand(2), (mask,)),
        lambda x: [x.expand(2), mask],
        lambda x: {"b": x.expand(2), "a": [(mask, None)]},
        lambda x: {"a": x.expand(2), "b": [(mask, None)]},
        lambda x: Boundary(x.expand(2), mask),
    ]
    seen = []

    def note(tree):
        leaves, _ = flatten(tree)
        seen.append(([leaf.data_ptr() for leaf in leaves], map_tree(torch.clone, tree)))

    recorded = Recorded(note, replayed)
    calls = WARM_UP + 3
    for value in range(calls):
        for tree in trees:
            recorded(tree(torch.tensor(float(value))))
    assert len(recorded._recordings) == len(trees)
    for start, tree in enumerate(trees):
        each = seen[start :: len(trees)]
        assert len(each) == calls
        for value, (_, got) in enumerate(each):
            wanted = tree(torch.tensor(float(value)))
            assert type(got) is type(wanted)
            (leaves, spec), (expected, theirs) = flatten(got), flatten(wanted)
            assert spec == theirs
            assert all(torch.equal(a, b) for a, b in zip(leaves, expected, strict=True))
        recordings = [places for places, _ in each[WARM_UP:]]
        assert all(places == recordings[0] for places in recordings)


def test_what_cannot_be_recorded_is_called_as_it_is(capsys):
    total = torch.zeros(())

    def refuse(work):
        raise RuntimeError("operation not permitted\nmore")

    recorded = Recorded(lambda x: total.add_(x.sum()), refuse)
    for _ in range(10):
        recorded(torch.ones(2))
    assert float(total) == 20.0
    said = capsys.readouterr().err
    assert said == "dni-rnn: updates are not recorded as a CUDA graph: operation not permitted\n"


@pytest.mark.parametrize("name", ["dni", "critic"])
def test_bf16_keeps_weights_and_interfaces_in_float32(name):
    learner, exact = LEARNERS[name](precision="bf16"), LEARNERS[name]()
    for _ in range(10):
        learner.update()
        exact.update()
    assert {t.dtype for t in kept(learner).values() if t.is_floating_point()} == {torch.float32}
    key = "bpc" if name == "dni" else "loss"
    assert learner.metrics()[key] == pytest.approx(exact.metrics()[key], rel=0.02)
    assert learner.metrics()[key] != exact.metrics()[key]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LEARNERS)
def test_a_cuda_graph_trains_as_plain_updates_do(name, capsys):
    cuda = torch.device("cuda")
    plain, other = LEARNERS[name](device=cuda, graph=False), LEARNERS[name](device=cuda)
    for learner in (plain, other):
        for group in learner.record.optimizer.param_groups:
            group["eps"] = 1e-4  # with 1e-8 Adam makes steps of the rounding in gradients that are zero
    assert isinstance(other._run, Recorded)
    assert other._run._record is cuda_graph
    for _ in range(60):
        plain.update()
        other.update()
    assert other._run._recordings
    assert capsys.readouterr().err == ""
    ours, theirs = kept(plain), kept(other)
    for key in ours:
        told = functools.partial("{}: {}".format, key)
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-3, atol=1e-4, msg=told)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_s_cell_of_an_lstm_is_its_equations():
    generator = torch.Generator().manual_seed(0)

    def draw(width):
        return torch.randn(5, width, generator=generator, dtype=torch.float64).cuda()

    c, of_x, of_h, at_h, at_c = draw(6), draw(24), draw(24), draw(6), draw(6)
    ours, theirs = lstm.KERNEL.forward(of_x, of_h, c), CellOfAnLSTM.forward(of_x, of_h, c)
    torch.testing.assert_close(ours, theirs)
    _, after, gates = ours
    for given in (at_h, None):
        got, wanted = (cell.backward(given, at_c, c, after, gates) for cell in (lstm.KERNEL, CellOfAnLSTM))
        torch.testing.assert_close(tuple(got), wanted)


def gradients_of_a_loop(core, device, fused):
    """Of four windows, in double precision."""
    torch.manual_seed(0)
    net = core().double()
    embedding, width = torch.nn.Embedding(11, 5).double(), 7
    traced = Traced(net, 6, 0.9, embedding=embedding, fused=fused).to(device)
    readout = torch.nn.Linear(width, 11).double().to(device)
    state, found = None, []
    for number in range(4):
        symbols = torch.randint(
            11, (3 if number < 3 else 2, 4), generator=torch.Generator().manual_seed(number)
        )
        symbols = symbols.to(device)
        output, state = traced(symbols, state)
        torch.nn.functional.cross_entropy(readout(output).flatten(0, 1), symbols.flatten()).backward()
        found.append([p.grad.cpu().clone() for p in traced.parameters() if p.grad is not None])
    return found


CORES = {
    "lstm": lambda: torch.nn.LSTM(5, 7, num_layers=2),
    "gru": lambda: torch.nn.GRU(5, 7),
    "rnn": lambda: torch.nn.RNN(5, 7),
    "mingru": lambda: MinGRU(5, 7),
    "diagonal": lambda: Diagonal(5, 7),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "fused"), [*((name, None) for name in CORES), ("lstm", False)])
def test_a_trace_on_a_gpu_is_that_of_a_cpu(name, fused):
    ours, theirs = (gradients_of_a_loop(CORES[name], torch.device(d), fused) for d in ("cuda", "cpu"))
    for after, wanted in zip(ours, theirs, strict=True):
        for a, b in zip(after, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [None, False])
def test_a_trace_in_half_precision_with_a_loss_scaler(fused):
    torch.manual_seed(0)
    device = torch.device("cuda")
    traced = Traced(torch.nn.LSTM(5, 7), 8, fused=fused).to(device)
    exact = Traced(torch.nn.LSTM(5, 7), 8).to(device)
    exact.load_state_dict(traced.state_dict())
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    optimizer = torch.optim.SGD(traced.parameters(), 0.0)
    state = other = None
    for number in range(5):
        x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(number)).to(device)
        traced.zero_grad()
        exact.zero_grad()
        traced.loss_scale = scaler.get_scale()
        with torch.autocast("cuda", torch.float16):
            output, state = traced(x, state)
            loss = output.square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        wanted, other = exact(x, other)
        wanted.square().mean().backward()
        for p, q in zip(traced.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=1e-4)
