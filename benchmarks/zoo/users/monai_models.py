"""monai: segmentation, classification, registration and generation in two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.users.model import Model, Size, sized

FLAT: tuple[Size, ...] = ((64, 64), (96, 64), (96, 96))
CUBE: tuple[Size, ...] = ((32, 32, 32), (48, 32, 32))
LARGE: tuple[Size, ...] = ((64, 64, 64), (96, 64, 64))
IO = {"in_channels": 1, "out_channels": 3}
STEPS = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2)}


def _build(name: str, **options: Any) -> nn.Module:
    from monai.networks import nets

    return getattr(nets, name)(**options)


def _dynunet(spatial_dims: int, **options: Any) -> nn.Module:
    return _build("DynUNet", spatial_dims=spatial_dims, **IO, kernel_size=[3] * 4, strides=[1, 2, 2, 2],
                  upsample_kernel_size=[2] * 3, filters=[16, 32, 64, 128], **options)  # fmt: skip


def _resnet(spatial_dims: int, block: str = "basic") -> nn.Module:
    return _build("ResNet", block=block, layers=[2, 2, 2, 2], block_inplanes=[32, 64, 128, 256],
                  spatial_dims=spatial_dims, n_input_channels=1, num_classes=5)  # fmt: skip


def _timed(batch: int, size: Size) -> dict[str, Any]:
    return {"x": sized(1)(batch, size), "timesteps": torch.arange(batch) + 3}


def _plain(
    name: str, sizes: tuple[Size, ...], family: str, kind: str = "cnn", *, eats: int = 1, **options: Any
) -> Model:
    return Model(partial(_build, name, **options), family, kind, sizes, sized(eats))


def _of(
    build: Callable[[], nn.Module], sizes: tuple[Size, ...], family: str, kind: str = "cnn", eats: int = 1
) -> Model:
    return Model(build, family, kind, sizes, sized(eats))


VIT = {"hidden_size": 96, "mlp_dim": 384, "num_heads": 4}
MODELS = {
    "UNet-2d": _plain("UNet", FLAT, "unet", spatial_dims=2, **IO, **STEPS, num_res_units=2),
    "UNet-3d": _plain("UNet", CUBE, "unet", spatial_dims=3, **IO, **STEPS, num_res_units=2, norm="batch"),
    "UNet-3d-plain": _plain("UNet", CUBE, "unet", spatial_dims=3, **IO, **STEPS),
    "BasicUNet-2d": _plain("BasicUNet", FLAT, "basic_unet", spatial_dims=2, **IO),
    "BasicUNet-3d": _plain("BasicUNet", CUBE, "basic_unet", spatial_dims=3, **IO, features=(16, 16, 32, 64, 128, 16)),
    "BasicUNetPlusPlus": _plain("BasicUNetPlusPlus", FLAT, "basic_unet_plus_plus", spatial_dims=2, **IO),
    "DynUNet-2d": _of(lambda: _dynunet(2), FLAT, "dynunet"),
    "DynUNet-3d": _of(lambda: _dynunet(3, res_block=True), CUBE, "dynunet"),
    "DynUNet-deep-supervision": _of(lambda: _dynunet(2, deep_supervision=True, deep_supr_num=2), FLAT, "dynunet"),
    "SegResNet-2d": _plain("SegResNet", FLAT, "segresnet", spatial_dims=2, init_filters=16, **IO),
    "SegResNet-3d": _plain("SegResNet", CUBE, "segresnet", spatial_dims=3, init_filters=16, **IO),
    "SegResNetDS": _plain("SegResNetDS", CUBE, "segresnet", spatial_dims=3, init_filters=16, **IO, dsdepth=2),
    "SegResNetVAE": _plain("SegResNetVAE", ((32, 32, 32),), "segresnet", input_image_size=(32, 32, 32), init_filters=16,
                           **IO),
    "AttentionUnet-2d": _plain("AttentionUnet", FLAT, "attention_unet", spatial_dims=2, **IO, **STEPS),
    "AttentionUnet-3d": _plain("AttentionUnet", CUBE, "attention_unet", spatial_dims=3, **IO, **STEPS),
    "VNet-2d": _plain("VNet", FLAT, "vnet", spatial_dims=2, **IO, dropout_dim=2),
    "VNet-3d": _plain("VNet", CUBE, "vnet", spatial_dims=3, **IO),
    "UNETR-2d": _plain("UNETR", ((64, 64),), "unetr", "hybrid", img_size=64, spatial_dims=2, **IO, **VIT),
    "UNETR-3d": _plain("UNETR", ((32, 32, 32),), "unetr", "hybrid", img_size=32, **IO, **VIT),
    "SwinUNETR-2d": _plain("SwinUNETR", FLAT, "swin_unetr", "hybrid", spatial_dims=2, **IO),
    "SwinUNETR-3d": _plain("SwinUNETR", ((64, 32, 32), (64, 64, 32)), "swin_unetr", "hybrid", spatial_dims=3, **IO,
                           feature_size=12),
    "DenseNet121-2d": _plain("DenseNet121", FLAT, "densenet", spatial_dims=2, **IO),
    "DenseNet121-3d": _plain("DenseNet121", CUBE, "densenet", spatial_dims=3, **IO, init_features=32, growth_rate=16),
    "ResNet-2d": _of(lambda: _resnet(2, "bottleneck"), FLAT, "resnet"),
    "ResNet-3d": _of(lambda: _resnet(3), CUBE, "resnet"),
    "SEResNet50-2d": _plain("SEResNet50", FLAT, "senet", spatial_dims=2, in_channels=1, num_classes=3),
    "EfficientNetBN-2d": _plain("EfficientNetBN", FLAT, "efficientnet", eats=3, model_name="efficientnet-b0",
                                pretrained=False, num_classes=5),
    "EfficientNetBN-3d": _plain("EfficientNetBN", CUBE, "efficientnet", model_name="efficientnet-b0", spatial_dims=3,
                                pretrained=False, in_channels=1, num_classes=5),
    "HighResNet-2d": _plain("HighResNet", FLAT, "highresnet", spatial_dims=2, **IO),
    "HighResNet-3d": _plain("HighResNet", ((24, 24, 24), (32, 24, 24)), "highresnet", spatial_dims=3, **IO),
    "FlexibleUNet": _plain("FlexibleUNet", FLAT, "flexible_unet", eats=3, in_channels=3, out_channels=3,
                           backbone="efficientnet-b0"),
    "AHNet": _plain("AHNet", LARGE, "ahnet", spatial_dims=3, layers=(2, 2, 2, 2), psp_block_num=2),
    "MedNeXt": _plain("MedNeXt", CUBE, "mednext", init_filters=16, **IO, kernel_size=3),
    "ViT": _plain("ViT", ((64, 64),), "vit", "transformer", in_channels=1, img_size=64, patch_size=8, spatial_dims=2,
                  num_layers=6, classification=True, num_classes=5, **VIT),
    "ViTAutoEnc": _plain("ViTAutoEnc", ((64, 64),), "vit", "transformer", in_channels=1, img_size=64, patch_size=4,
                         spatial_dims=2, num_layers=6, **VIT),
    "AutoEncoder": _plain("AutoEncoder", FLAT, "autoencoder", spatial_dims=2, **IO, channels=(16, 32, 64),
                          strides=(2, 2, 2), num_res_units=2, inter_channels=[64, 64]),
    "VarAutoEncoder": _plain("VarAutoEncoder", ((32, 32),), "autoencoder", spatial_dims=2, in_shape=(1, 32, 32),
                             out_channels=1, latent_size=16, channels=(16, 32, 64), strides=(2, 2, 2),
                             use_mean_at_inference=True),
    "RegUNet": _plain("RegUNet", FLAT, "regunet", eats=2, spatial_dims=2, in_channels=2, num_channel_initial=16,
                      depth=3, out_channels=2),
    "LocalNet": _plain("LocalNet", FLAT, "regunet", eats=2, spatial_dims=2, in_channels=2, num_channel_initial=16,
                       extract_levels=(0, 1, 2, 3), out_channels=2),
    "VoxelMorphUNet": _of(
        lambda: _build("VoxelMorphUNet", spatial_dims=2, in_channels=2, unet_out_channels=32, channels=(16, 32, 32, 32,
                       32, 32), final_conv_channels=(16, 16)), FLAT, "voxelmorph", eats=2),
    "PatchDiscriminator": _of(lambda: _build("PatchDiscriminator", spatial_dims=2, channels=32, in_channels=1), FLAT,
                              "discriminator"),
    "AutoencoderKL": _of(lambda: _build("AutoencoderKL", spatial_dims=2), FLAT, "autoencoder_kl"),
    "VQVAE": _of(lambda: _build("VQVAE", spatial_dims=2, in_channels=1, out_channels=1), FLAT, "vqvae"),
    "DiffusionModelUNet": Model(lambda: _build("DiffusionModelUNet", spatial_dims=2, in_channels=1, out_channels=1),
                                "diffusion_unet", "hybrid", ((32, 32), (48, 32)), _timed),
}  # fmt: skip
