"""What a file is compared on: inputs drawn like the example, or the user's own, at all sizes that are left open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.engines.base import tensors_of
from lightning_prune.errors import ExportError
from lightning_prune.graph.running import map_tensors
from lightning_prune.measure import samples_in, with_samples

SIDE = 32  # pixels by which another image size differs: networks halve their maps five times


def drawn_like(inputs: Any, generator: torch.Generator) -> Any:
    """New values: real numbers of the same mean and deviation within the same range, integers of the same range.

    Example:
        >>> drawn = drawn_like((torch.rand(4, 3), torch.tensor([2, 5])), torch.Generator().manual_seed(0))
        >>> drawn[0].shape, bool((drawn[0] >= 0).all()), bool(((drawn[1] >= 2) & (drawn[1] <= 5)).all())
        (torch.Size([4, 3]), True, True)
    """

    def drawn(x: Tensor) -> Tensor:
        if x.is_complex() or not x.numel():
            return x.clone()
        if not x.is_floating_point():
            low, high = int(x.min()), int(x.max())
            return torch.randint(low, high + 1, x.shape, generator=generator).to(x.dtype)
        noise = torch.randn(x.shape, generator=generator)
        deviation, mean = torch.std_mean(x.float(), correction=0)
        if not deviation:  # zeros or ones that stand for anything
            return (mean + noise).to(x.dtype)
        return (mean + deviation * noise).clamp(float(x.min()), float(x.max())).to(x.dtype)

    return map_tensors(drawn, inputs)


def at_size(inputs: Any, height: int, width: int) -> Any:
    """The same images at another size; what is no image stays as it is."""

    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, (height, width)) if x.dim() == 4 and x.is_floating_point() else x

    return map_tensors(resized, inputs)


def image_size(inputs: Any) -> tuple[int, int] | None:
    """Height and width of the images among the inputs, which are of one size; None: there are none."""
    found = {tuple(x.shape[-2:]) for x in tensors_of(inputs) if x.dim() == 4 and x.is_floating_point()}
    return found.pop() if len(found) == 1 else None  # type: ignore[return-value]


def compared_inputs(
    example: Any, given: Iterable[Any] | None, samples: int, *, dynamic_batch: bool, dynamic_size: bool
) -> list[Any]:
    """The example, then inputs that are given or drawn, until so many samples; and what only open dimensions take.

    Raises:
        ExportError: inputs that are given have other shapes than the file takes.
    """
    generator = torch.Generator().manual_seed(0)
    per_pass = samples_in(example)
    sizes: Sequence[int] = (per_pass,) if not dynamic_batch else (per_pass, per_pass + 1, 1)
    passes = [example]
    if given is None:
        done, turns = max(1, per_pass), cycle(sizes[1:] or sizes)
        while done < samples:
            batch = with_samples(example, size) if (size := next(turns)) != per_pass else example
            passes.append(drawn_like(batch, generator))
            done += max(1, size)
    else:
        passes = list(given)
        if not passes:
            raise ExportError("inputs: there are none; leave it out, and inputs like the example are drawn")
        for number, inputs in enumerate(passes):
            _check_shapes(example, inputs, number, dynamic_batch, dynamic_size)
    met = {samples_in(inputs) for inputs in passes}
    passes += [drawn_like(with_samples(example, size), generator) for size in sizes if size not in met]
    if dynamic_size:
        height, width = image_size(example) or (0, 0)
        passes.append(drawn_like(at_size(example, height + SIDE, width + 2 * SIDE), generator))
    return passes


def _check_shapes(example: Any, inputs: Any, number: int, dynamic_batch: bool, dynamic_size: bool) -> None:
    open_dimensions = {0} if dynamic_batch else set()
    open_dimensions |= {2, 3} if dynamic_size else set()
    wanted, found = tensors_of(example), tensors_of(inputs)
    same = len(wanted) == len(found) and all(
        a.dim() == b.dim()
        and a.dtype == b.dtype
        and all(m == n or d in open_dimensions for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)))
        for a, b in zip(wanted, found, strict=True)
    )
    if not same:
        shapes = [", ".join(f"{list(x.shape)} {str(x.dtype)[6:]}" for x in side) for side in (found, wanted)]
        raise ExportError(
            f"inputs[{number}] is {shapes[0] or 'no tensor'}, and the file takes {shapes[1]}: give inputs of the "
            "example's form, or leave dimensions open by dynamic_batch or dynamic_size"
        )
