"""Start from torchvision's ImageNet weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import WeightsError


def load_torchvision_weights(
    model: nn.Module, weights: Any, *, skip: tuple[str, ...] = ("conv1.weight", "fc.weight", "fc.bias")
) -> list[str]:
    """Load a torchvision state dict into a model, all but the stem and the classifier, whose shapes differ.

    Args:
        model: a `CifarResNet` of the same depth.
        weights: a torchvision weights enum or its name ("ResNet18_Weights.IMAGENET1K_V1"; downloaded by torchvision),
            the path of a state dict file, or a state dict.
        skip: names that keep their own initialisation.

    Returns:
        The names that were skipped.

    Raises:
        WeightsError: names or shapes differ elsewhere; the model is as it was.
    """
    state = _state_dict(weights)
    own = model.state_dict()
    offered = {name: tensor for name, tensor in state.items() if name not in skip}
    # torchvision's oldest files have no batch counters; ours stay as they are then
    optional = {name for name in own if name.endswith(".num_batches_tracked")} - state.keys()
    wanted = {name: tensor for name, tensor in own.items() if name not in skip and name not in optional}
    foreign = "the weights belong to another model: "
    missing, unexpected = sorted(wanted.keys() - offered.keys()), sorted(offered.keys() - wanted.keys())
    if missing or unexpected:
        raise WeightsError(f"{foreign}missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, tensor in wanted.items():
        there, here = list(offered[name].shape), list(tensor.shape)
        if there != here:
            raise WeightsError(f"{foreign}{name!r} is {there} there and {here} here")
    model.load_state_dict({**own, **offered})
    return [name for name in own if name in skip]


def _state_dict(weights: Any) -> Mapping[str, Tensor]:
    if isinstance(weights, Mapping):
        return weights
    if isinstance(weights, Path) or (isinstance(weights, str) and Path(weights).suffix in (".pt", ".pth", ".ckpt")):
        path = Path(weights)
        if not path.is_file():
            raise WeightsError(f"there is no file {path}")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise WeightsError(f"{path} is not a state dict: {error}") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise WeightsError(f"{path} is not a state dict, which maps names to tensors and holds nothing else")
        return loaded
    from torchvision.models import get_weight  # torchvision is slow to import and rarely needed here

    try:
        found: Any = get_weight(weights) if isinstance(weights, str) else weights
        return found.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise WeightsError(f"{weights} could not be downloaded ({error}); give the path of the file instead") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"weights must be a torchvision weights enum, its name, or a file, got {weights!r}"
        ) from error
