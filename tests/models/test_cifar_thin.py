"""ResNet-20 to 110 against a plain implementation with `torch.nn.functional.pad`, their costs, and their pruning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune as lp
from lightning_prune import models
from lightning_prune.errors import ModelError, WeightsError
from lightning_prune.models import load_public_weights
from tests.helpers import random_plan
from tests.zoo import randomise_

DEPTHS = (20, 32, 44, 56, 110)


def public(model):
    """A checkpoint in the form of the published ones: of DataParallel, in a training script's dict, no counters."""
    absent = ("num_batches_tracked", "shortcut.before", "shortcut.after")
    state = {f"module.{name}": value.clone() for name, value in model.state_dict().items() if not name.endswith(absent)}
    return {"state_dict": state, "best_prec1": 91.78}


def plain_forward(state, x, blocks, option):
    """The network of the public weights, from its state dict alone."""
    state = {name.removeprefix("module."): value for name, value in state.items()}

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def conv(x, name, stride=1, padding=1):
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)

    x = F.relu(norm(conv(x, "conv1"), "bn1"))
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = F.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
            out = norm(conv(out, f"{name}.conv2"), f"{name}.bn2")
            if stride == 2 and option == "A":
                quarter = out.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            elif stride == 2:
                x = norm(conv(x, f"{name}.shortcut.0", 2, 0), f"{name}.shortcut.1")
            x = F.relu(out + x)
    return F.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize("option", ["A", "B"])
def test_public_weights_give_the_network_they_were_made_of(option):
    published = public(randomise_(models.resnet32(option)))
    model = models.resnet32(option).double().eval()
    load_public_weights(model, published)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_forward(published["state_dict"], x, 5, option)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_torch_itself_loads_public_weights():
    model, published = models.resnet20(), public(randomise_(models.resnet20()).float())["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in published.items()})
    assert torch.equal(model.layer3[1].conv2.weight, published["module.layer3.1.conv2.weight"])
    assert not model.layer3[0].shortcut.after.any()


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_parameters_and_flops_are_the_published(depth):
    """Parameters in millions as in table 6 of He et al.; multiply-adds as the public weights' page has them."""
    params, macs = {20: (0.27, 41), 32: (0.46, 69), 44: (0.66, 97), 56: (0.85, 126), 110: (1.7, 253)}[depth]
    with torch.device("meta"):
        model, x = getattr(models, f"resnet{depth}")(), torch.zeros(1, 3, 32, 32)
        found = lp.measure.count_flops(model, x)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert lp.measure.count_params(model) / 1e6 == pytest.approx(params, abs=0.05 if depth == 110 else 0.005)
    assert found / 1e6 == pytest.approx(macs, abs=1.5)


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("option", ["A", "B"])
def test_every_channel_can_go_and_none_is_missed(option, coupling):
    """Padded channels go with the zeros of the shortcut; a channel of a narrow stage goes with its copies in wider."""
    model = randomise_(models.resnet20(option)).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = lp.trace(model, x[:1])
    assert [group.name for group in graph.groups if not group.prunable] == ["linear"]
    plan = random_plan(graph, 0.5, coupling)
    small = lp.reconstruct(model, graph, plan)
    with lp.mask_(model, graph, plan):
        for images in (x, torch.randn(3, 3, 40, 24, dtype=torch.float64)):
            check = lp.check_lossless(model, small, images)
            assert check.max_rel_error <= 1e-10
    if coupling == "joint":
        widths = [conv.out_channels for conv in (small.conv1, small.layer2[0].conv2, small.layer3[0].conv2)]
        assert widths == [8, 16, 32]
    if option == "A":
        shortcut = small.layer3[0].shortcut
        channels = small.layer2[0].conv2.out_channels
        padded = shortcut.before.shape[1] + channels + shortcut.after.shape[1]
        assert padded == small.layer3[0].conv2.out_channels < 64


def test_a_pruned_checkpoint_loads_into_a_fresh_network(tmp_path):
    model = randomise_(models.resnet20()).float().eval()
    x = torch.randn(2, 3, 32, 32)
    result = lp.prune(model, x, criterion="l1", ratio=0.5)
    lp.save(tmp_path / "small.pt", result.model, result.plan)
    fresh = models.resnet20().eval()
    lp.load(tmp_path / "small.pt", fresh)
    with torch.no_grad():
        assert torch.equal(fresh(x), result.model.eval()(x))
        assert torch.equal(copy.deepcopy(fresh)(x), fresh(x))


def test_public_files_and_what_is_refused(tmp_path):
    published = public(randomise_(models.resnet20()).float())
    torch.save(published, tmp_path / "resnet20.th")
    model = models.resnet20()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError, match=r"no file .*absent\.th"):
        load_public_weights(model, tmp_path / "absent.th")
    (tmp_path / "text.th").write_text("no weights")
    with pytest.raises(WeightsError, match=r"text\.th cannot be read: it is a text"):
        load_public_weights(model, tmp_path / "text.th")
    torch.save({"epoch": 3}, tmp_path / "epoch.th")
    with pytest.raises(WeightsError, match=r"epoch\.th: no state dict"):
        load_public_weights(model, str(tmp_path / "epoch.th"))
    with pytest.raises(WeightsError, match=r"missing.*layer1\.3"):
        load_public_weights(models.resnet32(), published)
    with pytest.raises(WeightsError, match=r"'linear.weight' is \[10, 64\] there and \[5, 64\] here"):
        load_public_weights(models.resnet20(num_classes=5), published)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_public_weights(model, str(tmp_path / "resnet20.th"))
    assert torch.equal(model.layer3[2].bn2.running_var, published["state_dict"]["module.layer3.2.bn2.running_var"])
    head = ("linear.weight", "linear.bias")
    other = models.resnet20(num_classes=5)
    load_public_weights(other, published, skip=head)
    assert torch.equal(other.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize("depth", [18, 2, 51])
def test_other_depths_are_refused(depth):
    with pytest.raises(ModelError, match=r"6n \+ 2"):
        models.ThinCifarResNet(depth)


def test_other_shortcuts_are_refused():
    with pytest.raises(ModelError, match="shortcut must be one of A, B, got 'C'"):
        models.resnet20("C")
