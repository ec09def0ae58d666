"""`fit`, `validate` and `test`: LightningCLI with recipes by name and errors that list the valid keys."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_prune.cli.config_errors import ExplainingParser
from lightning_prune.cli.recipes import resolve
from lightning_prune.errors import ConfigurationError, PruningError
from lightning_prune.experiments.runner import quiet

_COMMANDS = ("fit", "validate", "test")
_STRICT = {"allow_abbrev": False}  # or `--trainer.max_epoch` would pass on the command line and fail in a file


class _CLI(LightningCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only those that mean something for a pruned model."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in _COMMANDS}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args`, without Lightning's complaint that sys.argv is not empty: they come from there."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def instantiate_classes(self) -> None:
        """Say why a constructor refused a value: jsonargparse buries it in a list of all types it may have meant."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            root: BaseException = error
            while (below := root.__cause__ or root.__context__) is not None:
                root = below
            if isinstance(root, (PruningError, ValueError)):
                raise ConfigurationError(str(root)) from error
            raise

    def instantiate_trainer(self, **options: Any) -> Any:
        """None for `build_task`: one that runs nothing would look for devices and announce them."""
        return super().instantiate_trainer(**options) if self.subcommand else None


def run_lightning(command: str, argv: Sequence[str]) -> LightningCLI:
    """Run a Trainer method; `runs/NAME/COMMAND`, named after the configurations, is written anew by every run."""
    resolved, stems = resolve(argv)
    # Of torch to Lightning; nothing that the reader of a training log could act on.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    if command != "fit":  # nothing is saved here, so where the checkpoint once lay does not matter
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
    logger = {"save_dir": "runs", "name": f"{'-'.join(stems) or 'unnamed'}/{command}", "version": ""}
    return _CLI(
        args=[command, *resolved],
        parser_class=ExplainingParser,
        parser_kwargs={"prog": "lightning-prune", **_STRICT, **dict.fromkeys(_COMMANDS, _STRICT)},
        trainer_defaults={
            "default_root_dir": "runs",
            "logger": {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": logger},
            "log_every_n_steps": 10,
        },
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
    )


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
