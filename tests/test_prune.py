"""prune(): everything in one call, and the user's model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.criteria import JRE, L2
from lightning_prune.errors import NotReconstructedWarning, PlanError, PruningError, ScoreError, TraceError
from lightning_prune.graph import trace
from lightning_prune.measure import count_params
from lightning_prune.prune import prune
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.selection import GlobalRatio, LayerRatio
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(images(3, seed=10 + i), torch.randint(5, (3,), generator=generator)) for i in range(count)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Watch:
    """A model's parameters, buffers, gradients, modes, flags and hooks, and the random state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = copy.deepcopy(model.state_dict())
        self.objects = [id(p) for p in model.parameters()]
        self.rest = self._rest()
        self.random = torch.get_rng_state()

    def _rest(self) -> list[object]:
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in self.model.modules()]
        return [*modules, *((p.requires_grad, p.grad, p._backward_hooks) for p in self.model.parameters())]

    def assert_untouched(self) -> None:
        after = self.model.state_dict()
        assert after.keys() == self.state.keys()
        assert all(torch.equal(after[key], value) for key, value in self.state.items())
        assert [id(p) for p in self.model.parameters()] == self.objects
        assert self._rest() == self.rest
        assert torch.equal(torch.get_rng_state(), self.random)


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("criterion", ["l1", "jre"])
@pytest.mark.parametrize("name", ZOO)
def test_prune_works_end_to_end_and_leaves_the_model_alone(name: str, criterion, coupling) -> None:
    model, x = build(name).train(), images()
    watch = Watch(model)
    result = prune(model, x, criterion=criterion, ratio=0.4, coupling=coupling, batches=batches(), loss=loss)
    watch.assert_untouched()
    assert result.lossless.passed
    assert check_lossless(result.masked, result.model, images(4, seed=9)).passed
    assert (result.lossless.dtype, result.plan.coupling) == ("float64", coupling)
    # What costs are said to be is what they are.
    assert (result.before.params, result.after.params) == (count_params(model), count_params(result.model))
    assert result.after.params < result.before.params
    assert result.after.macs < result.before.macs
    assert set(result.scores) == {group.name for group in result.graph.prunable_groups}
    assert [module.training for module in result.model.modules()] == [True] * len(list(model.modules()))


def test_the_ratio_is_over_the_whole_network() -> None:
    result = prune(build("Dense"), images(), criterion="l1", ratio=0.5)  # every group has one layer
    assert result.plan.ratio == 0.5
    assert result.plan == GlobalRatio(0.5).select(result.graph, result.scores)


def test_a_selection_and_a_criterion_object_are_used_as_they_are() -> None:
    selection = LayerRatio(0.3, round_to=4)
    result = prune(build("Residual"), images(), criterion=L2(), selection=selection)
    assert result.plan == selection.select(result.graph, result.scores)
    assert {len(group.keep) % 4 for group in result.plan.groups.values()} == {0}
    data = prune(build("Residual"), images(), criterion=JRE(), ratio=0.3, batches=batches(), loss=loss)
    named = prune(build("Residual"), images(), criterion="jre", ratio=0.3, batches=batches(), loss=loss)
    assert data.plan == named.plan


def test_masks_of_the_masked_model_are_held() -> None:
    result = prune(build("Residual"), images(), ratio=0.5)
    optimizer = torch.optim.SGD(result.masked.train().parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for batch in batches(3):
        optimizer.zero_grad()
        loss(result.masked, batch).backward()
        optimizer.step()
    handle = mask_(copy.deepcopy(result.masked), result.graph, result.plan)  # only to ask what is to be zero
    parameters = dict(result.masked.named_parameters())
    result.masked(images())
    assert all(not parameters[z.parameter].detach().index_select(z.dim, z.entries).any() for z in handle.zeros)


def test_a_lossy_plan_is_measured_and_not_refused() -> None:
    lossy = prune(build("Residual"), images(), ratio=0.4, coupling="intersection", selection=LayerRatio(0.3))
    assert not lossy.lossless.passed
    unaware = prune(build("Residual"), images(), ratio=0.4, batch_norm=False)
    assert not unaware.lossless.passed


def test_a_model_that_already_holds_masks_can_be_pruned() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    mask_(model, graph, random_plan(graph, 0.25))
    watch = Watch(model)
    result = prune(model, x, criterion="l1", ratio=0.5)
    watch.assert_untouched()
    assert result.lossless.passed
    result.model(x).sum().backward()
    assert not any(module._forward_pre_hooks for module in result.model.modules())


def test_inputs_may_be_a_tuple_or_a_dict() -> None:
    by_tensor, by_tuple, by_name = (prune(build("Residual"), x).plan for x in (images(), (images(),), {"x": images()}))
    assert by_tensor == by_tuple == by_name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 1.0}, PlanError, r"ratio is the share .* got 1\.0"),
        ({"ratio": True}, PlanError, "ratio is the share"),
        ({"selection": 0.5}, PlanError, r"selection must be a Selection such as GlobalRatio\(0\.5\), got 0\.5"),
        ({"criterion": "l7"}, ScoreError, "criterion must be a Criterion or one of .*jre, l1, .* got 'l7'"),
        ({"criterion": None}, ScoreError, "criterion must be a Criterion"),
        ({"criterion": "jre"}, ScoreError, "needs data"),
        ({"criterion": "jre", "batches": batches()}, ScoreError, "needs gradients: pass loss="),
        ({"criterion": "jre", "batches": [], "loss": loss}, ScoreError, "batches was empty"),
        ({"criterion": "jre", "batches": batches(), "loss": lambda m, b: m(b[0])}, ScoreError, "must be a scalar"),
        ({"coupling": "or"}, PlanError, "coupling must be one of"),
        ({"selection": LayerRatio(0.5, ignore="nothing*")}, PlanError, "no layer matches 'nothing"),
        ({"selection": LayerRatio(0.5, ignore="*")}, PlanError, "nothing to prune"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_and_changes_nothing(options, error, message: str) -> None:
    model = build("Residual").train()
    watch = Watch(model)
    with pytest.raises(error, match=message):
        prune(model, images(), **options)
    assert issubclass(error, PruningError)
    watch.assert_untouched()


def test_inputs_that_do_not_fit_are_refused_and_change_nothing() -> None:
    model = build("Vgg").train()
    watch = Watch(model)
    with pytest.raises(TraceError):
        prune(model, torch.zeros(1, 4, 8, 8, dtype=torch.float64))
    watch.assert_untouched()


def test_an_error_inside_the_loss_reaches_the_user_and_changes_nothing() -> None:
    def broken(model: nn.Module, batch) -> Tensor:
        model(batch[0])
        raise RuntimeError("no labels today")

    model = build("Residual").train()
    watch = Watch(model)
    with pytest.raises(RuntimeError, match="no labels today"):
        prune(model, images(), criterion="jre", batches=batches(), loss=broken)
    watch.assert_untouched()


def test_channels_whose_number_the_model_uses_keep_their_width() -> None:
    class Counts(nn.Module):
        """Its output depends on the number of channels, which no trace can see."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) * torch.arange(len(self.a.weight))[-1]

    model = Counts()
    x = torch.randn(2, 3)
    watch = Watch(model)
    with pytest.warns(NotReconstructedWarning, match="differs from the masked one"):
        result = prune(model, x)
    assert result.model.a.out_features == 8
    assert result.lossless.passed
    assert list(result.lossless.left) == ["a"]
    watch.assert_untouched()
