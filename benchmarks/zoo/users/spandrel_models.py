"""spandrel: super-resolution and restoration networks by their constructors, less deep than published."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.users.model import Model, Size, images, sized

SIZES: tuple[Size, ...] = ((32, 32), (48, 32), (64, 64))
LARGE: tuple[Size, ...] = ((64, 64), (96, 64), (128, 128))
WINDOW = {"img_size": 32, "window_size": 8, "upscale": 2, "upsampler": "pixelshuffle"}
SWIN = {**WINDOW, "embed_dim": 60, "depths": [2, 2, 2], "num_heads": [6, 6, 6]}


def _build(module: str, name: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module(f"spandrel.architectures.{module}"), name)(**options)


def _cnn(module: str, name: str, sizes: tuple[Size, ...] = SIZES, eats: int = 3, **options: Any) -> Model:
    return Model(partial(_build, module, name, **options), module.partition(".")[0], "cnn", sizes, sized(eats))


def _attention(module: str, name: str, kind: str = "hybrid", sizes: tuple[Size, ...] = SIZES, **options: Any) -> Model:
    return Model(partial(_build, module, name, **options), module.partition(".")[0], kind, sizes)


def _masked(batch: int, size: Size) -> tuple[Tensor, Tensor]:
    """Images and the masks of what is missing."""
    return images(batch, size), (sized(1)(batch, size) > 0).float()


UP = {"in_chans": 3, "img_size": 32, "upscale": 2}
MODELS = {
    "ESRGAN": _cnn("ESRGAN.__arch.RRDB", "RRDBNet", num_blocks=4),
    "ESRGAN-plus": _cnn("ESRGAN.__arch.RRDB", "RRDBNet", num_blocks=2, plus=True, scale=2),
    "SRVGG": _cnn("Compact.__arch.SRVGG", "SRVGGNetCompact"),
    "RCAN": _cnn("RCAN.__arch.rcan_arch", "RCAN", n_resgroups=3, n_resblocks=4),
    "NAFNet": _cnn("NAFNet.__arch.NAFNet_arch", "NAFNet", width=32, middle_blk_num=4, enc_blk_nums=[1, 1, 2],
                   dec_blk_nums=[1, 1, 1]),
    "PLKSR": _cnn("PLKSR.__arch.PLKSR", "PLKSR", n_blocks=6),
    "RealPLKSR": _cnn("PLKSR.__arch.RealPLKSR", "RealPLKSR", n_blocks=6),
    "SPAN": _cnn("SPAN.__arch.span", "SPAN", num_in_ch=3, num_out_ch=3),
    "SAFMN": _cnn("SAFMN.__arch.safmn", "SAFMN", dim=36),
    "DnCNN": _cnn("DnCNN.__arch.network_dncnn", "DnCNN", in_nc=3, out_nc=3),
    "DRUNet": _cnn("DRUNet.__arch.network_unet", "DRUNet", LARGE, 4, in_nc=4, out_nc=3, nc=[32, 64, 128, 256], nb=2),
    "FBCNN": _cnn("FBCNN.__arch.FBCNN", "FBCNN", LARGE, nb=1),
    "MoSR": _cnn("MoSR.__arch.mosr_arch", "MoSR", n_block=6),
    "MoESR": _cnn("MoESR.__arch.MoESR", "MoESR", n_blocks=3, n_block=2),
    "SwiftSRGAN": _cnn("SwiftSRGAN.__arch.SwiftSRGAN", "Generator", num_blocks=6),
    "RealCUGAN-2x": _cnn("RealCUGAN.__arch.upcunet_v3", "UpCunet2x", LARGE),
    "RealCUGAN-4x": _cnn("RealCUGAN.__arch.upcunet_v3", "UpCunet4x", LARGE),
    "MixDehazeNet": _cnn("MixDehazeNet.__arch.MixDehazeNet", "MixDehazeNet", LARGE),
    "LaMa": Model(partial(_build, "LaMa.__arch.LaMa", "LaMa", in_nc=4), "LaMa", "cnn", LARGE, _masked),
    "KBNet": _cnn("KBNet.__arch.kbnet_s", "KBNet_s", LARGE, width=32, middle_blk_num=2, enc_blk_nums=[1, 1, 1],
                  dec_blk_nums=[1, 1, 1]),
    "SwinIR": _attention("SwinIR.__arch.SwinIR", "SwinIR", "transformer", **SWIN, mlp_ratio=2.0),
    "SwinIR-lightweight": _attention("SwinIR.__arch.SwinIR", "SwinIR", "transformer",
                                     **{**SWIN, "upsampler": "pixelshuffledirect"}, mlp_ratio=2.0),
    "Swin2SR": _attention("Swin2SR.__arch.Swin2SR", "Swin2SR", "transformer", **SWIN, mlp_ratio=2.0),
    "HAT": _attention("HAT.__arch.HAT", "HAT", sizes=((32, 32), (48, 32)), **SWIN, mlp_ratio=2.0),
    "DAT": _attention("DAT.__arch.DAT", "DAT", **UP, embed_dim=60, split_size=[8, 8], depth=[2, 2], num_heads=[2, 2],
                      expansion_factor=2.0),
    "DRCT": _attention("DRCT.__arch.drct_arch", "DRCT", **SWIN, gc=16),
    "OmniSR": _attention("OmniSR.__arch.OmniSR", "OmniSR", up_scale=2, res_num=2),
    "ATD": _attention("ATD.__arch.atd_arch", "ATD", **SWIN, category_size=64),
    "GRL": _attention("GRL.__arch.grl", "GRL", img_size=32, upscale=2, upsampler="pixelshuffle", embed_dim=60,
                      depths=[2, 2], num_heads_window=[3, 3], num_heads_stripe=[3, 3], mlp_ratio=2.0),
    "RGT": _attention("RGT.__arch.rgt", "RGT", **UP, embed_dim=60, depth=[2, 2], num_heads=[2, 2], mlp_ratio=2.0),
    "CRAFT": _attention("CRAFT.__arch.CRAFT", "CRAFT", upscale=2),
    "DITN": _attention("DITN.__arch.DITN_Real", "DITN_Real", upscale=2, ITL_blocks=2, SAL_blocks=2),
    "DCTLSA": _attention("DCTLSA.__arch.dctlsa", "DCTLSA", upscale=2),
    "FDAT": _attention("FDAT.__arch.fdat", "FDAT", scale=2, embed_dim=60, num_groups=2, depth_per_group=2),
    "SCUNet": _attention("SCUNet.__arch.SCUNet", "SCUNet", sizes=LARGE, config=[2] * 7, input_resolution=64),
    "Uformer": _attention("Uformer.__arch.Uformer", "Uformer", sizes=((128, 128),), img_size=128, embed_dim=16,
                          depths=[1] * 9, modulator=True),
    "RetinexFormer": _attention("RetinexFormer.__arch.retinexformer_arch", "RetinexFormer", sizes=LARGE, stage=1),
    "FFTformer": _attention("FFTformer.__arch.fftformer_arch", "FFTformer", sizes=LARGE, dim=24, num_blocks=[1, 1, 2],
                            num_refinement_blocks=1),
    "HVICIDNet": _attention("HVICIDNet.__arch.cidnet", "CIDNet", sizes=LARGE),
    "RestoreFormer": _attention("RestoreFormer.__arch.restoreformer_arch", "RestoreFormer", sizes=((64, 64), (128, 64)),
                                n_embed=64, embed_dim=64, ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, resolution=64,
                                z_channels=64),
}  # fmt: skip
