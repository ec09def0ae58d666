"""Next-layer Taylor against reruns without each channel, loops, Molchanov's identity; its memory and refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_prune as lp
from lightning_prune.criteria import NextLayerTaylor
from lightning_prune.criteria.channel_contributions import channel_contributions, next_layers
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from lightning_prune.graph.groups import Group
from lightning_prune.graph.readers import readers_of
from tests import zoo
from tests.criteria.helpers import READ, case, close, loss, members, raw
from tests.reference import taylor as reference


@pytest.mark.parametrize("magnitude", ["abs", "square", "signed"])
@pytest.mark.parametrize("name", READ)
def test_next_output_matches_reruns_without_each_channel(name, magnitude):
    model, graph, images, labels = case(name)
    found = raw(NextLayerTaylor(magnitude=magnitude, normalize="none", chunk=3), model, graph, [(images, labels)])
    for group, layer in members(graph):
        readers = readers_of(model, group)
        assert readers
        total = torch.zeros(group.size, dtype=torch.float64)
        for path, reader in readers.items():
            total += torch.tensor(
                reference.next_output(model, path, images, labels, reader.index, magnitude), dtype=torch.float64
            )
        output = reference.captured(model, [layer.name], images, labels)[layer.name]["output"]
        positions = output[0].numel() // layer.filters
        close(found[layer.name], total / positions, atol=1e-12)


@pytest.mark.parametrize("magnitude", ["abs", "square", "signed"])
@pytest.mark.parametrize("name", READ)
def test_next_weight_matches_loops(name, magnitude):
    model, graph, images, labels = case(name)
    criterion = NextLayerTaylor(form="weight", magnitude=magnitude, normalize="none")
    found = raw(criterion, model, graph, [(images, labels)])
    for group, layer in members(graph):
        total = torch.zeros(group.size, dtype=torch.float64)
        for reader in readers_of(model, group).values():
            expected = reference.next_weight(model, reader.weight, reader.dim, images, labels, reader.index, magnitude)
            total += torch.tensor(expected, dtype=torch.float64)
        close(found[layer.name], total, atol=1e-12)


def test_next_layers_are_those_that_mix_the_channels():
    expected = {
        ("Residual", "stem.0"): {"a1.0", "b1.0", "down.0"},
        ("Branches", "a.0"): {"mix.0"},
        ("InvertedResidual", "expand.0"): {"squeeze", "project.0"},  # not the depthwise convolution
        ("Dense", "convs.0"): {"convs.1", "convs.2", "head.fc"},
        ("Auxiliary", "a.0"): {"b.0", "aux"},
    }
    for (name, group), readers in expected.items():
        model, graph, *_ = case(name)
        assert set(readers_of(model, graph.group(group))) == readers


def test_a_next_layer_that_does_not_run_adds_nothing():
    model, graph, images, labels = case("Auxiliary")
    found = raw(NextLayerTaylor(normalize="none"), model, graph, [(images, labels)])["a.0"]
    reader = readers_of(model, graph.group("a.0"))["b.0"]
    expected = reference.next_output(model, "b.0", images, labels, reader.index, "abs")
    close(found, [value / 64 for value in expected])


@pytest.mark.parametrize("name", ["Plain", "Vgg", "Grouped", "Branches", "InvertedResidual"])
def test_signed_forms_are_molchanovs_at_the_next_layers_input(name):
    """sum g_w w over W_next[:, c] = sum g_z dz_c = sum g_a a_c, to 1e-12 in float64."""
    model, graph, images, labels = case(name)
    by_output = raw(NextLayerTaylor(magnitude="signed", normalize="none"), model, graph, [(images, labels)])
    by_weight = raw(
        NextLayerTaylor(form="weight", magnitude="signed", normalize="none"), model, graph, [(images, labels)]
    )
    checked = 0
    for group, layer in members(graph):
        readers = readers_of(model, group)
        output = reference.captured(model, [layer.name], images, labels)[layer.name]["output"]
        close(by_output[layer.name] * (output[0].numel() // layer.filters), by_weight[layer.name], 1e-12, 1e-12)
        if len(readers) > 1 or layer.reader not in readers:
            continue
        # The only reader: the gradient by its input is all there is. Not where others read the same tensor.
        with Scorer(model, graph, lp.criteria.GRE(site="activation", magnitude="signed", reduce="dataset")) as scorer:
            scorer.update(lambda: loss(model, (images, labels)))
        key = f"{group.name}/{layer.name}/global"
        molchanov = scorer.state[f"{key}/sum"] / scorer.state[f"{key}/count"]
        if not (name == "Grouped" and layer.name in ("stem.0", "c.0")):  # also read by an addition
            close(by_weight[layer.name], molchanov, 1e-12, 1e-12)
            checked += 1
    assert checked


class Largest(TorchDispatchMode):
    """The most elements that the memory behind any tensor made inside has room for; views take none."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in leaves]
        self.numel = max([self.numel, *sizes])
        return out


def test_memory_of_the_output_form_is_bounded_by_the_chunk():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU())
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(16 * 64, 5)).double()
    images, labels = zoo.images(4), torch.arange(4)
    graph = lp.trace(model, images)
    largest, scores = {}, {}
    for chunk in (1, 4, 8, 32):
        with Largest() as seen:
            scores[chunk] = score(model, graph, NextLayerTaylor(chunk=chunk), [(images, labels)], loss)
        largest[chunk] = seen.numel
    output = 4 * 16 * 64  # of the second convolution
    own = 4 * 32 * 64  # the largest tensor of the model itself
    for chunk, numel in largest.items():
        assert numel == max(own, chunk * output)
    for chunk in (4, 8, 32):
        for group in scores[1]:
            close(scores[chunk][group], scores[1][group])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(6, 4, 3, padding="same", dilation=2),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(6, 4, 3, groups=2, dilation=2),
        nn.Linear(6, 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("fan", [1, 2])
def test_channel_contributions_are_the_change_without_the_channel(layer, fan):
    torch.manual_seed(0)
    layer, x = layer.double(), torch.randn(2, 6, 7, 7, dtype=torch.float64)
    dim = 1
    if isinstance(layer, nn.Linear):
        x, dim = x[..., 0].transpose(1, 2).contiguous(), -1
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    size = 6 if transposed else layer.weight.shape[1]
    if transposed and groups == 2:
        index = torch.tensor([[0, 3], [4, 1]]) if fan == 1 else torch.tensor([[0, 1, 3, 5]])
    else:
        index = torch.randperm(size)[: size // fan * fan].view(-1, fan)
    output = layer(x)
    found = channel_contributions(layer, x, index, output.shape)
    for row, entries in enumerate(index.tolist()):
        chosen = entries if transposed else reference.inputs_of(layer, entries)
        without = x.clone()
        without.index_fill_(dim, torch.tensor(chosen), 0)
        close(found[:, row], (output - layer(without)).flatten(1).detach(), atol=1e-12)


@pytest.mark.parametrize("index", [[[0], [1]], [[0, 1]]])
def test_channels_of_one_transposed_group_only_are_refused(index):
    layer = nn.ConvTranspose2d(4, 4, 2, groups=2)
    with pytest.raises(ScoreError, match="only some groups of a transposed"):
        channel_contributions(layer, torch.zeros(1, 4, 2, 2), torch.tensor(index), torch.Size([1, 4, 3, 3]))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias)


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def test_a_next_layer_with_a_forward_of_its_own_is_refused_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 5)).double()
    images, labels = zoo.images(2), torch.arange(2)
    graph = lp.trace(model, images)
    with pytest.raises(ScoreError, match=r"1: a Doubled with a forward of its own.*form='weight'"):
        score(model, graph, NextLayerTaylor(), [(images, labels)], loss)
    assert score(model, graph, NextLayerTaylor(form="weight"), [(images, labels)], loss)["0"].isfinite().all()


def test_a_next_layer_with_a_parametrised_weight_is_refused_by_name():
    torch.manual_seed(0)
    last = nn.Conv2d(4, 5, 3)
    nn.utils.parametrize.register_parametrization(last, "weight", Positive())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), last, nn.Flatten(), nn.Linear(5 * 16, 5)).double()
    images, labels = zoo.images(2), torch.arange(2)
    with pytest.raises(ScoreError, match=r"1\.parametrizations\.weight.*not supported"):
        score(model, lp.trace(model, images), NextLayerTaylor(), [(images, labels)], loss)


def test_a_group_that_nothing_reads_is_refused_by_name():
    with pytest.raises(ScoreError, match="lonely: no convolution or linear layer reads its channels"):
        next_layers(nn.Conv2d(1, 2, 1), Group("lonely", 2, (), ()))


def test_next_layers_that_see_other_numbers_of_samples_are_refused():
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head, self.region = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x):
            x = self.stem(x).mean((2, 3))
            return self.head(x) + self.region(torch.cat([x, x])).view(2, len(x), 5).sum(0)

    torch.manual_seed(0)
    model = Regions().double()
    images, labels = zoo.images(2), torch.arange(2)
    with pytest.raises(ScoreError, match=r"region: called with 4 samples where head, .* has 2"):
        score(model, lp.trace(model, images), NextLayerTaylor(), [(images, labels)], loss)
