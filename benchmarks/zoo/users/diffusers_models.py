"""diffusers: U-Nets, autoencoders, control networks and diffusion transformers from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.users.model import Model, Size, sized

WIDTHS = {"block_out_channels": (64, 128, 128)}
DOWN, UP = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", *2 * ("CrossAttnUpBlock2D",))
UNET = {**WIDTHS, "cross_attention_dim": 96, "attention_head_dim": 4}
VAE = {**WIDTHS, "layers_per_block": 2, "sample_size": 32}
COUPLED = {"down_block_types": 3 * ("DownEncoderBlock2D",), "up_block_types": 3 * ("UpDecoderBlock2D",)}
DIT = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6, "sample_size": 16}


def _build(name: str, **options: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**options)


def _noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _timed(channels: int) -> Callable[[int, Size], Any]:
    """Noisy samples and a time."""
    return lambda batch, size: {"sample": sized(channels)(batch, size), "timestep": torch.tensor(7)}


def _text(batch: int, size: Size) -> dict[str, Any]:
    """Latents, a time, seven tokens of text."""
    return {**_timed(4)(batch, size), "encoder_hidden_states": _noise(batch, 7, 96)}


def _video(batch: int, size: Size) -> dict[str, Any]:
    return {**_text(batch, (3, *size))}


def _control(batch: int, size: Size) -> dict[str, Any]:
    return {**_text(batch, size), "controlnet_cond": _noise(batch, 3, *(8 * side for side in size))}


def _classes(batch: int, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": sized(4)(batch, size),
        "timestep": torch.arange(batch) + 5,
        "class_labels": torch.arange(batch),
    }


def _tokens(batch: int, size: Size) -> dict[str, Any]:
    return {
        "hidden_states": sized(4)(batch, size),
        "timestep": torch.arange(batch) + 5,
        "encoder_hidden_states": _noise(batch, 7, 96),
    }


def _pixart(batch: int, size: Size) -> dict[str, Any]:
    return {**_tokens(batch, size), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sd3(batch: int, size: Size) -> dict[str, Any]:
    return {**_tokens(batch, size), "pooled_projections": _noise(batch, 64, seed=3)}


def _flux(batch: int, size: Size) -> dict[str, Any]:
    tokens = size[0]
    return {
        "hidden_states": _noise(batch, tokens, 16), "encoder_hidden_states": _noise(batch, 7, 96, seed=3),
        "pooled_projections": _noise(batch, 64, seed=4), "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.arange(tokens)[:, None].repeat(1, 3).float(), "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip


LATENT: tuple[Size, ...] = ((16, 16), (24, 16))
IMAGE: tuple[Size, ...] = ((32, 32), (48, 32))
MODELS = {
    "UNet2DModel": Model(
        partial(_build, "UNet2DModel", **WIDTHS, sample_size=32, down_block_types=("DownBlock2D", "DownBlock2D",
                "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")),
        "unet", "hybrid", IMAGE, _timed(3)),
    "UNet2DModel-plain": Model(
        partial(_build, "UNet2DModel", **WIDTHS, sample_size=32, down_block_types=3 * ("DownBlock2D",),
                up_block_types=3 * ("UpBlock2D",), add_attention=False), "unet", "cnn", IMAGE, _timed(3)),
    "UNet2DModel-scale-shift": Model(
        partial(_build, "UNet2DModel", **WIDTHS, sample_size=32, resnet_time_scale_shift="scale_shift",
                down_block_types=3 * ("ResnetDownsampleBlock2D",), up_block_types=3 * ("ResnetUpsampleBlock2D",),
                add_attention=False), "unet", "cnn", IMAGE, _timed(3)),
    "UNet1DModel": Model(
        partial(_build, "UNet1DModel", sample_size=256, extra_in_channels=64),
        "unet1d", "hybrid", ((256,), (384,)), _timed(2)),
    "UNet2DConditionModel": Model(
        partial(_build, "UNet2DConditionModel", **UNET, sample_size=16, down_block_types=DOWN, up_block_types=UP),
        "unet_condition", "hybrid", LATENT, _text),
    "UNet2DConditionModel-linear": Model(
        partial(_build, "UNet2DConditionModel", **UNET, sample_size=16, down_block_types=DOWN, up_block_types=UP,
                use_linear_projection=True), "unet_condition", "hybrid", LATENT, _text),
    "UNet3DConditionModel": Model(
        partial(_build, "UNet3DConditionModel", **WIDTHS, cross_attention_dim=96, attention_head_dim=32,
                down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D")),
        "unet3d", "hybrid", LATENT, _video),
    "ControlNetModel": Model(
        partial(_build, "ControlNetModel", **UNET, down_block_types=DOWN), "controlnet", "hybrid", LATENT, _control),
    "AutoencoderKL": Model(partial(_build, "AutoencoderKL", **VAE, **COUPLED), "autoencoder_kl", "cnn", IMAGE),
    "AutoencoderKL-no-attention": Model(
        partial(_build, "AutoencoderKL", **VAE, **COUPLED, mid_block_add_attention=False), "autoencoder_kl", "cnn",
        IMAGE),
    "AsymmetricAutoencoderKL": Model(
        partial(_build, "AsymmetricAutoencoderKL", **COUPLED, down_block_out_channels=(64, 128, 128),
                layers_per_down_block=2, up_block_out_channels=(96, 128, 128), layers_per_up_block=2),
        "autoencoder_kl", "cnn", IMAGE),
    "AutoencoderTiny": Model(partial(_build, "AutoencoderTiny"), "autoencoder_tiny", "cnn", IMAGE),
    "AutoencoderDC": Model(
        partial(_build, "AutoencoderDC", latent_channels=8, attention_head_dim=16,
                encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(32, 64, 128), decoder_block_out_channels=(32, 64, 128),
                encoder_layers_per_block=(2, 2, 2), decoder_layers_per_block=(2, 2, 2),
                encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
                downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle"),
        "autoencoder_dc", "hybrid", IMAGE),
    "VQModel": Model(partial(_build, "VQModel", **VAE, **COUPLED, num_vq_embeddings=64), "vq_model", "cnn", IMAGE),
    "T2IAdapter": Model(
        partial(_build, "T2IAdapter", channels=[64, 96, 128, 128]), "t2i_adapter", "cnn", ((64, 64), (128, 64))),
    "AutoencoderOobleck": Model(
        partial(_build, "AutoencoderOobleck", encoder_hidden_size=32, downsampling_ratios=[2, 4, 4],
                channel_multiples=[1, 2, 4], decoder_channels=32, decoder_input_channels=16),
        "autoencoder_audio", "cnn", ((512,), (768,)), sized(2)),
    "DiTTransformer2DModel": Model(
        partial(_build, "DiTTransformer2DModel", **DIT, num_embeds_ada_norm=10),
        "dit", "transformer", LATENT, _classes),
    "PixArtTransformer2DModel": Model(
        partial(_build, "PixArtTransformer2DModel", **DIT, cross_attention_dim=128, caption_channels=96),
        "pixart", "transformer", LATENT, _pixart),
    "SanaTransformer2DModel": Model(
        partial(_build, "SanaTransformer2DModel", in_channels=4, out_channels=4, **DIT, num_cross_attention_heads=4,
                cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=96),
        "sana", "hybrid", LATENT, _tokens),
    "SD3Transformer2DModel": Model(
        partial(_build, "SD3Transformer2DModel", **DIT, in_channels=4, out_channels=4, joint_attention_dim=96,
                caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=24),
        "sd3", "transformer", LATENT, _sd3),
    "FluxTransformer2DModel": Model(
        partial(_build, "FluxTransformer2DModel", in_channels=16, num_layers=2, num_single_layers=4,
                attention_head_dim=32, num_attention_heads=4, joint_attention_dim=96, pooled_projection_dim=64,
                axes_dims_rope=(8, 12, 12)), "flux", "transformer", ((24,), (40,)), _flux),
}  # fmt: skip
