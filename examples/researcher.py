"""Criteria compared on images of one's own, with seeds and a criterion of one's own; a published table in small.

python examples/researcher.py --images my_pictures  # a folder for each class; without: made-up pictures
python examples/researcher.py --table guo-lenet
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Trainer, seed_everything

import lightning_prune as lp
from lightning_prune.criteria import WeightCriterion
from lightning_prune.criteria.functional import Normalizer
from lightning_prune.data import ImageFolderDataModule
from lightning_prune.experiments import compare_criteria
from lightning_prune.experiments.comparison import print_comparison, write_comparison
from lightning_prune.experiments.reproduce import print_page, read_recipe, reproduce, write_page
from lightning_prune.models import resnet20
from lightning_prune.tasks import ClassificationTask


@dataclass(frozen=True, kw_only=True)
class LargestWeight(WeightCriterion):
    """s_c = max |F_c|: a channel matters as much as the largest weight of its filter."""

    normalize: Normalizer = "mean"

    def channel_scores(self, rows: torch.Tensor) -> torch.Tensor:
        """From (channels, weights) to one score for each channel; high means keep."""
        return rows.abs().amax(1)


def draw_stripes(folder: Path) -> Path:
    """Pictures of three classes, 16 pixels wide: stripes along, across, and both."""
    chance = np.random.default_rng(0)
    for name, along, across in (("along", 1, 0), ("across", 0, 1), ("both", 1, 1)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(20):
            y, x = np.mgrid[:16, :16] + chance.integers(0, 4, (2, 1, 1))
            light = 120 + 60 * (along * np.sin(x) + across * np.sin(y)) + chance.normal(0, 20, (16, 16))
            Image.fromarray(light.clip(0, 255).astype("uint8")).convert("RGB").save(folder / name / f"{number}.png")
    return folder


def main() -> None:
    """Train once, compare, reproduce."""
    parser = argparse.ArgumentParser(description="Compare criteria; reproduce a table in small.")
    parser.add_argument("--images", type=Path, help="folder with a folder of images for each class")
    parser.add_argument("--table", help="published table to reproduce in small, such as guo-lenet; takes minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/researcher"))
    options = parser.parse_args()

    seed_everything(0, verbose=False)
    folder = options.images or draw_stripes(options.out / "stripes")
    data = ImageFolderDataModule(folder, batch_size=20, size=16, val_share=0.3)
    data.prepare_data()
    data.setup("fit")
    task = ClassificationTask(resnet20(num_classes=data.num_classes), data.num_classes, input_size=(3, 16, 16))
    Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False).fit(task, data)

    criteria = {"l1": "l1", "taylor": lp.Taylor(), "largest weight": LargestWeight()}
    compared = compare_criteria(task, data, criteria, ratios=[0.5], seeds=[0, 1], epochs=1, output=options.out)
    print_comparison(compared)
    for path in write_comparison(compared, options.out).values():  # a table, CSV, and pictures
        print(path)

    if options.table:
        table = reproduce(read_recipe(options.table), "smoke", options.out / options.table)
        print_page(table)
        print(f"Open {write_page(table, options.out / options.table)['html']}")


if __name__ == "__main__":
    main()
