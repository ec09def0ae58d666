"""darknet's .weights: published sizes, round trips, other class counts, and files that are refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from lightning_prune.errors import WeightsError
from lightning_prune.models import YoloV3, YoloV3Tiny, load_darknet_weights, save_darknet_weights
from tests.zoo import randomise_


def tiny(classes=3, **options):
    return YoloV3Tiny(classes, width=0.25, **options)


def randomised(model):
    return randomise_(model).float()


def states_differ(first, second):
    """Names of what differs, the batch counters apart, which darknet does not have."""
    return [
        name
        for name, value in first.state_dict().items()
        if not name.endswith("num_batches_tracked") and not torch.equal(value, second.state_dict()[name])
    ]


@pytest.mark.parametrize(
    ("kind", "upto", "size"),
    [(YoloV3, 200, 248_007_048), (YoloV3Tiny, 200, 35_434_956), (YoloV3, 74, 162_482_580)],
)
def test_sizes_of_the_published_files(kind, upto, size):
    """yolov3.weights, yolov3-tiny.weights and darknet53.conv.74, all with a header of 20 bytes."""
    with torch.device("meta"):
        model = kind(80)
    assert 20 + size_of(model, upto) == size


def size_of(model, upto=200):
    """Bytes of a file's numbers up to a layer."""
    layers = model.darknet_layers()
    return 4 * sum(c.weight.numel() + c.out_channels * (4 if norm else 1) for n, c, norm in layers if n <= upto)


@pytest.mark.parametrize("version", [(0, 2, 0), (0, 2, 5), (0, 1, 0), (1, 0, 0)])
def test_a_round_trip_and_its_header(tmp_path, version):
    path = tmp_path / "net.weights"
    source, target = randomised(tiny()), tiny()
    save_darknet_weights(source, path, seen=123_456)
    assert path.stat().st_size == 20 + size_of(source)
    assert list(tmp_path.iterdir()) == [path]
    layout = "<3ii" if version == (0, 1, 0) else "<3iQ"
    path.write_bytes(struct.pack(layout, *version, 123_456) + path.read_bytes()[20:])
    file = load_darknet_weights(target, path)
    assert (file.version, file.seen, file.skipped) == (version, 123_456, ())
    assert file.loaded == (0, 2, 4, 6, 8, 10, 12, 13, 14, 15, 18, 21, 22)
    assert states_differ(source, target) == []


def test_more_images_than_32_bits_hold(tmp_path):
    save_darknet_weights(tiny(), tmp_path / "net.weights", seen=2**40)
    assert load_darknet_weights(tiny(), tmp_path / "net.weights").seen == 2**40


def test_the_order_within_a_layer(tmp_path):
    model = randomised(tiny())
    save_darknet_weights(model, tmp_path / "net.weights")
    unit = model.shallow[0]
    expected = torch.cat(
        [unit.norm.bias, unit.norm.weight, unit.norm.running_mean, unit.norm.running_var, unit.conv.weight.flatten()]
    )
    numbers = np.fromfile(tmp_path / "net.weights", "<f4", len(expected), offset=20)
    np.testing.assert_array_equal(numbers, expected.detach().numpy())


@pytest.mark.parametrize(("make", "upto"), [(tiny, 14), (lambda: YoloV3(2, width=0.0625), 74)])
def test_a_pretrained_backbone(tmp_path, make, upto):
    source, target, before = randomised(make()), make(), make()
    before.load_state_dict(target.state_dict())
    save_darknet_weights(source, tmp_path / "backbone")
    damaged(tmp_path / "backbone", lambda content: content[: 20 + size_of(source, upto)])
    file = load_darknet_weights(target, tmp_path / "backbone")
    numbers = [number for number, *_ in target.darknet_layers()]
    assert file.loaded == tuple(n for n in numbers if n <= upto)
    assert file.skipped == tuple(n for n in numbers if n > upto)
    fresh = ("to_", "middle", "fine", "coarse" if upto == 74 else "coarse.predict")
    for name, value in target.state_dict().items():
        if not name.endswith("tracked"):
            expected = before if name.startswith(fresh) else source
            assert torch.equal(value, expected.state_dict()[name]), name


def test_another_number_of_classes_on_request(tmp_path):
    path = tmp_path / "coco.weights"
    source = randomised(tiny(80))
    save_darknet_weights(source, path)
    target = tiny(20)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(WeightsError, match=r"with 80 classes, and the model has 20; pass other_classes=True"):
        load_darknet_weights(target, path)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    file = load_darknet_weights(target, path, other_classes=True)
    assert file.skipped == (15, 22)
    for name, value in target.state_dict().items():
        expected = before if ".predict." in name or name.endswith("tracked") else source.state_dict()
        assert torch.equal(value, expected[name]), name


def test_the_constructor_takes_a_file(tmp_path):
    source = randomised(tiny(80))
    save_darknet_weights(source, tmp_path / "coco.weights")
    assert torch.equal(tiny(80, weights=tmp_path / "coco.weights").coarse.predict.weight, source.coarse.predict.weight)
    assert torch.equal(tiny(2, weights=str(tmp_path / "coco.weights")).to_fine.conv.weight, source.to_fine.conv.weight)


def damaged(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def with_float(offset, value):
    def change(content):
        content[offset : offset + 4] = struct.pack("<f", value)
        return content

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[:-4], r"ends at byte \d+, inside layer 22, which takes bytes \d+ to \d+: it is truncated"),
        (lambda c: c[:1000], r"ends at byte 1000, inside layer 2, which takes bytes 516 to"),
        (lambda c: c[:-1], "inside layer 22"),
        (lambda c: c + b"1234", "4 bytes after this network's last layer"),
        (lambda c: c[:8], "ends at byte 8, inside the header"),
        (lambda c: c[:14], "ends at byte 14, inside the header of 20 bytes"),
        (lambda c: b"PK\3\4" + c[4:], "not a darknet file: bytes 0 to 11"),
        (with_float(20 + 2 * 4, float("nan")), "byte 28, beta of layer 0, reads nan"),
        (with_float(20 + 13 * 4, -1.0), "byte 72, running variance of layer 0, reads -1"),
    ],
)
def test_damaged_and_foreign_files_are_refused_and_nothing_changes(tmp_path, change, words):
    path = tmp_path / "net.weights"
    save_darknet_weights(randomised(tiny()), path)
    damaged(path, change)
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=words):
        load_darknet_weights(model, path, other_classes=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_network_and_a_missing_file_are_refused(tmp_path):
    save_darknet_weights(YoloV3Tiny(3, width=0.5), tmp_path / "wide.weights")
    with pytest.raises(WeightsError, match="belongs to another network"):
        load_darknet_weights(tiny(), tmp_path / "wide.weights", other_classes=True)
    with pytest.raises(WeightsError, match=r"absent\.weights cannot be read: No such file"):
        load_darknet_weights(tiny(), tmp_path / "absent.weights")
