"""What tests of scores share: models of the zoo with graph and data, raw scores, comparing; the state of a model."""

import random

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.criteria import Member
from lightning_prune.criteria.scoring import score
from lightning_prune.graph.groups import Layer
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


def raw(criterion, model, graph, batches=None, loss=loss):
    """{layer: scores before they are combined over the group}."""
    return {
        name: values
        for of in score(model, graph, criterion, batches, loss).layers.values()
        for name, values in of.items()
    }


def at(model, layer, site):
    path = layer.norm if site == "bn" and layer.norm else layer.name
    return path, isinstance(model.get_submodule(layer.name), nn.Linear)


def close(found, expected, rtol=1e-9, atol=1e-14):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def member(weight, index=None, dim=0):
    index = torch.arange(weight.shape[dim]).unsqueeze(1) if index is None else index
    return Member("g", Layer("l", "l.weight", dim, weight.shape[dim], index), weight)


class Interrupt(Exception):
    pass


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "grad_ids": [id(parameter.grad) for parameter in model.parameters()],
        "grads": [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": hooks(model),
        "random": (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before:
        if key == "tensors":
            assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])
        elif key == "grads":
            assert len(before[key]) == len(after[key])
            assert all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))
        else:
            assert before[key] == after[key], key


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
    """Parameters after an epoch of two batches."""
    data = DataLoader(TensorDataset(zoo.images(8), torch.arange(8) % 5), batch_size=4)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet, **settings).fit(task, data)
    return {name: parameter.detach().clone() for name, parameter in task.net.named_parameters()}
