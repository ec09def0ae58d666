"""What each of the Trainer's loggers can take, behind one face."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Trainer
from torch import Tensor

from lightning_prune.files import write_text
from lightning_prune.report.figures import save_figure
from lightning_prune.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Sink:
    """Any logger: scalars only."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(dict(values), step)

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        """Distributions by name."""

    def picture(self, name: str, figure: Figure, step: int) -> None:
        """A Matplotlib figure."""

    def table(self, name: str, table: Table, step: int) -> None:
        """Columns and rows."""

    def file(self, name: str, kind: str, write: Callable[[Path], None]) -> None:
        """A file that ``write`` makes, with the run."""


class FolderSink(Sink):
    """Loggers that write into a folder (CSVLogger): the rest goes beside it, the newest under its name."""

    def picture(self, name: str, figure: Figure, step: int) -> None:
        self.file(f"{Path(name).name}.png", "picture", partial(save_figure, figure))

    def table(self, name: str, table: Table, step: int) -> None:
        self.file(f"{Path(name).name}.csv", "table", partial(write_text, text=table.csv()))

    def file(self, name: str, kind: str, write: Callable[[Path], None]) -> None:
        folder = str(self.logger.log_dir)
        if "://" not in folder:  # to a remote one only the logger itself can write
            write(Path(folder, "prune", name))


class TensorBoardSink(FolderSink):
    """TensorBoardLogger: histograms, images and text, and files beside the events."""

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        for name, tensor in values.items():
            self.logger.experiment.add_histogram(name, tensor.numpy(), step)

    def picture(self, name: str, figure: Figure, step: int) -> None:
        self.logger.experiment.add_image(name, pixels(figure), step, dataformats="HWC")

    def table(self, name: str, table: Table, step: int) -> None:
        self.logger.experiment.add_text(name, table.markdown(), step)  # it shows Markdown as a table
        super().table(name, table, step)


class WandbSink(Sink):
    """WandbLogger: everything in W&B's own kinds, files as artifacts."""

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        import wandb

        self.logger.log_metrics({name: wandb.Histogram(tensor.tolist()) for name, tensor in values.items()}, step)

    def picture(self, name: str, figure: Figure, step: int) -> None:
        self.logger.log_image(name, [pixels(figure)], step)

    def table(self, name: str, table: Table, step: int) -> None:
        self.logger.log_table(name, table.headings, table.data, step=step)

    def file(self, name: str, kind: str, write: Callable[[Path], None]) -> None:
        """An artifact, named after the file and the run; a new version every time."""
        import wandb

        run = self.logger.experiment
        artifact = wandb.Artifact(f"{Path(name).stem}-{run.id}", type=kind)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            write(path)
            artifact.add_file(str(path))  # copies
        run.log_artifact(artifact)


# By name: the same classes exist in pytorch_lightning and in lightning.pytorch.
SINKS = {"WandbLogger": WandbSink, "TensorBoardLogger": TensorBoardSink, "CSVLogger": FolderSink}


def sinks_of(trainer: Trainer) -> list[Sink]:
    """One for each of the Trainer's loggers; none in processes other than the first."""
    found = []
    for logger in trainer.loggers if trainer.is_global_zero else ():
        names = (cls.__name__ for cls in type(logger).__mro__)
        found.append(next((SINKS[name] for name in names if name in SINKS), Sink)(logger))
    return found


def pixels(figure: Figure) -> Any:
    """The figure as (height, width, 3) bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
