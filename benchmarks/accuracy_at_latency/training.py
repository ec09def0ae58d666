"""The images, and training of a network on a CPU: adapting the public weights, and fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import models
from lightning_prune.data import ImageFolderDataModule
from lightning_prune.files import atomic

Batch = tuple[Tensor, Tensor]
PUBLIC = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


@dataclass(frozen=True)
class Settings:
    """Of one training: SGD with momentum 0.9 under a cosine that ends at 0, batch norms in train mode."""

    epochs: int
    lr: float
    batch: int = 128
    weight_decay: float = 5e-4
    images: int = 0  # of each epoch, drawn anew; 0: all


def images(folder: Path, batch: int = 128) -> ImageFolderDataModule:
    """CIFAR-10 as folders of images, in memory; padded, cropped and flipped where it is trained on."""
    if not (folder / "cifar10" / "train").is_dir():
        raise SystemExit(
            f"{folder / 'cifar10'} is missing: `python ../shared/data/unpack.py cifar10 {folder}` makes it"
        )
    data = ImageFolderDataModule(str(folder / "cifar10"), batch, size=32)
    data.setup()
    return data


def public_network(name: str, weights: Path) -> nn.Module:
    """A network with its public weights, of the original images."""
    path = weights / PUBLIC[name] if weights.is_dir() else weights
    if not path.is_file():
        raise SystemExit(f"{path} is missing: --weights takes the folder of {', '.join(PUBLIC.values())}")
    network = getattr(models, name)()
    models.load_public_weights(network, path)
    return network


def train(
    network: nn.Module, data: ImageFolderDataModule, settings: Settings, seed: int, keep: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Train in place, and say after each epoch what came of it; with ``keep``, go on after a kill."""
    network.to(memory_format=torch.channels_last)
    part, count = data.parts["train"], settings.images or len(data.parts["train"])
    batches = count // settings.batch
    optimizer = torch.optim.SGD(
        network.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    begin = _resume(parts, keep, settings)
    for epoch in range(begin, settings.epochs):
        torch.manual_seed(1000 * seed + epoch)  # the same images and crops for all that are compared
        started, loss_sum = time.perf_counter(), 0.0
        network.train()
        for rows in torch.randperm(len(part))[: batches * settings.batch].split(settings.batch):
            x, y = part.__getitems__(rows.tolist())
            loss = F.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            loss_sum += float(loss.detach())
        if not loss_sum < float("inf"):
            raise ArithmeticError("the loss is not finite")
        if keep is not None:
            with atomic(keep) as stream:
                states = {name: of.state_dict() for name, of in parts.items()}
                torch.save({"epoch": epoch + 1, "settings": repr(settings), **states}, stream)
        yield {"epoch": epoch + 1, "loss": loss_sum / batches, "seconds": time.perf_counter() - started}


def _resume(parts: dict[str, Any], keep: Path | None, settings: Settings) -> int:
    if keep is None or not keep.is_file():
        return 0
    content = torch.load(keep, weights_only=True)
    if content.get("settings", repr(settings)) != repr(settings):
        raise SystemExit(f"{keep} was begun with {content['settings']}: give these, or remove it")
    for name, of in parts.items():
        of.load_state_dict(content[name])
    return int(content["epoch"])


@torch.no_grad()
def accuracy(network: nn.Module, data: ImageFolderDataModule) -> float:
    """Percent of all test images."""
    network.eval()
    right = sum(
        int((network(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
        for x, y in data.test_dataloader()
    )
    return 100 * right / len(data.parts["test"])


def adapted(name: str, weights: Path, data: ImageFolderDataModule, settings: Settings, path: Path) -> dict[str, Any]:
    """The public weights trained on these images: read from ``path``, or made and written there.

    Returns:
        ``state_dict``, and ``made``: what of, how, and the accuracies.
    """
    if path.is_file():
        return dict(torch.load(path, weights_only=True))
    network = public_network(name, weights)
    before, partial = accuracy(network, data), path.with_suffix(".partial.pt")
    for said in train(network, data, settings, seed=0, keep=partial):
        print(f"{name}, adapting:", *(f"{key} {value:.4g}" for key, value in said.items()), flush=True)
        if said["epoch"] % 4 == 0:
            print(f"{accuracy(network, data):.2f} % of the test images", flush=True)
    made = {"of": PUBLIC[name], "settings": repr(settings), "before": before, "accuracy": accuracy(network, data)}
    content = {"state_dict": network.state_dict(), "made": made}
    with atomic(path) as stream:
        torch.save(content, stream)
    partial.unlink(missing_ok=True)
    print(f"{name}: {before:.2f} % as published, {made['accuracy']:.2f} % adapted; {path}", flush=True)
    return content
