"""Accuracy on handwritten letters at the same FLOPs: pruned exactly, and with the layer norms' statistics given up."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from typing_extensions import Self

import lightning_prune as lp

Row = dict[str, Any]
BUDGETS, CRITERIA = (0.5, 0.25, 0.1), ("taylor", "l1")
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@dataclass
class Letters:
    """Images (N, 3, 32, 32) float32 and labels of both parts."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """EMNIST's letters as four IDX files."""
        try:
            parts = [_idx(folder / f"{name}-ubyte.gz") for name in FILES]
        except FileNotFoundError as error:
            raise SystemExit(
                f"{error.filename} is missing: --data takes the folder of EMNIST Letters' IDX files"
            ) from None
        return cls((_images(parts[0]), parts[1].long()), (_images(parts[2]), parts[3].long()))

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images."""
        images, labels = self.test
        found = torch.cat([model.eval()(part).argmax(1) for part in images.split(512)])
        return 100 * float((found == labels).double().mean())

    def fit_(self, model: nn.Module, epochs: int, lr: float, seed: int) -> nn.Module:
        """AdamW under one cycle; images shifted by up to two pixels."""
        torch.manual_seed(seed)
        images, labels = self.train
        batches = math.ceil(len(images) / 128)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.15)
        for _ in range(epochs):
            for some in torch.randperm(len(images)).split(128):
                shift = torch.randint(-2, 3, (2,)).tolist()
                optimizer.zero_grad()
                F.cross_entropy(model(images[some].roll(shift, (2, 3))), labels[some]).backward()
                optimizer.step()
                schedule.step()
        return model


def _idx(path: Path) -> Tensor:
    raw = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(raw[4 * i + 4 : 4 * i + 8], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)


def _images(pixels: Tensor) -> Tensor:
    return F.pad(pixels[:, None] / 255, (2, 2, 2, 2)).sub(0.17).div(0.33).repeat(1, 3, 1, 1)


def network() -> ConvNeXt:
    """A ConvNeXt of 0.24 million parameters and three widths."""
    blocks = [CNBlockConfig(24, 48, 2), CNBlockConfig(48, 96, 2), CNBlockConfig(96, None, 2)]
    return ConvNeXt(blocks, num_classes=26, layer_scale=1.0)


def pruned(
    letters: Letters,
    dense: nn.Module,
    tune: Callable[[nn.Module], list[float]],
    criterion: str,
    flops: float,
    *,
    lossy: bool,
) -> Row:
    """One row: pruned to a share of the FLOPs, before and after fine-tuning."""
    torch.manual_seed(0)
    some = torch.randperm(len(letters.train[0]))[:1024]
    batches = list(zip(*(part[some].split(128) for part in letters.train), strict=True))
    try:
        found = lp.prune(
            dense.eval(),
            letters.train[0][:2],
            criterion=criterion,
            selection=lp.Budget(flops=flops),
            statistics=lossy,
            batches=batches,
            loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        )
    except lp.PruningError as error:
        return {"refused": str(error)}
    widths = [found.model.features[stage][0].block[0].in_channels for stage in (1, 3, 5)]
    share = {"params": found.after.params / found.before.params, "flops": found.after.macs / found.before.macs}
    at_once = {"masked": letters.accuracy(found.masked), "pruned": letters.accuracy(found.model)}
    return {**share, **at_once, "widths": widths, "error": found.lossless.max_rel_error, "tuned": tune(found.model)}
