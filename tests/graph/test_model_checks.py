"""Models that are no eager modules, have no values, or only some: refused with the way out, or right."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import PlanError, ReconstructionError, ScoreError, TraceError

IMAGES = torch.randn(2, 3, 8, 8)


def net(between: nn.Module | None = None) -> nn.Sequential:
    middle = [between] if between is not None else []
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), *middle, nn.Conv2d(16, 4, 1)).eval()


def jit(how, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and used
        return how(*args)


class Double(nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2


OTHERS = {
    "scripted": lambda: jit(torch.jit.script, net()),
    "traced": lambda: jit(torch.jit.trace, net(), IMAGES),
    "scripted part": lambda: net(jit(torch.jit.script, nn.Sequential(nn.Conv2d(16, 16, 1)))),
    "exported": lambda: torch.export.export(net(), (IMAGES,)).module(),
}
ENTRIES = {
    "trace": lp.trace,
    "prune": lp.prune,
    "measure": lp.measure,
    "session": lambda model, images: lp.PruningSession(model, images).step(),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_models_that_are_not_eager_are_refused(kind, entry):
    with pytest.raises(TraceError, match="prune the eager model"):
        ENTRIES[entry](OTHERS[kind](), IMAGES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_lazy_model_that_never_ran_is_refused_and_one_that_did_is_pruned(entry):
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(4, 1))
    with pytest.raises(TraceError, match=r"'0.weight' has no size yet.*run the model on one batch first"):
        ENTRIES[entry](model, IMAGES)
    model(IMAGES)
    ENTRIES[entry](model.eval(), IMAGES)


def test_the_graph_of_the_eager_model_is_not_used_on_a_scripted_one():
    model = net()
    graph = lp.trace(model, IMAGES)
    plan = lp.GlobalRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    scripted = jit(torch.jit.script, model)
    for use in (lp.mask_, lp.reconstruct_):
        with pytest.raises(PlanError, match="prune the eager model"):
            use(scripted, graph, plan)
    with pytest.raises(PlanError, match="prune the eager model"):
        lp.score(scripted, graph, "l1")


EAGER = {
    "scripted activation": lambda: net(jit(torch.jit.script, Double())),
    "fx": lambda: torch.fx.symbolic_trace(net()),
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "compiled part": lambda: net(torch.compile(Double(), backend="eager")),
}


@pytest.mark.parametrize("kind", EAGER)
def test_models_whose_code_follows_the_channels_are_pruned(kind):
    def loss(model, batch):
        return model(batch).square().mean()

    larger = torch.randn(3, 3, 12, 10)
    model, eager = EAGER[kind](), net(*([Double()] if "net" not in kind and kind not in ("fx", "compiled") else []))
    eager.load_state_dict(dict(zip(eager.state_dict(), model.state_dict().values(), strict=True)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo about itself
        model(IMAGES)
    found = lp.prune(model, IMAGES, criterion="taylor", batches=[IMAGES], loss=loss)
    reference = lp.prune(eager, IMAGES, criterion="taylor", batches=[IMAGES], loss=loss)
    assert found.lossless.passed
    assert [group.keep for group in found.plan.groups.values()] == [g.keep for g in reference.plan.groups.values()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(found.model(larger), reference.model(larger))


def on_meta() -> tuple[nn.Module, torch.Tensor]:
    return net().to("meta"), IMAGES.to("meta")


def test_a_model_on_meta_is_planned_without_values():
    model, images = on_meta()
    graph = lp.trace(model, images)
    scores = lp.score(model, graph, "random")
    plan = lp.Budget(params=0.6).select(graph, scores, model=model, example_inputs=images)
    assert lp.reconstruct(model, graph, plan)[0].out_channels == len(plan.groups["0"].keep) < 16
    real = net()
    assert lp.reconstruct(real, graph, plan, example_inputs=IMAGES)[0].out_channels == len(plan.groups["0"].keep)
    assert lp.measure(model, images).macs == lp.measure(real, IMAGES).macs


@pytest.mark.parametrize("criterion", ["l1", "fpgm", "bn_scale", "lre", "taylor"])
def test_criteria_that_need_values_say_so(criterion):
    model, images = on_meta()
    with pytest.raises(ScoreError, match=r"'0.weight' is on the meta device.*Random"):
        lp.prune(model, images, criterion=criterion, batches=[images], loss=lambda m, x: m(x).mean())


def test_without_values_nothing_is_called_lossless():
    model, images = on_meta()
    with pytest.raises(ReconstructionError, match=r"no values to compare.*without example_inputs"):
        lp.prune(model, images, criterion="random")


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_partly_on_meta_is_refused_by_name(entry):
    model = net()
    model[3].to("meta")
    with pytest.raises(TraceError, match=r"2 of 9 tensors, such as '3.weight', are on the meta.* '0.weight', on cpu"):
        ENTRIES[entry](model, IMAGES)


@pytest.mark.parametrize("inputs", [IMAGES.double(), IMAGES.to("meta"), IMAGES.numpy(), {"image": IMAGES}])
def test_inputs_that_do_not_fit_are_refused(inputs):
    with pytest.raises(TraceError, match="does not run on the example inputs"):
        lp.prune(net(), inputs)


def test_batches_of_any_kind():
    model = net()
    graph = lp.trace(model, IMAGES)
    loader = torch.utils.data.DataLoader(IMAGES, batch_size=1)
    expected = lp.score(model, graph, "lre", [IMAGES[:1], IMAGES[1:]])["0"]
    for batches in (loader, iter(loader), (image[None] for image in IMAGES)):
        assert torch.equal(lp.score(model, graph, "lre", batches)["0"], expected)
    for batches, message in (
        (3, "iterable of batches such as a DataLoader, got int"),
        ([(IMAGES, torch.zeros(2))], r"does not run on a batch of type tuple: TypeError.*loss=lambda model, batch"),
        ([IMAGES.numpy()], "does not run on a batch of type ndarray"),
        (iter(()), "used-up generator"),
    ):
        with pytest.raises(ScoreError, match=message):
            lp.score(model, graph, "lre", batches)
