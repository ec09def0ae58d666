"""Residual blocks are found, masked, dropped without loss, saved and loaded; what is not exact is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import lightning_prune as lp
from lightning_prune.errors import CheckpointError, PlanError, ReconstructionError
from lightning_prune.reconstruction import Block, DroppedBlock, block_plan, choose_blocks, drop_blocks_, residual_blocks
from lightning_prune.sensitivity import block_sensitivity
from tests.zoo import conv_bn, randomise_

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Bottle(nn.Module):
    """A branch in a module of its own, another shortcut and a functional activation."""

    def __init__(self, inputs: int, outputs: int, activation=F.silu) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn(inputs, 6), nn.ReLU(inplace=True), conv_bn(6, outputs))
        self.around = conv_bn(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.around(x))


class Net(nn.Module):
    """Blocks of one kind, behind a stem."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = conv_bn(3, 8), nn.Sequential(*blocks), nn.Linear(blocks[-1].out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def bottles(activation=F.silu) -> nn.Module:
    blocks = [Bottle(8, 8, activation), Bottle(8, 12, activation), Bottle(12, 12, activation)]
    blocks[-1].out = 12
    return Net(*blocks)


MODELS = {
    "bottles": bottles,
    "resnet20": lambda: lp.models.cifar_thin.resnet20(),
    "resnet18": models.resnet18,
    "resnet50": lambda: models.ResNet(models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5),
    "mobilenet_v2": lambda: models.mobilenet_v2(width_mult=0.25),
    "convnext": lambda: models.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 1)]
    ),
}
SLOW = ("resnet18", "resnet50", "mobilenet_v2")
FOUND = {
    "bottles": {"blocks.0": ("SiLU",), "blocks.1": ("around", "SiLU"), "blocks.2": ("SiLU",)},
    "resnet20": {
        f"layer{s}.{k}": (("shortcut",) if s > 1 and not k else ()) + ("relu",) for s in (1, 2, 3) for k in range(3)
    },
    "resnet18": {
        f"layer{s}.{k}": (("downsample",) if s > 1 and not k else ()) + ("relu",) for s in (1, 2, 3, 4) for k in (0, 1)
    },
    "resnet50": {
        f"layer{s}.{k}": (("downsample",) if not k else ()) + ("relu",)
        for s, k in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0))
    },
    "mobilenet_v2": {f"features.{k}": () for k in (1, 3, 5, 6, 8, 9, 10, 12, 13, 15, 16)},
    "convnext": {"features.1.0": (), "features.1.1": (), "features.3.0": ()},
}


def built(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_(MODELS[name](), seed).eval()


def size_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MODELS],
)
def test_blocks_are_dropped_saved_and_loaded_without_loss(name: str, tmp_path: Path) -> None:
    model = built(name)
    graph = lp.trace(model, X)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = residual_blocks(model, graph, X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {block.name: block.remains for block in blocks if block.removable} == FOUND[name]
    names = [*FOUND[name]][:2] + [*FOUND[name]][-1:]
    masked = copy.deepcopy(model)
    lp.mask_(masked, graph, block_plan(graph, choose_blocks(blocks, names)))
    costs = lp.measure(model, X).macs
    plan, report = drop_blocks_(model, graph, names, X)
    assert report.passed
    assert report.compared == ("forward", "forward at another size", "forward while training")
    for x in (X, torch.randn(3, 3, 24, 20, dtype=torch.float64)):
        torch.testing.assert_close(model(x), masked(x), rtol=1e-10, atol=1e-10)
    assert lp.measure(model, X).macs < costs
    assert (
        {key for key in before if not key.startswith(tuple(f"{name}." for name in names))}
        <= {*model.state_dict()}
        < {*before}
    )

    lp.save(tmp_path / "small.pt", model, plan)
    fresh = built(name, seed=3)
    assert lp.load(tmp_path / "small.pt", fresh) == plan
    assert torch.equal(fresh(X), model(X))
    assert str(fresh) == str(model)
    lp.load(tmp_path / "small.pt", fresh)  # dropped alike
    assert torch.equal(fresh(X), model(X))
    retraced = lp.trace(model, X)
    left = {block.name for block in residual_blocks(model, retraced, X) if block.removable}
    assert left == {*FOUND[name]} - {*names}


def test_fine_tuning_masked_is_fine_tuning_dropped() -> None:
    dense = built("resnet20").train()
    graph = lp.trace(dense, X)
    masked, dropped = copy.deepcopy(dense), dense
    blocks = choose_blocks(residual_blocks(dense, graph, X), ["layer1.1", "layer2.0"])
    handle = lp.mask_(masked, graph, block_plan(graph, blocks))
    drop_blocks_(dropped, graph, [block.name for block in blocks], X)
    for model in (masked, dropped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    handle.apply_()
    mine, theirs = dropped.state_dict(), masked.state_dict()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-8, atol=1e-8)
    handle.remove()
    _, report = drop_blocks_(masked, graph, [block.name for block in blocks], X)
    assert report.passed
    assert torch.allclose(masked.eval()(X), dropped.eval()(X))


def test_channels_and_blocks_go_together(tmp_path: Path) -> None:
    model = built("resnet20")
    graph = lp.trace(model, X)
    channels = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    blocks = choose_blocks(residual_blocks(model, graph, X), ["layer1.1"])
    both = block_plan(graph, blocks, channels)
    masked = copy.deepcopy(model)
    lp.mask_(masked, graph, both)
    assert not masked.layer1[1].bn2.bias.any()
    lp.reconstruct_(model, graph, both, example_inputs=X)
    cut = size_of(model)
    drop_blocks_(model, lp.trace(model, X), ["layer1.1"], X)
    assert size_of(model) < cut
    torch.testing.assert_close(model(X), masked(X), rtol=1e-10, atol=1e-10)
    lp.save(tmp_path / "small.pt", model, both)
    fresh = built("resnet20", seed=2)
    assert lp.load(tmp_path / "small.pt", fresh) == both
    assert torch.equal(fresh(X), model(X))


def test_the_weakest_blocks_are_chosen_by_what_masking_them_costs() -> None:
    model = built("bottles")
    graph = lp.trace(model, X)
    target = model(X).detach()
    blocks = residual_blocks(model, graph, X)
    model.blocks[2].branch[2][1].weight.data.zero_()
    model.blocks[2].branch[2][1].bias.data.zero_()
    weak = model(X).detach()

    def error(one: nn.Module) -> float:
        return float((one(X) - weak).square().mean())

    scores = block_sensitivity(model, graph, blocks, error, mode="min")
    assert scores["blocks.2"] == 0 < min(scores["blocks.0"], scores["blocks.1"])
    assert (
        [b.name for b in choose_blocks(blocks, 1, scores)]
        == [b.name for b in choose_blocks(blocks, 0.3, scores)]
        == ["blocks.2"]
    )
    drop_blocks_(model, graph, 1, X, scores=scores)
    torch.testing.assert_close(model(X), weak, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(weak, target)
    assert isinstance(model.blocks[2], DroppedBlock)


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (["blocks.9"], "there is no residual block 'blocks.9'; those that can be dropped are blocks.0, blocks.1"),
        (["stem"], "block 'stem' cannot be dropped: it computes more than a shortcut"),
        (9, "got 9, and 3 can be dropped"), (-1, "got -1"), (1.5, "got 1.5"), (True, "got True"),
        (2, "scores are needed"),
    ],
    ids=["unknown", "stem", "many", "negative", "share", "bool", "scores"],
)  # fmt: skip
def test_what_cannot_be_dropped_is_refused_before_anything_changes(amount, message: str) -> None:
    model = built("bottles")
    with pytest.raises(PlanError, match=message):
        drop_blocks_(model, lp.trace(model, X), amount, X)
    assert not any(isinstance(module, DroppedBlock) for module in model.modules())


def gated(x: Tensor) -> Tensor:
    return F.silu(x) + 1e-6


def test_a_block_that_is_nearly_exact_is_no_block() -> None:
    model = built("bottles")
    model.blocks[1].activation = gated
    graph = lp.trace(model, X)
    found = {block.name: block.reason for block in residual_blocks(model, graph, X)}
    assert found["blocks.0"] is None
    assert "computes more than a shortcut" in found["blocks.1"]


class Peeking(Net):
    """Its code reads a weight of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.blocks[0].branch[0][0].weight.mean()


def test_code_that_needs_the_block_keeps_it() -> None:
    blocks = [Bottle(8, 8), Bottle(8, 8)]
    blocks[-1].out = 8
    model = randomise_(Peeking(*blocks)).eval()
    expected, block = model(X), model.blocks[0]
    with pytest.raises(ReconstructionError, match="does not run forward"):
        drop_blocks_(model, lp.trace(model, X), ["blocks.0"], X)
    assert model.blocks[0] is block
    assert torch.equal(model(X), expected)


def test_held_masks_and_hooks_are_refused() -> None:
    model = built("bottles")
    graph = lp.trace(model, X)
    handle = lp.mask_(model, graph, block_plan(graph, [Block("blocks.0", ("blocks.0.branch.2.0",))]))
    assert residual_blocks(model, graph, X)[1].removable
    with pytest.raises(ReconstructionError, match=r"call MaskHandle.remove\(\) first"):
        drop_blocks_(model, graph, ["blocks.0"], X)
    handle.remove()
    model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(PlanError, match="has forward hooks, which would no longer run"):
        drop_blocks_(model, graph, ["blocks.0"], X)


def test_the_input_of_a_dropped_block_is_left_alone() -> None:
    model = built("resnet20")
    drop_blocks_(model, lp.trace(model, X), ["layer1.1"], X)
    given = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    kept = given.clone()
    assert torch.equal(model.layer1[1](given), kept.relu())
    assert torch.equal(given, kept)


def test_files_of_dropped_blocks_are_refused_by_other_models(tmp_path: Path) -> None:
    model, path = built("bottles"), tmp_path / "small.pt"
    plan, _ = drop_blocks_(model, lp.trace(model, X), ["blocks.1"], X)
    lp.save(path, model, plan)
    good = torch.load(path, weights_only=True)
    assert good["blocks"] == {"blocks.1": ["around", "SiLU"]}
    dense = built("bottles")
    whole = str(dense)
    for blocks in (
        [],
        {"blocks.1": "around"},
        {"blocks.1": [3]},
        {"blocks.7": []},
        {"": []},
        {"blocks.1": ["system"]},
        {},
    ):
        torch.save({**good, "blocks": blocks}, path)
        with pytest.raises(CheckpointError, match=r"small\.pt"):
            lp.load(path, dense)
        assert str(dense) == whole
    lp.save(path, dense, plan)
    with pytest.raises(CheckpointError, match=r"'blocks.1' was dropped here, and not in the file"):
        lp.load(path, model)
