"""Weights that code assigns, folds or averages while the model runs: tied to where they come from, or frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_prune.graph import trace
from lightning_prune.prune import prune
from tests.graph.weight_assigners import (
    FOLDS,
    MEANS,
    UPDATES,
    WRITES,
    Averaged,
    Conv3XC,
    Direct,
    Fold,
    Fused,
    LowRank,
    Remembering,
    RepBlock,
    Swapped,
    Teacher,
    Update,
    another_shape,
    assert_lossless,
    clamped_away_from_zero,
    conv,
    exponential,
    filled,
    flipped,
    foreign,
    halves,
    mean_in_place,
    net,
    noisy,
    replaced_by_ones,
    shifted,
    traced,
    transposed,
    viewed,
)
from tests.zoo import images, randomise_


@pytest.mark.parametrize("outside", [False, True], ids=["forward", "mode"])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_a_kernel_that_is_folded_from_branches_goes_with_them(update: Update, outside: bool) -> None:
    model = randomise_(net(update, outside=outside)).eval()
    graph = traced(model)
    for name in ("0", "2"):
        tensors = {f"{name}.{of}.{kind}" for of in ("a", "b", "into") for kind in ("weight", "bias")}
        assert any(tensors <= {part.tensor for part in group.slices} for group in graph.prunable_groups)
    assert not graph.notes
    assert_lossless(model, graph)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", FOLDS)
def test_branches_with_batch_norms_go_with_the_kernel_that_they_are_folded_into(how: str, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(RepBlock(3, 8, how), nn.ReLU(), RepBlock(8, 6, how), nn.ReLU(), nn.Conv2d(6, 4, 1))
    model = randomise_(model).train(training)
    graph = traced(model)
    assert sum(group.size for group in graph.prunable_groups) == 14
    assert_lossless(model, graph)


@pytest.mark.parametrize("how", FOLDS)
def test_an_identity_kernel_ties_or_holds(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 8), RepBlock(8, 8, how, identity=True), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    model = randomise_(model).eval()
    graph = traced(model)
    assert_lossless(model, graph)


@pytest.mark.parametrize("update", MEANS, ids=lambda update: update.__name__)
def test_a_teacher_goes_with_its_student(update: Callable[[nn.Module, nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = randomise_(Teacher(update)).train()
    graph = traced(model)
    for name in ("0", "3"):
        assert any(
            {f"student.{name}.weight", f"teacher.{name}.weight"} <= {part.tensor for part in group.slices}
            for group in graph.prunable_groups
        )
    assert_lossless(model, graph)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["mean", "buffers", "ema"]
)
def test_torchs_averaged_model_goes_with_its_source(options, steps: int) -> None:
    torch.manual_seed(0)
    model = randomise_(Averaged(**options)).train()
    for _ in range(steps):
        model(images())
    graph = traced(model)
    assert any(
        {"net.0.weight", "mean.module.0.weight"} <= {part.tensor for part in group.slices}
        for group in graph.prunable_groups
    )
    assert_lossless(model, graph)


@pytest.mark.parametrize("how", ["call", "mean call", "data", "function"])
def test_weights_that_are_swapped_for_a_while(how: str) -> None:
    torch.manual_seed(0)
    model = randomise_(Swapped(how)).eval()
    graph = traced(model)
    assert any(
        {"net.0.weight", "other.0.weight"} <= {part.tensor for part in group.slices} for group in graph.prunable_groups
    )
    assert_lossless(model, graph)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_buffers_that_are_written_from_activations(write: Callable[[Remembering, Tensor], None]) -> None:
    torch.manual_seed(0)
    model = randomise_(Remembering(write)).eval()
    graph = traced(model)
    group = graph.group("encoder")
    assert group.prunable, group.reason
    assert {"queue", "keys", "center", "scale"} <= {part.tensor for part in group.slices}
    assert_lossless(model, graph)


def test_kernels_that_are_convolved_with_each_other() -> None:
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(Conv3XC(3, 8), nn.SiLU(), Conv3XC(8, 6), nn.SiLU(), conv(6, 4))).eval()
    graph = traced(model)
    assert sum(group.size for group in graph.prunable_groups) >= 14
    small = assert_lossless(model, graph)
    x = images(2, seed=9)
    small.a = nn.Identity()
    kernels = [module for module in small.modules() if isinstance(module, Conv3XC)]
    for kernel in kernels:  # the fold of the small model is still what its branches compute
        y = torch.randn(2, kernel.a.in_channels, 8, 8, dtype=torch.float64)
        assert torch.allclose(kernel.train()(y), kernel.eval()(y), atol=1e-6)
    assert small(x).isfinite().all()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_low_rank_product_that_is_merged_in_eval(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), LowRank(192, 12), nn.ReLU(), LowRank(12, 10), nn.ReLU(), nn.Linear(10, 4))
    model = randomise_(model).train(training)
    graph = traced(model)
    assert sum(group.size for group in graph.prunable_groups) >= 22
    assert_lossless(model, graph, inputs=[images(3, seed=5), images(1, seed=6)])


@pytest.mark.parametrize("outside", [False, True], ids=["forward", "mode"])
@pytest.mark.parametrize(
    "update", [exponential, shifted, filled, noisy, replaced_by_ones, foreign, clamped_away_from_zero]
)
def test_values_that_no_mask_keeps_at_zero_hold_the_channels(update: Update, outside: bool) -> None:
    model = randomise_(net(update, outside=outside)).eval()
    graph = traced(model)
    for name in ("0", "2"):
        tensor = f"{name}.into.weight"
        held = [
            group for group in graph.groups if any(part.tensor == tensor and part.dim == 0 for part in group.slices)
        ]
        assert not any(group.prunable for group in held)
        assert any(
            "into.weight" in str(group.reason) or "fixed in the Python code" in str(group.reason) for group in held
        )
    if graph.prunable_groups:
        assert_lossless(model, graph)


@pytest.mark.parametrize("outside", [False, True], ids=["forward", "mode"])
@pytest.mark.parametrize("update", [flipped, transposed, halves, another_shape, viewed])
def test_unusual_layouts_are_followed_or_held(update: Update, outside: bool) -> None:
    torch.manual_seed(0)
    folds = [Fold(8, 8, update, outside=outside) for _ in range(2)]
    model = randomise_(nn.Sequential(conv(3, 8), *folds, nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4))).eval()
    assert_lossless(model, traced(model))


def test_averages_given_as_a_callable_tie_the_teacher() -> None:
    torch.manual_seed(0)
    model = randomise_(Teacher(mean_in_place)).eval()
    model.update = lambda t, s: None
    loose, tied = (trace(model, images(), also=also) for also in ((), (lambda m: mean_in_place(m.teacher, m.student),)))
    both = {"student.0.weight", "teacher.0.weight"}
    assert not any(both <= {part.tensor for part in group.slices} for group in loose.groups)
    assert any(both <= {part.tensor for part in group.slices} for group in tied.prunable_groups)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_module_that_exists_in_eval_only(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Fused(3, 8), nn.ReLU(), Fused(8, 6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    model = randomise_(model).train(training)
    graph = traced(model)
    assert sum(group.size for group in graph.prunable_groups) == 14
    assert_lossless(model, graph)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", [lambda: Fused(3, 8), lambda: RepBlock(3, 8, "data in mode"), lambda: LowRank(3, 8)])
def test_pruning_leaves_the_pair_in_the_mode_that_it_had(make: Callable[[], nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    first = make()
    linear = isinstance(first, LowRank)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 4) if linear else nn.Conv2d(8, 4, 1))
    model = randomise_(model).train(training)
    x = torch.randn(5, 3, dtype=torch.float64) if linear else images()
    before = copy.deepcopy(model)(x)
    result = prune(model, x, criterion="l2", ratio=0.5)
    assert torch.equal(model.train(training)(x), before) or torch.allclose(model(x), before, rtol=1e-12)
    expected, found = result.masked(x), result.model(x)
    assert torch.allclose(expected, found, rtol=0, atol=1e-10)
    assert torch.allclose(result.model.train(training)(x), found, rtol=0, atol=1e-10)
    assert torch.allclose(result.masked.train(training)(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("outside", [False, True], ids=["forward", "mode"])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_weights_that_read_constants_are_masked_wherever_they_come_from(update: Update, outside: bool) -> None:
    torch.manual_seed(0)
    first, second = (Direct(a, b, update, outside=outside) for a, b in ((3, 8), (8, 6)))
    model = randomise_(nn.Sequential(first, nn.Sigmoid(), second, nn.Sigmoid(), nn.Conv2d(6, 4, 1))).eval()
    graph = traced(model)
    assert sum(group.size for group in graph.prunable_groups) == 14
    assert_lossless(model, graph)
