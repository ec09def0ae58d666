"""ThiNet against next layers run again and sets tried one by one; its draw, its memory, its refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria import ThiNet, channel_contributions
from lightning_prune.criteria.observe.reader_outputs import SampledOutputWatcher
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scoring import score
from lightning_prune.criteria.thinet import removal_places
from lightning_prune.errors import ScoreError
from lightning_prune.graph.readers import readers_of
from tests import zoo
from tests.criteria.helpers import READ, case, close, loss, members, raw
from tests.criteria.test_next_layer import Doubled, Largest
from tests.reference import thinet as reference


def rows_of(model, group, images):
    """All rows of all readers of a group, (rows, channels)."""
    found = [
        each
        for path, reader in readers_of(model, group).items()
        for each in reference.effects(model, path, images, reader.index)
    ]
    return torch.cat([each.flatten(0, 1) for each in found])


@pytest.mark.parametrize("name", [*READ, "Shared"])
def test_order_and_products_match_trying_every_set(name):
    model, graph, images, _ = case(name, batch=2)
    with Scorer(model, graph, ThiNet(rows=None)) as scorer:
        scorer.update(lambda: model(images))
    found = scorer.compute().layers
    for group in graph.prunable_groups:
        rows = rows_of(model, group, images)
        key = f"{group.name}/{group.layers[0].name}/gram"
        close(scorer.state[f"{key}/sum"], rows.T @ rows, atol=1e-11)
        assert scorer.state[f"{key}/count"] == len(rows)
        expected = reference.places(rows.tolist())
        for layer in group.layers:
            assert found[group.name][layer.name].tolist() == pytest.approx(expected), (group.name, layer.name)


@pytest.mark.parametrize("name", [*READ, "Shared"])
def test_a_draw_is_rows_of_the_reference(name, monkeypatch):
    model, graph, images, _ = case(name)
    drawn = {}
    original = SampledOutputWatcher._draw

    def draw(self, key, tap, path, call, shape):
        drawn[key, path, call] = original(self, key, tap, path, call, shape)
        return drawn[key, path, call]

    monkeypatch.setattr(SampledOutputWatcher, "_draw", draw)
    with Scorer(model, graph, ThiNet(rows=7, seed=3)) as scorer:
        scorer.update(lambda: model(images))
    for group in graph.prunable_groups:
        key, rows = f"{group.name}/{group.layers[0].name}/gram", []
        for path, reader in readers_of(model, group).items():
            for call, each in enumerate(reference.effects(model, path, images, reader.index)):
                chosen = drawn[key, path, call]
                assert chosen.shape == (4, 7)
                assert each.shape[1] < 8 or len(chosen.unique()) > 4  # not one output again and again
                rows += [each[n, output] for n in range(4) for output in chosen[n].tolist()]
        rows = torch.stack(rows)
        close(scorer.state[f"{key}/sum"], rows.T @ rows, atol=1e-11)


def gram(model, graph, batches, **options):
    with Scorer(model, graph, ThiNet(**options)) as scorer:
        for images in batches:
            scorer.update(lambda images=images: model(images))
    return scorer


@pytest.mark.parametrize("name", ["Vgg", "Residual", "Grouped", "Shared"])
def test_the_draw_depends_on_the_seed_alone_and_not_on_the_split(name):
    model, graph, *_ = case(name)
    images = zoo.images(8)
    whole = gram(model, graph, [images])
    torch.rand(5)  # the global random state plays no part
    for sizes in ([4, 4], [1, 2, 5], [8]):
        parts = gram(model, graph, images.split(sizes))
        for key, value in whole.state.items():
            close(parts.state[key], value, atol=1e-12)
        for group, values in whole.compute().items():
            assert torch.equal(parts.compute()[group], values)
    assert not torch.equal(*(gram(model, graph, [images], seed=s).state[next(iter(whole.state))] for s in (0, 1)))


def test_sums_of_several_processes_add_up():
    model, graph, images, _labels = case("Residual")
    halves = [gram(model, graph, [part], rows=None) for part in images.split(2)]
    for key, value in halves[0].state.items():
        value += halves[1].state[key]
    for group, values in gram(model, graph, [images], rows=None).compute().items():
        assert torch.equal(halves[0].compute()[group], values)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(6, 4, (1, 3), padding="same", dilation=2),
        nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", groups=2),
        nn.Conv2d(6, 6, 3, groups=3, padding=1),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        nn.Linear(6, 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("fan", [1, 2])
def test_sampled_contributions_are_the_change_without_the_channel(layer, fan, monkeypatch):
    monkeypatch.setattr(channel_contributions, "_ELEMENTS", 100)  # several parts
    layer, x = layer.double(), torch.randn(2, 6, 7, 8, dtype=torch.float64)
    if isinstance(layer, nn.Linear):
        x = x.movedim(1, -1)
    size = 6 if isinstance(layer, nn.ConvTranspose2d) else layer.weight.shape[1]
    index = torch.randperm(size)[: size // fan * fan].view(-1, fan)
    output = layer(x)
    chosen = torch.randint(output[0].numel(), (2, 9))
    parts = list(channel_contributions.sampled_contributions(layer, x, index, output.shape, chosen))
    (expected,) = reference.effects(layer, "", x, index)
    close(torch.cat(parts), torch.cat([expected[n, chosen[n]] for n in range(2)]), atol=1e-12)


@pytest.mark.parametrize("dims", [1, 3])
def test_sampled_contributions_in_other_dimensions(dims):
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    layer, x = kind(4, 3, 3, stride=2, padding=1).double(), torch.randn(2, 4, *[5, 6, 7][:dims], dtype=torch.float64)
    index, output = torch.arange(4).unsqueeze(1), layer(x)
    chosen = torch.arange(output[0].numel()).expand(2, -1)
    found = torch.cat(list(channel_contributions.sampled_contributions(layer, x, index, output.shape, chosen)))
    close(found, reference.effects(layer, "", x, index)[0].flatten(0, 1), atol=1e-12)


def test_channels_that_cancel_go_together():
    """Two channels that add +a and -a cost nothing as a pair, though each alone costs most."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1)).double()
    model[0].weight.data = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).double()
    model[1].weight.data = torch.tensor([[2.0, -2.0, 1.0, 2.5]]).double()
    inputs = torch.tensor([[1.0, 0], [0, 2.0]]).double()
    scores = score(model, lp.trace(model, inputs), ThiNet(rows=None), [inputs])["0"]
    # costs alone 4, 4, 4, 25: first 0 by number, then 1 makes up for it
    assert scores.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_places_of_ties_of_one_channel_and_of_what_is_not_finite():
    assert removal_places(torch.zeros(3, 3)).tolist() == [0, 0.5, 1]
    assert removal_places(torch.ones(1, 1)).tolist() == [0]
    assert removal_places(torch.full((2, 2), torch.inf)).isnan().all()


def test_a_thousand_channels_take_no_loop_over_candidates():
    rows = torch.randn(300, 1000, dtype=torch.float64)
    places = removal_places(rows.T @ rows)
    order = (places * 999).round().long().argsort()
    assert torch.equal(order.sort().values, torch.arange(1000))
    sums = torch.zeros(300, dtype=torch.float64)
    for step in range(20):
        left = order[step:]
        costs = (sums[:, None] + rows[:, left]).square().sum(0)
        assert costs.argmin() == 0  # none that is left would have been cheaper
        sums += rows[:, order[step]]


def test_pruned_channels_go_first():
    model, graph, images, _labels = case("Residual")
    plan = lp.LayerRatio(0.5).select(graph, score(model, graph, "l1"))
    with lp.mask_(model, graph, plan):
        again = lp.LayerRatio(0.5).select(graph, score(model, graph, ThiNet(), [images]))
    assert {name: group.keep for name, group in again.groups.items()} == {
        name: group.keep for name, group in plan.groups.items()
    }


def test_memory_does_not_grow_with_the_output():
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    images = torch.randn(2, 3, 32, 32)
    graph = lp.trace(model, images)
    with Largest() as plain, torch.no_grad():
        model(images)
    with Largest() as seen:
        score(model, graph, ThiNet(), [images])
    assert seen.numel <= 1.2 * plain.numel  # the padded copy of one layer's input


def test_it_needs_no_loss_and_leaves_the_model_alone():
    model, graph, images, labels = case("Vgg")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = score(model, graph, "thinet", [images])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not ThiNet().needs_backward
    with pytest.raises(ScoreError, match="taylor_fo, thinet"):
        score(model, graph, "thin")
    with_loss = score(model, graph, "thinet", [(images, labels)], loss)
    assert all(torch.equal(with_loss[name], scores[name]) for name in scores)


def test_it_prunes_by_name():
    model, _, images, _ = case("Grouped")
    result = lp.prune(model, images, criterion="thinet", ratio=0.5, batches=[images])
    assert result.lossless.passed
    assert result.after.params < 0.5 * result.before.params


def test_all_layers_of_a_group_score_alike():
    model, graph, images, labels = case("Residual")
    found = raw(ThiNet(), model, graph, [(images, labels)])
    for group, layer in members(graph):
        assert torch.equal(found[layer.name], found[group.layers[0].name])


def test_what_cannot_be_computed_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 5)).double()
    images = zoo.images(2)
    with pytest.raises(ScoreError, match="1: a Doubled with a forward of its own"):
        score(model, lp.trace(model, images), ThiNet(), [images])
    model[1] = nn.Conv2d(4, 5, 3).double()
    graph = lp.trace(model, images)
    model[0].bias.data[0] = torch.nan
    with pytest.raises(ScoreError, match=r"0: 4 of 4 scores are NaN"):
        score(model, graph, ThiNet(), [images])
    with pytest.raises(ScoreError, match="needs data"):
        score(model, graph, ThiNet())


def test_a_layer_that_never_runs_is_refused_by_name():
    model, graph, images, _labels = case("Vgg")
    with pytest.raises(ScoreError, match=r"features\.3\.0: never called while scoring"):
        score(model, graph, ThiNet(), [images], lambda model, x: model.features(x))


def test_an_input_without_batch_dimension_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    graph = lp.trace(model, torch.randn(2, 3))
    with pytest.raises(ScoreError, match=r"1: its input has shape \[4\]; a batch dimension is needed"):
        score(model, graph, ThiNet(), [torch.randn(3)])


def test_half_precision_scores_in_float32():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    inputs = torch.randn(16, 6).bfloat16()
    graph = lp.trace(model, inputs)
    found = score(model, graph, ThiNet(rows=None), [inputs])["0"]
    hidden = F.relu(model[0](inputs)).double()
    rows = (hidden[:, None] * model[2].weight.double()).flatten(0, 1)
    assert found.tolist() == pytest.approx(reference.places(rows.tolist()))
