"""Recurrent layers read channels as linear layers do: what is before them goes, their hidden state stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lightning_prune as lp
from lightning_prune.criteria.channel_contributions import next_layers
from lightning_prune.errors import ScoreError
from lightning_prune.graph import trace


class Speech(nn.Module):
    """Two convolutions over time, a recurrent layer, a linear layer on its last step."""

    def __init__(self, recurrent: nn.RNNBase, hidden: int = 12, *, packed: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(5, 10, 3), nn.Conv1d(10, 16, 3)
        self.norm = nn.BatchNorm1d(16)
        self.recurrent, self.head, self.packed = recurrent, nn.Linear(hidden, 4), packed

    def forward(self, x: Tensor) -> Tensor:
        steps = self.norm(self.b(self.a(x).relu())).sigmoid().permute(0, 2, 1)  # a masked channel is no zero here
        if self.packed:
            lengths = [steps.shape[1] - k % 3 for k in range(len(steps))]
            found, _ = self.recurrent(pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False))
            return self.head(pad_packed_sequence(found, batch_first=True)[0].mean(1))
        if self.recurrent.batch_first:
            return self.head(self.recurrent(steps)[0][:, -1])
        return self.head(self.recurrent(steps.transpose(0, 1))[0][-1])


class Stepwise(nn.Module):
    """A cell, called once per time step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.a, self.b, self.cell, self.head = nn.Conv1d(5, 10, 3), nn.Conv1d(10, 16, 3), cell, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.b(self.a(x).relu()).relu(), None
        for step in steps.unbind(2):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Speech(nn.LSTM(16, 12, batch_first=True)),
    "lstm, both ways, two layers": lambda: Speech(nn.LSTM(16, 12, 2, bidirectional=True), 24),
    "lstm without bias": lambda: Speech(nn.LSTM(16, 12, bias=False)),
    "lstm with projection": lambda: Speech(nn.LSTM(16, 20, proj_size=12, batch_first=True)),
    "lstm, packed": lambda: Speech(nn.LSTM(16, 12, batch_first=True), packed=True),
    "gru": lambda: Speech(nn.GRU(16, 12, 2)),
    "gru, both ways": lambda: Speech(nn.GRU(16, 12, bidirectional=True, batch_first=True), 24),
    "gru, packed": lambda: Speech(nn.GRU(16, 12, batch_first=True, bias=False), packed=True),
    "rnn": lambda: Speech(nn.RNN(16, 12, 2, batch_first=True)),
    "rnn with relu": lambda: Speech(nn.RNN(16, 12, nonlinearity="relu", bidirectional=True), 24),
    "lstm cell": lambda: Stepwise(nn.LSTMCell(16, 12)),
    "gru cell": lambda: Stepwise(nn.GRUCell(16, 12)),
    "rnn cell": lambda: Stepwise(nn.RNNCell(16, 12)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def sounds(count: int = 3, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(count, 5, length, generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def differ(first: nn.Module, second: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = first.double().eval()(x.double()), second.double().eval()(x.double())
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # other kernels
def test_convolution_before_a_recurrent_layer_goes(name: str, dtype: torch.dtype, tmp_path) -> None:
    model = build(name).to(dtype)
    result = lp.prune(model, sounds().to(dtype), selection=lp.LayerRatio(0.5))
    assert [group.name for group in result.graph.groups] == ["a", "b", "head"]  # its gates are no channels
    assert result.model.b.out_channels == 8
    recurrent = getattr(result.model, "recurrent", None) or result.model.cell
    assert recurrent.input_size == 8
    assert recurrent.hidden_size == (20 if "projection" in name else 12)
    for x in (sounds(4, 12, 3), sounds(2, 17, 4)):
        assert differ(result.masked, result.model, x) < 1e-10
    lp.save(tmp_path / "small.pt", result.model, result.plan)
    lp.load(tmp_path / "small.pt", loaded := build(name).double())
    assert differ(result.model, loaded, sounds(2, 13, 5)) == 0
    assert differ(result.model, copy.deepcopy(loaded), sounds(2, 13, 5)) == 0


@pytest.mark.parametrize("name", ["lstm, both ways, two layers", "gru", "rnn", "gru cell", "lstm, packed"])
def test_training_the_masked_and_the_small_model_is_the_same(name: str) -> None:
    result = lp.prune(build(name).double(), sounds().double(), ratio=0.5)
    assert result.model.b.out_channels < 16
    for model in (result.masked, result.model):
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for step in range(5):
            optimizer.zero_grad()
            loss(model, sounds(4, seed=step).double()).backward()
            optimizer.step()
    assert differ(result.masked, result.model, sounds(2, 14, 9)) < 1e-9


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("criterion", ["jre", "taylor", "l1", "apoz", lp.criteria.GRE(site="activation")])
def test_criteria_before_a_recurrent_layer(name: str, criterion: object) -> None:
    model = build(name)
    model.norm = nn.Sequential(nn.BatchNorm1d(16), nn.ReLU())
    scores = lp.score(model, trace(model, sounds()), criterion, [sounds(4), sounds(2)], loss)
    assert scores["b"].shape == (16,)
    assert (scores["b"] > 0).any()


def test_activations_are_those_of_samples_not_of_time_steps() -> None:
    criterion = lp.criteria.GRE(site="activation")
    first, second = build("lstm"), build("lstm")
    second.recurrent.batch_first = False
    found, expected = (lp.score(m, trace(m, sounds()), criterion, [sounds(4)], loss) for m in (first, second))
    assert torch.allclose(found["b"], expected["b"])


def test_a_recurrent_layer_is_no_next_layer_to_score_by() -> None:
    model = build("lstm")
    group = trace(model, sounds()).group("b")
    assert group.layer("b").reader == "recurrent"
    with pytest.raises(ScoreError, match=r"recurrent\.weight_ih_l0: a recurrent layer reads channels"):
        next_layers(model, group)


def test_explaining_and_repairing_leave_a_recurrent_reader_alone() -> None:
    model = build("gru")
    graph = trace(model, sounds())
    plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    told = {group.name: group for group in lp.explain(model, graph, plan, sounds()).groups}
    assert told["b"].kept == 8
    assert told["b"].params_saved == 8 * (5 * 3 + 1 + 2 + 36)  # half of its own inputs are gone, too
    before, kept = model.recurrent.weight_ih_l0.clone(), list(plan.groups["b"].keep)
    assert lp.compensation.least_squares_(model, graph, plan, [sounds(8)]) == ("b",)
    assert torch.equal(model.recurrent.weight_ih_l0[:, kept], before[:, kept])


class Summed(Speech):
    """The hidden states are added to the channels that made them."""

    def forward(self, x: Tensor) -> Tensor:
        steps = self.norm(self.b(self.a(x).relu())).relu().transpose(1, 2)
        return self.head((self.recurrent(steps)[0] + steps)[:, -1])


def test_the_hidden_state_stays_even_if_one_step_was_traced() -> None:
    model = Summed(nn.RNN(16, 16, batch_first=True), 16)
    assert "hidden state of a recurrent layer in aten." in str(trace(model, sounds(2, 5)).group("b").reason)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_channels_that_meet_the_hidden_state_stay(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Summed(kind(16, 16, batch_first=True), 16)
    result = lp.prune(model, sounds(), ratio=0.5)
    assert not result.graph.group("b").prunable
    assert result.graph.group("a").prunable
    assert differ(result.masked, result.model, sounds(2, 15, 3)) < 1e-10


class Filled(nn.Module):
    """An empty tensor is filled step by step, and a linear layer reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head, self.out = nn.GRU(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.recurrent(x.permute(2, 0, 1))[0]
        table = torch.zeros(len(steps), steps.shape[1], 8, dtype=x.dtype)
        for number, step in enumerate(steps):
            table[number] = step
        return self.out(self.head(table).relu())


def test_a_tensor_that_is_filled_by_and_by_is_data() -> None:
    torch.manual_seed(0)
    result = lp.prune(Filled(), sounds(), ratio=0.5)
    assert [group.name for group in result.graph.prunable_groups] == ["head"]
    assert differ(result.masked, result.model, sounds(2, 9, 3)) < 1e-10


class OnGpu(nn.Module):
    """The fused operator that a GPU runs, called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.recurrent = nn.Conv1d(5, 16, 3), nn.LSTM(16, 12, 2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.b(x).relu().permute(2, 0, 1)
        start = steps.new_zeros(4, steps.shape[1], 12)
        settings = (2, 12, 0, 2, False, 0.0, False, True, [], None)
        return torch.ops.aten._cudnn_rnn(steps, self.recurrent._flat_weights, 4, None, start, start, *settings)[0]


def test_the_fused_operator_of_a_gpu() -> None:
    stand_in = torch.library.Library("aten", "IMPL")
    stand_in.impl("_cudnn_rnn", lambda x, *_: [x.new_ones(len(x), x.shape[1], 24), *[x.new_ones(4, 2, 12)] * 4], "CPU")
    try:
        graph = trace(OnGpu(), sounds())
    finally:
        stand_in._destroy()
    assert [group.name for group in graph.groups] == ["b"]
    read = {(part.tensor, part.dim) for part in graph.group("b").slices if part.layer is None}
    assert graph.group("b").prunable
    assert read == {("recurrent.weight_ih_l0", 1), ("recurrent.weight_ih_l0_reverse", 1)}
