"""pytorchcv: one small model each of many families of convolutional networks."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.zoo.users.model import Model, Size

FAMILIES = (
    "airnet50_1x64d_r2 alexnet bagnet9 bam_resnet50 bn_vgg11 cbam_resnet18 darknet_tiny diaresnet18 "
    "dicenet_wd5 diracnet18v2 dla34 dpn68 drnc26 efficientnet_b0 erfnet_cityscapes espnetv2_wd2 fbnet_cb "
    "fdmobilenet_wd4 fishnet99 ghostnet hardnet39ds hrnet_w18_small_v1 ibn_resnet50 igcv3_wd4 inceptionv3 "
    "linknet_cityscapes menet108_8x1_g3 mixnet_s mnasnet_b1 mobilenet_wd4 mobilenetv2_wd4 mobilenetv3_small_w7d20 "
    "peleenet polynet preresnet18 proxylessnas_cpu regnetx002 resattnet56 resnesta18 resnet18 resnetd50b "
    "resnext26_16x4d scnet50 selecsls42 seresnet18 shufflenet_g1_wd4 shufflenetv2_wd2 sknet50 spnasnet "
    "sqnxt23_w1 squeezenet_v1_1 squeezeresnet_v1_1 unet_cityscapes vovnet27s wrn50_2 xception zfnet"
)
CIFAR = (
    "nin_cifar10 densenet40_k12_cifar10 pyramidnet110_a48_cifar10 resnet20_cifar10 preresnet20_cifar10 "
    "resnext20_16x4d_cifar10 ror3_56_cifar10 rir_cifar10 wrn16_10_cifar10 shakeshakeresnet20_2x16d_cifar10 "
    "xdensenet40_2_k24_bc_cifar10 wrn20_10_1bit_cifar10 fractalnet_cifar10 diaresnet20_cifar10"
)
#: Small inputs die in deep strides or unpadded kernels.
SIZES: dict[str, tuple[Size, ...]] = {
    "alexnet": ((224, 224),), "zfnet": ((224, 224),), "bn_vgg11": ((224, 224),), "resattnet56": ((224, 224),),
    "xception": ((320, 320),), "inceptionv3": ((128, 128), (160, 128)), "polynet": ((128, 128), (160, 128)),
    "scnet50": ((128, 128), (192, 128)), "dpn68": ((224, 224),),
}  # fmt: skip
OPEN = ((64, 64), (96, 64), (96, 96))
SMALL = ((32, 32), (48, 32), (64, 64))


def _build(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    model = get_model(name, pretrained=False)
    for module in list(model.modules()):  # poolings as wide as the maps of 224 pixels, as for any other size
        if isinstance(getattr(module, "final_pool", None), nn.AvgPool2d):
            module.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


MODELS = {
    name: Model(
        partial(_build, name), name.partition("_")[0], "cnn", SIZES.get(name, SMALL if "cifar" in name else OPEN)
    )
    for name in f"{FAMILIES} {CIFAR}".split()
}
