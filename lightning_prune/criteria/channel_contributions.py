"""What each channel adds to the output of a layer that reads it, without running the layer once per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.errors import ScoreError

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_FORWARDS = {
    kind.forward
    for kind in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    )
}  # fmt: skip


def input_dim(module: nn.Module) -> int | None:
    """The dimension of a layer's weight along which its input channels lie; None if it is no such layer."""
    if isinstance(module, _ConvTransposeNd):
        return 0
    return 1 if isinstance(module, _ConvNd | nn.Linear) else None


def is_computable(module: nn.Module) -> bool:
    """Whether the layer computes what torch's own does with its weight: a subclass may do more."""
    return type(module).forward in _FORWARDS and "forward" not in vars(module)


def computable(model: nn.Module, path: str, way_out: str) -> nn.Module:
    """The layer at a path, whose output follows from its weight.

    Raises:
        ScoreError: it has a forward of its own; with the way out.
    """
    module = model.get_submodule(path)
    if not is_computable(module):
        raise ScoreError(
            f"{path}: a {type(module).__name__} with a forward of its own reads channels, so what each adds to its "
            f"output is not known; use {way_out}"
        )
    return module


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called on."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def channel_effects(module: nn.Module, inputs: Tensor, index: Tensor, output: torch.Size) -> Tensor:
    """W[:, c] * a_c for several channels c: (N, ...) and (K, r) to (N, K, outputs of a sample).

    The channels are separate groups of one grouped convolution. Nothing larger than the result is made, unless
    the inputs of the K channels are.

    Args:
        module: a convolution or linear layer; its bias does not count.
        inputs: what entered it.
        index: entries of its weight's input dimension that belong to each channel.
        output: shape of what it returned.

    Raises:
        ScoreError: channels of a grouped transposed convolution that are not spread over its groups alike.

    Example:
        >>> layer = nn.Conv2d(4, 3, 3)
        >>> images = torch.randn(2, 4, 5, 5)
        >>> each = channel_effects(layer, images, torch.arange(4).unsqueeze(1), layer(images).shape)
        >>> whole = layer(images) - layer.bias.view(3, 1, 1)
        >>> each.shape, torch.allclose(each.sum(1).view(2, 3, 3, 3), whole, atol=1e-5)
        (torch.Size([2, 4, 27]), True)
    """
    index = index.to(inputs.device)
    weight = getattr(module, "weight").detach().to(inputs.dtype)  # noqa: B009
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return torch.einsum("ntkr,okr->nkto", rows[..., index], weight[:, index]).flatten(2)
    assert isinstance(module, _ConvNd)
    each = _transposed_effects if isinstance(module, _ConvTransposeNd) else _convolution_effects
    return each(module, inputs, weight, index, output).reshape(len(inputs), len(index), -1)


def _convolution_effects(module: _ConvNd, inputs: Tensor, weight: Tensor, index: Tensor, _output: torch.Size) -> Tensor:
    # The weight of every convolution group has these entries, so a channel enters every group.
    groups, channels = module.groups, len(index)
    split = inputs.unflatten(1, (groups, -1))[:, :, index]  # N, groups, K, r, positions
    maps = split.transpose(1, 2).flatten(1, 3)
    kernels = weight.unflatten(0, (groups, -1))[:, :, index]  # groups, out, K, r, kernel
    kernels = kernels.movedim(2, 0).flatten(0, 2)
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        maps = F.pad(maps, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = (0,) * len(module.kernel_size)
    convolve = _CONVOLVE[len(module.kernel_size)]
    return convolve(maps, kernels, None, module.stride, padding, module.dilation, channels * groups)


def _transposed_effects(module: _ConvNd, inputs: Tensor, weight: Tensor, index: Tensor, output: torch.Size) -> Tensor:
    # Here an entry is one input channel, which enters the one group it lies in.
    groups, channels = module.groups, len(index)
    index = index.sort(1).values
    owner = index // (module.in_channels // groups)
    alike = torch.arange(groups, device=index.device).repeat_interleave(max(1, index.shape[1] // groups))
    if index.shape[1] % groups or not bool((owner == alike).all()):
        raise ScoreError(
            "channels that enter only some groups of a transposed convolution cannot be scored; use Taylor"
        )
    maps, kernels = inputs[:, index.flatten()], weight[index.flatten()]
    padding: Any = module.padding
    extra = [
        size - ((before - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
        for size, before, stride, pad, dilation, kernel in zip(
            output[2:],
            inputs.shape[2:],
            module.stride,
            padding,
            module.dilation,
            module.kernel_size,
            strict=True,
        )
    ]
    convolve = _TRANSPOSED[len(module.kernel_size)]
    return convolve(maps, kernels, None, module.stride, padding, extra, channels * groups, module.dilation)
