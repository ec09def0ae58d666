"""segmentation_models_pytorch: every decoder with several encoders, and one decoder with many."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.zoo.users.model import Model

DECODERS = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer"
ENCODERS = "resnet18 mobilenet_v2 efficientnet-b0"
#: Only with one of the decoders.
MORE = {
    "Unet": "resnet34 resnext50_32x4d se_resnet50 densenet121 vgg11_bn dpn68 xception inceptionv4 timm-skresnet18 "
    "timm-efficientnet-b0 timm-tf_efficientnet_lite0 mobileone_s0 mit_b0 tu-mobilenetv3_small_100 tu-regnety_002 "
    "tu-convnext_atto tu-resnest14d",
    "MAnet": "mit_b0 densenet121",
    "FPN": "mit_b0 tu-mobilenetv3_small_100",
    "PSPNet": "mit_b0 densenet121 timm-efficientnet-b0",
    "UPerNet": "mit_b0 tu-convnext_atto",
    "Segformer": "mit_b0",
    "DeepLabV3Plus": "tu-mobilenetv3_small_100 se_resnet50",
    "DPT": "tu-vit_tiny_patch16_224 tu-deit_tiny_patch16_224",
}
TRANSFORMERS = ("mit_", "tu-vit", "tu-deit")


def _build(decoder: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    options = {"dynamic_img_size": True} if decoder == "DPT" else {}
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=5, **options)


def _model(decoder: str, encoder: str) -> Model:
    kind = "hybrid" if encoder.startswith(TRANSFORMERS) else "cnn"
    sizes = ((128, 128), (160, 128), (192, 192)) if decoder == "PAN" else ((64, 64), (96, 64), (96, 96))
    return Model(partial(_build, decoder, encoder), decoder, kind, sizes)


MODELS = {
    f"{decoder}-{encoder}": _model(decoder, encoder)
    for decoder in [*DECODERS.split(), "DPT"]
    for encoder in f"{ENCODERS if decoder != 'DPT' else ''} {MORE.get(decoder, '')}".split()
}
