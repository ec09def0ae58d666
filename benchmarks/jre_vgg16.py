"""JRE, LRE and GRE on VGG16-BN at half of its channels, ranked over the network, beside the paper's 2.1x.

Run from the repository's root: ``python -m benchmarks.jre_vgg16``. Li et al. (Symmetry 14(7):1372, 2022) print 2.1x on
CIFAR-10 and do not say whether min-max runs over a layer or over the network; both are here. The network is trained on
the handwritten digits at 32x32, once; it and every finished row are kept in ``--out``, so a stopped run goes on.
About half an hour on two idle cores.
"""

from __future__ import annotations

import argparse

import torch
from pytorch_lightning import seed_everything

import lightning_prune as lp
from lightning_prune.data import DigitsDataModule
from lightning_prune.experiments.comparison import (
    Cell,
    Refusal,
    compare_criteria,
    print_comparison,
    trained_once,
    write_comparison,
)
from lightning_prune.models import vgg16_bn
from lightning_prune.tasks import ClassificationTask

PAPER = 2.1
FORMS = {
    "JRE, layer": lp.JRE(),
    "JRE, network, sum": lp.JRE(scope="network"),
    "JRE, network, mean": lp.JRE(scope="network", spatial="mean"),
    "GRE, layer": lp.criteria.GRE(),
    "GRE, network": lp.criteria.GRE(scope="network"),
    "LRE, layer": lp.criteria.LRE(),
    "LRE, network, sum": lp.criteria.LRE(scope="network"),
    "LRE, network, mean": lp.criteria.LRE(scope="network", spatial="mean"),
}
OPTIMIZER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/jre-vgg16")
    parser.add_argument("--dense-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    task = ClassificationTask(vgg16_bn(), 10, optimizer=lambda p: torch.optim.SGD(p, **OPTIMIZER))
    data = DigitsDataModule()
    trained_once(task, data, options.dense_epochs, options.out, OPTIMIZER)
    comparison = compare_criteria(
        task,
        data,
        FORMS,
        ratios=[0.5],
        seeds=[0],
        epochs=options.epochs,
        lr=0.01,
        output=options.out,
        task_settings=OPTIMIZER,
        on_outcome=_show,
    )
    write_comparison(comparison, options.out)
    print_comparison(comparison)
    print("\nFLOPs cut at 50 % of 4224 channels        ours   paper (JRE)")
    cuts = {cell.criterion: comparison.dense.macs / cell.macs for cell in comparison.cells}
    for name, cut in cuts.items():
        within = "   within 0.2" if abs(cut - PAPER) <= 0.2 else ""
        print(f"{name:<38} {cut:6.2f}x {PAPER:9.1f}x{within}")


def _show(cell: Cell | Refusal) -> None:
    print(cell.criterion, "refused" if isinstance(cell, Refusal) else f"{cell.before:.2%}, then {cell.after:.2%}")


if __name__ == "__main__":
    main()
