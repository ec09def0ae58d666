"""How much a model computes: parameters, and FLOPs under named conventions."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.measure.operators import OperatorCounter
from lightning_prune.measure.samples import samples_in

Convention = Literal["macs", "flops2", "ptflops", "paper"]


def count_params(model: nn.Module, *, trainable: bool = True) -> int:
    """Number of parameters; with ``trainable`` only those that require gradients, as the papers count."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_flops(model: nn.Module, example_inputs: Any, convention: Convention = "macs") -> int:
    r"""Count the operations of one sample's forward pass in eval mode, functional calls included.

    ``macs``
        multiply-accumulates of convolutions and matrix products, :math:`k^2 C_{in}/g \, C_{out} H W` (H, W of the
        input for transposed convolutions); no biases.
    ``flops2``
        2 x ``macs``.
    ``ptflops``
        as ptflops 0.6.9: ``macs``, plus output elements for a bias, 2 x elements for an affine batch, instance or
        group norm (1 x without affine), output elements of a ReLU-like activation, input elements of a pooling.
        Additions and resizing are free.
    ``paper``
        2 x ``ptflops``: what Lee et al., Sensors 23(4):2102, 2023, print as FLOPs.

    Samples are counted by the first dimension of the first tensor, or by the length of the list if that tensor lies
    in one, as images do for detection models. A model on the meta device is counted without computing anything.

    Raises:
        PruningError: unknown convention.
        TraceError: the model does not run on the inputs.

    Example:
        >>> import torch
        >>> count_flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 4, 4), "ptflops")
        3584
    """
    if convention not in get_args(Convention):
        raise PruningError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
    return flops_by_convention(model, example_inputs)[convention]


def flops_by_convention(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """`count_flops` under every convention, from one forward pass."""
    counter = OperatorCounter().watch(model, example_inputs)
    batch = samples_in(example_inputs) or 1
    macs, others = counter.macs // batch, counter.others // batch
    return {"macs": macs, "flops2": 2 * macs, "ptflops": macs + others, "paper": 2 * (macs + others)}
