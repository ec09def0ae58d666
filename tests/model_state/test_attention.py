"""Attention with narrower heads: torch's own as long as they are as wide, and exact once they are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.graph import trace
from lightning_prune.model_state.attention import NarrowMultiheadAttention, narrow_
from lightning_prune.reconstruction.checkpoint import load, save
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct, reconstruct_
from tests.helpers import random_plan
from tests.zoo import randomise_

BUILDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias of keys and values": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "other keys and values": {"kdim": 6, "vdim": 10},
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments(given: str, batch_first: bool, kdim: int, vdim: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """3 samples, 5 queries, 7 keys."""
    q, k, v = tokens(5, 3, 8), tokens(7, 3, kdim, seed=1), tokens(7, 3, vdim, seed=2)
    if batch_first:
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    padding = torch.arange(7).expand(3, 7) > torch.tensor([6, 3, 5])[:, None]
    options: dict[str, dict[str, Any]] = {
        "weights": {},
        "no weights": {"need_weights": False},
        "weights of every head": {"average_attn_weights": False},
        "padding": {"key_padding_mask": padding},
        "mask": {"attn_mask": tokens(5, 7, seed=3), "need_weights": False},
        "mask of every head": {"attn_mask": tokens(12, 5, 7, seed=3)},
        "both": {"attn_mask": tokens(5, 7, seed=3) > 1, "key_padding_mask": padding, "need_weights": False},
    }
    return (q, k, v), options[given]


@pytest.mark.parametrize(
    "given", ["weights", "no weights", "weights of every head", "padding", "mask", "mask of every head", "both"]
)
@pytest.mark.parametrize("build", BUILDS)
def test_it_computes_what_torchs_own_does(build: str, given: str) -> None:
    options = BUILDS[build]
    own = randomise_(nn.MultiheadAttention(8, 4, **options)).double().eval()
    narrow = copy.deepcopy(own)
    narrow_(narrow)
    assert type(narrow) is NarrowMultiheadAttention
    args, kwargs = arguments(given, options.get("batch_first", False), options.get("kdim", 8), options.get("vdim", 8))
    for expected, found in zip(own(*args, **kwargs), narrow(*args, **kwargs), strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            assert torch.allclose(expected, found, atol=1e-12)


def test_without_a_batch() -> None:
    own = randomise_(nn.MultiheadAttention(8, 2, batch_first=True)).double().eval()
    narrow = copy.deepcopy(own)
    narrow_(narrow)
    x = tokens(5, 8)
    for expected, found in zip(own(x, x, x), narrow(x, x, x), strict=True):
        assert torch.allclose(expected, found, atol=1e-12)
    with pytest.raises(RuntimeError, match="attn_mask"):
        narrow(x, x, x, is_causal=True)


class Encoder(nn.Module):
    """Layers of torch's encoder over tokens, whose padding is known."""

    def __init__(self, norm_first: bool = False, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


class Decoder(nn.Module):
    """Queries that look at themselves and at a memory, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), 2)
        self.queries, self.head = nn.Parameter(torch.randn(3, 16)), nn.Linear(16, 2)

    def forward(self, memory: Tensor) -> Tensor:
        return self.head(self.layers(self.queries.expand(len(memory), -1, -1), memory))


@pytest.mark.parametrize("build", [Encoder, lambda: Encoder(norm_first=True), Decoder])
def test_heads_of_torchs_transformers_get_narrower(build: Any) -> None:
    model = randomise_(build()).double().eval()
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    attentions = [name for name in attentions if name != "layers.layers.0.self_attn"]  # of queries alone: a constant
    graph = trace(model, tokens(2, 6, 16))
    assert {part.tensor for group in graph.prunable_groups for part in group.slices} >= {
        f"{name}.out_proj.weight" for name in attentions
    }
    plan = random_plan(graph, 0.5)
    small = reconstruct(model, graph, plan)
    masked = copy.deepcopy(model)
    mask_(masked, graph, plan)
    assert all(type(masked.get_submodule(name)) is nn.MultiheadAttention for name in attentions)
    for x in (tokens(4, 6, 16, seed=1), tokens(1, 9, 16, seed=2)):
        assert check_lossless(masked, small, x).passed
        with torch.no_grad():  # where torch would take its fused layers
            assert torch.allclose(masked(x), small(x), atol=1e-10)
    attention = small.get_submodule(attentions[0])
    assert isinstance(attention, nn.MultiheadAttention)
    assert (attention.num_heads, attention.embed_dim) == (model.get_submodule(attentions[0]).num_heads, 16)
    assert attention.out_proj.weight.shape[1] < 16


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_tokens_go_through_narrower_layers() -> None:
    model = randomise_(Encoder()).double().eval()
    padding = torch.arange(6).expand(2, 6) > torch.tensor([5, 2])[:, None]
    graph = trace(model, (tokens(2, 6, 16), padding))
    plan = random_plan(graph, 0.5)
    small = reconstruct(model, graph, plan)
    mask_(model, graph, plan)
    with torch.no_grad():
        assert torch.allclose(model(tokens(2, 6, 16), padding), small(tokens(2, 6, 16), padding), atol=1e-10)


def test_a_pruned_file_a_second_plan_and_a_train_step(tmp_path: Any) -> None:
    dense = randomise_(Encoder()).double().eval()
    graph = trace(dense, tokens(2, 6, 16))
    plan = random_plan(graph, 0.5)
    small = reconstruct(dense, graph, plan)
    save(tmp_path / "small.pt", small, plan)
    load(tmp_path / "small.pt", loaded := copy.deepcopy(dense))
    assert torch.equal(loaded(tokens(2, 6, 16)), small(tokens(2, 6, 16)))

    again = trace(small, tokens(2, 6, 16))
    second = random_plan(again, 0.5)
    masked = copy.deepcopy(small)
    mask_(masked, again, second)
    reconstruct_(small, again, second)
    assert check_lossless(masked, small, tokens(3, 6, 16, seed=5)).passed
    small.train()(tokens(2, 6, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_the_traced_model_keeps_its_class() -> None:
    model = randomise_(Encoder()).double().eval()
    trace(model, tokens(2, 6, 16))
    assert all(type(m) is not NarrowMultiheadAttention for m in model.modules())
    assert model.encoder.use_nested_tensor
