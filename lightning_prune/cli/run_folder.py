"""Where a run writes: into a folder of its own, never into that of an earlier one."""

from __future__ import annotations

import csv
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from lightning_prune.errors import ConfigurationError
from lightning_prune.files import write_text

RUNS = Path("runs")
_CHOSEN = "LIGHTNING_PRUNE_RUN_FOLDER"  # tells processes that a Trainer starts what the first one has chosen
_METRICS = "metrics.csv"
_BEFORE = "metrics.csv.before"  # the rows of a run that goes on, until they stand in the new file


def is_first_process() -> bool:
    """Of those that train together, as their environment says."""
    other_node = os.environ.get("NODE_RANK", "0") not in ("", "0")  # where Lightning starts the processes of each node
    return not getattr(rank_zero_only, "rank", 0) and not other_node


@contextmanager
def own_folder(name: str) -> Iterator[str]:
    """Take ``runs/NAME``, or ``runs/NAME-2`` and so on if there is such a run already; given back if left empty."""
    if not is_first_process():  # which alone writes
        yield os.environ.get(_CHOSEN, name)
        return
    for chosen in _numbered(name):
        new = [parent for parent in (RUNS / chosen).parents if not parent.exists()]
        (RUNS / chosen).parent.mkdir(parents=True, exist_ok=True)
        try:
            (RUNS / chosen).mkdir()
            break
        except FileExistsError:  # also where another process was faster
            continue
    os.environ[_CHOSEN] = chosen
    try:
        yield chosen
    finally:
        os.environ.pop(_CHOSEN, None)
        for folder in (RUNS / chosen, *new):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _numbered(name: str) -> Iterator[str]:
    """NAME, NAME-2, NAME-3, ..."""
    return itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))


def new_folder(folder: str | Path) -> Path:
    """The folder, or one named FOLDER-2 and so on if something lies in it."""
    return next(path for path in map(Path, _numbered(str(folder))) if not path.is_dir() or not any(path.iterdir()))


def check_unused(trainer: Trainer) -> None:
    """Refuse a folder that a configuration names and that an earlier run has written to.

    Raises:
        ConfigurationError: there are results in it, which would be lost.
    """
    folders = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    used = next((folder for folder in folders if (folder / _METRICS).is_file()), None)
    if used is not None and trainer.is_global_zero:
        raise ConfigurationError(
            f"{used} holds the {_METRICS} of an earlier run, which would be deleted: name another folder, "
            "--trainer.logger.init_args.version NAME, or leave out the logger for a new one"
        )


def last_checkpoint(name: str) -> Path | None:
    """The newest ``last.ckpt`` of earlier runs of this name."""
    found = RUNS.glob(f"{name}*/checkpoints/last*.ckpt")
    own = [path for path in found if _is_of(path.parent.parent.relative_to(RUNS).as_posix(), name)]
    return max(own, key=lambda path: path.stat().st_mtime, default=None)


def _is_of(folder: str, name: str) -> bool:
    """Whether it is NAME or NAME-2, NAME-3, ..."""
    number = folder.removeprefix(name)
    return folder.startswith(name) and (not number or (number[0] == "-" and number[1:].isdecimal()))


def folder_of(checkpoint: str | None, name: str) -> str | None:
    """The folder under runs/ of a run of this name that goes on from its last checkpoint; None: a new one begins."""
    path = Path(checkpoint or "")
    folder = path.absolute().parent.parent
    if not (path.name.startswith("last") and path.is_file() and _rows_in(folder)):
        return None
    found = folder.relative_to(RUNS.absolute()).as_posix() if RUNS.absolute() in folder.parents else ""
    return found if _is_of(found, name) else None


def carry_over(trainer: Trainer, checkpoint: Path, content: Mapping[str, Any]) -> None:
    """Begin metrics.csv with the rows of the run that a checkpoint is of; of a new run those up to the checkpoint."""
    logger = trainer.logger
    source = next((path for p in checkpoint.absolute().parents[:2] if (path := _rows_in(p))), None)
    if source is None or not isinstance(logger, CSVLogger) or not trainer.is_global_zero:
        return
    with source.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows, names = list(reader), list(reader.fieldnames or ())
    kept = source
    if goes_on := Path(logger.log_dir).absolute() == source.parent:
        kept = source.rename(source.with_name(_BEFORE))  # or the logger would delete it
    else:
        rows = [row for row in rows if _is_before(row, content["global_step"], content["epoch"])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        writer = logger.experiment
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names, extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    write_text(Path(writer.metrics_file_path), text.getvalue())
    writer.metrics_keys = names
    if goes_on:
        kept.unlink()


def _rows_in(folder: Path) -> Path | None:
    """The file of a run's rows; if the run was killed while it took them over, they are those from before."""
    return next((folder / name for name in (_BEFORE, _METRICS) if (folder / name).is_file()), None)


def _share_folder(trainer: Trainer) -> None:
    """Give every process the folder that the first has chosen: a launcher's processes have not heard of it."""
    named = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    names: list[str] = trainer.strategy.broadcast([logger.name for logger in named])
    for logger, name in zip(named, names, strict=True):
        if logger.name != name:
            shared = CSVLogger(logger.save_dir, name=name, version=logger.version)
            trainer.loggers = [shared if other is logger else other for other in trainer.loggers]


def _is_before(row: Mapping[str, str], step: int, epoch: int) -> bool:
    try:
        return float(row["step"]) <= step and float(row.get("epoch") or 0) <= epoch
    except (KeyError, TypeError, ValueError):  # a row that was cut short, or of somebody else
        return False


class SaveConfig(SaveConfigCallback):
    """Saves the configuration beside the results, and never over that of an earlier run.

    What belongs to one run is left out, so that the file can be given to another and to all commands: the checkpoint
    that it went on from, and of the Trainer's settings those ``chosen`` here.
    """

    def __init__(self, parser: Any, config: Any, *args: Any, chosen: Sequence[str] = (), **options: Any) -> None:
        config = config.clone()
        config.pop("ckpt_path", None)
        for name in chosen:
            config.trainer.pop(name)
        super().__init__(parser, config, *args, **options)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Choose a free name, where a run without logger has no folder of its own."""
        _share_folder(trainer)
        folder = Path(trainer.log_dir or ".")  # every process: it is broadcast
        if not self.already_saved:
            names = (f"{name}.yaml" for name in _numbered(Path(self.config_filename).stem))
            self.config_filename = next(name for name in names if not (folder / name).exists())
        name = self.config_filename
        self.config_filename = f".{name}.{os.getpid()}.tmp"  # whole under its name, or not at all
        draft = folder / self.config_filename
        try:
            super().setup(trainer, pl_module, stage)
            if draft.exists():
                draft.replace(folder / name)
        finally:
            draft.unlink(missing_ok=True)
            self.config_filename = name
