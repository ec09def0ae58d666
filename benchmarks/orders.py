"""ResNet-34 on the digits at ratios 0.4, 0.6 and 0.8, joint: fine-tuning before and after reconstruction (Figure 6).

Run from the repository's root on an idle machine: ``python -m benchmarks.orders --out runs/orders``; about ten minutes.
Ratios are shares of every layer, as in the paper (Lee et al., Sensors 23(4):2102, 2023), or of the network. One dense
model is trained; every ratio is pruned and fine-tuned twice from it with the same seed. Writes a table and
``orders.png``: validation accuracy against wall-clock time, evaluation included, a panel per ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from pytorch_lightning import seed_everything
from torch import nn

from lightning_prune import GlobalRatio, LayerRatio, PruneCallback
from lightning_prune.callbacks import EpochTimerCallback
from lightning_prune.data import DigitsDataModule
from lightning_prune.experiments.runner import Runner, quiet
from lightning_prune.measure import count_params
from lightning_prune.models import resnet34
from lightning_prune.report import EpochRecord
from lightning_prune.tasks import ClassificationTask

RATIOS = (0.4, 0.6, 0.8)
TARGET = 6.0  # at 0.8
Records = dict[tuple[float, str], list[EpochRecord]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/orders"))
    parser.add_argument("--criterion", default="jre")
    parser.add_argument("--over", choices=("layer", "network"), default="layer", help="what the ratio is a share of")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning")
    parser.add_argument("--dense-epochs", type=int, default=6)
    options = parser.parse_args()
    run = Runner(DigitsDataModule())
    seed_everything(0, verbose=False)
    task = ClassificationTask(resnet34(num_classes=10), num_classes=10, optimizer=_sgd, lr_scheduler="cosine")
    print("| ratio | order | epoch, s | faster | test accuracy, % | parameters, M | pruned and reconstructed, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found: Records = {}
    with quiet():
        timer = EpochTimerCallback("val_acc")
        run.fit(task, options.dense_epochs, [timer])
        dense = _seconds(timer.records)
        print(
            f"| 0 | dense | {dense:.2f} | | {100 * run.test(task)[0]:.2f} | {count_params(task) / 1e6:.2f} | |",
            flush=True,
        )
        for ratio in RATIOS:
            for order, when in (("A", "after"), ("B", "before")):
                small = copy.deepcopy(task)
                selection = LayerRatio(ratio) if options.over == "layer" else GlobalRatio(ratio)
                prune = PruneCallback(options.criterion, selection=selection, reconstruct=when, monitor="val_acc")
                seed_everything(1, verbose=False)
                run.fit(small, options.epochs, [prune], lr=0.02)
                found[ratio, order] = prune.reconstruction.records
                seconds = _seconds(found[ratio, order])
                faster = f"{_seconds(found[ratio, 'A']) / seconds:.1f}x" if order == "B" else ""
                print(
                    f"| {ratio} | {order} | {seconds:.2f} | {faster} | {100 * run.test(small)[0]:.2f} | "
                    f"{count_params(small) / 1e6:.2f} | {prune.reconstruction.seconds:.2f} |",
                    flush=True,
                )
    options.out.mkdir(parents=True, exist_ok=True)
    _draw(found, options.out / "orders.png")
    print(f"\nto reach at 0.8: {TARGET}x; accuracy against time: {options.out / 'orders.png'}")


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def _seconds(records: list[EpochRecord]) -> float:
    return statistics.median(record.train_seconds for record in records)


def _draw(found: Records, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(RATIOS), sharey=True)
    for panel, ratio in zip(axes, RATIOS, strict=True):
        for order, color, marker in (("A", "#b35806", "s"), ("B", "#2166ac", "o")):
            records = found[ratio, order]
            times = [record.elapsed_seconds for record in records]
            panel.plot(times, [100 * record.accuracy for record in records], color=color, marker=marker, ms=5, lw=1.8)
            end = (times[-1], 100 * records[-1].accuracy)
            offset = {"xytext": (0, 8), "textcoords": "offset points"}
            panel.annotate(f"order {order}", end, color=color, ha="center", **offset)
        panel.set_title(f"{ratio:.0%} of the channels removed", fontsize=10)
        panel.set_xlabel("seconds since the start of pruning")
        longest = max(record.elapsed_seconds for order in "AB" for record in found[ratio, order])
        panel.set(xlim=(0, 1.12 * longest), ylim=(0, 115), yticks=range(0, 101, 20))
        panel.grid(alpha=0.3, lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation accuracy (%)")
    figure.suptitle("ResNet-34 on digits; A fine-tunes, then reconstructs; B the other way round", fontsize=11)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
