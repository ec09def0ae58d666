"""YOLOv3 and YOLOv3-tiny: published sizes, the same function as darknet's cfg, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.models import YoloV3, YoloV3Tiny, save_darknet_weights
from lightning_prune.models.yolo_v3 import SameMaxPool
from tests.reference import darknet
from tests.zoo import randomise_

NETWORKS = {YoloV3: darknet.yolov3_cfg, YoloV3Tiny: darknet.yolov3_tiny_cfg}


@pytest.mark.parametrize(
    ("kind", "params", "flops"),
    [(YoloV3, 61_626_049, 65_658_238_334), (YoloV3Tiny, 8_713_766, 5_518_233_630)],
)
def test_parameters_and_flops_are_the_papers_to_the_digit(kind, params, flops):
    with torch.device("meta"):
        model, images = kind(20), torch.zeros(1, 3, 416, 416)
    assert lp.measure.count_params(model) == params
    assert lp.measure.count_flops(model, images, "paper") == flops


def test_yolov3_has_75_convolutions_of_which_72_are_normalised():
    with torch.device("meta"):
        layers = YoloV3(20).darknet_layers()
    assert len(layers) == 75
    assert [number for number, _, norm in layers if norm is None] == [81, 93, 105]
    strided = [number for number, conv, _ in layers if conv.stride == (2, 2)]
    assert strided == [1, 5, 12, 37, 62]


@pytest.mark.parametrize("kind", NETWORKS)
def test_layer_numbers_are_those_of_the_cfg(kind):
    cfg = NETWORKS[kind]()
    with torch.device("meta"):
        layers = kind(20).darknet_layers()
    expected = [(n, row) for n, row in enumerate(cfg) if row[0] in ("conv", "detect")]
    assert [number for number, *_ in layers] == [number for number, _ in expected]
    for (_, conv, _), (_, (_, *options)) in zip(layers, expected, strict=True):
        if options:
            assert (conv.out_channels, conv.kernel_size[0], conv.stride[0]) == tuple(options)
        else:
            assert (conv.out_channels, conv.kernel_size[0], conv.stride[0]) == (75, 1, 1)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_same_function_as_the_cfg_run_layer_by_layer(kind, tmp_path):
    model = randomise_(kind(3, width=0.125)).float().eval()
    save_darknet_weights(model, tmp_path / "net.weights")
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        maps = model.double()(images)
    expected = darknet.run(NETWORKS[kind](), tmp_path / "net.weights", images, 3, width=0.125)
    assert [tuple(m.shape[2:]) for m in maps] == [(64 // s, 96 // s) for s in kind.strides]
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def test_the_pool_of_stride_one_ignores_what_lies_outside():
    x = -torch.arange(1.0, 10).view(1, 1, 3, 3)
    expected = torch.tensor([[-1.0, -2, -3], [-4, -5, -6], [-7, -8, -9]])
    assert torch.equal(SameMaxPool()(x)[0, 0], expected)
    assert torch.equal(SameMaxPool()(-x)[0, 0], torch.tensor([[5.0, 6, 6], [8, 9, 9], [8, 9, 9]]))


def test_anchors_are_given_small_to_large_and_handed_out_large_first():
    model = YoloV3Tiny(2, width=0.25, anchors=[(n, n + 1) for n in range(1, 7)])
    assert model.anchors == (((4, 5), (5, 6), (6, 7)), ((1, 2), (2, 3), (3, 4)))


def test_a_prior_makes_few_cells_start_as_objects():
    model = YoloV3Tiny(2, width=0.25, objectness_prior=0.01)
    for head in (model.coarse, model.fine):
        bias = head.predict.bias.view(3, 7)
        torch.testing.assert_close(bias[:, 4].sigmoid(), torch.full((3,), 0.01))
        assert not bias[:, [0, 1, 2, 3, 5, 6]].any()


def test_narrow_networks_scale_every_width():
    wide, narrow = (
        [m.out_channels for m in YoloV3(1, width=w).modules() if isinstance(m, nn.Conv2d)] for w in (0.5, 0.25)
    )
    assert [w // 2 for w in wide if w != 18] == [n for n in narrow if n != 18]


@pytest.mark.parametrize("side", [(64, 80), (48, 64)])
def test_sizes_that_are_no_multiple_of_32_are_refused(side):
    with pytest.raises(ValueError, match=f"multiples of 32 pixels, got {side[0]}x{side[1]}"):
        YoloV3Tiny(1, width=0.25)(torch.zeros(1, 3, *side))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"anchors": [(1, 2)] * 9}, "needs 6 anchors"),
        ({"anchors": [(0, 2)] * 6}, "above 0"),
        ({"width": 0}, "width"),
        ({"objectness_prior": 1.0}, "objectness_prior"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        YoloV3Tiny(**options)
