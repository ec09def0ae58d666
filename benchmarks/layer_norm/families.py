"""How many parameters and FLOPs of a family can go, exactly and with the layer norms' statistics given up."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import VisionTransformer, get_model

import lightning_prune as lp
from benchmarks.zoo.models import outputs, randomise_
from lightning_prune.graph.tracing import OUTPUT
from lightning_prune.measure import count_flops, count_params
from lightning_prune.reconstruction.small_model import cuts

Row = dict[str, Any]
RATIOS = {"half": 0.5, "most": 1 - 1e-9}  # of every group; the second leaves one channel of each
NORM = re.compile("layer_norm|group_norm")  # statistics that `NormsOverKept` knows
TINY = {"hidden_size": 192, "num_attention_heads": 3}


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _transformers(name: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT-Ti (timm)": lambda: _timm("vit_tiny_patch16_224"),
    "ViT-Ti (transformers)": lambda: _transformers("ViT", **TINY, intermediate_size=768),
    "ViT-Ti (torchvision)": lambda: VisionTransformer(224, 16, 12, 3, 192, 768),
    "DINOv2-Ti (transformers)": lambda: _transformers("Dinov2", **TINY, image_size=224, patch_size=14),
    "CaiT-XXS24 (timm)": lambda: _timm("cait_xxs24_224"),
    "Swin-T (torchvision)": lambda: get_model("swin_t"),
    "DaViT-T (timm)": lambda: _timm("davit_tiny"),
    "SegFormer-B0 (transformers)": lambda: _transformers("Segformer"),
    "PVTv2-B0 (timm)": lambda: _timm("pvt_v2_b0"),
    "FocalNet-T (timm)": lambda: _timm("focalnet_tiny_srf"),
    "ConvNeXt-T (torchvision)": lambda: get_model("convnext_tiny"),
    "ConvNeXt V2 atto (timm)": lambda: _timm("convnextv2_atto"),
    "PoolFormer-S12 (timm)": lambda: _timm("poolformer_s12"),
    "ConvFormer-S18 (timm)": lambda: _timm("convformer_s18"),
    "MambaOut-femto (timm)": lambda: _timm("mambaout_femto"),
    "MLP-Mixer-S32 (timm)": lambda: _timm("mixer_s32_224"),
}


def family(build: Callable[[], nn.Module], side: int = 224) -> Row:
    """Shares of parameters and FLOPs that go, with and without ``statistics``; errors of the half removed."""
    torch.manual_seed(0)
    model, images = build(), torch.randn(1, 3, side, side)
    randomise_(model, images)
    row: Row = {"params": count_params(model), "flops": count_flops(model, images)}
    for mode, allowed in (("exact", False), ("statistics", True)):
        graph = lp.trace(model, images, statistics=allowed)
        scores = lp.score(model, graph, lp.L1()) if graph.prunable_groups else None
        for name, ratio in RATIOS.items():
            if scores is None:
                row[f"{mode} {name}"] = (0.0, 0.0)
                continue
            plan = lp.LayerRatio(ratio).select(graph, scores)
            small = lp.reconstruct(model, graph, plan)
            gone = (1 - count_params(small) / row["params"], 1 - count_flops(small, images) / row["flops"])
            row[f"{mode} {name}"] = gone
            if name == "half" and all(NORM.search(group.statistics or "layer_norm") for group in graph.prunable_groups):
                row[f"{mode} error"] = _difference(model, small, graph, plan, images)
    whole = [group for group in graph.groups if not group.prunable and group.reason != OUTPUT]
    row["whole"] = max(whole, key=lambda group: len(group.layers) * group.size).reason if whole else ""
    return row


def _difference(model: nn.Module, small: nn.Module, graph: lp.ChannelGraph, plan: lp.Plan, images: Tensor) -> float:
    """Largest relative error in float64 to the masked model whose norms count the remaining channels only."""
    masked, small, images = copy.deepcopy(model), copy.deepcopy(small).double(), images.double()
    lp.mask_(masked, graph, plan)
    with NormsOverKept(masked.double(), {cut.tensor: cut.keep for cut in cuts(graph, plan) if cut.dim == 0}):
        reference = outputs(masked, images)
    found = zip(reference, outputs(small, images), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in found)


class NormsOverKept(TorchFunctionMode):
    """Inside, a layer norm (or a group norm of one group) takes its statistics over the kept channels only."""

    def __init__(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kept = {id(tensor): kept[name] for name, tensor in model.named_parameters() if name in kept}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.layer_norm, F.group_norm):
            return func(*args, **kwargs)
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        keep, x = self.kept.get(id(given.get("weight"))), given["input"]
        if keep is None or given.get("num_groups", 1) != 1:
            return func(*args, **kwargs)
        dim = x.dim() - 1 if func is F.layer_norm else 1
        given |= {"input": x.index_select(dim, keep), "weight": given["weight"][keep]}
        given |= {"bias": given["bias"][keep]} if given.get("bias") is not None else {}
        given |= {"normalized_shape": [len(keep)]} if func is F.layer_norm else {}
        return torch.zeros_like(x).index_copy(dim, keep, func(**given))
