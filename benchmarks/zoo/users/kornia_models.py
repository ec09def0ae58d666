"""kornia: local features, matching, edges, faces, restoration and vision transformers that build without a download."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.users.model import Model, Size, images, sized

PATCH: tuple[Size, ...] = ((32, 32),)
IMAGE: tuple[Size, ...] = ((64, 64), (96, 64), (96, 96))
GREY = sized(1)


def _build(module: str, name: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(f"kornia.{module}"), name)(**options)


def _feature(name: str, sizes: tuple[Size, ...] = PATCH, inputs: Any = GREY, **options: Any) -> Model:
    return Model(partial(_build, "feature", name, pretrained=False, **options), name.lower(), "cnn", sizes, inputs)


def _model(module: str, name: str, kind: str = "cnn", sizes: tuple[Size, ...] = IMAGE, **options: Any) -> Model:
    return Model(partial(_build, f"models.{module}", name, **options), name.lower(), kind, sizes)


class Dense(nn.Module):
    """DISK's maps, before it picks keypoints by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = _build("feature", "DISK")

    def forward(self, x: Tensor) -> Any:
        """Heat map and descriptors."""
        return self.disk.heatmap_and_dense_descriptors(x)


def _loftr() -> nn.Module:
    from kornia.feature.loftr.loftr import default_cfg

    coarse = {**default_cfg["coarse"], "layer_names": ["self", "cross"], "d_model": 128, "d_ffn": 128}
    fine = {**default_cfg["fine"], "d_model": 64, "d_ffn": 64}
    resnet = {"initial_dim": 64, "block_dims": [64, 96, 128]}
    match = {**default_cfg["match_coarse"], "thr": 0.0, "border_rm": 0}
    config = {**default_cfg, "coarse": coarse, "fine": fine, "resnetfpn": resnet, "match_coarse": match}
    return _build("feature", "LoFTR", pretrained=None, config=config)


def _pair(batch: int, size: Size) -> tuple[dict[str, Tensor]]:
    return ({"image0": GREY(batch, size), "image1": GREY(batch, size).flip(0)},)


def _rt_detr() -> nn.Module:
    from kornia.models.rt_detr import RTDETR, RTDETRConfig

    return RTDETR.from_config(RTDETRConfig("resnet18d", 10, head_num_queries=20, head_num_decoder_layers=2))


def _siglip() -> nn.Module:
    from kornia.models.siglip2.config import SigLip2VisionConfig

    config = SigLip2VisionConfig(64, 8, 3, 192, 6, 3, 768)
    return _build("models.siglip2.vision_encoder", "SigLip2VisionModel", config=config)


VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
EV = "efficient_vit.backbone"
MODELS = {
    "HardNet": _feature("HardNet"),
    "HardNet8": _feature("HardNet8"),
    "HyNet": _feature("HyNet"),
    "SOSNet": _feature("SOSNet"),
    "TFeat": _feature("TFeat"),
    "OriNet": _feature("OriNet"),
    "KeyNet": _feature("KeyNet", IMAGE),
    "SOLD2_detector": _feature("SOLD2_detector", IMAGE),
    "DeFMO": _feature("DeFMO", ((64, 64), (128, 64)), sized(6)),
    "XFeatModel": Model(partial(_build, "feature", "XFeatModel"), "xfeat", "cnn", IMAGE),
    "DISK": Model(Dense, "disk", "cnn", IMAGE),
    "LoFTR": Model(_loftr, "loftr", "hybrid", ((64, 64), (96, 64)), _pair),
    "DexiNed": _model("dexined", "DexiNed", pretrained=False),
    "RRDBNet": _model("rrdbnet", "RRDBNet", sizes=((32, 32), (48, 32)), num_in_ch=3, num_out_ch=3, num_block=3),
    "SmallSRNet": Model(partial(_build, "models.small_sr", "SmallSRNet", upscale_factor=3, pretrained=False),
                        "small_sr", "cnn", ((32, 32), (48, 32)), GREY),
    "YuNet": _model("yunet.model", "YuNet", phase="test", pretrained=False),
    "EfficientViT-b0": _model(EV, "efficientvit_backbone_b0", "hybrid"),
    "EfficientViT-l0": _model(EV, "efficientvit_backbone_l0", "hybrid"),
    "MobileViT": _model("vit_mobile", "MobileViT", "hybrid", ((256, 256),), mode="xxs"),
    "TinyViT": _model("tiny_vit", "TinyViT", "hybrid", ((64, 64),), img_size=64, embed_dims=(48, 96, 144, 192),
                      depths=(1, 2, 2, 1), num_heads=(2, 3, 6, 6), window_sizes=(4, 4, 4, 4), num_classes=10),
    "VisionTransformer": _model("vit", "VisionTransformer", "transformer", ((64, 64),), image_size=64, patch_size=8,
                                embed_dim=192, depth=6, num_heads=3),
    "SamImageEncoder": _model("sam.architecture.image_encoder", "ImageEncoderViT", "transformer", ((64, 64),), **VIT,
                              out_chans=64, window_size=4, global_attn_indexes=(2, 5), use_rel_pos=True),
    "SigLip2VisionModel": Model(_siglip, "siglip2", "transformer", ((64, 64), (96, 64))),
    "RTDETR-resnet18d": Model(_rt_detr, "rtdetr", "hybrid", ((64, 64), (96, 64)), images),
}  # fmt: skip
