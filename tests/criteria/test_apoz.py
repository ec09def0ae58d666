"""APoZ against loops; finding the rectifier; what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria import APoZ
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from tests import zoo
from tests.criteria.helpers import assert_same, close, raw, snapshot
from tests.reference import taylor as reference


def kept(maps, index, eps=0.0, last=False):
    return [1 - reference.zeros(maps, filters, eps, last) for filters in index.tolist()]


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_apoz_of_convolutions_in_front_of_pooling_and_of_linear_layers(eps):
    model = zoo.build("Vgg")
    images = zoo.images(6)
    graph = lp.trace(model, images)
    before = snapshot(model)
    found = raw(APoZ(eps=eps), model, graph, [images], None)
    assert_same(before, snapshot(model))
    with torch.no_grad():
        first = F.relu(model.features[0](images))  # what enters the next layer is pooled
        second = F.relu(model.features[3](F.max_pool2d(first, 2)))
        hidden = F.relu(model.classifier[0](F.max_pool2d(second, 2).flatten(1)))
    layers = graph.layers
    close(found["features.0.0"], kept(first, layers["features.0.0"].index, eps))
    close(found["features.3.0"], kept(second, layers["features.3.0"].index, eps))
    close(found["classifier.0"], kept(hidden, layers["classifier.0"].index, eps))


def test_apoz_behind_additions_and_global_pooling():
    model = zoo.build("Residual")
    images = zoo.images(6)
    found = raw(APoZ(), model, lp.trace(model, images), [images], None)
    with torch.no_grad():
        x = F.relu(model.stem(images))
        inner = F.relu(model.a1(x))
        block = F.relu(model.a2(inner) + x)
        last = F.relu(model.b2(F.relu(model.b1(block))) + model.down(block))  # a mean over positions follows
    index = torch.arange(8).unsqueeze(1)
    close(found["stem.0"], kept(x, index))
    close(found["a1.0"], kept(inner, index))
    close(found["a2.0"], kept(block, index))
    ends = kept(last, torch.arange(12).unsqueeze(1))
    close(found["b2.0"], ends)
    close(found["down.0"], ends)


def test_apoz_of_grouped_convolutions_counts_all_filters_of_a_channel():
    model = zoo.build("Grouped")
    images = zoo.images(6)
    graph = lp.trace(model, images)
    found = raw(APoZ(), model, graph, [images], None)
    with torch.no_grad():
        x = F.relu(model.stem(images))
        a = F.relu(model.a(x))
        b = F.relu(model.b(a))
        x = F.relu(x + model.c(b))
        deep = F.relu(model.multiply(x))
    maps = {"a.0": a, "b.0": b, "c.0": x, "multiply.0": deep}
    for name, tensor in maps.items():
        assert graph.layers[name].index.shape[1] == {"c.0": 1, "multiply.0": 2}.get(name, 3)
        close(found[name], kept(tensor, graph.layers[name].index))


def test_apoz_behind_a_concatenation_and_its_batch_norm():
    model = zoo.build("Dense")
    images = zoo.images(6)
    found = raw(APoZ(), model, lp.trace(model, images), [images], None)
    with torch.no_grad():
        stem = model.stem(images)
        first = model.convs[0](F.relu(model.norms[0](stem)))
        behind = F.relu(model.norms[1](torch.cat([stem, first], 1)))  # the first of three
    close(found["convs.0"], kept(behind[:, 6:], torch.arange(4).unsqueeze(1)))
    close(found["stem"], kept(F.relu(model.norms[0](stem)).detach(), torch.arange(6).unsqueeze(1)))


RECTIFIERS = {
    "relu": F.relu,
    "in place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "clamp": lambda x: x.clamp(min=0),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2], dtype=x.dtype)),
    "dropout": lambda x: F.relu(F.dropout(F.max_pool2d(x, 1), 0.0, training=True)),
    "scaled": lambda x: F.relu(2 * x.contiguous() / 3),
}


class Behind(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.bn, self.last, self.act = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3), act

    def forward(self, x):
        return self.last(self.act(self.bn(self.conv(x))))


@pytest.mark.parametrize("name", RECTIFIERS)
def test_every_rectifier_is_found(name):
    torch.manual_seed(0)
    model = zoo.randomise_(Behind(RECTIFIERS[name])).eval()
    images = zoo.images(4)
    with torch.no_grad():
        maps = model.bn(model.conv(images))
    close(raw(APoZ(), model, lp.trace(model, images), [images], None)["conv"], kept(maps, torch.arange(6).unsqueeze(1)))


def test_every_call_of_a_shared_layer_counts():
    model, images = zoo.build("Shared"), zoo.images(4)
    graph = lp.trace(model, images)
    found = raw(APoZ(missing="keep"), model, graph, [images], None)
    with torch.no_grad():
        x = F.relu(model.stem(images))
        once = F.relu(model.twice(x))
        again = F.relu(model.norm(model.twice(once)))
    index = torch.arange(8).unsqueeze(1)
    close(found["stem.0"], kept(x, index))
    close(found["twice"], [(a + b) / 2 for a, b in zip(kept(once, index), kept(again, index), strict=True)])


@pytest.mark.parametrize("act", [torch.tanh, lambda x: x.clamp(-1, 1), F.silu, lambda x: -x])
def test_apoz_without_a_rectifier_is_refused_with_the_layer(act):
    torch.manual_seed(0)
    model, images = Behind(act).double().eval(), zoo.images(2)
    graph = lp.trace(model, images)
    with pytest.raises(ScoreError, match=r"APoZ counts the zeros of rectifiers.*none ran behind conv$"):
        score(model, graph, APoZ(), [images])


def test_groups_without_may_be_kept():
    model, images = zoo.build("InvertedResidual"), zoo.images(4)
    graph = lp.trace(model, images)
    with pytest.raises(ScoreError, match=r"none ran behind stem.0, project.0, expand.0, depthwise.0, excite$"):
        score(model, graph, APoZ(), [images])
    scores = score(model, graph, APoZ(missing="keep"), [images])
    rest = torch.cat([scores["stem.0"], scores["expand.0"]])
    assert rest.min() > scores["squeeze"].max()
    assert rest.unique().numel() == 1
    plain = zoo.build("SigmoidConstant")
    graph = lp.trace(plain, images)
    with pytest.raises(ScoreError, match="APoZ"):  # nothing at all to rank by
        score(plain, graph, APoZ(missing="keep"), [images])


def test_apoz_does_not_depend_on_the_split_into_batches():
    model, images = zoo.build("Residual"), zoo.images(64)
    graph = lp.trace(model, images[:2])
    whole, split = (score(model, graph, APoZ(), batches) for batches in ([images], images.split(32)))
    again = score(model, graph, APoZ(), [images])
    for group in whole:
        close(split[group], whole[group])
        assert torch.equal(again[group], whole[group])


def test_apoz_stops_following_when_scoring_fails():
    model, images = zoo.build("Vgg"), zoo.images(2)
    graph = lp.trace(model, images)

    def fail(model, batch):
        model(batch)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        score(model, graph, APoZ(), [images], fail)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
