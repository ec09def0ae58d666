"""Ways into the model's code besides its forward: ``also=``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import ReconstructionError, TraceError
from tests.zoo import randomise_


class Heads(nn.Module):
    """Forward runs one head; the other two take the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head, self.side = nn.Conv2d(16, 4, 1), nn.Sequential(nn.Conv2d(16, 12, 1), nn.Conv2d(12, 2, 1))
        self.register_buffer("center", torch.zeros(16))

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        self.runs += 1
        return (self.side if other else self.head)(self.stem(x))

    def loss(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        self.center = 0.5 * self.center + 0.5 * features.mean((0, 2, 3))
        return self.side(features - self.center[:, None, None]).square().mean()


def model() -> Heads:
    torch.manual_seed(0)
    return randomise_(Heads(), 0).eval()


def images(batch: int, side: int = 8) -> Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize(
    "also",
    [
        [(images(2), True)],
        [{"x": images(2), "other": True}],
        [lambda net: net(images(2), other=True)],
        [lambda net: net.loss(images(2))],
    ],
    ids=["tuple", "dict", "callable", "loss"],
)
def test_what_else_runs_is_traced_and_compared(also: list[object], request: pytest.FixtureRequest) -> None:
    net = model()
    result = lp.prune(net, images(2), also=also)
    assert result.model.stem[0].out_channels < 16
    assert result.model.side[0].in_channels == result.model.stem[0].out_channels
    assert result.lossless.passed
    assert "also[0]" in result.lossless.compared
    for x in (images(3), images(1, 12)):
        for other in (False, True):
            assert torch.allclose(result.masked(x, other), result.model(x, other), rtol=1e-10, atol=1e-12)
        if "loss" in request.node.name:
            assert torch.allclose(result.masked.loss(x), result.model.loss(x), rtol=1e-10, atol=1e-12)


def test_the_model_is_untouched() -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    lp.trace(net, images(2), also=[lambda copied: copied.loss(torch.randn(2, 3, 8, 8, dtype=torch.float64))])
    assert net.runs == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(state, torch.get_rng_state())  # images() drew
    state = torch.get_rng_state()
    x = torch.ones(2, 3, 8, 8, dtype=torch.float64)
    lp.trace(net, x, also=[lambda copied: copied.loss(torch.randn(2, 3, 8, 8, dtype=torch.float64))])
    assert torch.equal(state, torch.get_rng_state())


def test_a_session_traces_and_compares_it_too() -> None:
    net = model()
    session = lp.PruningSession(net, images(2), criterion="l1", also=lambda: [lambda copied: copied.loss(images(2))])
    session.step()
    report = session.reconstruct_()
    assert report.compared == ("forward", "forward at another size", "also[0]")
    assert net.loss(images(3)).isfinite()


def test_what_makes_no_sense_is_refused() -> None:
    net = model()
    with pytest.raises(TraceError, match="also must be a list"):
        lp.trace(net, images(2), also=images(2))  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"also\[0\] is a module"):
        lp.trace(net, images(2), also=[net])
    with pytest.raises(TraceError, match=r"does not run on also\[1\] in module 'stem.0'"):
        lp.trace(net, images(2), also=[images(1), torch.zeros(1, 5, 8, 8).double()])
    with pytest.raises(TraceError, match=r"also\[0\] does not run: AttributeError.*copy of the model"):
        lp.trace(net, images(2), also=[lambda copied: copied.nothing])


class Late(nn.Module):
    """What is wrong shows only after tracing."""

    broken = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())

    def other(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.broken and x.shape[1] != 16:
            raise ValueError("16 channels are needed here")
        return self.b(x)


def test_the_smaller_model_is_rehearsed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = Late().double(), images(2)
    also = [lambda copied: copied.other(x)]
    graph = lp.trace(net, x, also=also)
    plan = lp.LayerRatio(0.5).select(graph, lp.score(net, graph, lp.L1()))
    monkeypatch.setattr(Late, "broken", True)
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(lp.errors.NotReconstructedWarning, match="16 channels are needed here"):
        report = lp.reconstruct_(net, graph, plan, example_inputs=x, also=also)
    assert list(report.left) == ["a"]
    assert net.a.out_channels == 16
    monkeypatch.setattr(Late, "other", lambda *_: 1 / 0)
    with pytest.raises(ReconstructionError, match=r"does not run also\[0\].*ZeroDivisionError"):
        lp.reconstruct_(net, graph, plan, example_inputs=x, also=also)
    assert {name: value.shape for name, value in net.state_dict().items()} == {n: v.shape for n, v in before.items()}
