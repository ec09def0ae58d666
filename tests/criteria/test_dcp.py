"""Reduced DCP against gradients of a loss written out with scikit-learn's heads; its labels, passes and refusals."""

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.criteria import DCP
from lightning_prune.criteria.observe.auxiliary_classifiers import Moments
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import CallbackError, ScoreError
from lightning_prune.graph.readers import readers_of
from tests import zoo
from tests.criteria.helpers import READ, assert_same, case, close, loss, members, raw, snapshot
from tests.reference import dcp as reference


def heads_of(model, graph, images, labels, **options):
    scorer = Scorer(model, graph, DCP(**options))
    scorer.fit(lambda: loss(model, (images, labels)))
    return list(scorer._classifiers.moments)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("name", [*READ, "Shared"])
def test_scores_are_the_norms_of_the_gradient_of_the_joint_loss(name, heads):
    model, graph, images, labels = case(name, batch=15)
    found = raw(DCP(heads=heads, weight=0.7, normalize="none"), model, graph, [(images, labels)])
    sites = heads_of(model, graph, images, labels, heads=heads) if heads else []
    assert len(sites) == heads
    total = reference.joint_loss(model, sites, images, labels, 0.7)
    for group, layer in members(graph):
        readers = list(readers_of(model, group).values())
        gradients = torch.autograd.grad(total, [model.get_parameter(r.weight) for r in readers], retain_graph=True)
        expected = reference.norms([(g, r.dim, r.index) for g, r in zip(gradients, readers, strict=True)])
        close(found[layer.name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["Vgg", "Residual", "Grouped"])
def test_equal_batches_may_be_split_in_any_way(name):
    model, graph, images, labels = case(name, batch=20)
    whole = score(model, graph, DCP(), [(images, labels)], loss)
    split = list(zip(images.split(5), labels.split(5), strict=True))
    for group, values in score(model, graph, DCP(), split, loss).items():
        close(values, whole[group], rtol=1e-8)
    first = next(iter(whole))
    assert not torch.allclose(score(model, graph, DCP(heads=0), split, loss)[first], whole[first])


def test_discriminants_are_those_of_scikit_learn():
    features, labels = torch.randn(40, 6).double(), torch.arange(40) % 4
    features += torch.randn(4, 6).double()[labels]
    moments = Moments()
    for part, of in zip(features.split(7), labels.split(7), strict=True):
        moments.add(part, F.one_hot(of, 4))
    expected = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(features.numpy(), labels.numpy())
    others = torch.randn(9, 6).double()
    logits = torch.tensor(expected.decision_function(others.numpy()))
    close(moments.classifier()(others).log_softmax(1), logits.log_softmax(1), rtol=1e-8)


def test_a_class_without_samples_and_features_without_spread_do_no_harm():
    moments = Moments()
    moments.add(torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]]), torch.eye(3)[[0, 0, 1]])
    logits = moments.classifier()(torch.tensor([[1.5, 0.0], [4.0, 0.0]]))
    assert logits.argmax(1).tolist() == [0, 1]
    assert logits.softmax(1)[:, 2].max() < 1e-6
    moments = Moments()
    moments.add(torch.ones(4, 2), torch.eye(2)[[0, 0, 0, 1]])
    close(moments.classifier()(torch.ones(1, 2)).softmax(1).double(), [[0.75, 0.25]], rtol=1e-6)


def test_heads_are_spread_over_the_layers_in_the_order_they_run():
    model, graph, images, labels = case("Residual", batch=10)
    # stem, a1, a2, b1, b2, down in that order
    assert heads_of(model, graph, images, labels, heads=2) == ["a2.1", "b2.1"]
    assert heads_of(model, graph, images, labels, heads=1) == ["b1.1"]
    assert len(heads_of(model, graph, images, labels, heads=99)) == 6


def test_labels_come_from_the_loss_in_all_its_forms():
    model, graph, images, labels = case("Vgg", batch=10)
    expected = score(model, graph, DCP(), [(images, labels)], loss)
    module = nn.CrossEntropyLoss()
    forms = [
        lambda model, batch: module(model(batch[0]), batch[1]),
        lambda model, batch: F.cross_entropy(target=batch[1], input=model(batch[0])),
        lambda model, batch: F.cross_entropy(model(batch[0]), F.one_hot(batch[1], 5).double()),
    ]
    for form in forms:
        for group, values in score(model, graph, DCP(), [(images, labels)], form).items():
            close(values, expected[group], rtol=1e-8)


def test_ignored_labels_do_not_count():
    model, graph, images, labels = case("Vgg", batch=10)
    ignored = labels.clone()
    ignored[:5] = -100
    heads = []
    for part, target in ((images, ignored), (images[5:], labels[5:])):
        scorer = Scorer(model, graph, DCP(heads=1))
        scorer.fit(lambda part=part, target=target: loss(model, (part, target)))
        heads += scorer._classifiers.moments.values()
    features = torch.randn(9, len(heads[0].origin)).double()
    first, second = (moments.classifier()(features) for moments in heads)
    close(first, second)


def test_the_model_is_left_alone():
    model, graph, images, labels = case("Residual", batch=10)
    model.train()
    loss(model, (images, labels)).backward()
    before = snapshot(model)
    score(model, graph, "dcp", [(images, labels)], loss)
    assert_same(before, snapshot(model))


def test_frozen_weights_score_alike():
    model, graph, images, labels = case("Residual", batch=10)
    expected = score(model, graph, DCP(), [(images, labels)], loss)
    model.requires_grad_(False)
    for group, values in score(model, graph, DCP(), [(images, labels)], loss).items():
        assert torch.equal(values, expected[group])


def test_pruned_channels_score_lowest():
    model, graph, images, labels = case("Residual", batch=10)
    plan = lp.LayerRatio(0.5).select(graph, score(model, graph, "l1"))
    with lp.mask_(model, graph, plan):
        scores = score(model, graph, DCP(), [(images, labels)], loss)
    for name, group in plan.groups.items():
        assert scores[name][list(group.removed)].max() == 0


def test_it_prunes_by_name():
    model, _, images, labels = case("Grouped", batch=10)
    result = lp.prune(model, images, criterion="dcp", ratio=0.5, batches=[(images, labels)], loss=loss)
    assert result.lossless.passed
    assert result.after.params < 0.6 * result.before.params


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = zoo.build("Residual").float()
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_callback_makes_both_passes(tmp_path):
    task = Task()
    images, labels = zoo.images(20).float(), torch.arange(20) % 5
    graph = lp.trace(task, images)
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    expected = score(task, graph, DCP(), batches, lambda model, batch: model.training_step(batch, 0))
    callback = lp.ScoringCallback("dcp")
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    trainer.fit(task.train(), DataLoader(TensorDataset(images, labels), batch_size=10))
    for group, values in expected.items():
        close(callback.scores[group], values, rtol=1e-6, atol=1e-9)
    with pytest.raises(CallbackError, match="auxiliary heads in a pass of its own"):
        lp.ScoringCallback(DCP(), update_weights=True)
    lp.ScoringCallback(DCP(heads=0), update_weights=True)


def test_what_is_missing_is_refused_by_name():
    model, graph, images, labels = case("Vgg", batch=10)
    batches = [(images, labels)]
    with pytest.raises(ScoreError, match=r"need labels, but no torch\.nn\.functional\.cross_entropy .* DCP\(heads=0\)"):
        score(model, graph, DCP(), batches, lambda model, batch: model(batch[0]).square().mean())
    assert score(model, graph, DCP(heads=0), batches, lambda model, batch: model(batch[0]).square().mean())
    with pytest.raises(ScoreError, match="needs data, several times, but batches was empty"):
        score(model, graph, DCP(), iter(batches), loss)
    with pytest.raises(ScoreError, match="needs gradients: pass loss"):
        score(model, graph, DCP(), batches)
    scorer = Scorer(model, graph, DCP())
    with pytest.raises(ScoreError, match="have to be fitted first"):
        scorer.update(lambda: loss(model, batches[0]))
    with pytest.raises(ScoreError, match="pass of their own"):
        scorer.begin_batch()
    with pytest.raises(ScoreError, match="has no auxiliary classifiers"):
        Scorer(model, graph, DCP(heads=0)).fit(lambda: None)
    with pytest.raises(ScoreError, match="sees 10 samples where the loss has 5"):
        score(model, graph, DCP(), batches, lambda model, batch: F.cross_entropy(model(batch[0])[:5], batch[1][:5]))
    with pytest.raises(ScoreError, match="must be a scalar tensor"):
        score(model, graph, DCP(), batches, lambda model, batch: (loss(model, batch), model(batch[0]))[1])
    with pytest.raises(ScoreError, match=r"features\.3\.1: what it puts out is NaN"):
        score(model, graph, DCP(), [(images * torch.nan, labels)], loss)
    assert not any(module._forward_hooks for module in model.modules())
