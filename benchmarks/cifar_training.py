"""The images, and training of a network on a CPU: adapting the public weights, and fine-tuning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
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
Logits = Callable[[Tensor], Tensor]
Loss = Callable[[Logits, Tensor, Tensor], Tensor]
PUBLIC = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


@dataclass(frozen=True)
class Settings:
    """Of one training: SGD with momentum 0.9 under a cosine that ends at 0, batch norms in train mode."""

    epochs: int
    lr: float
    batch: int = 128
    weight_decay: float = 5e-4
    images: int = 0  # of each epoch, drawn anew; 0: all
    bf16: bool = False  # of convolutions and products, by autocast; weights, norms and losses stay in float32


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


def cross_entropy(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a batch."""
    return F.cross_entropy(logits(x), y)


def logits_of(network: nn.Module, bf16: bool) -> Logits:
    """What the network computes in that precision, in float32."""

    def logits(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return network(x).float()

    return logits


class Training:
    """Steps of SGD under one cosine; between two of them another network may take the place of the first.

    All that are trained with one seed see the same images, cropped and flipped in the same way.
    """

    def __init__(
        self,
        network: nn.Module,
        data: ImageFolderDataModule,
        settings: Settings,
        seed: int,
        loss: Loss = cross_entropy,
    ) -> None:
        self.part, self.settings, self.seed = data.parts["train"], settings, seed
        self.loss = loss
        self.before_step: Callable[[nn.Module], object] | None = None  # between backward and step
        self.batches = (settings.images or len(self.part)) // settings.batch
        self.total, self.step = settings.epochs * self.batches, 0
        self.use(network)

    def use(self, network: nn.Module) -> None:
        """Go on with this network, at the same place of the schedule, without momentum."""
        of = self.settings
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.logits = logits_of(self.network, of.bf16)
        self.optimizer = torch.optim.SGD(
            network.parameters(), of.lr, momentum=0.9, weight_decay=of.weight_decay, fused=True
        )

    def run(self, steps: int) -> float:
        """Train, in place; the mean of the losses."""
        self.network.train()
        losses = 0.0
        for _ in range(steps):
            passed = math.pi * self.step / self.total
            self.optimizer.param_groups[0]["lr"] = self.settings.lr * (1 + math.cos(passed)) / 2
            x, y = self._batch()
            loss = self.loss(self.logits, x.contiguous(memory_format=torch.channels_last), y)
            loss.backward()
            if self.before_step is not None:
                self.before_step(self.network)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses += float(loss.detach())
        if not losses < float("inf"):
            raise ArithmeticError("the loss is not finite")
        return losses / max(steps, 1)

    def _batch(self) -> Batch:
        epoch, place = divmod(self.step, self.batches)
        if place == 0:
            torch.manual_seed(1000 * self.seed + epoch)
            self.order = torch.randperm(len(self.part))[: self.batches * self.settings.batch].split(self.settings.batch)
        return self.part.__getitems__(self.order[place].tolist())


def train(
    network: nn.Module, data: ImageFolderDataModule, settings: Settings, seed: int, keep: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Train in place, and say after each epoch what came of it; with ``keep``, go on after a kill."""
    training = Training(network, data, settings, seed)
    if keep is not None and keep.is_file():
        content = torch.load(keep, weights_only=True)
        if content["settings"] != repr(settings):
            raise SystemExit(f"{keep} was begun with {content['settings']}: give these, or remove it")
        network.load_state_dict(content["network"])
        training.optimizer.load_state_dict(content["optimizer"])
        training.step = content["step"]
    while training.step < training.total:
        started = time.perf_counter()
        loss = training.run(training.batches)
        if keep is not None:
            states = {"network": network.state_dict(), "optimizer": training.optimizer.state_dict()}
            with atomic(keep) as stream:
                torch.save({"step": training.step, "settings": repr(settings), **states}, stream)
        epoch = training.step // training.batches
        yield {"epoch": epoch, "loss": loss, "seconds": time.perf_counter() - started}


@torch.no_grad()
def accuracy(network: nn.Module, data: ImageFolderDataModule) -> float:
    """Percent of all test images."""
    network.eval()
    right = sum(
        int((network(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
        for x, y in data.test_dataloader()
    )
    return 100 * right / len(data.parts["test"])


def adapted(
    name: str,
    start: Callable[[], nn.Module],
    data: ImageFolderDataModule,
    settings: Settings,
    path: Path,
) -> dict[str, Any]:
    """A network trained on these images: read from ``path``, or made and written there.

    Args:
        name: of what it starts from.
        start: makes it.
        data: the images.
        settings: of the training.
        path: of the result; beside it lies what a kill leaves.

    Returns:
        ``state_dict``, and ``made``: what of, how, and the accuracies.
    """
    if path.is_file():
        return dict(torch.load(path, weights_only=True))
    network, partial = start(), path.with_suffix(".partial.pt")
    before = accuracy(network, data)
    for said in train(network, data, settings, seed=0, keep=partial):
        print(f"{name}, training:", *(f"{key} {value:.4g}" for key, value in said.items()), flush=True)
        if said["epoch"] % 4 == 0:
            print(f"{accuracy(network, data):.2f} % of the test images", flush=True)
    made = {"of": name, "settings": repr(settings), "before": before, "accuracy": accuracy(network, data)}
    content = {"state_dict": network.state_dict(), "made": made}
    with atomic(path) as stream:
        torch.save(content, stream)
    partial.unlink(missing_ok=True)
    print(f"{name}: {before:.2f} % before, {made['accuracy']:.2f} % trained; {path}", flush=True)
    return content


def scoring_batches(data: Any, count: int, seed: int = 0) -> list[Batch]:
    """Training images as they are, without crops and flips; the same for a seed."""
    part = data.parts["train"]
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[: count * 128]
    plain = data.parts["val"].transforms
    pixels, labels = (tensor[order] for tensor in part.tensors)
    return list(zip(plain(pixels).split(128), labels.split(128), strict=True))
