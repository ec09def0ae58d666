"""APoZ and batch-norm scales against loops; finding the rectifier; what is refused; the sparsity penalty."""

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.criteria import FPGM, L1, L2, APoZ, BNScale, Member, functional
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from lightning_prune.graph.groups import Layer
from tests import zoo
from tests.criteria.helpers import assert_same, snapshot
from tests.reference import criteria as slow
from tests.reference import taylor as reference


def raw(criterion, model, graph, batches=None):
    found = score(model, graph, criterion, batches).layers
    return {name: scores for of in found.values() for name, scores in of.items()}


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def kept(maps, index, eps=0.0, last=False):
    return [1 - reference.zeros(maps, filters, eps, last) for filters in index.tolist()]


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_apoz_of_convolutions_in_front_of_pooling_and_of_linear_layers(eps):
    model = zoo.build("Vgg")
    images = zoo.images(6)
    graph = lp.trace(model, images)
    before = snapshot(model)
    found = raw(APoZ(eps=eps), model, graph, [images])
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
    found = raw(APoZ(), model, lp.trace(model, images), [images])
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
    found = raw(APoZ(), model, graph, [images])
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
    found = raw(APoZ(), model, lp.trace(model, images), [images])
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
    close(raw(APoZ(), model, lp.trace(model, images), [images])["conv"], kept(maps, torch.arange(6).unsqueeze(1)))


def test_every_call_of_a_shared_layer_counts():
    model, images = zoo.build("Shared"), zoo.images(4)
    graph = lp.trace(model, images)
    found = raw(APoZ(missing="keep"), model, graph, [images])
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


def test_short_names_and_settings():
    assert lp.criteria.criterion_from("bn_scale") == BNScale()
    assert lp.criteria.criterion_from("apoz") == APoZ()
    for build, word in ((lambda: BNScale(missing="skip"), "'skip'"), (lambda: APoZ(eps=-1), "eps")):
        with pytest.raises(ScoreError, match=word):
            build()


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


class Task(LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.net = zoo.build("Residual").train()
        self.automatic_optimization = not manual

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        halves = [[], []]
        for number, parameter in enumerate(self.parameters()):
            halves[number % 2].append(parameter)
        return [torch.optim.SGD(half, lr=0.1) for half in halves]


def train(task, callbacks, **settings):
    data = DataLoader(TensorDataset(zoo.images(8), torch.arange(8) % 5), batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet, **settings).fit(task, data)
    return {name: parameter.detach().clone() for name, parameter in task.net.named_parameters()}


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


@pytest.mark.parametrize(
    "criterion",
    [
        *("apoz", "taylor", "taylor_fo", "next_layer_taylor"),
        *(lp.criteria.TaylorFO(form="weight"), lp.criteria.NextLayerTaylor(form="weight")),
    ],
)
def test_scoring_while_the_model_trains_leaves_training_as_it_is(criterion):
    settings = {"ratio": 0.5, "update_weights": True, "example_inputs": zoo.images()}
    prune = lp.PruneCallback(criterion, reconstruct="never", **settings)
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.update({name: parameter.detach().clone() for name, parameter in pl_module.net.named_parameters()})

    train(Task(), [Look(), prune])
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    for name, parameter in train(Task(), []).items():
        torch.testing.assert_close(seen[name], parameter, rtol=1e-10, atol=1e-12)
    assert {group: len(scores) for group, scores in prune.scoring.scores.items()} == {
        "net.stem.0": 8,
        "net.a1.0": 8,
        "net.b1.0": 12,
        "net.b2.0": 12,
    }
    assert all(scores.isfinite().all() for scores in prune.scoring.scores.values())


def member(weight):
    return Member("g", Layer("l", "l.weight", 0, len(weight), torch.arange(len(weight)).unsqueeze(1)), weight)


@pytest.mark.parametrize(("criterion", "p"), [(L1, 1), (L2, 2)])
def test_lamp_and_l2_normalisers_match_loops(criterion, p):
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    weight[4] = weight[2]  # a tie
    norms = slow.norm(weight, 0, torch.arange(7).unsqueeze(1), p)
    (found,) = criterion(normalize="lamp").scores([member(weight)])
    close(found, reference.lamp(norms))
    assert found.max() == 1
    (found,) = criterion(normalize="l2").scores([member(weight)])
    close(found, [v / sum(w * w for w in norms) ** 0.5 for v in norms])
    for how in ("lamp", "l2", "mean", "max"):
        assert functional.normalize(torch.zeros(3), how).tolist() == [0, 0, 0]


def test_mixed_fpgm_drops_by_norm_first_and_then_by_distance_among_the_survivors():
    torch.manual_seed(0)
    weight = torch.randn(10, 6, dtype=torch.float64)
    weight[3] = 0
    (found,) = FPGM(norm_share=0.3, normalize="none").scores([member(weight)])
    norms = slow.norm(weight, 0, torch.arange(10).unsqueeze(1), 2)
    first, second, third = sorted(range(10), key=norms.__getitem__)[:3]
    assert first == 3
    assert found[3] == -1
    assert -1 < found[second] < found[third] < 0
    others = [i for i in range(10) if i not in (first, second, third)]
    close(found[others], slow.geometric_median(weight[others], 0, torch.arange(7).unsqueeze(1), "l2"))
    (scaled,) = FPGM(norm_share=0.3).scores([member(weight)])
    assert torch.equal(scaled.argsort(), found.argsort())
    with pytest.raises(ScoreError, match="norm_share"):
        FPGM(norm_share=1.0)
