"""Plans as masks and masks as plans: the same after a round trip, and nothing that a plan cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from lightning_prune.compensation import fold_constants_
from lightning_prune.errors import PlanError
from lightning_prune.graph import trace
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction import mask_, masks_of, plan_from_masks, plan_from_zeros, reconstruct
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("name", ZOO)
def test_masks_say_what_is_masked_and_give_the_plan_back(name: str, coupling, tmp_path) -> None:
    model = build(name)
    graph = trace(model, images())
    plan = random_plan(graph, coupling=coupling)
    torch.save(masks_of(graph, plan), tmp_path / "masks.pt")
    masks = torch.load(tmp_path / "masks.pt", weights_only=True)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    mask_(model, graph, plan)
    for key, parameter in model.named_parameters():
        expected = dense[key] * masks[key] if key in masks else dense[key]
        assert torch.equal(parameter, expected)
    assert plan_from_masks(graph, masks, coupling=coupling) == plan
    assert plan_from_masks(graph, {f"{k}_mask": v.float() for k, v in masks.items()}, coupling=coupling) == plan
    assert plan_from_zeros(model, graph, coupling=coupling) == plan


def line() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    model[1].weight.data.uniform_(0.5, 1.5)
    model[1].bias.data.uniform_(0.5, 1.5)
    return model.eval()


def test_a_model_that_torch_has_pruned_becomes_small() -> None:
    model, x = line(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    torch_prune.ln_structured(model[0], "weight", amount=3, n=2, dim=0)
    state = model.state_dict()
    plan = plan_from_masks(graph, state)
    assert len(plan.groups["0"].keep) == 3
    # The masked model as it is, with the masks in it, and after they were made permanent
    graph = trace(model, x)
    assert plan_from_masks(graph, state) == plan
    with pytest.raises(PlanError, match=r"of '0' are constants: their filters go, but '0.bias' stays"):
        plan_from_zeros(model, graph)
    assert plan_from_zeros(model, graph, constants="remove") == plan
    assert not plan_from_zeros(model, graph, constants="keep")
    torch_prune.remove(model[0], "weight")
    graph, before = trace(model, x), model(x)
    assert plan_from_zeros(model, graph, constants="remove") == plan
    fold_constants_(model, graph, plan, [x])
    small = reconstruct(model, graph, plan)
    assert small[0].out_channels == 3
    assert torch.allclose(small(x), before, atol=1e-5)  # the readers are 1x1: folding is exact


def test_a_norm_that_is_not_zero_is_a_constant_too() -> None:
    model = line()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    model[0].weight.data[2], model[0].bias.data[2] = 0, 0
    with pytest.raises(PlanError, match=r"channels 2 of '0' are constants: .* '1.weight' stays and is not zero"):
        plan_from_zeros(model, graph)
    model[1].weight.data[2], model[1].bias.data[2] = 0, 0
    x = torch.randn(2, 3, 8, 8)
    small = reconstruct(model, graph, plan_from_zeros(model, graph), example_inputs=x)
    assert torch.allclose(small(x), model(x), atol=1e-6)


def filters(model: nn.Module, name: str, *gone: int) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(model.get_parameter(f"{name}.weight"))
    mask[list(gone)] = 0
    return {f"{name}.weight_mask": mask}


def test_masks_that_cut_through_a_group_are_refused() -> None:
    model = build("Residual")
    graph = trace(model, images())
    one = filters(model, "b2.0", 3, 4)
    with pytest.raises(PlanError, match=r"cut through group 'b2\.0': channel 3 is masked in 'b2\.0' and not in 'down"):
        plan_from_masks(graph, one)
    plan = plan_from_masks(graph, one, coupling="union")
    assert not plan.groups["b2.0"].removed
    assert plan.groups["b2.0"].layers["b2.0"] == (0, 1, 2, *range(5, 12))
    assert plan_from_masks(graph, {**one, **filters(model, "down.0", 3, 4)}).groups["b2.0"].removed == (3, 4)


def test_masks_that_cut_through_a_grouped_convolution_are_refused() -> None:
    model = build("Grouped")
    graph = trace(model, images())
    rows = graph.group("a.0").layers[0].index.tolist()
    with pytest.raises(PlanError, match=r"filters 1, 5, 9 of 'a\.0' are one channel and go together, and only some"):
        plan_from_masks(graph, filters(model, "a.0", rows[1][0]), coupling="union")
    assert plan_from_masks(graph, filters(model, "a.0", *rows[1])).groups["a.0"].removed == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"0.weigth": torch.ones(6)}), r"has no parameter '0\.weigth'; did you mean '0\.weight'"),
        (lambda m: m.update({"0.bias": torch.ones(5)}), r"mask '0\.bias' must be a tensor of shape \[6\], got \[5\]"),
        (lambda m: m.update({"0.bias": [1] * 6}), r"must be a tensor of shape \[6\], got list"),
        (lambda m: m.update({"0.bias": torch.full((6,), 0.5)}), r"has other values than 0 and 1"),
        (lambda m: m.update({"0.bias": torch.ones(6)}), r"channels 1 of '0' are constants: .* '0\.bias' stays"),
        (lambda m: m["0.weight_mask"][2, 0, 1].zero_(), r"zero 3 single weights of '0\.weight' .* at \[2, 0, 1, 0\]"),
        (lambda m: m.update(filters(line(), "3", 0)), r"group '3' are masked; it cannot be pruned: it reaches"),
        (lambda m: m["0.weight_mask"].zero_(), r"the plan leaves no channel of group '0'"),
    ],
    ids=["name", "shape", "list", "values", "constant", "single", "output", "all"],
)
def test_masks_that_no_plan_can_carry_out_are_refused(change, message: str) -> None:
    graph = trace(line(), torch.zeros(1, 3, 8, 8))
    masks = filters(line(), "0", 1)
    assert plan_from_masks(graph, masks).groups["0"].removed == (1,)
    change(masks)
    with pytest.raises(PlanError, match=message):
        plan_from_masks(graph, masks)


def test_inputs_of_removed_channels_may_be_masked_too() -> None:
    graph = trace(line(), torch.zeros(1, 3, 8, 8))
    masks = filters(line(), "0", 1)
    masks["3.weight"] = torch.ones(4, 6, 1, 1)
    masks["3.weight"][:, 1] = 0
    assert plan_from_masks(graph, masks).groups["0"].removed == (1,)
    masks["3.weight"][:, 2] = 0
    with pytest.raises(PlanError, match=r"zero 4 single weights of '3\.weight'"):
        plan_from_masks(graph, masks)


def test_settings_are_checked() -> None:
    graph = trace(line(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(PlanError, match="coupling must be one of joint, union, got 'intersection'"):
        plan_from_masks(graph, {}, coupling="intersection")
    with pytest.raises(PlanError, match="constants must be one of refuse, keep, remove, got 'fold'"):
        plan_from_zeros(line(), graph, constants="fold")
    with pytest.raises(PlanError, match="has no channel group 'x'"):
        masks_of(graph, Plan({"x": GroupPlan(2, (0,))}))
    assert plan_from_masks(graph, {}).groups["0"].keep == tuple(range(6))
