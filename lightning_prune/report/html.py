"""A report as files: one HTML page that needs nothing else, JSON, pictures, the table as text."""

from __future__ import annotations

import base64
import io
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.files import write_text
from lightning_prune.report import summary
from lightning_prune.report.data import PruneReport
from lightning_prune.report.figures import PALETTES, accuracy_time_figure, channels_figure, save_figure
from lightning_prune.report.pages import render
from lightning_prune.report.strips import strips
from lightning_prune.report.table import MISSING, Column, Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure


def html_page(report: PruneReport) -> str:
    """The whole report as one HTML page: no request goes out; light and dark, phone and paper."""
    pictures = {
        kind: {theme: _address(draw, theme) for theme in PALETTES}
        for kind, draw in _figures(report).items()
        if kind != "channels"  # drawn by the page itself, as strips
    }
    return render(
        "report.html",
        report=report,
        summary=summary,
        title=report.title,
        subtitle=_subtitle(report),
        tiles=_tiles(report),
        notes=report.notes,
        settings={key: _say(value) for key, value in report.settings.items()},
        pictures=pictures,
        conventions=_conventions(report),
        epochs=_epochs(report),
        strips=strips(report.layers),
    )


def write_report(report: PruneReport, folder: str | Path) -> dict[str, Path]:
    """Write every form of a report into a folder, each file whole or not at all; returns them by what they hold."""
    folder = Path(folder)
    texts = {
        "json": ("report.json", json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"),
        "html": ("report.html", html_page(report)),
        "table": ("table.txt", table_text(report)),
        "markdown": ("table.md", summary.markdown_table(report)),
    }
    files = {kind: folder / name for kind, (name, _) in texts.items()}
    for kind, (_, text) in texts.items():
        write_text(files[kind], text)
    for kind, draw in _figures(report).items():
        files[kind] = folder / f"{kind}.png"
        save_figure(draw(), files[kind])
    return files


def table_text(report: PruneReport, width: int = 110) -> str:
    """What `print_report` shows, without colours."""
    from rich.console import Console

    stream = io.StringIO()
    summary.print_report(report, Console(file=stream, width=width, color_system=None, force_terminal=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n") + "\n"


def _figures(report: PruneReport) -> dict[str, Callable[..., Figure]]:
    """What draws the channels and the time, each if there is something to draw."""
    figures: dict[str, Callable[..., Figure]] = {}
    if report.layers:
        figures["channels"] = partial(channels_figure, report.layers)
    if any(record.accuracy is not None for timing in report.timings for record in timing.epochs):
        draw = partial(accuracy_time_figure, report.timings, dense=report.dense_validation, metric=report.metric)
        figures["accuracy_time"] = draw
    return figures


def _address(draw: Callable[..., Figure], theme: str) -> str:
    """A picture as an SVG inside the page."""
    stream = io.BytesIO()
    save_figure(draw(theme=theme), stream, "svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _subtitle(report: PruneReport) -> str:
    keys = [key for key in ("criterion", "channels removed", "coupling", "machine") if key in report.settings]
    return " · ".join(f"{'' if key == 'criterion' else f'{key} '}{_say(report.settings[key])}" for key in keys)


def _say(value: object) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return MISSING if value is None else str(value)


def _tiles(report: PruneReport) -> list[tuple[str, str, str]]:
    """Number, unit and what it is, in the order in which they are shown."""
    epoch = "training epoch, order B against A"
    shown = [*summary.gains(report), summary.times(report.epoch_speedup, f"faster {epoch}", f"slower {epoch}")]
    tiles = [(number, "", what) for number, _, what in (text.partition(" ") for text in shown if text)]
    if report.accuracy_change is not None:
        number, unit = summary.points(report.accuracy_change).split(" ")
        tiles.append((number, unit, f"{report.metric}, fine-tuned"))
    return tiles


def _conventions(report: PruneReport) -> Table:
    """FLOPs by every convention."""
    names = list(dict.fromkeys(name for stage in report.stages for name in stage.flops))
    rows = (
        (stage.name, *(f"{stage.flops[name] / 1e6:,.2f}" if name in stage.flops else MISSING for name in names))
        for stage in report.stages
    )
    return Table.of(("Model", *names), rows)


def _epochs(report: PruneReport) -> Table:
    """Every epoch of both orders."""
    rows = [
        (
            f"{timing.order}, {record.epoch}",
            *(f"{seconds:.2f}" for seconds in (record.train_seconds, record.eval_seconds, record.elapsed_seconds)),
            MISSING if record.accuracy is None else f"{100 * record.accuracy:.2f}",
        )
        for timing in report.timings
        for record in timing.epochs
    ]
    seconds = [Column(title, "s") for title in ("Training", "Evaluation", "Elapsed")]
    return Table((Column("Order, epoch"), *seconds, Column(summary.capitalized(report.metric), "%")), tuple(rows))
