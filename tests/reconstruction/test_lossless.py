"""The losslessness check sees small differences and leaves models alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.criteria import L1
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ReconstructionError
from lightning_prune.graph import trace
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection import LayerRatio
from tests.tasks.helpers import SIDE, torchvision_detector
from tests.zoo import build, images


class Returns(nn.Module):
    """Returns what it was given, whatever the input."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor):
        return self.value


def compare(first, second, **options):
    return check_lossless(Returns(first), Returns(second), torch.zeros(1), **options)


def test_a_relative_difference_of_1e_9_is_seen() -> None:
    model, x = build("Residual"), images()
    assert check_lossless(model, copy.deepcopy(model), x).max_rel_error == 0
    other = copy.deepcopy(model)
    other.head.fc.bias.data[0] += 1e-9 * model(x).abs().max()
    report = check_lossless(model, other, x)
    assert not report.passed
    assert report.max_rel_error == pytest.approx(1e-9, rel=1e-3)
    assert check_lossless(model, other, x, tolerance=1e-8).passed


def test_float32_models_are_compared_in_float64() -> None:
    model = build("Residual").float()
    x, other = images().float(), copy.deepcopy(model)
    other.head.fc.bias.data += 1e-6
    report = check_lossless(model, other, x)
    assert (report.dtype, report.tolerance, report.passed) == ("float64", 1e-10, False)
    as_is = check_lossless(model, other, x, dtype=None)
    assert (as_is.dtype, as_is.tolerance, as_is.passed) == ("float32", 1e-5, True)


def test_buffers_are_cast_too() -> None:
    model = nn.BatchNorm1d(2, affine=False)  # no parameter says that it is float32
    model.running_mean.fill_(0.1)
    other = copy.deepcopy(model)
    assert check_lossless(model, other, torch.randn(3, 2)).passed
    mixed = nn.Sequential(nn.Linear(2, 2).double(), nn.BatchNorm1d(2))
    mixed[1].running_mean.fill_(1e8)
    near = copy.deepcopy(mixed)
    near[0].bias.data += 1e-6
    assert check_lossless(mixed, near, torch.ones(1, 2), tolerance=0.0).max_abs_error > 1e-7
    assert {t.dtype for t in (*model.buffers(), *mixed[1].parameters())} == {torch.float32, torch.int64}


def test_the_error_is_relative_to_the_largest_output_of_the_same_tensor() -> None:
    large, tiny = torch.tensor([100.0, 1.0]), torch.tensor([1e-3])
    report = compare((large, tiny), (large + torch.tensor([0.0, 1.0]), tiny))
    assert (report.max_abs_error, report.max_rel_error, report.outputs) == (1.0, 0.01, 2)
    assert compare((large, tiny), (large, 2 * tiny)).max_rel_error == pytest.approx(1.0, rel=1e-6)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("first", "second", "relative", "absolute"),
    [
        ([1.0, NAN], [1.0, NAN], INF, INF),
        ([1.0, NAN], [1.0, 1.0], INF, INF),
        ([1.0, 1.0], [NAN, 1.0], INF, INF),
        ([1.0, INF, -INF], [1.0, INF, -INF], 0.0, 0.0),
        ([1.0, INF], [1.0, -INF], INF, INF),
        ([1.0, INF], [1.0, 5.0], INF, INF),
        ([1.0, 5.0], [1.0, INF], INF, INF),
        ([NAN, NAN], [NAN, NAN], INF, INF),
        ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0),
        ([0.0, 0.0], [0.0, 1e-30], INF, 1e-30),
    ],
)
def test_nan_infinity_and_zero(first, second, relative: float, absolute: float) -> None:
    report = compare(torch.tensor(first), torch.tensor(second))
    assert report.max_rel_error == relative
    assert report.max_abs_error == pytest.approx(absolute, rel=1e-6, abs=0)
    assert report.passed == (relative == 0)


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (torch.ones(2), t),
        lambda t: [torch.ones(2), (t,)],
        lambda t: {"out": torch.ones(2), "aux": t},
        lambda t: [{"boxes": torch.zeros(0, 4), "scores": t}],
        lambda t: Output(t),
    ],
    ids=["tensor", "tuple", "nested", "dict", "detections", "dataclass"],
)
def test_every_tensor_of_an_output_is_compared(wrap) -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert compare(wrap(tensor), wrap(tensor.clone())).passed
    assert compare(wrap(tensor), wrap(tensor + 0.5)).max_rel_error == pytest.approx(0.25)


def test_integers_booleans_and_complex_numbers() -> None:
    assert not compare(torch.tensor([1, 2]), torch.tensor([1, 3])).passed
    assert not compare(torch.tensor([True, False]), torch.tensor([True, True])).passed
    assert not compare(torch.tensor([1 + 1j]), torch.tensor([1 + 2j])).passed
    assert compare(torch.tensor([1 + 1j]), torch.tensor([1 + 1j])).passed


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.ones(2), torch.ones(3), r"different shapes: \[\[2\]\] and \[\[3\]\]"),
        ((torch.ones(2), torch.ones(1)), (torch.ones(2),), r"\[\[2\], \[1\]\] and \[\[2\]\]"),
        (None, None, "no tensor"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(first, second, message: str) -> None:
    with pytest.raises(ReconstructionError, match=message):
        compare(first, second)


def test_models_and_random_state_stay_as_they_are() -> None:
    model = build("Vgg").train()  # has dropout, and batch norms that would move
    model.features[1].eval()
    other = copy.deepcopy(model)
    modes = [module.training for module in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert check_lossless(model, other, images()).passed  # in eval mode: dropout would differ
    for checked in (model, other):
        assert [module.training for module in checked.modules()] == modes
        assert all(torch.equal(value, state[key]) for key, value in checked.state_dict().items())
        assert all(parameter.grad is None for parameter in checked.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_are_restored_after_a_failure() -> None:
    model = build("Vgg").train()
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5"):
        check_lossless(model, model, torch.zeros(1, 5, 8, 8))
    assert all(module.training for module in model.modules())


def test_dict_and_tuple_inputs_are_cast() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.fc(x)[index]

    model, x, index = Two(), torch.ones(2, 2), torch.tensor([1])
    assert check_lossless(model, copy.deepcopy(model), (x, index)).passed
    assert check_lossless(model, copy.deepcopy(model), {"index": index, "x": x}).passed
    assert (x.dtype, model.fc.weight.dtype) == (torch.float32, torch.float32)


class Insists(nn.Module):
    """Refuses any type but float32."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 expected")
        return self.fc(x)


def test_a_model_that_insists_on_its_type_is_compared_in_it() -> None:
    model = Insists()
    report = check_lossless(model, copy.deepcopy(model), torch.randn(2, 3))
    assert report.passed
    assert (report.dtype, report.tolerance) == ("float32", 1e-5)
    with pytest.raises(TypeError, match="float32 expected"):
        check_lossless(model, model, torch.randn(2, 3).half(), dtype=None)


def test_detectors_that_find_nothing_are_compared_by_what_their_modules_compute() -> None:
    x = ([torch.rand(3, SIDE, SIDE)],)
    torch.manual_seed(0)
    detector, other = torchvision_detector("fcos").eval(), torchvision_detector("fcos").eval()
    detector.score_thresh = other.score_thresh = 0.99
    assert not detector(*x)[0]["boxes"].numel()
    assert check_lossless(detector, copy.deepcopy(detector), x).max_rel_error == 0
    assert not check_lossless(detector, other, x).passed  # nothing of the two is alike but the emptiness
    graph = trace(detector, x)
    plan = LayerRatio(0.5).select(graph, score(detector, graph, L1()))
    small = reconstruct(detector, graph, plan)
    assert not check_lossless(detector, small, x).passed
    with mask_(detector, graph, plan):
        report = check_lossless(detector, small, x)
    assert report.passed
    assert report.outputs > 5  # the heads' maps


def test_emptiness_without_modules_is_refused() -> None:
    with pytest.raises(ReconstructionError, match="nothing but empty tensors"):
        compare(torch.zeros(0, 4), torch.zeros(0, 4))


def test_a_model_that_computes_nan_is_not_pruned_and_nan_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[2].bias[0] = torch.nan  # which no criterion looks at
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ReconstructionError, match=r"the masked model computes NaN, .* Nothing was changed"):
        lp.prune(model, torch.randn(1, 3, 8, 8), criterion="l1", ratio=0.5)
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7.0), value.nan_to_num(7.0)) for name, value in before.items())
