"""Functions around parts of a model: in a copy they run the copy's parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.model_state.copying import copied
from tests.zoo import images, randomise_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.features: list[Tensor] = []
        self.through: Callable[[Tensor], Tensor] = self.block.forward

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        x = self.through(self.stem(x).relu())
        return self.head(x + sum(self.features))


def lambda_attribute(net: Net) -> None:
    net.through = lambda x: net.block(x)


def of_a_default(net: Net) -> None:
    net.through = lambda x, block=net.block: block(x)


def parameter_in_a_hook(net: Net) -> None:
    net.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
    net.stem.register_forward_hook(lambda module, args, out: out * net.gain)


def hook_that_keeps_features(net: Net) -> None:
    net.stem.register_forward_hook(lambda module, args, out: net.features.append(out))


def hook_around_the_list(net: Net) -> None:
    features = net.features
    net.stem.register_forward_hook(lambda module, args, out: features.append(out))


def replaced_forward(net: Net) -> None:
    before = net.block.forward

    @wraps(before)
    def forward(x: Tensor) -> Tensor:
        return before(x) + x

    net.block.forward = forward  # type: ignore[method-assign]
    net.through = lambda x: net.block(x)


def decorated(net: Net) -> None:
    def plain(x: Tensor) -> Tensor:
        return net.block(x)

    net.through = torch.enable_grad()(plain)


def in_a_partial_in_a_list(net: Net) -> None:
    net.kept = [partial(lambda module, x: module(x), net.block)]  # type: ignore[assignment]
    net.through = lambda x: net.kept[0](x)


def calls_itself(net: Net) -> None:
    def twice(x: Tensor, left: int = 2) -> Tensor:
        return twice(net.block(x), left - 1) if left else x

    net.through = twice


KINDS = [
    lambda_attribute,
    of_a_default,
    parameter_in_a_hook,
    hook_that_keeps_features,
    hook_around_the_list,
    replaced_forward,
    decorated,
    in_a_partial_in_a_list,
    calls_itself,
]


def build(kind: Callable[[Net], None]) -> Net:
    torch.manual_seed(0)
    net = Net()
    kind(net)
    return randomise_(net).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_runs_on_its_own(kind: Callable[[Net], None]) -> None:
    net, x = build(kind), images(2)
    other = copied(net)
    expected = net(x)
    for parameter in net.parameters():
        parameter.data.zero_()
    net.features = [torch.zeros(())]
    assert torch.equal(other(x), expected)
    assert net.features == [torch.zeros(())]


def test_modules_that_change_what_is_copied_of_them_are_no_exception() -> None:
    """As every LightningModule does, to leave its Trainer behind."""

    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.trainer = build(replaced_forward), object()
            self.through = lambda x: self.net(x)

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "trainer": None}

        def forward(self, x: Tensor) -> Tensor:
            return self.through(x)

    model = Leaving()
    other, expected = copied(model), model(images(2))
    assert other.trainer is None
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(other(images(2)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_such_a_model_is_pruned_without_loss(kind: Callable[[Net], None]) -> None:
    net = build(kind)
    result = lp.prune(net, images(2), criterion="random", ratio=0.5)
    assert result.model.stem.out_channels < 8
    assert lp.check_lossless(result.masked, result.model, images(3, size=19)).max_rel_error < 1e-10
    session = lp.PruningSession(net, images(2), criterion="l1")
    session.step()
    assert session.reconstruct_().passed
    assert net.stem.out_channels == 4
    assert not net.features or net(images(2)).shape[1] == 4


def test_the_rest_is_shared() -> None:
    """A log that belongs to nobody, functions around it, and what two hooks have in common."""
    log: list[int] = []
    net = Net()

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        log.append(len(out))

    def both(module: nn.Module, args: Any, out: Tensor) -> None:
        note(net.block, args, out)

    for part in (net.stem, net.head):
        part.register_forward_hook(note)
        part.register_forward_hook(both)
    other = copied(net)
    (same, ours), (_, again) = (tuple(part._forward_hooks.values()) for part in (other.stem, other.head))
    assert same is note
    assert ours is again is not both
    other(torch.rand(2, 3, 8, 8))
    assert log == [2] * 4
