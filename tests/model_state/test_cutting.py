"""Cutting in place: every attribute says what the weights are, everything is put back, dense shapes are remembered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.model_state.cutting import (
    Cut,
    NewSize,
    Undo,
    changed_sizes,
    cut_,
    dense_shapes,
    remember_dense_,
    resize_,
    update_attributes_,
)

LAYERS = {
    "conv": (nn.Conv2d(6, 4, 3), (2, 5), {"in_channels": 5, "out_channels": 2}),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (2, 2), {"in_channels": 4, "out_channels": 2}),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), (5, 2), {"in_channels": 5, "out_channels": 2}),
    "transposed, grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2), (4, 1), {"in_channels": 4, "out_channels": 2}),
    "linear": (nn.Linear(6, 4), (2, 5), {"in_features": 5, "out_features": 2}),
    "bilinear": (nn.Bilinear(6, 6, 4), (2,), {"in1_features": 6, "in2_features": 6, "out_features": 2}),
    "batch norm": (nn.BatchNorm2d(6), (5,), {"num_features": 5}),
    "group norm": (nn.GroupNorm(2, 6), (4,), {"num_channels": 4, "num_groups": 2}),
    "layer norm": (nn.LayerNorm((6, 4)), (5, 4), {"normalized_shape": (5, 4)}),
    "embedding": (nn.Embedding(6, 4), (6, 3), {"num_embeddings": 6, "embedding_dim": 3}),
    "prelu": (nn.PReLU(6), (5,), {"num_parameters": 5}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attributes_say_what_the_weights_are(name: str) -> None:
    layer, sizes, expected = copy.deepcopy(LAYERS[name])
    cut_(layer, [Cut("weight", dim, torch.arange(size)) for dim, size in enumerate(sizes)])
    update_attributes_(layer)
    assert {attribute: getattr(layer, attribute) for attribute in expected} == expected


def test_a_batch_norm_without_weights_goes_by_its_statistics() -> None:
    layer = nn.BatchNorm2d(6, affine=False)
    cut_(layer, [Cut("running_mean", 0, torch.tensor([0, 5])), Cut("running_var", 0, torch.tensor([0, 5]))])
    update_attributes_(layer)
    assert layer.num_features == 2


def test_a_buffer_in_several_places_stays_one() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Identity())
    model[1].register_buffer("mean", model[0].running_mean)
    cut_(model, [Cut("0.running_mean", 0, torch.tensor([1, 2]))])
    assert model[0].running_mean is model[1].mean
    assert len(model[1].mean) == 2


class Caching(nn.Module):
    """Derives a tensor from its weights in eval mode, which train mode forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.sizes, self.derived = nn.Linear(2, 4), [4, 2], None

    def train(self, mode: bool = True) -> Caching:
        self.derived = None if mode else self.derived
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.derived = self.layer.weight.abs() if self.derived is None else self.derived
        return x @ self.derived.T


def test_sizes_are_set_and_what_was_derived_from_the_weights_is_forgotten() -> None:
    model = Caching().eval()
    model(torch.ones(1, 2))
    model.layer.train()
    cut_(model, [Cut("layer.weight", 0, torch.tensor([0, 3]))])
    resize_(model, [NewSize("", "sizes", 0, 2)])
    assert model.sizes == [2, 2]
    assert changed_sizes(model) == {"": {"sizes": [2, 2]}}
    assert [module.training for module in model.modules()] == [False, True]
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_undo_puts_everything_back() -> None:
    model = nn.Sequential(Caching(), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 2)).square().sum().backward()
    optimizer.step()
    weight = model[0].layer.weight
    tensors = [weight.data, weight.grad, model[1].running_mean, optimizer.state[weight]["exp_avg"]]
    undo = Undo(model, [optimizer])
    cuts = [Cut("0.layer.weight", 0, torch.tensor([0, 3])), Cut("1.running_mean", 0, torch.tensor([0, 3]))]
    cut_(model, cuts, [optimizer])
    resize_(model, [NewSize("0", "sizes", 0, 2)])
    assert len(optimizer.state[weight]["exp_avg"]) == model[0].layer.out_features == 2
    undo()
    after = [weight.data, weight.grad, model[1].running_mean, optimizer.state[weight]["exp_avg"]]
    assert all(one.shape == other.shape and torch.equal(one, other) for one, other in zip(after, tensors, strict=True))
    assert (model[0].sizes, model[0].layer.out_features, changed_sizes(model)) == ([4, 2], 4, {})


def test_of_several_cuts_the_first_knows_the_dense_shapes() -> None:
    model = nn.Linear(2, 2)
    remember_dense_(model, {"weight": torch.Size([8, 2])})
    remember_dense_(model, {"weight": torch.Size([4, 2]), "bias": torch.Size([4])})
    assert dense_shapes(model) == {"weight": [8, 2], "bias": [4]}
