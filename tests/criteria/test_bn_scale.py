"""Batch-norm scales against loops, what is refused, and the sparsity penalty."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria import BNScale
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from tests import zoo
from tests.criteria.helpers import Task, close, raw, train


@pytest.mark.parametrize("name", ["Vgg", "Residual", "Grouped"])
def test_scales_match_loops(name):
    model = zoo.build(name)
    graph = lp.trace(model, zoo.images())
    found = raw(BNScale(missing="keep"), model, graph)
    for layer in graph.layers.values():
        if layer.norm is not None:
            gamma = model.get_submodule(layer.norm).weight.tolist()
            close(found[layer.name], [sum(abs(gamma[f]) for f in row) / len(row) for row in layer.index.tolist()])


def test_scales_of_layers_whose_batch_norm_stands_elsewhere():
    model = zoo.build("Dense")
    found = raw(BNScale(), model, lp.trace(model, zoo.images()))
    later = [model.norms[1].weight[6:10], model.norms[2].weight[6:10], model.last.weight[6:10]]
    close(found["convs.0"], torch.stack(later).abs().mean(0).detach())
    close(found["stem"], model.norms[0].weight.abs().detach())
    model = zoo.build("PreActivation")
    found = raw(BNScale(), model, lp.trace(model, zoo.images()))
    close(found["c2"], model.bn3.weight.abs().detach())  # behind the addition
    model = zoo.build("InvertedResidual")
    scores = score(model, lp.trace(model, zoo.images()), BNScale(missing="keep"))
    parts = scores.layers["expand.0"]
    close(parts["excite"], (parts["expand.0"] + parts["depthwise.0"]) / 2)  # has none: as its group
    close(scores["expand.0"], parts["excite"])


def test_without_batch_norm_scales_are_refused_with_the_layers():
    images = zoo.images()
    for name, layers in {"Plain": "a, b", "Vgg": "classifier.0", "InvertedResidual": "squeeze"}.items():
        model = zoo.build(name)
        graph = lp.trace(model, images)
        with pytest.raises(ScoreError, match=rf"BNScale needs batch norms with a scale.*none behind {layers}$"):
            score(model, graph, BNScale())
    unscaled = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).double()
    with pytest.raises(ScoreError, match=r"none behind 0$"):
        score(unscaled, lp.trace(unscaled, images), BNScale())
    kept = score(zoo.build("Vgg"), lp.trace(zoo.build("Vgg"), images), BNScale(missing="keep"))
    assert kept["classifier.0"].min() > max(kept["features.0.0"].max(), kept["features.3.0"].max())


def test_the_penalty_adds_its_subgradient_to_scales_only():
    model = zoo.build("Residual")
    model.a1[1].weight.data[0] = 0  # masked
    model.b1[1].weight.requires_grad_(False)
    F.cross_entropy(model(zoo.images()), torch.tensor([0, 1])).backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    lp.criteria.add_bn_sparsity_(model, 0.01)
    changed = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name == "b1.1.weight"
            continue
        scale = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d) and name.endswith("weight")
        expected = before[name] + (0.01 * parameter.detach().sign() if scale else 0)
        assert torch.equal(parameter.grad, expected)
        changed += scale
    assert changed == 5
    assert model.a1[1].weight.grad[0] == before["a1.1.weight"][0]
    with pytest.raises(ScoreError, match="strength"):
        lp.criteria.add_bn_sparsity_(model, -1.0)
    with pytest.raises(ScoreError, match="strength"):
        lp.callbacks.BNSparsityCallback(float("nan"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_adds_the_penalty_once_per_step(accumulate):
    found = train(Task(), [lp.callbacks.BNSparsityCallback(0.05)], accumulate_grad_batches=accumulate)
    net = zoo.build("Residual").train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    images, labels = zoo.images(8), torch.arange(8) % 5
    for number, (x, y) in enumerate(zip(images.split(4), labels.split(4), strict=True), 1):
        scales = [module.weight for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        (F.cross_entropy(net(x), y) / accumulate).backward()
        if number % accumulate == 0:
            (0.05 * sum(scale.abs().sum() for scale in scales)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-10, atol=1e-12)


def test_with_two_optimizers_every_scale_is_penalised_once():
    found = train(Task(manual=True), [lp.callbacks.BNSparsityCallback(0.05)])
    expected = train(Task(), [lp.callbacks.BNSparsityCallback(0.05)])
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-10, atol=1e-12)


def test_sparse_training_then_bn_scale():
    task = Task()
    train(task, [lp.callbacks.BNSparsityCallback(0.5)], limit_train_batches=2)
    images = zoo.images()
    result = lp.prune(task.net.eval(), images, criterion="bn_scale", ratio=0.5)
    assert result.lossless.passed


class HalfNormalised(nn.Module):
    """IBN: instance norm of one half of the channels, batch norm of the other."""

    def __init__(self):
        super().__init__()
        self.sizes = [4, 4]
        self.conv, self.instance, self.batch = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)
        self.whole, self.norm, self.head = nn.Conv2d(8, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        first, second = self.conv(x).split(self.sizes, 1)
        x = torch.cat([self.instance(first), self.batch(second)], 1)
        return self.head(F.relu(self.norm(self.whole(F.relu(x)))))


def test_instance_norm_sees_each_scale_once_for_every_image():
    model = zoo.randomise_(HalfNormalised()).double()
    graph = lp.trace(model, zoo.images(2))
    found = raw(BNScale(), model, graph)
    close(found["whole"], model.norm.weight.abs().detach())
    close(found["conv"], model.instance.weight.abs().detach())
    assert set(score(model, graph, "l1")) == {group.name for group in graph.prunable_groups}
