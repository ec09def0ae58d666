"""Start from torchvision's ImageNet weights, or from weights that others have made public for the same network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import WeightsError
from lightning_prune.models.cifar_thin import PaddedShortcut
from lightning_prune.tensor_files import read_tensors


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
    return _load(model, _state_dict(weights), skip)


def load_public_weights(model: nn.Module, weights: str | Path | Mapping[str, Any], *, skip: Sequence[str] = ()) -> None:
    """Load a checkpoint as training scripts write it into the network that it was written of.

    The tensors may lie under ``"state_dict"``, ``"model"`` or ``"net"``, and their names may begin with ``"module."``,
    as `torch.nn.DataParallel` has it. Such are the weights of ``resnet20`` to ``resnet110`` of
    https://github.com/akamaster/pytorch_resnet_cifar10 (Idelbayev; CIFAR-10, mean 0.485, 0.456, 0.406 and deviation
    0.229, 0.224, 0.225).

    Args:
        model: a network with the same names and shapes, in place.
        weights: path of a file that holds nothing but tensors and plain data, or what it holds.
        skip: names that keep the values they have, such as those of a head with other classes.

    Raises:
        WeightsError: no such file, no state dict, or names or shapes differ; the model is as it was.

    Example:
        >>> from lightning_prune.models import resnet20
        >>> published = {"state_dict": {f"module.{name}": value for name, value in resnet20().state_dict().items()}}
        >>> load_public_weights(model := resnet20(), published)
        >>> bool((model.linear.weight == published["state_dict"]["module.linear.weight"]).all())
        True
    """
    where = "the weights" if isinstance(weights, Mapping) else str(weights)
    state: Any = weights if isinstance(weights, Mapping) else read_tensors(weights, WeightsError)
    holder = next((name for name in ("state_dict", "model", "net") if isinstance(state.get(name), Mapping)), None)
    state = state if holder is None else state[holder]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{where}: no state dict, which maps names to tensors and holds nothing else")
    _load(model, {str(name).removeprefix("module."): value for name, value in state.items()}, skip)


def _load(model: nn.Module, state: Mapping[str, Tensor], skip: Sequence[str]) -> list[str]:
    """Load all but ``skip``, of which those that the model has are returned."""
    own = model.state_dict()
    offered = {name: tensor for name, tensor in state.items() if name not in skip}
    # the oldest files have no batch counters, and public ones no zeros that are padded; ours stay as they are then
    optional = {name for name in own if name.endswith(".num_batches_tracked")}
    for module, part in model.named_modules():
        if isinstance(part, PaddedShortcut):
            optional.update(f"{module}.{name}" for name, _ in part.named_buffers())
    optional -= state.keys()
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
        loaded = read_tensors(path, WeightsError)
        if not all(isinstance(value, Tensor) for value in loaded.values()):
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
