"""Networks of the papers, and torchvision's weights in them."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune import models
from lightning_prune.errors import WeightsError
from lightning_prune.models.weights import load_torchvision_weights

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


def test_the_stem_and_the_head_keep_their_own_weights():
    torch.manual_seed(0)
    state = {key: _random_like(value) for key, value in torchvision.models.resnet18(weights=None).state_dict().items()}
    model = models.resnet18()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    skipped = load_torchvision_weights(model, state)
    assert sorted(skipped) == ["conv1.weight", "fc.bias", "fc.weight"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in skipped else state[key]), key


def test_the_head_is_loaded_too_if_asked():
    state = torchvision.models.resnet18(weights=None).state_dict()
    model = models.resnet18(num_classes=1000)
    assert load_torchvision_weights(model, state, skip=("conv1.weight",)) == ["conv1.weight"]
    assert torch.equal(model.fc.weight, state["fc.weight"])


def test_files_without_batch_counters_are_taken():
    """As torchvision's V1 files of 2017 are."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    state = {key: _random_like(value) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    model = models.resnet18()
    load_torchvision_weights(model, state)
    assert torch.equal(model.layer1[0].bn1.running_var, state["layer1.0.bn1.running_var"])


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("resnet34", "resnet18", "unexpected.*layer1.2"),
        ("resnet18", "resnet34", "missing.*layer1.2"),
        (
            "wide_resnet50_2",
            "resnet50",
            r"'layer1.0.conv1.weight' is \[128, 64, 1, 1\] there and \[64, 64, 1, 1\] here",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_loaded(source, target, words):
    model = getattr(models, target)()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = getattr(torchvision.models, source)(weights=None).state_dict()
    with pytest.raises(WeightsError, match=words):
        load_torchvision_weights(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_weights_from_a_file(tmp_path, kind):
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = models.resnet18()
    load_torchvision_weights(model, kind(tmp_path / "weights.pth"))
    assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"no file .*absent\.pth"):
        load_torchvision_weights(models.resnet18(), str(tmp_path / "absent.pth"))
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(WeightsError, match=r"nested\.pth is not a state dict"):
        load_torchvision_weights(models.resnet18(), tmp_path / "nested.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(WeightsError, match=r"text\.pth is not a state dict"):
        load_torchvision_weights(models.resnet18(), tmp_path / "text.pth")


@pytest.mark.parametrize("weights", ["ResNet18", "ResNet18_Weights.IMAGENET", "Nothing_Weights.IMAGENET1K_V1", 3])
def test_unknown_weights_are_refused(weights):
    with pytest.raises(WeightsError, match="torchvision weights enum"):
        load_torchvision_weights(models.resnet18(), weights)


def test_a_weights_enum_is_asked_for_its_state_dict(monkeypatch):
    enum = torchvision.models.ResNet18_Weights
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **options: state)
    for weights in (enum.IMAGENET1K_V1, "ResNet18_Weights.IMAGENET1K_V1"):
        model = models.resnet18()
        load_torchvision_weights(model, weights)
        assert torch.equal(model.layer2[0].conv1.weight, state["layer2.0.conv1.weight"])


def test_a_failed_download_says_what_to_do(monkeypatch):
    def fail(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(WeightsError, match=r"no route to host.*give the path"):
        load_torchvision_weights(models.resnet18(), "ResNet18_Weights.IMAGENET1K_V1")


def _random_like(value):
    return torch.randint(1, 9, value.shape) if not value.is_floating_point() else torch.rand_like(value)
