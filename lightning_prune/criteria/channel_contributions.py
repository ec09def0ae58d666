"""What each channel adds to outputs of a layer that reads it, without running the layer once per channel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.errors import ScoreError
from lightning_prune.graph.groups import Group
from lightning_prune.graph.readers import Reader, other_reader, readers_of

_ELEMENTS = 2**21  # of the largest tensor that sampling makes at once: 16 MiB in float64
_KINDS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def next_layers(model: nn.Module, group: Group) -> dict[str, Reader]:
    """The readers of a group, by module path."""
    if (other := other_reader(model, group)) is not None:
        raise ScoreError(
            f"{other} reads channels, which is not supported here; use another criterion, such as Taylor, or remove "
            "what computes the weight"
        )
    found = readers_of(model, group)
    if not found:
        raise ScoreError(
            f"{group.name}: no convolution or linear layer reads its channels, so there is no next layer to score by; "
            "use another criterion, such as Taylor"
        )
    return found


def is_computable(module: nn.Module) -> bool:
    """Whether the layer computes what torch's own does with its weight: a subclass may do more."""
    return type(module).forward in {kind.forward for kind in _KINDS} and "forward" not in vars(module)


def check_computable(model: nn.Module, path: str, way_out: str) -> None:
    """Refuse a layer whose output does not follow from its weight."""
    module = model.get_submodule(path)
    if not is_computable(module):
        raise ScoreError(
            f"{path}: a {type(module).__name__} with a forward of its own reads channels, so what each adds to its "
            f"output is not known; use {way_out}"
        )


def channel_contributions(module: nn.Module, inputs: Tensor, index: Tensor, output: torch.Size) -> Tensor:
    """W[:, c] * a_c for several channels c, bias left out: (N, ...) and (K, r) to (N, K, outputs of a sample).

    The channels are separate groups of one grouped convolution. Nothing larger than the result is made, unless
    the inputs of the K channels are.
    """
    index = index.to(inputs.device)
    layer: Any = module
    weight = layer.weight.detach().to(inputs.dtype)
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return torch.einsum("ntkr,okr->nkto", rows[..., index], weight[:, index]).flatten(2)
    if isinstance(module, _ConvTransposeNd):
        return _through_transposed(module, inputs, weight, index, output).reshape(len(inputs), len(index), -1)
    grouped = inputs.unflatten(1, (layer.groups, -1))

    def alone(entries: Tensor) -> Tensor:  # the weight of every group has them, so a channel enters every group
        return layer._conv_forward(grouped[:, :, entries].flatten(1, 2), weight[:, entries], None)

    return torch.vmap(alone, out_dims=1)(index).flatten(2)


def _through_transposed(module: Any, inputs: Tensor, weight: Tensor, index: Tensor, output: torch.Size) -> Tensor:
    # Here an entry is one input channel, which enters the one group it lies in.
    groups, spatial = module.groups, len(module.kernel_size)
    index = index.sort(1).values
    owner = index // (module.in_channels // groups)
    alike = torch.arange(groups, device=index.device).repeat_interleave(max(1, index.shape[1] // groups))
    if index.shape[1] % groups or not bool((owner == alike).all()):
        raise ScoreError(
            "channels that enter only some groups of a transposed convolution cannot be scored; use Taylor"
        )
    extra = module._output_padding(
        inputs, list(output[2:]), module.stride, module.padding, module.kernel_size, spatial, module.dilation
    )
    convolve = getattr(F, f"conv_transpose{spatial}d")
    maps, kernels = inputs[:, index.flatten()], weight[index.flatten()]
    return convolve(maps, kernels, None, module.stride, module.padding, extra, len(index) * groups, module.dilation)


def windows(layer: _ConvNd, inputs: Tensor) -> Tensor:
    """What every output position of a convolution sees, padding included: (N, C, *positions, *taps), a view."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        padded = padded.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return padded


def sampled_contributions(
    module: nn.Module, inputs: Tensor, index: Tensor, output: torch.Size, chosen: Tensor
) -> Iterator[Tensor]:
    """What each channel adds to chosen outputs (N, rows) of a layer, bias left out: some (rows, channels) after others.

    Only the windows behind the chosen outputs are looked at.
    """
    index = index.to(inputs.device)
    if isinstance(module, _ConvTransposeNd):
        parts = [
            channel_contributions(module, inputs, some, output).gather(2, chosen.unsqueeze(1).expand(-1, len(some), -1))
            for some in index.split(max(1, _ELEMENTS // math.prod(output)))
        ]
        yield torch.cat(parts, 1).transpose(1, 2).flatten(0, 1)
        return
    layer: Any = module
    weight = layer.weight.detach().to(inputs.dtype)
    seen = windows(layer, inputs) if isinstance(module, _ConvNd) else inputs.reshape(len(inputs), -1, inputs.shape[-1])
    limit = max(1, _ELEMENTS // (math.prod(weight.shape[2:]) * index.numel()))
    samples = torch.arange(len(inputs), device=inputs.device).repeat_interleave(chosen.shape[1])
    for sample, row in zip(samples.split(limit), chosen.flatten().split(limit), strict=True):
        if isinstance(module, _ConvNd):
            out, *place = torch.unravel_index(row, output[1:])
            group = out // (weight.shape[0] // module.groups)
            entries = group[:, None, None] * weight.shape[1] + index  # rows, channels, r
            where = (sample[:, None, None], entries, *(at[:, None, None] for at in place))
            values = seen[where].flatten(3)
            yield (values * weight.flatten(2)[out][:, index]).sum((-2, -1))
        else:
            place, out = row // output[-1], row % output[-1]
            yield (seen[sample, place][:, index] * weight[out][:, index]).sum(-1)
