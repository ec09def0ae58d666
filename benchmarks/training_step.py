"""What masks cost in a training step, and what reconstruction inside a fit costs.

Run from the repository's root on an idle machine: ``python -m benchmarks.training_step``; about five minutes.
Step: ResNet-18 for 32x32 images, batch 64, SGD with momentum; a pair is an unmasked and a masked step, one after the
other, each of a model of its own. Memory of the masks: their indices, beside the parameters' bytes. Reconstruction:
ResNet-50 with AdamW's state at ratio 0.5, joint; the loss of the next batch on the masked and the reconstructed model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import lightning_prune as lp
from benchmarks import seconds
from lightning_prune.models import resnet18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    _step(options.pairs, options.batch)
    _reconstruction()


def _step(pairs: int, batch: int) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    plain = resnet18()
    masked = copy.deepcopy(plain)
    graph = lp.trace(masked, images[:2])
    plan = lp.GlobalRatio(0.5).select(graph, lp.score(masked, graph, "l1"))
    handle = lp.mask_(masked, graph, plan, undoable=False)
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    optimizers = {model: torch.optim.SGD(model.parameters(), **settings) for model in (plain, masked)}
    steps = [_training(model, optimizer, images, labels) for model, optimizer in optimizers.items()]
    times = [[seconds(step) for step in steps] for _ in range(pairs + 2)][2:]
    low, middle, high = statistics.quantiles([with_masks / without for without, with_masks in times], n=4)
    medians = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    print(f"ResNet-18, batch {batch}, {torch.get_num_threads()} threads, {pairs} pairs")
    quartiles = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    print(f"unmasked {medians[0]:.1f} ms, masked {medians[1]:.1f} ms: {quartiles}, at most 1.03")
    indices = sum(zeros.entries.nbytes for zeros in handle.zeros)
    weights = sum(parameter.nbytes for parameter in masked.parameters())
    print(f"masks hold {indices:,} bytes, {indices / weights:.3%} of the parameters' {weights:,} (at most 1 %)")


def _training(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _reconstruction() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    images, labels = torch.randn(8, 3, 96, 96), torch.randint(1000, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    graph = lp.trace(model, images[:2])
    plan = lp.GlobalRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    handle = lp.mask_(model, graph, plan, optimizers=[optimizer])
    step = _training(model, optimizer, images, labels)
    step()
    step()
    handle.apply_()
    before = F.cross_entropy(copy.deepcopy(model)(images), labels).item()
    handle.remove()
    started = time.perf_counter()
    report = lp.reconstruct_(model, graph, plan, optimizers=[optimizer], example_inputs=images[:2])
    took = time.perf_counter() - started
    after = F.cross_entropy(model(images), labels).item()
    print(
        f"\nResNet-50 with AdamW, ratio 0.5: reconstructed in {took:.2f} s with the float64 comparison (under 2 s), "
        f"relative error {report.max_rel_error:.1e}\nnext loss in train mode: masked {before:.8f}, reconstructed "
        f"{after:.8f}, relative difference {abs(after - before) / before:.1e} (at most 1e-5)"
    )


if __name__ == "__main__":
    main()
