"""Scenes of real handwritten digits on textured backgrounds, rendered from a seed."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_prune.data.digits import digit_parts
from lightning_prune.errors import DataError

Part = Literal["train", "val", "test"]
Floats = NDArray[np.float32]
CLASS_NAMES = tuple(str(digit) for digit in range(10))
PARTS: tuple[Part, ...] = ("train", "val", "test")
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_INK = 0.5  # opacity from which a pixel belongs to its digit
_TRIES = 8  # places to look for one digit before it is left out


@dataclass(frozen=True)
class Scene:
    """One image with what is in it.

    Attributes:
        image: (H, W, 3) uint8.
        instances: (H, W) uint8, 0 for background, k + 1 where object k is seen.
        labels: (n,) int64, the digits 0..9.
        boxes: (n, 4) float32, x1 y1 x2 y2 in pixels, tight around what is seen of each object.
    """

    image: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    labels: NDArray[np.int64]
    boxes: Floats

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(H, W) uint8: 0 for background, digit + 1 elsewhere."""
        return np.concatenate([[0], self.labels + 1]).astype(np.uint8)[self.instances]

    @property
    def pixels(self) -> NDArray[np.int64]:
        """(n,) number of pixels seen of each object."""
        return np.bincount(self.instances.ravel(), minlength=len(self.labels) + 1)[1:]


@dataclass(eq=False)
class Scenes:
    """Scikit-learn's handwritten digits at random places, sizes, slants, colours and contrasts.

    Scene ``i`` depends on the seed, the part and ``i`` alone, whatever process asks for it and in whatever order;
    the scenes of a part hold that part's digits only (70 / 10 / 20 percent of the 1,797 scans). A millisecond each.

    Args:
        part: whose digits, "train", "val" or "test".
        length: number of scenes.
        size: height and width in pixels, at least 32.
        objects: fewest and most digits per scene; some are left out where they would hide another.
        extent: smallest and largest height of a digit as a share of ``size``; at least 4 pixels.
        hidden: largest share of a digit's ink that later ones may cover.
        seed: of everything, the split of the digits included.

    Raises:
        DataError: an argument outside its range, or an index outside the length.

    Example:
        >>> scene = Scenes("test", 10, size=64)[3]
        >>> scene.image.shape, scene.boxes.shape[1], scene.mask.max() == scene.labels.max() + 1
        ((64, 64, 3), 4, np.True_)
    """

    part: Part = "train"
    length: int = 1000
    _: KW_ONLY
    size: int = 128
    objects: tuple[int, int] = (1, 5)
    extent: tuple[float, float] = (0.2, 0.45)
    hidden: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise DataError(f"part must be one of {', '.join(PARTS)}, got {self.part!r}")
        if self.length < 1 or self.size < 32:
            raise DataError(f"length must be at least 1 and size at least 32 pixels, got {self.length} and {self.size}")
        if not 0 <= self.objects[0] <= self.objects[1] <= 100:
            raise DataError(f"objects must be (fewest, most) within 0 and 100, got {self.objects}")
        if not 4 / self.size <= self.extent[0] <= self.extent[1] <= 0.7:
            raise DataError(
                f"extent must be (smallest, largest) share of the size, within {4 / self.size:g} (4 pixels) and 0.7, "
                f"got {self.extent}"
            )
        if not 0 <= self.hidden < 1:
            raise DataError(f"hidden must lie in [0, 1), got {self.hidden}")
        scans, labels, parts = digit_parts(self.seed)
        self.scans = np.pad(scans[parts[self.part]].numpy(), ((0, 0), (2, 2), (2, 2)))
        self.digits = labels[parts[self.part]].numpy()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        rng = np.random.default_rng([self.seed, PARTS.index(self.part), index])
        image = background(rng, self.size)
        instances = np.zeros((self.size, self.size), dtype=np.uint8)
        labels: list[int] = []
        inked: list[int] = []
        for _ in range(rng.integers(self.objects[0], self.objects[1], endpoint=True)):
            chosen = int(rng.integers(len(self.digits)))
            alpha = self._ink(rng, self.scans[chosen])
            place = self._place(rng, instances, inked, alpha)
            if place is not None:
                paint(rng, image[place], alpha)
                instances[place][alpha > _INK] = len(labels) + 1
                labels.append(int(self.digits[chosen]))
                inked.append(int((alpha > _INK).sum()))
        pixels = (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        boxes = np.array([_box(instances == k + 1) for k in range(len(labels))], dtype=np.float32).reshape(-1, 4)
        return Scene(pixels, instances, np.array(labels, dtype=np.int64), boxes)

    def _ink(self, rng: np.random.Generator, scan: Floats) -> Floats:
        """Opacity (h, w) in [0, 1] of one scan after random scale, aspect and slant; cut to what is not empty."""
        height = rng.uniform(*self.extent) * self.size
        width = height * rng.uniform(0.85, 1.15)
        angle = math.radians(rng.uniform(-15, 15))
        side = math.ceil(1.5 * max(height, width))
        # From output pixels to the 12x12 padded scan, whose 8x8 core becomes (height, width).
        across, down = 8 / width, 8 / height
        a, b = across * math.cos(angle), across * math.sin(angle)
        d, e = -down * math.sin(angle), down * math.cos(angle)
        middle, centre = len(scan) / 2, side / 2
        matrix = (a, b, middle - (a + b) * centre, d, e, middle - (d + e) * centre)
        drawn = Image.fromarray(scan).transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        alpha = ((np.asarray(drawn) - 0.3) / 0.3).clip(0, 1)
        left, top, right, bottom = (int(edge) for edge in _box(alpha > 0))
        return alpha[top:bottom, left:right][: self.size, : self.size]

    def _place(
        self, rng: np.random.Generator, instances: NDArray[np.uint8], inked: list[int], alpha: Floats
    ) -> tuple[slice, slice] | None:
        """Where the digit fits without hiding too much of another; None after some tries."""
        height, width = alpha.shape
        ink = alpha > _INK
        whole = np.array(inked, dtype=np.int64)
        visible = np.bincount(instances.ravel(), minlength=len(whole) + 1)[1:]
        for _ in range(_TRIES):
            top, left = int(rng.integers(self.size - height + 1)), int(rng.integers(self.size - width + 1))
            place = slice(top, top + height), slice(left, left + width)
            covered = np.bincount(instances[place][ink], minlength=len(whole) + 1)[1:]
            if (whole - visible + covered <= self.hidden * whole).all():
                return place
        return None


def background(rng: np.random.Generator, size: int) -> Floats:
    """A textured background (size, size, 3) in [0, 1]: a gradient, clouds, stripes and grain."""
    down, across = np.mgrid[:size, :size].astype(np.float32) / size
    start, end = rng.uniform(0.1, 0.9, (2, 3)).astype(np.float32)
    turn = rng.uniform(0, 2 * math.pi)
    ramp = 0.5 + 0.5 * (math.cos(turn) * (across - 0.5) + math.sin(turn) * (down - 0.5))
    image = start + 0.6 * ramp[..., None] * (end - start)
    cells = int(rng.integers(3, 9))
    clouds = rng.normal(0, 0.09, (cells, cells)).astype(np.float32)
    blurred = Image.fromarray(clouds).resize((size, size), Image.Resampling.BICUBIC)
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.04, 0.15)
    stripes = np.sin(2 * math.pi / period * (math.cos(angle) * across + math.sin(angle) * down))
    texture = np.asarray(blurred) + rng.uniform(0, 0.06) * stripes
    grain = rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(rng.uniform(0.01, 0.04))
    return image + texture[..., None] * rng.uniform(0.6, 1.4, 3).astype(np.float32) + grain


def paint(rng: np.random.Generator, region: Floats, alpha: Floats) -> None:
    """Draw ink (h, w) on a region (h, w, 3) in place, in a colour of its own and 0.3 to 0.6 lighter or darker."""
    under = float((region @ _LUMINANCE)[alpha > _INK].mean())
    contrast = rng.uniform(0.3, 0.6)
    lighter = under + contrast <= 1 and (under - contrast < 0 or rng.random() < 0.5)
    luminance = under + contrast if lighter else max(0.0, under - contrast)
    tint = rng.random(3).astype(np.float32)
    colour = (luminance + 0.4 * (tint - tint @ _LUMINANCE)).clip(0, 1)
    region += alpha[..., None] * (colour - region)


def _box(seen: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Tight x1 y1 x2 y2 around True; the far edges are exclusive."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
