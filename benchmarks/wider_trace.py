"""What it costs that a fit traces and rehearses the user's own steps, against training steps.

Run from the repository's root on an idle machine: ``python -m benchmarks.wider_trace``; about three minutes. All that
`PruneCallback("l1")` does before the first epoch, with and without training_step and validation_step, in pairs; the
difference is counted in training steps (forward, backward, SGD) on the same batch.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import seconds
from lightning_prune import PruneCallback
from lightning_prune.callbacks.run import PruningRun
from lightning_prune.models import resnet18
from lightning_prune.tasks import ClassificationTask

TARGET = 10
SUBJECTS: list[tuple[str, Callable[[], nn.Module], int, int]] = [
    ("resnet18", lambda: resnet18(max_pool=False), 64, 32),
    ("resnet18", lambda: resnet18(max_pool=False), 128, 32),
    ("mobilenet_v2", lambda: torchvision.models.mobilenet_v2(num_classes=10), 16, 96),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"{torch.get_num_threads()} threads, {options.pairs} pairs; a step is forward, backward and SGD on one batch")
    print("model         batch  side   step, ms   without steps, s   with, s   difference in steps: median (quartiles)")
    for name, build, batch, side in SUBJECTS:
        step, pairs = _measure(build, batch, side, options.pairs)
        low, middle, high = statistics.quantiles([(wide - narrow) / step for narrow, wide in pairs], n=4)
        narrow, wide = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"{name:<13}{batch:>6}{side:>6}{1000 * step:>11.0f}{narrow:>19.2f}{wide:>10.2f}   "
            f"{middle:.1f} ({low:.1f} to {high:.1f})"
        )
    print(f"to reach: at most {TARGET}")


def _measure(
    build: Callable[[], nn.Module], batch: int, side: int, pairs: int
) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of one training step; of a fit of no epochs without and with the user's steps."""
    loader = DataLoader(TensorDataset(torch.randn(batch, 3, side, side), torch.randint(10, (batch,))), batch)
    images, labels = next(iter(loader))
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def fit() -> None:
        task = ClassificationTask(build(), 10, lr_scheduler="constant", input_size=(3, side, side))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        callback = PruneCallback("l1", 0.5, track=False)
        Trainer(max_epochs=0, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet).fit(
            task, loader, loader
        )

    def narrow() -> None:
        with patch.object(PruningRun, "steps", lambda *_: []):
            fit()

    found = [(seconds(narrow), seconds(fit)) for _ in range(pairs + 1)]  # the first one warms up
    return statistics.median([seconds(step) for _ in range(6)][1:]), found[1:]


if __name__ == "__main__":
    main()
