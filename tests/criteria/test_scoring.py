"""The scorer: hooks, restoration, refusals, shared and frozen modules, in-place operations, traced graphs."""

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_prune as lp
from lightning_prune.criteria import FPGM, GRE, JRE, L1, LRE
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scores import Scores
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from lightning_prune.graph import trace
from lightning_prune.graph.groups import Group, Layer
from tests import zoo
from tests.criteria.helpers import Interrupt, Task, hooks, train
from tests.graph.helpers import CASES, conv_case, graph_of, identity, linear_case, residual_case


def test_only_sites_are_differentiated():
    case = conv_case()
    arrived = []
    handle = case.model.conv2.weight.register_hook(arrived.append)
    score(case.model, case.graph, GRE(), [case.batch], case.loss)
    handle.remove()
    assert arrived == []


def test_the_trainers_own_backward_agrees_with_score():
    case = conv_case()
    with Scorer(case.model, case.graph, JRE()) as scorer:
        for batch in case.split(4):
            scorer.begin_batch()
            case.loss(case.model, batch).backward()
            scorer.end_batch()
            assert not any(watcher.edges for watcher in scorer._observer._watchers)  # they keep graphs alive
    expected = score(case.model, case.graph, JRE(), case.split(4), case.loss)
    for name, found in scorer.compute().items():
        torch.testing.assert_close(found, expected[name])


def test_watching_training_without_with_leaves_gradients_to_the_trainer():
    case = conv_case()
    scorer = Scorer(case.model, case.graph, GRE())
    scorer.end_batch()  # none open: nothing happens
    scorer.begin_batch()
    case.loss(case.model, case.batch).backward()
    scorer.end_batch()
    assert case.model.conv1.weight.grad is not None
    assert hooks(case.model) == 0
    assert scorer.compute()["conv1"].isfinite().all()


def test_a_failed_batch_is_not_counted():
    case = conv_case()
    first, second = case.split(4)

    def fail(model, batch):
        case.loss(model, batch)
        raise Interrupt

    with Scorer(case.model, case.graph, LRE()) as scorer:
        scorer.update(lambda: case.loss(case.model, first))
        with pytest.raises(Interrupt):
            scorer.update(lambda: fail(case.model, second))
    expected = score(case.model, case.graph, LRE(), [first], case.loss)
    assert torch.equal(scorer.compute()["conv1"], expected["conv1"])


def test_state_sums_can_be_reduced_over_processes():
    case = conv_case()
    parts = []
    for batch in (case.split(5)[0], case.split(5)[1]):
        with Scorer(case.model, case.graph, JRE()) as scorer:
            scorer.update(lambda batch=batch: case.loss(case.model, batch))
        parts.append(scorer)
    for key, tensor in parts[0].state.items():
        assert tensor.dtype == torch.float64
        tensor += parts[1].state[key]
    whole = score(case.model, case.graph, JRE(), [case.batch], case.loss)
    for name, found in parts[0].compute().items():
        torch.testing.assert_close(found, whole[name])


def test_forward_criteria_run_under_no_grad_without_a_loss():
    case = conv_case()
    enabled = []
    handle = case.model.fc.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    by_model = score(case.model, case.graph, LRE(), [case.images])
    handle.remove()
    assert enabled == [False]
    by_keyword = score(case.model, case.graph, LRE(), [{"x": case.images}])
    by_loss = score(case.model, case.graph, LRE(), [case.batch], case.loss)
    for name in by_model:
        assert torch.equal(by_model[name], by_loss[name])
        assert torch.equal(by_model[name], by_keyword[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_scoring_works_where_gradients_are_off(context):
    case = conv_case()
    with context():
        inside = score(case.model, case.graph, GRE(), [case.batch], case.loss)
    outside = score(case.model, case.graph, GRE(), [case.batch], case.loss)
    assert torch.equal(inside["conv1"], outside["conv1"])


class InPlace(nn.Module):
    """bn -> in-place op -> reader; the plain twin computes the same out of place."""

    def __init__(self, inplace):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.inplace = inplace

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.inplace:
            x += x.detach()
            x.relu_()
        else:
            x = (x + x.detach()).relu()
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("site", ["bn", "conv"])
def test_in_place_operations_change_neither_value_nor_gradient(site, frozen):
    torch.manual_seed(0)
    plain, inplace = InPlace(False).double(), InPlace(True).double()
    inplace.load_state_dict(plain.state_dict())
    graph = graph_of(Group("conv", 4, (Layer("conv", "conv.weight", 0, 4, identity(4), "bn"),), ()))
    images, labels = torch.randn(6, 3, 5, 5).double(), torch.randint(5, (6,))
    found = []
    for model in (plain, inplace):
        if frozen and model is inplace:
            model.requires_grad_(False)
        loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
        found.append(score(model, graph, GRE(site=site, scope="network"), [(images, labels)], loss)["conv"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("site", ["bn", "conv", "activation"])
@pytest.mark.parametrize("name", CASES)
def test_frozen_parameters_score_as_trainable_ones(name, site):
    case = CASES[name]()
    expected = score(case.model, case.graph, JRE(site=site), [case.batch], case.loss)
    case.model.requires_grad_(False)
    frozen = score(case.model, case.graph, JRE(site=site), [case.batch], case.loss)
    for group in expected:
        torch.testing.assert_close(frozen[group], expected[group])
    assert not any(parameter.requires_grad for parameter in case.model.parameters())


def test_a_layer_called_twice_sums_its_calls_before_the_absolute_value():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.head(self.conv(x)).mean((1, 2, 3)) - self.head(self.conv(2 * x)).mean((1, 2, 3))

    torch.manual_seed(0)
    model = Shared().double()
    images = torch.randn(5, 3, 2, 2).double()
    graph = graph_of(Group("conv", 4, (Layer("conv", "conv.weight", 0, 4, identity(4)),), ()))
    with Scorer(model, graph, JRE(magnitude="abs")) as scorer:
        scorer.update(lambda: model(images).mean())
    maps = model.conv(images).detach()
    weight = model.head.weight.view(1, 4, 1, 1).detach()
    # d/dz of the first call is w/4 per position, of the second -w/4, and its map is twice as large
    expected = (weight * (maps - 2 * maps) / 4).sum((2, 3)).abs().sum(0)
    torch.testing.assert_close(scorer.state["conv/conv/global/sum"], expected)
    torch.testing.assert_close(scorer.state["conv/conv/local/sum"], 5 * maps.square().sum((0, 2, 3)))
    assert scorer.state["conv/conv/global/count"] == 5


@pytest.mark.parametrize("by_trainer", [False, True])
def test_activation_checkpointing_counts_once(by_trainer):
    case = conv_case()
    sums = []
    for run in (lambda x: case.model(x), lambda x: checkpoint(case.model, x, use_reentrant=False)):
        with Scorer(case.model, case.graph, JRE()) as scorer:
            if by_trainer:
                scorer.begin_batch()
                F.cross_entropy(run(case.images), case.labels).backward()
                scorer.end_batch()
            else:
                scorer.update(lambda run=run: F.cross_entropy(run(case.images), case.labels))
        sums.append(scorer.state)
    for key in sums[0]:
        torch.testing.assert_close(sums[1][key], sums[0][key])


def test_half_precision_is_summed_in_float32():
    case = linear_case()
    model = case.model.to(torch.bfloat16)
    scores = score(model, case.graph, JRE(), [(case.images.bfloat16(), case.labels)], case.loss)
    assert all(values.dtype == torch.float64 and values.isfinite().all() for values in scores.values())
    layer = case.graph.groups[0].layers[0]
    with Scorer(model, case.graph, LRE()) as scorer:
        scorer.update(lambda: model(case.images.bfloat16()))
    z = model.fc1(case.images.bfloat16().flatten(2).transpose(1, 2)).detach()
    expected = z.double().square().sum((0, 1))
    torch.testing.assert_close(scorer.state[f"fc1/{layer.name}/local/sum"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_traced_graphs_score_as_hand_written_ones(name):
    case = CASES[name]()
    graph = trace(case.model, case.images)
    for criterion in (L1(), FPGM(), JRE(), JRE(site="activation")):
        expected = score(case.model, case.graph, criterion, [case.batch], case.loss)
        found = score(case.model, graph, criterion, [case.batch], case.loss)
        layers = {layer: values for group in found.layers.values() for layer, values in group.items()}
        for members in expected.layers.values():
            for layer, values in members.items():
                torch.testing.assert_close(layers[layer], values)


def test_scores_survive_a_round_trip():
    case = residual_case()
    scores = score(case.model, case.graph, L1())
    again = Scores.from_dict(scores.to_dict())
    assert again.keys() == scores.keys()
    assert {group: list(of) for group, of in again.layers.items()} == {
        "stem": ["stem", "conv2"],
        "conv1": ["conv1"],
    }
    assert torch.equal(again["stem"], scores["stem"])
    with pytest.raises(ScoreError, match="not scores"):
        Scores.from_dict({"conv1": 1})


def test_the_dense_model_sees_the_same_randomness():
    case = conv_case()
    dense = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    drawn = []

    def loss(model, batch):
        drawn.append(torch.rand(3).tolist())
        return case.loss(model, batch)

    score(case.model, case.graph, JRE(reference="baseline"), case.split(4), loss, baseline=dense)
    assert len(drawn) == 4
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


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
