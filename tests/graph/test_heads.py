"""Which channels of an attention go: whole heads, or the same place of all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from tests.graph.tokens import Tokens, smaller


class Attention(nn.Module):
    """Four heads of four, sizes in attributes; what is special about it comes in between."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def joined(self, weights: Tensor, v: Tensor) -> Tensor:
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Rotary(Attention):
    """Queries and keys turned by an angle for every position: pairs of places in a head belong together."""

    def angles(self, positions: Tensor) -> Tensor:
        return positions[:, None] * torch.tensor([1.0, 0.1], dtype=positions.dtype)

    def turned(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angles = self.angles(torch.arange(x.shape[-2], dtype=x.dtype))
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = self.turned(q) @ self.turned(k).transpose(-2, -1) * self.scale
        return self.joined(scores.softmax(-1), v)


class RotaryBuffer(Rotary):
    """The frequencies are a buffer, which all heads and all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", FREQUENCIES)

    def angles(self, positions: Tensor) -> Tensor:
        return positions[:, None] * self.frequencies


FREQUENCIES = torch.tensor([1.0, 0.1], dtype=torch.float64)


class RelativePositions(Attention):
    """SAM: a bias made of queries and of one table for all heads, added where (batch * heads) is one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        n, positions, _ = x.shape
        q, k, v = (self.split(layer(x)).reshape(n * self.heads, positions, -1) for layer in (self.q, self.k, self.v))
        bias = torch.einsum("bqc,c->bq", q, self.table)[..., None]
        weights = (q @ k.transpose(-2, -1) * self.scale + bias * torch.eye(positions, dtype=x.dtype)).softmax(-1)
        mixed = (weights @ v).reshape(n, self.heads, positions, -1)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Windows(Attention):
    """Swin: a bias of every head, and a mask of every window where windows were shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, positions, width = x.shape
        x = x.reshape(-1, 4, width)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-2, -1) * self.scale + self.bias
        mask = torch.arange(positions // 4, dtype=x.dtype)[:, None, None] * torch.eye(4, dtype=x.dtype)
        scores = scores.view(n, positions // 4, self.heads, 4, 4) + mask[None, :, None]
        return self.joined(scores.view(-1, self.heads, 4, 4).softmax(-1), v).reshape(n, positions, -1)


@pytest.mark.parametrize(("kind", "channels"), [(Rotary, 4), (RotaryBuffer, 4), (RelativePositions, 4), (Windows, 4)])
def test_heads_beside_tensors_of_fixed_size(kind: type[Attention], channels: int) -> None:
    _, graph, small = smaller(Tokens(kind(), kind()))
    for number in (0, 1):
        group = graph.group(f"blocks.{number}.attention.q")
        assert (group.prunable, group.size) == (True, channels)
    assert small.blocks[0].attention.q.out_features == 8


def test_rotary_and_windows_lose_whole_heads_and_relative_positions_none() -> None:
    for kind, heads in ((Rotary, 2), (RotaryBuffer, 2), (Windows, 2), (RelativePositions, 4)):
        _, _, small = smaller(Tokens(kind()))
        assert small.blocks[0].attention.heads == heads


class Indices(nn.Module):
    """Keeps the outputs of some layers by their number, as YOLO's models do; a number may equal a width."""

    def __init__(self, kept: list[int]) -> None:
        super().__init__()
        self.save = kept
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(9))])
        self.mix = Mixed()
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for number, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if number in self.save:
                kept.append(x)
        return self.head(torch.cat([self.mix(kept[0]), kept[1]], 1)).mean((2, 3))


class Mixed(nn.Module):
    """Code that no attribute can tell about its width."""

    def forward(self, x: Tensor) -> Tensor:
        layout = [len(x), 2, 4, *x.shape[2:]]
        layout[1] = 2
        return x.reshape(layout).flip(1).reshape(x.shape)


def test_a_list_of_numbers_that_are_no_widths_is_not_changed() -> None:
    model, graph, small = smaller(Indices([8, 9]))
    assert small.save == model.save
    assert sum(group.prunable for group in graph.groups) >= 8


def test_code_that_runs_at_another_size_only_is_traced_there() -> None:
    """A Swin whose windows are as large as the image shifts them, and masks, only where the image is larger."""
    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=5)
    _, graph, small = smaller(model)
    heads = [group for group in graph.groups if group.name.endswith("qkv")]
    assert [(group.prunable, group.size) for group in heads] == [(True, 3), (True, 3), (True, 6), (True, 6)]
    assert small.features[3][1].attn.qkv.out_features == 72


class PassedOn(nn.Module):
    """Gives its attributes to a function, of which a part does not run here."""

    def __init__(self, mask: bool = False) -> None:
        super().__init__()
        self.mask, self.heads, self.scale = mask, 4, 0.5
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(mixed(self.qkv(x), self.scale, heads=self.heads, mask=self.mask))


def mixed(qkv: Tensor, scale: float, heads: int, mask: bool) -> Tensor:
    n, positions, width = qkv.shape
    q, k, v = qkv.view(n, positions, 3, heads, 4).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * scale
    if mask:
        scores = scores.view(1, n, heads, positions, positions).tril().view(n, heads, positions, positions)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, positions, width // 3)


def test_an_attribute_that_a_function_is_given_is_set() -> None:
    model, graph, small = smaller(Tokens(PassedOn()))
    assert graph.group("blocks.0.attention.qkv").size == 4
    attention = small.blocks[0].attention
    assert (attention.heads, attention.qkv.out_features) == (2, 24)
    attention.mask = model.blocks[0].attention.mask = True
    assert attention(torch.rand(2, 4, 16, dtype=torch.float64)).shape == (2, 4, 16)
