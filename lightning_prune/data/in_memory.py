"""Data that lie in memory, of which a batch is taken and transformed as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as transform

KEPT_BYTES = 2**30  # of decoded images and masks that are kept in memory unless asked for otherwise


class WholeBatches(Dataset[Any], ABC):
    """Samples that are made a batch at a time.

    Torch's loader asks for ``__getitems__`` and hands what it gets to its ``collate_fn``, here `whole_batch`. Samplers,
    ``drop_last`` and what Lightning replaces are thus the loader's own, and its batches are finished whoever iterates.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, Any]:
        """The finished batch of these samples, in new tensors: images and what is known of each."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        images, known = self.__getitems__([range(len(self))[index]])
        return images[0], known[0]


def whole_batch(batch: Any) -> Any:
    """The batch as `WholeBatches` made it."""
    return batch


class ImageTensors(WholeBatches, TensorDataset):
    """Images (N, C, H, W) and labels (N,); batches of images go through ``transforms``."""

    def __init__(self, images: Tensor, labels: Tensor, transforms: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(images, labels)
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        images, labels = (tensor.index_select(0, rows) for tensor in self.tensors)  # a tenth of the time of [rows]
        return images if self.transforms is None else self.transforms(images), labels


class KeptSamples(WholeBatches):
    """Samples that are made when they are first asked for; the first ``kept`` of them are made once in a process.

    Args:
        length: number of samples.
        kept: how many of them are kept.
        make: a sample by its index, the same whenever it is made.
        batch: the finished batch of samples, of which it changes none.
    """

    def __init__(
        self, length: int, kept: int, make: Callable[[int], Any], batch: Callable[[list[Any]], tuple[Any, Any]]
    ) -> None:
        self.made: list[Any] = [None] * min(kept, length)
        self.length, self.make, self.batch = length, make, batch

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, Any]:
        return self.batch([self._sample(index) for index in indices])

    def _sample(self, index: int) -> Any:
        if index >= len(self.made):
            return self.make(index)
        if self.made[index] is None:
            self.made[index] = self.make(index)
        return self.made[index]


def standardised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (N, C, H, W) uint8 as float32: in [0, 1], less the channel's mean, by its deviation."""
    scaled = transform.to_dtype(images, torch.float32, scale=True)
    return transform.normalize(scaled, list(mean), list(std), inplace=True)


def random_crop_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Of each image (N, C, H, W) a crop of its own size at random after padding, flipped half of the time.

    The same in distribution as torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()`` image by
    image (Krizhevsky et al., 2012; He et al., 2016), in three operations for a batch instead of several per image.
    """
    count, own = len(images), _own_generator()
    down, across = torch.randint(2 * padding + 1, (2, count), generator=own)
    return crop_flip(images, down, across, torch.rand(count, generator=own) < 0.5, padding)


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Each image (N, C, H, W) moved by up to ``pixels`` at random, down and across; zeros come in from outside."""
    down, across = torch.randint(2 * pixels + 1, (2, len(images)), generator=_own_generator())
    return crop_flip(images, down, across, torch.zeros(len(images), dtype=torch.bool), pixels)


def _own_generator() -> torch.Generator:
    """Seeded by torch's, which the processes of a distributed run share: each is to draw other numbers."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) + rank)


def crop_flip(images: Tensor, down: Tensor, across: Tensor, flipped: Tensor, padding: int) -> Tensor:
    """Pad images (N, C, H, W) by zeros, cut (H, W) at row ``down`` and column ``across`` of each, flip some (N,)."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    rows, columns = torch.arange(height), torch.arange(width)
    rows = down[:, None] + rows
    columns = across[:, None] + torch.where(flipped[:, None], columns.flip(0), columns)
    places = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).view(count, 1, -1)  # in a padded channel
    return padded.flatten(2).gather(2, places.expand(-1, channels, -1)).view(images.shape)
