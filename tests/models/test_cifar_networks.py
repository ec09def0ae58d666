"""ResNets and VGG16 for 32x32 images against torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune import models

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


@pytest.mark.parametrize("name", RESNETS)
def test_names_and_shapes_are_torchvisions_but_for_the_stem(name):
    with torch.device("meta"):
        ours = getattr(models, name)(num_classes=1000)
        theirs = getattr(torchvision.models, name)(weights=None)
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert shapes.pop("conv1.weight") == (64, 3, 3, 3)
    assert expected.pop("conv1.weight") == (64, 3, 7, 7)
    assert list(shapes.items()) == list(expected.items())
    assert [key for key, _ in ours.named_children()] == [key for key, _ in theirs.named_children()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_same_function_as_torchvision_with_the_same_stem(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    ours = getattr(models, name)().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_max_pool_can_be_left_out():
    with torch.device("meta"):
        x = torch.zeros(1, 3, 32, 32)
        for max_pool, side in ((True, 16), (False, 32)):
            model = models.resnet18(max_pool=max_pool)
            assert model.layer1(model.maxpool(model.conv1(x))).shape[-2:] == (side, side)


def test_vgg16_follows_torchvisions_features_and_has_one_linear_head():
    with torch.device("meta"):
        ours, theirs = models.vgg16_bn(), torchvision.models.vgg16_bn(weights=None)
    for (name, value), (other, expected) in zip(
        ours.features.state_dict().items(), theirs.features.state_dict().items(), strict=True
    ):
        assert (name, value.shape) == (other, expected.shape)
    convs = [module for module in ours.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 13
    assert sum(conv.out_channels for conv in convs) == 4224
    assert isinstance(ours.classifier, nn.Linear)
    assert (ours.classifier.in_features, ours.classifier.out_features) == (512, 10)


def test_channels_of_resnet18():
    with torch.device("meta"):
        widths = {n: m.out_channels for n, m in models.resnet18().named_modules() if isinstance(m, nn.Conv2d)}
    projections = sum(width for name, width in widths.items() if "downsample" in name)
    inner = sum(width for name, width in widths.items() if name.startswith("layer") and name.endswith("conv1"))
    assert (sum(widths.values()) - projections, projections, inner) == (3904, 896, 1920)
