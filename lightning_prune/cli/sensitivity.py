"""`sensitivity`: what masking channels of one layer alone costs, and the ratio of every layer that follows."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_prune.cli.architecture import Architecture, Checkpoint, architecture
from lightning_prune.cli.constraints import constraint_words, constraints_of
from lightning_prune.cli.criterion import criterion_of
from lightning_prune.errors import ModelError
from lightning_prune.experiments.sensitivity import SensitivityStudy, measure_task_sensitivity, write_sensitivity
from lightning_prune.report.sensitivity import sensitivity_table
from lightning_prune.report.table import print_line, printable
from lightning_prune.selection import LayerRatio
from lightning_prune.sensitivity import within_budget


def run(options: argparse.Namespace) -> int:
    """`lightning-prune sensitivity CHECKPOINT --config TASK.yaml --criterion l1 --out DIR`."""
    checkpoint = Checkpoint.read(options.checkpoint)
    if checkpoint.pruned:
        raise ModelError(f"{options.checkpoint} is pruned already; measure the dense checkpoint it came from")
    known = architecture(options, checkpoint)
    if known.data is None:
        raise ModelError("sensitivity is measured on validation data: the TASK of --config has no data: section")
    task = known.load(checkpoint)
    assert isinstance(task, LightningModule)
    console = Console(highlight=False)
    constraints = constraints_of(options)
    study = _measured(task, known, options, constraints)
    selection, said = _chosen(study, task, known, options, constraints)
    _show(console, study, selection, said)
    files = write_sensitivity(study, options.output, selection)
    console.print("Written: " + "  ".join(map(str, files.values())), soft_wrap=True, markup=False)
    if selection is not None:
        # unbroken, for it is copied
        console.print(printable(console, _prune_command(options, files["layer_ratios.json"]), "bold"), soft_wrap=True)
    return 0


def _prune_command(options: argparse.Namespace, ratios: Path) -> str:
    """What carries out the ratios that were chosen: the same model, criterion and constraints."""
    words = ["lightning-prune", "prune", options.checkpoint]
    words += [word for name in options.config for word in ("--config", name)] + options.fit_options
    words += ["--criterion", options.criterion] * (options.criterion != "l1")
    words += ["--score-batches", str(options.score_batches)] * (options.score_batches is not None)
    words += ["--layer-ratios", str(ratios)]
    return " ".join([shlex.join(words), *constraint_words(options), *["--statistics"] * options.statistics])


def _measured(
    task: LightningModule, known: Architecture, options: argparse.Namespace, constraints: dict[str, Any]
) -> SensitivityStudy:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("evaluations", total=None)
        assert known.data is not None
        return measure_task_sensitivity(
            task,
            known.data,
            criterion_of(options.criterion),
            output=options.output,
            ratios=options.ratios,
            batches=options.batches,
            score_batches=options.score_batches,
            metric=options.metric,
            mode=options.mode,
            statistics=options.statistics,
            task_settings=known.origin,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
            **constraints,
        )


def _chosen(
    study: SensitivityStudy,
    task: LightningModule,
    known: Architecture,
    options: argparse.Namespace,
    constraints: dict[str, Any],
) -> tuple[LayerRatio | None, str]:
    """The ratios that --drop or --budget ask for, and what they mean."""
    together = "together they lose more"
    if options.drop is not None:
        selection = study.sensitivity.layer_ratio(options.drop, **constraints)
        return selection, f"chosen: no layer alone loses more than {_amount(study, options.drop)}; {together}"
    if options.budget is None:
        return None, ""
    inputs = known.deployed_inputs()
    found = within_budget(study.sensitivity, task, study.graph, study.scores, inputs, **options.budget, **constraints)
    left = ", ".join(f"{100 * share:.1f} % of the {name}" for name, share in found.remains.items())
    said = f"chosen: no layer alone loses more than {_amount(study, found.drop)} ({together}); {left} remain"
    return found.selection, said


def _amount(study: SensitivityStudy, drop: float) -> str:
    metric = study.sensitivity.metric
    return f"{100 * drop:.3g} points of {metric}" if study.percent else f"{drop:.3g} of {metric}"


def _show(console: Console, study: SensitivityStudy, selection: LayerRatio | None, said: str) -> None:
    found = study.sensitivity
    ratios = None if selection is None else {group: float(selection.overrides.get(group, 0.0)) for group in found.sizes}
    console.print()
    console.print(sensitivity_table(found, ratios, percent=study.percent))
    dense = f"{100 * found.dense:.2f} %" if study.percent else f"{found.dense:.4g}"
    unit = "points " if study.percent else ""
    print_line(console, f"{unit}of {found.metric} lost ({dense} dense) at this share masked of one layer alone", "dim")
    print_line(console, f"on {study.about}", "dim")
    console.print()
    if selection is None:
        print_line(console, "ratios for prune and fit: repeat with --drop or --budget; nothing is measured anew")
    elif not any(selection.overrides.values()):
        print_line(console, f"{said}. Every layer stays whole: allow a larger --drop", "yellow")
    else:
        print_line(console, said)
