"""transformers: vision, audio and video models from small configurations, of their usual proportions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.users.model import Model, Size, images, sized

Options = dict[str, Any]
IMAGE: tuple[Size, ...] = ((64, 64), (96, 64), (96, 96))
LARGE: tuple[Size, ...] = ((128, 128), (160, 128), (160, 160))
VIT: Options = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 64,
    "patch_size": 8, "num_labels": 10,
}  # fmt: skip
#: A pyramid in four stages.
WIDTHS: Options = {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 4, 2], "num_labels": 10}
MIX: Options = {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "num_labels": 10}
SWIN: Options = {"image_size": 64, "embed_dim": 48, "depths": [2, 2, 2], "num_heads": [3, 6, 12], "window_size": 4,
                 "num_labels": 10}  # fmt: skip
RES: Options = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "num_labels": 10}
BIT: Options = {**RES, "hidden_sizes": [128, 256, 512, 512]}  # group norms of 32 groups
DETR: Options = {
    "d_model": 128, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "num_labels": 10,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "num_queries": 20,
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip
SPEECH: Options = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768,
    "conv_dim": (128,) * 7, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
    "mask_time_length": 4, "ctc_zero_infinity": True, "layerdrop": 0.0,
}  # fmt: skip
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}


def _config(name: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}Config")(**options)


def _build(config: str, model: str, **options: Any) -> nn.Module:
    """A model; options named ``*_config`` are a configuration's name and its options."""
    import transformers

    nested = {k: _config(v[0], **v[1]) for k, v in options.items() if k.endswith("_config")}
    built = getattr(transformers, model)(_config(config, **{**options, **nested}))
    return built.float()


def _model(
    config: str, model: str, kind: str, sizes: tuple[Size, ...] = IMAGE, inputs: Any = images, **options: Any
) -> Model:
    return Model(partial(_build, config, model, **options), config.lower(), kind, sizes, inputs)


def _frames(batch: int, size: Size) -> Tensor:
    """Videos: (batch, frames, channels, height, width)."""
    return images(batch, size).transpose(1, 2)


def _wave(batch: int, size: Size) -> Tensor:
    return sized(1)(batch, size)[:, 0]


def _mapped(batch: int, size: Size) -> dict[str, Tensor]:
    return {"pixel_values": images(batch, size)}


def _noisy(batch: int, size: Size) -> dict[str, Tensor]:
    """Images, and for each patch of 8 pixels the number that decides whether it is hidden."""
    return {"pixel_values": images(batch, size), "noise": sized(1)(batch, (size[0] * size[1] // 64,))[:, 0]}


def _masked(batch: int, size: Size) -> dict[str, Tensor]:
    return {"pixel_values": images(batch, size), "pixel_mask": torch.ones(batch, *size, dtype=torch.long)}


RESNET = ("ResNet", {**RES, "layer_type": "basic", "out_features": ["stage4"]})
SWIN4: Options = {**SWIN, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 12]}
PIXELS: tuple[Size, ...] = ((64, 64),)
MODELS = {
    "vit": _model("ViT", "ViTForImageClassification", "transformer", **VIT),
    "deit": _model("DeiT", "DeiTForImageClassification", "transformer", **VIT),
    "vit_mae": _model("ViTMAE", "ViTMAEForPreTraining", "transformer", PIXELS, _noisy, **VIT, decoder_hidden_size=128,
                      decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=512),
    "ijepa": _model("IJepa", "IJepaForImageClassification", "transformer", **VIT),
    "dinov2": _model("Dinov2", "Dinov2ForImageClassification", "transformer", **VIT),
    "dinov2_with_registers": _model("Dinov2WithRegisters", "Dinov2WithRegistersForImageClassification", "transformer",
                                    **VIT),
    "dinov3_vit": _model("DINOv3ViT", "DINOv3ViTModel", "transformer", **VIT),
    "clip_vision": _model("CLIPVision", "CLIPVisionModel", "transformer", **VIT),
    "siglip_vision": _model("SiglipVision", "SiglipVisionModel", "transformer", **VIT),
    "yolos": _model("Yolos", "YolosForObjectDetection", "transformer", **{**VIT, "image_size": [64, 64]},
                    num_detection_tokens=20),
    "beit": _model("Beit", "BeitForImageClassification", "transformer", **VIT, use_relative_position_bias=True),
    "data2vec_vision": _model("Data2VecVision", "Data2VecVisionForImageClassification", "transformer", **VIT,
                              use_relative_position_bias=True),
    "vitdet": _model("VitDet", "VitDetModel", "transformer", **VIT, window_size=4, window_block_indices=[0, 1, 3, 4]),
    "sam_vision": _model("SamVision", "SamVisionModel", "transformer", PIXELS, **VIT, mlp_dim=768, output_channels=64,
                         window_size=4, global_attn_indexes=[2, 5]),
    "segformer": _model("Segformer", "SegformerForSemanticSegmentation", "hybrid", num_labels=10),
    "segformer-classifier": _model("Segformer", "SegformerForImageClassification", "hybrid", num_labels=10),
    "glpn": _model("GLPN", "GLPNForDepthEstimation", "hybrid"),
    "pvt": _model("Pvt", "PvtForImageClassification", "transformer", image_size=64, **MIX),
    "pvt_v2": _model("PvtV2", "PvtV2ForImageClassification", "hybrid", image_size=64, num_labels=10),
    "pvt_v2-linear": _model("PvtV2", "PvtV2ForImageClassification", "hybrid", image_size=64, linear_attention=True,
                            num_labels=10),
    "swin": _model("Swin", "SwinForImageClassification", "transformer", **SWIN),
    "swinv2": _model("Swinv2", "Swinv2ForImageClassification", "transformer", **SWIN),
    "swin2sr": _model("Swin2SR", "Swin2SRForImageSuperResolution", "transformer", image_size=32, embed_dim=60,
                      depths=[2, 2, 2], num_heads=[6, 6, 6], window_size=8, upscale=2),
    "focalnet": _model("FocalNet", "FocalNetForImageClassification", "hybrid", image_size=64, embed_dim=48,
                       depths=[2, 2, 4, 2], num_labels=10, use_conv_embed=True),
    "convnext": _model("ConvNext", "ConvNextForImageClassification", "cnn", **WIDTHS),
    "convnextv2": _model("ConvNextV2", "ConvNextV2ForImageClassification", "cnn", **WIDTHS),
    "dinov3_convnext": _model("DINOv3ConvNext", "DINOv3ConvNextModel", "cnn", **WIDTHS),
    "resnet": _model("ResNet", "ResNetForImageClassification", "cnn", **RES, layer_type="basic"),
    "resnet-bottleneck": _model("ResNet", "ResNetForImageClassification", "cnn", **RES),
    "regnet": _model("RegNet", "RegNetForImageClassification", "cnn", embedding_size=32, groups_width=16,
                     hidden_sizes=[32, 64, 160, 384], depths=[1, 1, 3, 4], num_labels=10),
    "regnet-x": _model("RegNet", "RegNetForImageClassification", "cnn", embedding_size=32, groups_width=16,
                       hidden_sizes=[32, 64, 160, 384], depths=[1, 1, 3, 4], layer_type="x", num_labels=10),
    "bit": _model("Bit", "BitForImageClassification", "cnn", **BIT),
    "bit-bottleneck": _model("Bit", "BitForImageClassification", "cnn", **BIT, layer_type="bottleneck"),
    "mobilenet_v1": _model("MobileNetV1", "MobileNetV1ForImageClassification", "cnn", num_labels=10),
    "mobilenet_v2": _model("MobileNetV2", "MobileNetV2ForImageClassification", "cnn", num_labels=10),
    "mobilenet_v2-deeplab": _model("MobileNetV2", "MobileNetV2ForSemanticSegmentation", "cnn", LARGE, num_labels=10),
    "efficientnet": _model("EfficientNet", "EfficientNetForImageClassification", "cnn", width_coefficient=1.0,
                           depth_coefficient=1.0, hidden_dim=1280, image_size=64, num_labels=10),
    "hgnet_v2": _model("HGNetV2", "HGNetV2ForImageClassification", "cnn", num_labels=10),
    "pp_lcnet": _model("PPLCNet", "PPLCNetForImageClassification", "cnn", num_labels=10),
    "textnet": _model("TextNet", "TextNetForImageClassification", "cnn", num_labels=10),
    "superpoint": _model("SuperPoint", "SuperPointForKeypointDetection", "cnn", ((64, 64), (96, 64))),
    "mobilevit": _model("MobileViT", "MobileViTForImageClassification", "hybrid", image_size=64, num_labels=10),
    "mobilevit-deeplab": _model("MobileViT", "MobileViTForSemanticSegmentation", "hybrid", LARGE, num_labels=10),
    "mobilevitv2": _model("MobileViTV2", "MobileViTV2ForImageClassification", "hybrid", image_size=64, num_labels=10),
    "poolformer": _model("PoolFormer", "PoolFormerForImageClassification", "hybrid", **MIX),
    "swiftformer": _model("SwiftFormer", "SwiftFormerForImageClassification", "hybrid", image_size=64,
                          embed_dims=[48, 56, 112, 220], depths=[2, 2, 3, 2], num_labels=10),
    "levit": _model("Levit", "LevitForImageClassification", "hybrid", ((128, 128),), image_size=128, num_labels=10),
    "cvt": _model("Cvt", "CvtForImageClassification", "hybrid", embed_dim=[32, 96, 192], depth=[1, 2, 4],
                  num_labels=10),
    "hiera": _model("Hiera", "HieraForImageClassification", "transformer", PIXELS, image_size=[64, 64], embed_dim=48,
                    depths=[1, 2, 3, 2], num_labels=10),
    "dpt": _model("DPT", "DPTForSemanticSegmentation", "hybrid", **VIT, is_hybrid=False,
                  backbone_out_indices=[0, 2, 4, 5], neck_hidden_sizes=[48, 96, 192, 192], fusion_hidden_size=64),
    "depth_anything": _model(
        "DepthAnything", "DepthAnythingForDepthEstimation", "hybrid", patch_size=8, reassemble_hidden_size=192,
        neck_hidden_sizes=[48, 96, 192, 192], fusion_hidden_size=64, head_in_index=-1,
        backbone_config=("Dinov2", {**VIT, "out_indices": [1, 2, 4, 6], "reshape_hidden_states": False})),
    "vitmatte": _model(
        "VitMatte", "VitMatteForImageMatting", "hybrid", ((64, 64), (96, 64)), sized(4), hidden_size=192,
        convstream_hidden_sizes=[48, 96, 192], fusion_hidden_sizes=[256, 128, 64, 32],
        backbone_config=("VitDet", {**VIT, "num_channels": 4, "patch_size": 16, "window_size": 2,
                                    "window_block_indices": [0, 1, 3, 4], "out_features": ["stage6"]})),
    "vitpose": _model("VitPose", "VitPoseForPoseEstimation", "transformer", PIXELS, use_simple_decoder=False,
                      backbone_config=("VitPoseBackbone", {**VIT, "image_size": [64, 64], "patch_size": [8, 8],
                                                           "out_indices": [6]}), num_labels=17),
    "upernet": _model("UperNet", "UperNetForSemanticSegmentation", "cnn", hidden_size=96, auxiliary_in_channels=192,
                      auxiliary_channels=64, num_labels=10, backbone_config=("ConvNext", {**WIDTHS, **STAGES})),
    "upernet-swin": _model("UperNet", "UperNetForSemanticSegmentation", "hybrid", hidden_size=96, num_labels=10,
                           auxiliary_in_channels=192, auxiliary_channels=64,
                           backbone_config=("Swin", {**SWIN4, **STAGES})),
    "detr": _model("Detr", "DetrForObjectDetection", "hybrid", LARGE, _mapped, **DETR, backbone_config=RESNET),
    "detr-segmentation": _model("Detr", "DetrForSegmentation", "hybrid", LARGE, _mapped,
                                **{**DETR, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
                                backbone_config=("ResNet", {**RES, "layer_type": "basic", **STAGES})),
    "conditional_detr": _model("ConditionalDetr", "ConditionalDetrForObjectDetection", "hybrid", LARGE, _mapped, **DETR,
                               backbone_config=RESNET),
    "table_transformer": _model("TableTransformer", "TableTransformerForObjectDetection", "hybrid", LARGE, _masked,
                                **DETR, backbone_config=RESNET),
    "deformable_detr": _model(
        "DeformableDetr", "DeformableDetrForObjectDetection", "hybrid", LARGE, _mapped, **DETR,
        backbone_config=("ResNet", {**RES, "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]})),
    "rt_detr": _model(
        "RTDetr", "RTDetrForObjectDetection", "hybrid", LARGE, _mapped, d_model=128, encoder_hidden_dim=128,
        encoder_ffn_dim=512, decoder_ffn_dim=512, decoder_layers=3, encoder_attention_heads=4, num_queries=20,
        decoder_attention_heads=4, num_denoising=0, encoder_in_channels=[128, 256, 512], decoder_in_channels=[128] * 3,
        backbone_config=("RTDetrResNet", {**RES, "layer_type": "basic", "out_features": ["stage2", "stage3",
                                                                                         "stage4"]})),
    "maskformer": _model("MaskFormer", "MaskFormerForInstanceSegmentation", "hybrid", LARGE, _mapped,
                         fpn_feature_size=64, mask_feature_size=64, backbone_config=("Swin", {**SWIN4, **STAGES}),
                         decoder_config=("Detr", DETR)),
    "mask2former": _model("Mask2Former", "Mask2FormerForUniversalSegmentation", "hybrid", LARGE, _mapped,
                          feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=256,
                          dim_feedforward=256, encoder_layers=2, decoder_layers=3, num_attention_heads=4,
                          num_queries=20, backbone_config=("Swin", {**SWIN4, **STAGES})),
    "videomae": _model("VideoMAE", "VideoMAEForVideoClassification", "transformer", ((4, 64, 64),), _frames, **VIT,
                       num_frames=4),
    "timesformer": _model("Timesformer", "TimesformerForVideoClassification", "transformer", ((4, 64, 64),), _frames,
                          **VIT, num_frames=4),
    "wav2vec2": _model("Wav2Vec2", "Wav2Vec2ForCTC", "hybrid", ((4000,), (6000,)), _wave, **SPEECH),
    "wav2vec2-layer-norm": _model("Wav2Vec2", "Wav2Vec2ForCTC", "hybrid", ((4000,), (6000,)), _wave, **SPEECH,
                                  feat_extract_norm="layer", do_stable_layer_norm=True),
    "hubert": _model("Hubert", "HubertForCTC", "hybrid", ((4000,), (6000,)), _wave, **SPEECH),
    "ast": _model("AST", "ASTForAudioClassification", "transformer", ((128, 64),), _wave, **VIT, max_length=128,
                  num_mel_bins=64, frequency_stride=8, time_stride=8),
    "encodec": _model("Encodec", "EncodecModel", "other", ((960,), (1280,)), sized(1), num_filters=16, hidden_size=64,
                      upsampling_ratios=[4, 4, 2], codebook_size=64, codebook_dim=64, target_bandwidths=[1.5],
                      sampling_rate=3200, num_lstm_layers=1),
    "dac": _model("Dac", "DacModel", "cnn", ((1024,), (1536,)), sized(1), encoder_hidden_size=32, n_codebooks=2,
                  downsampling_ratios=[2, 4, 8], decoder_hidden_size=256, codebook_size=64, codebook_dim=8,
                  upsampling_ratios=[8, 4, 2], hidden_size=256),
}  # fmt: skip
