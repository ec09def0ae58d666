"""Build a model of the sweep with random weights that let no error hide, and inputs on which it runs."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.zoo import users
from benchmarks.zoo.families import Entry

CLASSES = {"segmentation": 21, "torchvision": 1000, "timm": 1000}
SMALL = 96
PROPOSALS = {
    f"rpn_{when}_nms_top_n_{mode}": count for when, count in (("pre", 60), ("post", 30)) for mode in ("train", "test")
}


@dataclass
class Case:
    """A model ready to be pruned: float32, randomised, in eval mode."""

    model: nn.Module
    inputs: Any  # a tensor, or a tuple of positional arguments (detection: images and targets)
    trains: bool  # the dense model, in train mode on these inputs
    size: int | users.Size  # side of the images
    others: dict[str, Any] = field(default_factory=dict)  # further inputs, of other sizes, not traced


def prepare(entry: Entry) -> Case:
    """Build, find an input size that the dense model runs on, randomise."""
    torch.manual_seed(0)
    case = _users_case(users.models(entry.suite)[entry.name]) if is_users(entry) else _case(entry, build(entry))
    randomise_(case.model, case.inputs)
    return case


def is_users(entry: Entry) -> bool:
    """Whether the model is of a library of the users' zoo."""
    return entry.suite in users.LIBRARIES


def build(entry: Entry) -> nn.Module:
    """The dense model with its own random initialisation."""
    if entry.suite == "timm":
        import timm

        return timm.create_model(entry.name, pretrained=False)
    from torchvision.models import get_model

    if entry.suite == "detection":
        return _detector(entry.name)
    options: dict[str, Any] = {"weights": None}
    if entry.suite == "segmentation":
        options["weights_backbone"] = None
        options |= {} if entry.name.startswith("lraspp") else {"aux_loss": True}
    if entry.name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # scipy's truncated normal takes half a minute
    return get_model(entry.name, **options)


def _detector(name: str) -> nn.Module:
    """A detector for small images and few proposals; with few classes an untrained one finds boxes."""
    from torchvision.models import get_model

    options: dict[str, Any] = {"num_classes": 2 if name.startswith("keypoint") else 7}
    if "rcnn" in name:
        options |= {**PROPOSALS, "box_detections_per_img": 10, "box_batch_size_per_image": 32}
    model = get_model(name, weights=None, weights_backbone=None, **options)
    if not name.startswith("ssd"):  # whose size is fixed
        model.transform.min_size, model.transform.max_size = (128,), 160
    return model


def _case(entry: Entry, model: nn.Module) -> Case:
    if entry.suite == "detection":
        return Case(model.eval(), detection_inputs(entry.name), True, 128)
    config = getattr(model, "default_cfg", None) or {}
    own = (config.get("input_size") or (3, 224, 224))[-1]
    larger = [299] if entry.family == "inception" else []
    patches = [112] if own % 14 == 0 else []  # of 14 pixels, which do not fit into 96
    sizes = dict.fromkeys([own] if config.get("fixed_input_size") else [SMALL, *patches, own, *larger])
    failures = []
    for trains, size in itertools.product((True, False), sizes):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                model.eval()(images)
                if trains:
                    model.train()(images)
        except Exception as error:  # noqa: BLE001 - whatever the model raises, another size may do
            failures.append(f"{size} px: {told(error)}")
        else:
            return Case(model.eval(), images, trains, size)
    raise RuntimeError("the dense model runs on no size tried; " + "; ".join(failures)[:600])


def _users_case(spec: users.Model) -> Case:
    """Traced at one batch and size; another batch, and another size if the model takes one, are only checked."""
    model, size = spec.build().eval(), spec.sizes[0]
    inputs = spec.inputs(2, size)
    with torch.no_grad():
        call(model, inputs)
    trains = _runs(model.train(), inputs)
    others = {}
    for batch, sizes in ((3, [size]), (1, spec.sizes[1:])):
        for other in sizes:
            if _runs(model.eval(), further := spec.inputs(batch, other)):
                others[label(batch, other)] = further
                break
    return Case(model.eval(), inputs, trains, size, others)


@torch.no_grad()
def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        call(model, inputs)
    except Exception:  # noqa: BLE001 - whatever the dense model raises, it does not take them
        return False
    return True


def label(batch: int, size: users.Size) -> str:
    """How a row names inputs."""
    return f"{batch} of {'x'.join(map(str, size))}"


def detection_inputs(name: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different size and two boxes in each."""
    generator = torch.Generator().manual_seed(1)
    images, targets = [], []
    for height, width in ((128, 128), (112, 144)):
        images.append(torch.rand(3, height, width, generator=generator))
        boxes = torch.tensor([[8.0, 8.0, 70.0, 60.0], [30.0, 20.0, 100.0, 90.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 1 if name.startswith("keypoint") else 2])}
        if name.startswith("mask"):
            target["masks"] = (torch.rand(2, height, width, generator=generator) > 0.5).to(torch.uint8)
        if name.startswith("keypoint"):
            inside = boxes[:, None, :2] + 30 * torch.rand(2, 17, 2, generator=generator)
            target["keypoints"] = torch.cat([inside, torch.ones(2, 17, 1)], 2)
        targets.append(target)
    return images, targets


@torch.no_grad()
def randomise_(model: nn.Module, inputs: Any = None, seed: int = 0) -> None:
    """Perturb what initialisation leaves constant or zero, and batch norm's statistics; eval mode afterwards.

    Biases, affine parameters, layer scales and all other vectors and constants get noise; weights initialised close
    to zero (heads of detectors, last layers of residual blocks) become as large as others. Batch norms first take
    the statistics of one batch, so that deep networks neither explode nor die, and these are perturbed then.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)

    for parameter in filter(Tensor.numel, model.parameters()):
        fan_in = parameter.numel() / max(1, len(parameter)) if parameter.dim() else 1
        if parameter.dim() <= 1 or parameter.min() == parameter.max():
            parameter.add_(noise(parameter), alpha=0.3)
        elif parameter.std() < 0.3 * fan_in**-0.5 and fan_in > 1:
            parameter.copy_(noise(parameter) * fan_in**-0.5)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    model.eval()
    _calibrate_(model, norms, inputs)
    for norm in norms:
        mean, var = norm.running_mean, norm.running_var
        if not (mean.isfinite().all() and var.isfinite().all()):
            mean.zero_(), var.fill_(1.0)
        mean.add_(noise(mean) * var.sqrt(), alpha=0.5)
        var.mul_(0.5 + torch.rand(var.shape, generator=generator)).add_(0.01)
    model.eval()


def _calibrate_(model: nn.Module, norms: list[_BatchNorm], inputs: Any) -> None:
    if inputs is None or not norms:
        return
    momentum = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        call(model, inputs)
    except ValueError:  # one value per channel has no statistics: the initial ones stay
        pass
    finally:
        for norm, before in zip(norms, momentum, strict=True):
            norm.momentum = before


def told(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output on copies of example inputs as the library takes them: it may change them in place."""
    inputs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Output tensors in eval mode from a fixed seed."""
    torch.manual_seed(0)
    return tensors(call(model.eval(), inputs))


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two outputs are the same bit by bit; NaN equals NaN."""
    return len(first) == len(second) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(first, second, strict=True)
    )


def to_double(inputs: Any) -> Any:
    """Floating-point inputs in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def train_step(model: nn.Module, inputs: Any) -> bool:
    """Forward and backward in train mode; True, or an error unless some gradients came and all are finite."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    values = [t for t in tensors(call(model, copy.copy(inputs))) if t.is_floating_point() and t.requires_grad]
    losses = [t if t.dim() == 0 else t.square().mean() for t in values]
    torch.stack([loss.double() for loss in losses]).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        raise RuntimeError("no parameter received a gradient")
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise RuntimeError("a gradient is not finite")
    return True


class RawHeads(nn.Module):
    """What a torchvision detector's heads compute, before sorting and suppression.

    The boxes after non-maximum suppression jump when two scores are nearly equal, and with no box the second stage
    would compute nothing at all; so the region heads get fixed boxes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor], targets: Any = None) -> list[Any]:  # noqa: ARG002
        """Outputs of all heads."""
        model = self.model
        batch, _ = model.transform(list(images), None)
        features = model.backbone(batch.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        maps = list(features.values())
        if not hasattr(model, "rpn"):
            return [model.head(maps)]
        box = torch.tensor([[4.0, 4.0, 90.0, 70.0], [20.0, 10.0, 60.0, 100.0]], dtype=maps[0].dtype)
        heads, found = model.roi_heads, [model.rpn.head(maps)]
        for kind in ("box", "mask", "keypoint"):
            if getattr(heads, f"{kind}_roi_pool", None) is not None:
                pooled = getattr(heads, f"{kind}_roi_pool")(features, [box] * len(images), batch.image_sizes)
                found.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled)))
        return found
