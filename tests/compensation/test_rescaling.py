"""ThiNet's least squares: against a solver on the rows themselves, on masked and reconstructed models; its refusals."""

import copy

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.compensation.rescaling import fit
from lightning_prune.errors import PlanError, ScoreError
from lightning_prune.graph.readers import readers_of
from tests import zoo
from tests.criteria.helpers import close
from tests.helpers import random_plan
from tests.reference import thinet as reference

MODELS = ["Vgg", "Residual", "Grouped", "Branches", "Dense", "Shared"]


def pruned(name):
    dense, images = zoo.build(name), zoo.images(16)
    graph = lp.trace(dense, images)
    plan = random_plan(graph, 0.5)
    masked = copy.deepcopy(dense)
    lp.mask_(masked, graph, plan)
    return dense, graph, plan, masked, lp.reconstruct(dense, graph, plan), images


@pytest.mark.parametrize("name", MODELS)
def test_factors_are_those_of_least_squares_on_the_rows(name):
    dense, graph, plan, masked, _, images = pruned(name)
    before = {key: value.clone() for key, value in masked.state_dict().items()}
    done = lp.compensation.rescale_(masked, graph, plan, images.split(5), dense=dense, rows=None)
    expected = dict(before)
    for group in graph.prunable_groups:
        keep, gone = list(plan.groups[group.name].keep), list(plan.groups[group.name].removed)
        for path, reader in readers_of(dense, group).items():
            calls = reference.effects(dense, path, images, reader.index)
            rows = torch.cat([call.flatten(0, 1) for call in calls])
            target = rows.sum(1)
            # the smallest change from 1 that fits best
            change = torch.linalg.pinv(rows[:, keep], rtol=1e-7) @ rows[:, gone].sum(1)
            found = done[group.name][path]
            close(torch.tensor(found.scales).double(), 1 + change, rtol=1e-6, atol=1e-7)
            assert found.before == pytest.approx(float(rows[:, gone].sum(1).square().sum() / target.square().sum()))
            left = target - rows[:, keep] @ (1 + change)
            assert found.after == pytest.approx(float(left.square().sum() / target.square().sum()), rel=1e-6, abs=1e-9)
            assert found.after <= found.before
            weight = expected[reader.weight].movedim(reader.dim, 0).clone()
            for channel, factor in zip(keep, 1 + change, strict=True):
                weight[reader.index[channel]] *= factor
            expected[reader.weight] = weight.movedim(0, reader.dim)
    for key, value in masked.state_dict().items():
        close(value.double(), expected[key].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_masked_and_reconstructed_models_stay_equal(name):
    dense, graph, plan, masked, small, images = pruned(name)
    first = lp.compensation.rescale_(masked, graph, plan, [images], dense=dense)
    assert lp.compensation.rescale_(small, graph, plan, [images], dense=dense) == first
    assert lp.check_lossless(masked, small, images).passed
    assert not torch.allclose(small(images), lp.reconstruct(dense, graph, plan)(images))


def test_the_next_layers_output_is_nearer_to_the_dense_one_on_other_samples():
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).double()
    dense[2].weight.data.abs_()  # channels add alike, so that one can make up for another
    images, others = torch.randn(64, 3, 8, 8).double(), torch.randn(64, 3, 8, 8).double()
    result = lp.prune(dense, images, criterion="thinet", ratio=0.5, batches=[images])
    before = (result.model(others) - dense(others)).square().mean()
    done = lp.compensation.rescale_(result.model, result.graph, result.plan, [images], dense=dense)["0"]["2"]
    after = (result.model(others) - dense(others)).square().mean()
    assert after < 0.8 * before
    assert done.after < 0.8 * done.before


def test_a_copy_of_a_removed_channel_takes_over_exactly():
    dense = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    dense[0].weight.data[3], dense[0].bias.data[3] = 2 * dense[0].weight.data[0], 2 * dense[0].bias.data[0]
    dense[2].weight.data[:, 3] = dense[2].weight.data[:, 0]
    inputs = torch.randn(50, 3).double()
    graph = lp.trace(dense, inputs)
    plan = lp.Plan({"0": lp.plan.GroupPlan(4, (0, 1, 2))})
    small = lp.reconstruct(dense, graph, plan)
    done = lp.compensation.rescale_(small, graph, plan, [inputs], dense=dense)
    assert done["0"]["2"].scales == pytest.approx((3, 1, 1))
    assert done["0"]["2"].after == pytest.approx(0, abs=1e-12)
    close(small(inputs).detach(), dense(inputs).detach())


def test_channels_that_add_nothing_keep_their_weights():
    gram = torch.tensor([[4.0, 0, 2], [0, 0, 0], [2, 0, 4]]).double()
    assert fit(gram, torch.tensor([0, 1])).scales == pytest.approx((1.5, 1.0))


def test_the_dense_model_is_left_alone():
    dense, graph, plan, masked, _, images = pruned("Residual")
    dense.train()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    again = copy.deepcopy(masked)
    done = lp.compensation.rescale_(masked, graph, plan, [images], dense=dense)
    assert dense.training
    assert lp.compensation.rescale_(again, graph, plan, [images], dense=copy.deepcopy(dense).eval()) == done
    assert not any(module._forward_hooks for module in dense.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_masks_still_hold():
    dense, graph, plan, _, _, images = pruned("Residual")
    model = copy.deepcopy(dense)
    handle = lp.mask_(model, graph, plan)
    lp.compensation.rescale_(model, graph, plan, [images], dense=dense)
    assert handle.is_zero()


def test_what_does_not_fit_is_refused_before_any_change():
    dense, graph, plan, masked, small, images = pruned("Vgg")
    before = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    with pytest.raises(PlanError, match="dense must be the model before pruning"):
        lp.compensation.rescale_(masked, graph, plan, [images], dense=masked)
    with pytest.raises(PlanError, match="neither the masked nor the reconstructed"):
        lp.compensation.rescale_(
            lp.reconstruct(dense, graph, random_plan(graph, 0.25)), graph, plan, [images], dense=dense
        )
    with pytest.raises(PlanError, match="traced on another model"):
        lp.compensation.rescale_(masked, graph, plan, [images], dense=small)
    with pytest.raises(ScoreError, match=r"features\.3\.0: 2 rows cannot determine 4 factors"):
        lp.compensation.rescale_(masked, graph, plan, [images[:2]], dense=dense, rows=1)
    with pytest.raises(ScoreError, match="no layer that reads pruned channels ran"):
        lp.compensation.rescale_(masked, graph, plan, [], dense=dense)
    with pytest.raises(ScoreError, match="NaN or infinite; check batches"):
        lp.compensation.rescale_(masked, graph, plan, [images * torch.nan], dense=dense)
    with pytest.raises(ScoreError, match="rows must be"):
        lp.compensation.rescale_(masked, graph, plan, [images], dense=dense, rows=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in masked.state_dict().items())


def test_nothing_pruned_is_nothing_done():
    dense, images = zoo.build("Plain"), zoo.images(4)
    graph = lp.trace(dense, images)
    assert lp.compensation.rescale_(copy.deepcopy(dense), graph, random_plan(graph, 0.0), [images], dense=dense) == {}
