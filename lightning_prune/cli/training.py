"""`fit`, `validate` and `test`: LightningCLI with recipes by name and errors that list the valid keys."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_prune.callbacks.processes import leave_processes, lost_process
from lightning_prune.callbacks.whole_checkpoints import write_whole
from lightning_prune.cli.config_errors import ExplainingParser, title_groups
from lightning_prune.cli.recipes import resolve
from lightning_prune.cli.resuming import judge, start_from
from lightning_prune.cli.run_folder import (
    RUNS,
    SaveConfig,
    carry_over,
    check_unused,
    folder_of,
    is_first_process,
    last_checkpoint,
    own_folder,
)
from lightning_prune.errors import (
    CallbackError,
    CheckpointError,
    ConfigurationError,
    PruningError,
    first_line,
    is_out_of_memory,
)
from lightning_prune.experiments.runner import quiet

_COMMANDS = {
    "fit": "Train a task; with a prune recipe score, mask and reconstruct too.",
    "validate": "Evaluate a task on the validation set.",
    "test": "Evaluate a task on the test set.",
}
_WEIGHTS = "weights to start from, dense or of a pruned file, where no --ckpt_path is given"
_GROUPS = {"trainer": "the Trainer", "model": "the task", "data": "the data"}
_STRICT = {"allow_abbrev": False}  # or `--trainer.max_epoch` would pass on the command line and fail in a file


def _strict(command: str) -> dict[str, Any]:
    """Settings of a command's parser; without a usage its help would list all 50 options twice."""
    own = "[--config PRUNE.yaml]\n           [--weights FILE]" if command == "fit" else "--ckpt_path FILE"
    files = f"--config TASK.yaml {own}"
    keys = "[--trainer.KEY VALUE ...]\n           [--model.KEY VALUE ...] [--data.KEY VALUE ...]"
    about = _COMMANDS[command]
    return {**_STRICT, "usage": f"lightning-prune {command} {files}\n           {keys}", "description": about}


class _CLI(LightningCLI):
    def __init__(self, *, folder: str = "", **options: Any) -> None:
        self._folder = folder  # of the first run of this name, under runs/
        self._continued: str | None = None  # that of a run that goes on
        with ExitStack() as self._opened:
            super().__init__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CLI:
        """Itself: jsonargparse keeps it in what builds the task's optimizer, and a copied task needs no other."""
        return self

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only those that mean something for a pruned model."""
        found = LightningCLI.subcommands()
        return {name: {*found[name], "weights_only"} for name in _COMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Weights to start from; `build_task` knows the key, for it reads the configuration of a run."""
        parser.add_argument("--weights", type=str | None, default=None, help=_WEIGHTS)
        if not self._folder:  # `build_task`: configurations that Lightning's own command line has saved hold this one
            parser.add_argument("--ckpt_path", type=str | None, default=None, help=SUPPRESS)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> LightningArgumentParser:
        """Groups of options with titles of a few words in place of what Lightning says of its classes."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        title_groups(parser, {**_GROUPS, subcommand: "the run"})
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Judge the checkpoint before anything is written; no code of a file is ever run."""
        options = super()._prepare_subcommand_kwargs(subcommand)
        path, training = options.get("ckpt_path"), subcommand == "fit"
        if self._continued is None:
            check_unused(self.trainer)
        weights = self.config[subcommand].weights
        if weights is not None and path is None:
            start_from(weights, self.model, self.trainer)
        if path in ("best", "hpc"):
            why = "which one is best only the run knows that wrote it" if path == "best" else "of which run is not said"
            raise CheckpointError(f"--ckpt_path {path}: {why}; name its file")
        if path not in (None, "last"):
            content = judge(path, self.model, self.trainer, training=training)
            if content is None:  # the model has the weights
                path = None
            elif training:
                carry_over(self.trainer, Path(path), content)
        options["ckpt_path"] = path
        return {**options, "weights_only": True}

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint name the model's class; here the configuration does, which is the user's own."""

    def before_instantiate_classes(self) -> None:
        """Choose where to write, unless the configuration does: a run that goes on writes where it wrote before."""
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        devices, most = config.trainer.get("devices"), max(64, 4 * (os.cpu_count() or 1))
        if str(devices).isdecimal() and int(devices) > most:  # each is a process
            raise ConfigurationError(f"--trainer.devices must be at most {most} on this machine, got {devices}")
        if config.trainer.get("accumulate_grad_batches") == 0:
            raise ConfigurationError("--trainer.accumulate_grad_batches must be at least 1, got 0")
        logger = config.trainer.get("logger")
        init_args = logger.get("init_args") if isinstance(logger, Namespace) else None
        chosen_here = None if init_args is None else self._folder_in(init_args)
        self._folder = chosen_here or self._folder
        if config.get("ckpt_path") == "last":
            config.ckpt_path = str(last_checkpoint(self._folder) or "last")
        if init_args is None or chosen_here is None:
            return  # the user's own
        self._continued = folder_of(config.get("ckpt_path"), self._folder) if self.subcommand == "fit" else None
        folder = self._continued or self._opened.enter_context(own_folder(self._folder))
        if folder not in (self._folder, self._continued) and is_first_process():
            first, own = RUNS / self._folder, RUNS / folder
            sys.stdout.write(f"{first} holds an earlier run, which stays: this one is in {own}\n")
        init_args.name, chosen = folder, ["logger"]
        if config.trainer.default_root_dir == str(RUNS):  # where SLURM's requeued jobs look for a checkpoint of theirs
            config.trainer.default_root_dir = str(RUNS / folder)
            chosen.append("default_root_dir")
        self.save_config_kwargs = {"chosen": chosen}

    def _folder_in(self, logger: Namespace) -> str | None:
        """The folder that a logger was given here, or by the command that printed its configuration: for any number
        of runs. None: the user has chosen it.
        """
        save_dir, name, version = (logger.get(key) for key in ("save_dir", "name", "version"))
        if (name, version) == (self._folder, ""):
            return self._folder
        stem, _, command = str(name).rpartition("/")
        printed = (save_dir, version) == (str(RUNS), "") and command in _COMMANDS
        return f"{stem}/{self.subcommand}" if printed and stem else None

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args`, without Lightning's complaint that sys.argv is not empty: they come from there."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def instantiate_classes(self) -> None:
        """Say why a constructor refused a value: jsonargparse buries it in a list of all types it may have meant."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            raise ConfigurationError(str(error)) from error
        except Exception as error:
            root: BaseException = error
            while (below := root.__cause__ or root.__context__) is not None:
                root = below
            if is_out_of_memory(root):
                raise root from error
            if isinstance(root, (PruningError, ValueError)):
                raise ConfigurationError(str(root)) from error
            place = traceback.extract_tb(root.__traceback__)[-1]  # whose code it is, its author will ask
            where = f"{place.filename}:{place.lineno}"
            raise ConfigurationError(f"what was configured cannot be built: {first_line(root)} ({where})") from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigurationError(f"--seed_everything: {error}") from error

    def instantiate_trainer(self, **options: Any) -> Any:
        """None for `build_task`: one that runs nothing would look for devices and announce them."""
        if not self.subcommand:
            return None
        trainer = super().instantiate_trainer(**options)
        write_whole(trainer)
        return trainer


def run_lightning(command: str, argv: Sequence[str]) -> LightningCLI:
    """Run a Trainer method; it writes to `runs/NAME/COMMAND`, named after the configurations, or to `COMMAND-2`, ..."""
    resolved, stems = resolve(argv)
    # Of torch to Lightning; nothing that the reader of a training log could act on.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a run that goes on
    if command != "fit":  # nothing is saved here, so where the checkpoint once lay does not matter
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
    folder = f"{'-'.join(stems) or 'unnamed'}/{command}"
    logger = {"save_dir": str(RUNS), "name": folder, "version": ""}
    try:
        return _CLI(
            args=[command, *resolved],
            folder=folder,
            parser_class=ExplainingParser,
            parser_kwargs={"prog": "lightning-prune", **_STRICT, **{name: _strict(name) for name in _COMMANDS}},
            trainer_defaults={
                "default_root_dir": str(RUNS),
                "logger": {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": logger},
                "log_every_n_steps": 10,
            },
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
        )
    except MisconfigurationException as error:
        raise ConfigurationError(str(error)) from error
    except RuntimeError as error:
        if said := lost_process(error):
            raise CallbackError(said) from error
        raise
    finally:
        leave_processes()


class BuiltTask(NamedTuple):
    """What a configuration describes; ``name`` is made of the configurations' names, ``config`` is plain data."""

    task: LightningModule
    data: LightningDataModule | None
    name: str
    config: dict[str, Any]


def build_task(argv: Sequence[str], prog: str) -> BuiltTask:
    """The task and the data of a configuration, as `fit` would build them; ``prog`` is the command, for its errors."""
    resolved, stems = resolve(argv)
    with quiet():  # about the seed
        cli = _CLI(
            args=resolved,
            run=False,
            parser_class=ExplainingParser,
            parser_kwargs={"prog": prog, **_STRICT},
            seed_everything_default=False,
            auto_configure_optimizers=False,
        )
    config = json.loads(cli.parser.dump(cli.config, format="json"))
    return BuiltTask(cli.model, cli.datamodule, "-".join(stems), config)


def fit(argv: Sequence[str]) -> None:
    """`lightning-prune fit`; says at the end where the best weights are, for `prune` and `test` to be given."""
    trainer = run_lightning("fit", argv).trainer
    saved = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    if trainer.is_global_zero and saved.is_file():
        shown = saved.relative_to(Path.cwd()) if saved.is_relative_to(Path.cwd()) else saved
        sys.stdout.write(f"checkpoint: {shown}\n")


def validate(argv: Sequence[str]) -> None:
    """`lightning-prune validate`."""
    run_lightning("validate", argv)


def test(argv: Sequence[str]) -> None:
    """`lightning-prune test`."""
    run_lightning("test", argv)
