"""A team's own LightningModule and DataModule, run from YAML, over processes, resumed, logged.

python examples/team.py fit --config examples/team.yaml
python examples/team.py fit --config examples/team.yaml --trainer.devices 2 --trainer.strategy ddp
python examples/team.py fit --config examples/team.yaml --ckpt_path runs/team/last.ckpt --trainer.max_epochs 3
"""

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        norms = [nn.BatchNorm2d(width) for _ in range(2)]
        self.body = nn.Sequential(convolutions[0], norms[0], nn.ReLU(), convolutions[1], norms[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What enters is added to what leaves: both keep the same channels."""
        return torch.relu(x + self.body(x))


class Classifier(LightningModule):
    """Nothing in it knows of pruning; `example_input_array` is what is asked of it."""

    def __init__(self, width: int = 16, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.net = nn.Sequential(stem, Block(width), Block(width), nn.Flatten(), nn.Linear(64 * width, 10))
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of the ten classes."""
        return self.net(images)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss, which criteria with gradients look at."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """What the team watches."""
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As ever."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


class Digits(LightningDataModule):
    """Scikit-learn's scans."""

    def setup(self, stage: str) -> None:
        """Read them once a process."""
        scans = load_digits()
        images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 16
        self.parts = images.split([1437, 360]), torch.tensor(scans.target).split([1437, 360])

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Lightning gives every process its share."""
        return DataLoader(TensorDataset(self.parts[0][0], self.parts[1][0]), 64, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """The last 360."""
        return DataLoader(TensorDataset(self.parts[0][1], self.parts[1][1]), 360)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits, seed_everything_default=0, save_config_kwargs={"overwrite": True})
