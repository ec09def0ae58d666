"""torchvision's weights in the networks for 32x32 images."""

from __future__ import annotations

import pytest
import torch
import torchvision

from lightning_prune import models
from lightning_prune.errors import WeightsError
from lightning_prune.models.weights import load_torchvision_weights


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
    with pytest.raises(WeightsError, match=r"text\.pth cannot be read: it is a text"):
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
