"""Copies of models that hold what cannot be copied, or that were made in inference mode."""

from __future__ import annotations

import concurrent.futures
import functools
import socket
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import PruningError
from lightning_prune.model_state.copying import copied

IMAGES = torch.randn(2, 3, 8, 8)


class Holds(nn.Module):
    def __init__(self, thing):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.thing = thing

    def forward(self, x):
        return self.second(self.first(x).relu())


class Helper:
    """An object beside the modules, with a lock of its own."""

    def __init__(self, model=None):
        self.lock, self.model, self.numbers = threading.Lock(), model, [1, 2]


class Refuses:
    def __deepcopy__(self, memo):
        raise ValueError("not me")


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def opened():
    with Path(__file__).open() as stream, socket.socket() as connection:
        yield [stream, connection]


def things(pool, opened):
    return {
        "lock": threading.RLock(),
        "generator": (number for number in range(3)),
        "pool": pool,
        "file and socket": opened,
        "module": torch,
        "deep": {"a": (1, [threading.Lock()])},
        "partial": functools.partial(print, end=threading.Lock()),
    }


@pytest.mark.parametrize("kind", list(things(None, None)))
def test_what_cannot_be_copied_is_shared(kind, pool, opened):
    model = Holds(things(pool, opened)[kind])
    result = lp.prune(model, IMAGES)
    assert result.lossless.passed
    session = lp.PruningSession(model, IMAGES)
    session.step()
    session.reconstruct_()
    assert model.first.out_channels == 4
    assert lp.reconstruct(Holds(model.thing), *plan_of(model.thing), example_inputs=IMAGES).first.out_channels == 4


def plan_of(thing):
    model = Holds(thing)
    graph = lp.trace(model, IMAGES)
    return graph, lp.GlobalRatio(0.5).select(graph, lp.score(model, graph, "l1"))


def test_an_object_beside_the_model_is_shared_whole():
    model = Holds([Helper()])
    twin = copied(model)
    assert twin.thing is not model.thing
    assert twin.thing[0] is model.thing[0]
    assert twin.first.weight is not model.first.weight


def test_an_object_that_leads_to_the_model_leads_to_the_copy():
    model = Holds(None)
    model.thing = Helper({"first": model.first})
    twin = copied(model)
    assert twin.thing.model["first"] is twin.first
    assert twin.thing.lock is model.thing.lock


def test_what_can_be_copied_is_copied_once_and_never_shared():
    copies = []

    class DataSet:
        def __deepcopy__(self, memo):
            copies.append(self)
            return DataSet()

    model = Holds([DataSet()])
    assert copied(model).thing[0] is not model.thing[0]
    assert len(copies) == 1


def test_an_object_that_refuses_is_named():
    with pytest.raises(PruningError, match="cannot be copied: ValueError: not me"):
        lp.prune(Holds(Refuses()), IMAGES)


class Noisy(Holds):
    """Draws from a generator of its own."""

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.thing)
        return super().forward(x + noise)


def test_generators_of_the_model_are_put_back():
    model = Noisy(torch.Generator().manual_seed(3))
    before = model.thing.get_state()
    assert lp.prune(model, IMAGES).lossless.passed
    lp.trace(model, IMAGES)
    lp.score(model, lp.trace(model, IMAGES), "lre", [IMAGES])
    assert torch.equal(model.thing.get_state(), before)


@pytest.fixture
def frozen():
    with torch.inference_mode():
        return Holds(None)


def loss(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("criterion", ["l1", "lre", "taylor"])
@pytest.mark.parametrize("inference", [True, False])
def test_models_made_in_inference_mode_are_pruned_as_copies_that_train(frozen, criterion, inference):
    with torch.inference_mode(inference):
        batch = torch.randn(2, 3, 8, 8)
        result = lp.prune(frozen, batch, criterion=criterion, batches=[batch], loss=loss)
    assert result.lossless.passed
    loss(result.model, IMAGES).backward()
    graph = lp.trace(frozen, IMAGES)
    small = lp.reconstruct(frozen, graph, result.plan, example_inputs=IMAGES)
    loss(small, IMAGES).backward()
    assert lp.measure(frozen, IMAGES).params == sum(p.numel() for p in frozen.parameters())


def test_gradients_through_inference_tensors_are_refused(frozen):
    graph = lp.trace(frozen, IMAGES)
    with pytest.raises(lp.PruningError, match=r"'first.weight' was made under torch.inference_mode"):
        lp.score(frozen, graph, "taylor", [IMAGES], loss)
