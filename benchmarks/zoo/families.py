"""Which models the sweep takes: all of torchvision, and of every timm model file ("family") at least the smallest.

The timm names were chosen once by building every model of timm 1.0.31 on the meta device and taking the one with the
fewest parameters (timm's own ``test_*`` miniatures left out); further names of the same file stand where it holds
another architecture. `tests/benchmarks/test_zoo.py` checks that no file of the installed timm is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.zoo import users

SUITES = ("torchvision", "segmentation", "detection", "timm")

#: Convolutional networks: no attention over tokens. Some normalise over channels (convnext, focalnet).
CNN = {
    "byobnet": "mobileone_s1 repvgg_a0 gernet_s gcresnext26ts",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms convnext_atto convnextv2_atto",
    "cspnet": "cs3darknet_focus_s cspresnet50 darknet53",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla46x_c dla60_res2net",
    "dpn": "dpn48b",
    "efficientnet": "mobilenetv2_035 efficientnet_lite0 mixnet_s tinynet_e mnasnet_small",
    "fasternet": "fasternet_t0",
    "focalnet": "focalnet_tiny_srf",
    "ghostnet": "ghostnet_050 ghostnetv3_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0 hgnet_tiny",
    "hrnet": "hrnet_w18_small",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "mambaout": "mambaout_femto",
    "mobilenetv3": "mobilenetv3_small_050 lcnet_035 mobilenetv4_conv_small",
    "nasnet": "nasnetalarge",
    "nfnet": "nf_regnet_b0 nfnet_l0",
    "pnasnet": "pnasnet5large",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002 regnetz_005",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50 res2net50_14w_8s",
    "resnest": "resnest14d",
    "resnet": "resnet10t resnet18 seresnet18 ecaresnet26t resnext50_32x4d",
    "resnetv2": "resnetv2_18 resnetv2_50x1_bit",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "tresnet": "tresnet_m",
    "vgg": "vgg11 vgg11_bn",
    "vovnet": "ese_vovnet19b_slim_dw ese_vovnet19b_slim",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p xception41",
}

#: Convolutions and attention (or another mixer over all tokens: state space, pooling) in one network.
HYBRID = {
    "byoanet": "halonet_h1 eca_botnext26ts_256",
    "coat": "coat_tiny",
    "cpubone": "cpubone_nano",
    "csatv2": "csatv2",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fastvit": "fastvit_t8",
    "iformer": "iformer_t",
    "levit": "levit_128s levit_conv_128s",
    "lowformer": "lowformer_b0",
    "maxxvit": "maxvit_pico_rw_256 coatnet_pico_rw_224",
    "metaformer": "poolformerv2_s12 poolformer_s12 convformer_s18 caformer_s18",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "nextvit": "nextvit_small",
    "shvit": "shvit_s1",
    "swiftformer": "swiftformer_xs",
    "tiny_vit": "tiny_vit_5m_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "visformer": "visformer_tiny",
    "vitamin": "vitamin_small_224",
}

#: Transformers whose convolutions, if any, only embed patches or positions.
TRANSFORMER = {
    "beit": "beit_base_patch16_224",
    "cait": "cait_xxs24_224",
    "convit": "convit_tiny",
    "crossvit": "crossvit_tiny_240",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "eva": "vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nest": "nest_tiny",
    "pit": "pit_ti_224",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tnt": "tnt_s_patch16_224",
    "twins": "twins_svt_small twins_pcpvt_small",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "volo": "volo_d1_224",
    "xcit": "xcit_nano_12_p8_224",
}

#: Token mixers without attention: linear layers, or an LSTM (sequencer).
MLP = {"mlp_mixer": "gmlp_ti16_224 resmlp_12_224 mixer_s32_224", "sequencer": "sequencer2d_s"}

TIMM_KINDS = {"cnn": CNN, "hybrid": HYBRID, "transformer": TRANSFORMER, "mlp": MLP}


@dataclass(frozen=True)
class Entry:
    """A model of the sweep."""

    suite: str
    name: str
    family: str
    kind: str

    @property
    def key(self) -> str:
        """Identifies its row in the results, whatever the revision of the library."""
        return f"{self.suite}/{self.name}"


def timm_entries() -> list[Entry]:
    """Every timm model of the tables above."""
    return [
        Entry("timm", name, family, kind)
        for kind, families in TIMM_KINDS.items()
        for family, names in families.items()
        for name in names.split()
    ]


def torchvision_entries(suite: str) -> list[Entry]:
    """Every torchvision model of one kind; the family is its Python file."""
    from torchvision import models

    module = {"torchvision": models, "segmentation": models.segmentation, "detection": models.detection}[suite]
    return [
        Entry(suite, name, models.get_model_builder(name).__module__.rpartition(".")[2], _torchvision_kind(name))
        for name in models.list_models(module)
    ]


def _torchvision_kind(name: str) -> str:
    if name.startswith("maxvit"):
        return "hybrid"
    return "transformer" if name.startswith(("vit_", "swin_")) else "cnn"


def entries(suite: str = "all", only: str | None = None, part: str | None = None) -> list[Entry]:
    """Models of a suite (or all), whose key contains ``only``, the i-th of n interleaved parts."""
    found = [entry for name in suites_of(suite) for entry in _entries(name)]
    found = [entry for entry in found if only is None or only in entry.key]
    return part_of(found, part)


def suites_of(suite: str) -> tuple[str, ...]:
    """The suites that a word of the command line stands for."""
    return {"all": SUITES, "users": users.LIBRARIES}.get(suite, (suite,))


def _entries(suite: str) -> list[Entry]:
    if suite in users.LIBRARIES:
        return [Entry(suite, name, model.family, model.kind) for name, model in users.models(suite).items()]
    return timm_entries() if suite == "timm" else torchvision_entries(suite)


def part_of(found: Iterable[Entry], part: str | None) -> list[Entry]:
    """The i-th of n interleaved parts, given as "i/n"."""
    number, _, count = (part or "1/1").partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part must be i/n with 1 <= i <= n, got {part!r}")
    return list(found)[int(number) - 1 :: int(count)]
