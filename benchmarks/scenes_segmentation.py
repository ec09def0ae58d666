"""FCN-ResNet50 on scenes of digits: dense, masked, reconstructed and fine-tuned, at several ratios.

Run from the repository's root: ``python -m benchmarks.scenes_segmentation``; prints a Markdown table. The test scenes
choose nothing. Masked and reconstructed must have the same mIoU to the last pixel; the script fails where they differ.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import sys
import time
import warnings
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torchvision.models.segmentation import fcn_resnet50

import lightning_prune as lp
from lightning_prune.data import ScenesSegmentation
from lightning_prune.tasks import SegmentationTask


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the scenes in pixels")
    parser.add_argument("--test-scenes", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800, help="of dense training, every scene seen once")
    parser.add_argument("--finetune-steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--finetune-lr", type=float, default=3e-4)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--score-batches", type=int, default=16)
    parser.add_argument("--backbone-only", action="store_true", help="leave the heads whole, as Lee et al. do")
    parser.add_argument("--precision", default="bf16-mixed", help="of training; everything is evaluated in float32")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def trainer(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


def evaluate(task: LightningModule, data: ScenesSegmentation) -> tuple[float, float]:
    """(global accuracy, mIoU) on the test scenes."""
    (logged,) = trainer().test(task, data, verbose=False)
    return logged["test_acc"], logged["test_miou"]


def train(task: LightningModule, data: ScenesSegmentation, steps: int, args: argparse.Namespace) -> float:
    """Seconds it took."""
    started = time.perf_counter()
    trainer(max_epochs=1, limit_train_batches=steps, precision=args.precision).fit(task, data)
    return time.perf_counter() - started


def optimizer(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)


def row(
    name: str, task: LightningModule, scores: tuple[float, float], dense: LightningModule, seconds: float | None
) -> str:
    x = torch.zeros(1, *task.example_input_array.shape[1:])  # type: ignore[union-attr, operator]
    flops, params = lp.count_flops(task, x, "paper"), lp.count_params(task)
    share = f"{flops / lp.count_flops(dense, x, 'paper'):.0%}", f"{params / lp.count_params(dense):.0%}"
    took = "" if seconds is None else f"{seconds:.0f} s"
    return (
        f"| {name} | {scores[1]:.4f} | {scores[0]:.4f} | {params / 1e6:.2f} M ({share[1]}) | "
        f"{flops / 1e9:.2f} G ({share[0]}) | {took} |"
    )


def run(args: argparse.Namespace) -> list[str]:
    """The rows of the table."""
    seed_everything(args.seed, verbose=False)
    data = ScenesSegmentation(
        args.batch_size,
        size=args.size,
        lengths=(max(args.steps, args.finetune_steps) * args.batch_size, 1, args.test_scenes),
        objects=(1, 2),
        extent=(0.5, 0.7),
        seed=args.seed,
    )
    net = fcn_resnet50(weights=None, weights_backbone=None, num_classes=data.num_classes, aux_loss=True)
    dense = SegmentationTask(net, data.num_classes, optimizer=optimizer(args.lr), input_size=(3, args.size, args.size))
    rows = []
    seconds = train(dense, data, args.steps, args)
    rows.append(row("dense", dense, evaluate(dense, data), dense, seconds))
    print(rows[-1], file=sys.stderr)
    graph = lp.trace(dense, dense.example_input_array)
    batches = list(itertools.islice(data.train_dataloader(), args.score_batches))
    scores = lp.score(dense, graph, lp.JRE(), batches=batches, loss=lambda task, batch: task.loss(batch))
    ignore = ["*classifier.*"] if args.backbone_only else []
    for ratio in args.ratios:
        plan = lp.GlobalRatio(ratio, ignore=ignore).select(graph, scores)
        masked = copy.deepcopy(dense)
        with lp.mask_(masked, graph, plan):
            before = evaluate(masked, data)
            small = lp.reconstruct(dense, graph, plan)
            lossless = lp.check_lossless(masked, small, next(iter(data.test_dataloader()))[0])
        after = evaluate(small, data)
        if after != before or not lossless.passed:
            raise SystemExit(f"not lossless at {ratio}: {before} masked, {after} reconstructed, {lossless}")
        rows.append(row(f"{ratio:g} masked", dense, before, dense, None))
        rows.append(row(f"{ratio:g} reconstructed", small, after, dense, None))
        small.optimizer = optimizer(args.finetune_lr)  # type: ignore[assignment]
        seconds = train(small, data, args.finetune_steps, args)
        rows.append(row(f"{ratio:g} fine-tuned", small, evaluate(small, data), dense, seconds))
        print(*rows[-3:], f"  float64: {lossless.max_rel_error:.1e} relative", sep="\n", file=sys.stderr)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    started = time.perf_counter()
    rows = run(args)
    print(
        f"FCN-ResNet50 with auxiliary head, {args.size} px, {args.steps} steps of {args.batch_size} scenes, then "
        f"{args.finetune_steps}; JRE over the network; {args.test_scenes} test scenes; {torch.get_num_threads()} "
        f"threads, {time.perf_counter() - started:.0f} s in all\n"
    )
    print("| model | test mIoU | pixel accuracy | parameters | FLOPs (paper) | training |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
