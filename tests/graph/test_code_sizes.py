"""Sizes that the model's own code computes or holds: in the smaller model it reads them from an attribute."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import CheckpointError, PruningError
from lightning_prune.graph import trace
from lightning_prune.model_state.code_sizes import SIZES
from lightning_prune.reconstruction.checkpoint import load, save
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from tests.graph.tokens import Block, Tokens, images, smaller
from tests.helpers import random_plan
from tests.zoo import randomise_


class Fused(nn.Module):
    """The layout of most vision transformers: the width of a head comes from the input."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Reduced(nn.Module):
    """Keys and values of fewer positions (PVT, MiT), sizes kept in a tuple, one head or several."""

    def __init__(self, heads: int, width: int = 16) -> None:
        super().__init__()
        self.heads, self.head_width, self.all_heads, self.width = heads, width // heads, width, width
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.reduce, self.norm, self.out = nn.Conv2d(width, width, 2, 2), nn.LayerNorm(width), nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> Tensor:
        shape = x.size()[:-1] + (self.heads, self.head_width)  # noqa: RUF005
        x = x.view(shape)
        return x.permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, positions, channels = x.shape
        side = int(positions**0.5)
        fewer = x.permute(0, 2, 1).reshape(n, channels, side, side)
        fewer = self.norm(self.reduce(fewer).reshape(n, channels, -1).permute(0, 2, 1))
        q, k, v = self.heads_of(self.q(x)), self.heads_of(self.k(fewer)), self.heads_of(self.v(fewer))
        weights = (q @ k.transpose(-2, -1) / self.head_width**0.5).softmax(-1)
        mixed = (weights @ v).permute(0, 2, 1, 3).contiguous()
        return self.out(mixed.view(mixed.size()[:-2] + (self.all_heads,)))  # noqa: RUF005


def attend(x: Tensor, weight: Tensor, out: Tensor, heads: int) -> Tensor:
    n, positions, channels = x.shape
    qkv = F.linear(x, weight).view(n, positions, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] * (channels // heads) ** -0.5 @ qkv[1].transpose(-2, -1)).softmax(-1)
    return F.linear((weights @ qkv[2]).transpose(1, 2).reshape(n, positions, channels), out)


class Function(nn.Module):
    """Its code lies in a function beside it, as that of torchvision's Swin does."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(3 * width, width)), nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.weight, self.out, 4)


class Gated(nn.Module):
    """FocalNet: pieces of the input's width and gates behind them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.project, self.context, self.out = (
            nn.Linear(width, 2 * width + 2),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        query, context, gates = torch.split(self.project(x), (width, width, 2), -1)
        return self.out(query * self.context(context * gates[..., :1] + context.mean(1, keepdim=True) * gates[..., 1:]))


class Mapped(Fused):
    """Attention over channels (Restormer): heads are laid out in a comprehension, the width comes from the input."""

    def forward(self, x: Tensor) -> Tensor:
        n, positions, channels = x.shape
        parts = self.qkv(x).transpose(1, 2).chunk(3, 1)
        q, k = (part.reshape(n, self.num_heads, -1, positions) for part in parts[:2])
        (v,) = map(lambda part: part.reshape(n, self.num_heads, -1, positions), parts[2:])  # noqa: C417
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).reshape(n, channels, positions).transpose(1, 2))


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Private(Mixed):
    """Names that only its own class may know, and the parent's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.__wider = nn.Linear(16, 24)
        self.__back = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, width = len(x), x.shape[-1]
        inner = self.__wider(x).reshape(n, -1, 3, width // 2)
        return super().forward(x) + self.__back(F.relu(inner).reshape(n, -1, 3 * (width // 2)))


ATTENTIONS = {
    "fused": lambda: Fused(),
    "one head": lambda: Reduced(1),
    "several heads": lambda: Reduced(4),
    "function": lambda: Function(),
    "gated": lambda: Gated(),
    "private": lambda: Private(),
}
if sys.version_info >= (3, 11):  # before, nothing tells where in a comprehension a call stands
    ATTENTIONS["mapped"] = lambda: Mapped()


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_widths_inside_go_though_the_code_takes_them_from_its_input(kind: str) -> None:
    model, graph, small = smaller(Tokens(ATTENTIONS[kind](), ATTENTIONS[kind]()))
    inside = {part.tensor for group in graph.prunable_groups for part in group.slices if ".attention." in part.tensor}
    assert any(name.startswith("blocks.0.attention.") for name in inside)
    assert any(name.startswith("blocks.1.attention.") for name in inside)
    own, new = (sum(p.numel() for p in m.blocks[0].attention.parameters()) for m in (model, small))
    assert new < 0.8 * own
    assert isinstance(small.blocks[0].attention, type(model.blocks[0].attention))
    assert SIZES not in vars(model.blocks[0].attention)


def test_heads_of_several_stages_are_laid_out_each_for_itself() -> None:
    _, graph, small = smaller(Tokens(Reduced(1), Reduced(4)))
    assert {group.name for group in graph.prunable_groups} >= {"blocks.0.attention.q", "blocks.1.attention.q"}
    assert small.blocks[1].attention.heads == 4  # the code reads another number


class Scaled(Fused):
    """The scale that torch derives from the width of a head."""

    def forward(self, x: Tensor) -> Tensor:
        n, positions, channels = x.shape
        shape = n, positions, 3, self.num_heads, channels // self.num_heads
        q, k, v = self.qkv(x).view(*shape).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, positions, channels))


def test_whole_heads_go_where_the_scale_depends_on_their_width() -> None:
    _, graph, small = smaller(Tokens(Scaled(heads=4)))
    assert graph.group("blocks.0.attention.qkv").size == 4
    assert small.blocks[0].attention.qkv.out_features == 24


def test_one_head_whose_scale_depends_on_its_width_stays_and_others_of_its_type_go() -> None:
    _, graph, _ = smaller(Tokens(Scaled(heads=1), Scaled(width=16, heads=4)))
    assert not graph.group("blocks.0.attention.qkv[0:32]").prunable  # queries and keys
    model = Tokens(Scaled(heads=1), width=16)
    model.blocks.append(nn.Sequential(nn.Linear(16, 32), nn.GELU(), Block(Scaled(32), 32), nn.Linear(32, 16)))
    _, graph, _ = smaller(model)
    assert not graph.group("blocks.0.attention.qkv[0:32]").prunable
    assert graph.group("blocks.1.2.attention.qkv").prunable


class LeNet(nn.Module):
    """As tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc1, self.fc2 = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 16, 3),
            nn.Linear(64, 20),
            nn.Linear(20, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * 2 * 2)
        return self.fc2(F.relu(self.fc1(x)))


def test_a_flatten_of_a_written_size() -> None:
    model = randomise_(LeNet()).double().eval()
    graph = trace(model, images())
    plan = random_plan(graph, 0.5)
    small = reconstruct(model, graph, plan)
    assert [group.name for group in graph.prunable_groups] == ["conv1", "conv2", "fc1"]
    with mask_(model, graph, plan):
        assert check_lossless(model, small, images(5)).passed
    assert len(small(images(5))) == 5


def test_without_the_source_the_width_stays() -> None:
    scope: dict = {"nn": nn, "__name__": __name__}
    code = Path(__file__).read_text("utf-8")
    start = code.index("class Fused(")
    exec(code[start : code.index("class Reduced(")].replace(": Tensor", "").replace("-> Tensor", ""), scope)
    _, graph, small = smaller(Tokens(scope["Fused"]()))
    assert "fixed in the Python code" in str(graph.group("blocks.0.attention.qkv").reason)
    assert small.blocks[0].attention.qkv.out_features == 48


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, nn.Module]:
    model, _, small = smaller(Tokens(Fused(), Fused()))
    return model, small


def test_copies_and_pickles_compute_the_same(pruned: tuple[nn.Module, nn.Module]) -> None:
    _, small = pruned
    whole = io.BytesIO()
    torch.save(small, whole)
    whole.seek(0)
    for other in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(whole, weights_only=False),
    ):
        assert torch.equal(other(images(3)), small(images(3)))
        assert type(other.blocks[0].attention).__name__ == "Fused"


def test_it_is_pruned_again(pruned: tuple[nn.Module, nn.Module]) -> None:
    _, small = pruned
    again = reconstruct(small, graph := trace(small, images()), plan := random_plan(graph, 0.5))
    assert graph.group("blocks.0.attention.qkv").size == 2
    masked = copy.deepcopy(small)
    mask_(masked, graph, plan)
    assert check_lossless(masked, again, images(3)).passed
    assert again.blocks[0].attention.qkv.out_features == 12


def test_a_file_of_it_loads_into_the_dense_model(tmp_path: Path) -> None:
    model, graph, _ = smaller(Tokens(Fused()))
    plan = random_plan(graph, 0.5)
    small = reconstruct(model, graph, plan)
    save(tmp_path / "small.pt", small, plan)
    load(tmp_path / "small.pt", other := copy.deepcopy(model))
    assert torch.equal(other(images(3)), small(images(3)))


def test_a_file_that_speaks_of_other_code_is_refused(tmp_path: Path) -> None:
    model, graph, _ = smaller(Tokens(Fused()))
    plan = random_plan(graph, 0.5)
    save(tmp_path / "small.pt", reconstruct(model, graph, plan), plan)
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    sizes = content["sizes"]["blocks.0.attention"][SIZES]
    for wrong in ("forward+2:61 print(C)", "forward+200:1 C", "nothing+2:61 C", "__init__+1:8 heads", "forward", ""):
        content["sizes"]["blocks.0.attention"][SIZES] = {**sizes, wrong: 3}
        torch.save(content, tmp_path / "wrong.pt")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match="code"):
            load(tmp_path / "wrong.pt", model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert type(model.blocks[0].attention) is Fused


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_scripting_is_refused_and_export_works(pruned: tuple[nn.Module, nn.Module]) -> None:
    _, small = pruned
    with pytest.raises(PruningError, match=r"torch\.export"):
        torch.jit.script(small)
    program = torch.export.export(small, (images(3),))
    assert torch.allclose(program.module()(images(3)), small(images(3)))


def test_the_traced_model_keeps_its_class() -> None:
    model = randomise_(Tokens(Fused())).double().eval()
    trace(model, images())
    assert type(model.blocks[0].attention) is Fused
    assert SIZES not in vars(model.blocks[0].attention)
