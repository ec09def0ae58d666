"""What the tests of the Taylor criteria share: models of the zoo with graph and data, raw scores, comparing."""

import torch
from torch import nn
from torch.nn import functional as F

import lightning_prune as lp
from lightning_prune.criteria.scoring import score
from tests import zoo

# conv with BN and linear; residual; grouped convolutions and a depthwise multiplier
MODELS = ["Vgg", "Residual", "Grouped"]
READ = [*MODELS, "Plain", "Branches", "Dense", "InvertedResidual", "Shuffle", "SigmoidConstant"]


def case(name, batch=4):
    model = zoo.build(name)
    images, labels = zoo.images(batch), torch.arange(batch) % 5
    return model, lp.trace(model, images), images, labels


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def members(graph):
    return [(group, layer) for group in graph.prunable_groups for layer in group.layers]


def raw(criterion, model, graph, batches):
    """{layer: scores before they are combined over the group}."""
    found = score(model, graph, criterion, batches, loss).layers
    return {layer.name: found[group.name][layer.name] for group, layer in members(graph)}


def at(model, layer, site):
    path = layer.norm if site == "bn" and layer.norm else layer.name
    return path, isinstance(model.get_submodule(layer.name), nn.Linear)


def close(found, expected, rtol=1e-9, atol=1e-14):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)
