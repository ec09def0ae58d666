"""A report as files: one HTML page that needs nothing else, JSON, pictures, the table as text."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.errors import PruningError
from lightning_prune.files import atomic
from lightning_prune.report import DENSE, FINE_TUNED, PruneReport, StageResult, markdown_table, print_report
from lightning_prune.report.figures import Theme, accuracy_time_figure, channels_figure, save_figure
from lightning_prune.report.table import (
    MISSING,
    capitalized,
    columns,
    footnote,
    lossless_line,
    points,
    savings_line,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from matplotlib.figure import Figure

# The browser itself refuses whatever is not in the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(report: PruneReport) -> str:
    """The whole report as one HTML page: no request goes out; light and dark, phone and paper.

    What was not measured is left out, or a dash in the table.

    Example:
        >>> "<h1>a &lt; b</h1>" in html_page(PruneReport("a < b"))
        True
    """
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        _subtitle(report),
        _tiles(report),
        "<h2>Dense, pruned, fine-tuned</h2>" + _stages(report) if report.stages else "",
        f'<p class="foot">{escape(footnote(report))}</p>' if report.stages else "",
        _verdict(report),
    ]
    savings = savings_line(report)
    if savings:
        parts.append("<h2>What reconstruction saves in fine-tuning</h2>")
        parts.append(f"<p>{escape(savings[0].upper() + savings[1:])}.</p>")
    if _drawable_time(report):
        parts.append(
            _picture(
                report, accuracy_time_figure, f"{capitalized(report.metric)} against wall-clock time in both orders"
            )
        )
        parts.append(_epochs(report))
    if report.layers:
        parts.append("<h2>What was removed</h2>")
        parts.append(_picture(report, channels_figure, "Channels kept per layer", "tall"))
        parts.append(_layers(report))
    if report.predictions:
        parts.append("<h2>What is found in test images</h2>" + _predictions(report))
    if report.notes:
        parts.append("<h2>Notes</h2>" + "".join(f"<p>{escape(note)}</p>" for note in report.notes))
    if report.settings:
        pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(_say(v))}</dd>" for k, v in report.settings.items())
        parts.append(f'<h2>Settings</h2><dl class="settings">{pairs}</dl>')
    style = (resources.files("lightning_prune.report") / "page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(report.title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def write_report(report: PruneReport, folder: str | Path) -> dict[str, Path]:
    """Write every form of a report into a folder; each file whole or not at all.

    Args:
        report: what was measured.
        folder: created where it is missing.

    Returns:
        Paths by "json", "html", "channels" and "accuracy_time" (PNG; none where there is nothing to draw),
        "table" (text) and "markdown".
    """
    folder = Path(folder)
    files = {
        "json": folder / "report.json",
        "html": folder / "report.html",
        "table": folder / "table.txt",
        "markdown": folder / "table.md",
    }
    _write(files["json"], json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write(files["html"], html_page(report))
    _write(files["table"], table_text(report))
    _write(files["markdown"], markdown_table(report))
    if report.layers:
        files["channels"] = folder / "channels.png"
        save_figure(channels_figure(report), files["channels"])
    if _drawable_time(report):
        files["accuracy_time"] = folder / "accuracy_time.png"
        save_figure(accuracy_time_figure(report), files["accuracy_time"])
    return files


def read_report(path: str | Path) -> PruneReport:
    """Read a report.json that `write_report` wrote.

    Raises:
        PruningError: the file is not a report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PruningError(f"{path} is not the JSON of a report: {error}") from error
    return PruneReport.from_dict(data)


def table_text(report: PruneReport, width: int = 110) -> str:
    """What `print_report` shows, without colours."""
    from rich.console import Console

    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")
    print_report(report, Console(file=stream, width=width, color_system=None, force_terminal=False))
    stream.seek(0)
    return "\n".join(line.rstrip() for line in stream.read().splitlines()).strip("\n") + "\n"


def _write(path: Path, text: str) -> None:
    with atomic(path) as stream:
        stream.write(text.encode())


def _drawable_time(report: PruneReport) -> bool:
    return any(record.accuracy is not None for timing in report.timings for record in timing.epochs)


def _subtitle(report: PruneReport) -> str:
    said = [
        f"{key} {_say(report.settings[key])}" if key != "criterion" else _say(report.settings[key])
        for key in ("criterion", "channels removed", "coupling", "machine")
        if key in report.settings
    ]
    return f'<p class="quiet">{escape(" · ".join(said))}</p>' if said else ""


def _say(value: object) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return MISSING if value is None else str(value)


def _tiles(report: PruneReport) -> str:
    factors = (
        times(report.params_cut, "fewer parameters", "more parameters"),
        times(report.flops_cut, "fewer FLOPs", "more FLOPs"),
        times(report.latency_gain, f"faster forward ({report.device})", f"slower forward ({report.device})"),
        times(report.epoch_speedup, *(f"{word} training epoch, order B against A" for word in ("faster", "slower"))),
    )
    tiles = [text.split(" ", 1) for text in factors if text]
    shown = [f"<div><dd>{escape(value)}</dd><dt>{escape(what)}</dt></div>" for value, what in tiles]
    if report.accuracy_change is not None:
        number, unit = points(report.accuracy_change).split(" ")
        metric = escape(report.metric)
        shown.append(f"<div><dd>{number} <small>{unit}</small></dd><dt>{metric}, fine-tuned</dt></div>")
    return f'<dl class="tiles">{"".join(shown)}</dl>' if shown else ""


def _stages(report: PruneReport) -> str:
    cols = columns(report)
    head = "".join(f"<th scope=col>{escape(c.title)}<small>{escape(c.unit)}</small></th>" for c in cols)
    rows = []
    for at, stage in enumerate(report.stages):
        cells = []
        for column in cols:
            cell = column.cells[at]
            text = f"{escape(cell.value)}" + (f" <small>± {escape(cell.spread)}</small>" if cell.spread else "")
            text += f' <span class="times">{escape(cell.times)}</span>' if cell.times else ""
            cells.append(f'<td data-label="{escape(f"{column.title} ({column.unit})")}"><span>{text}</span></td>')
        key = ' class="key"' if stage.name in (DENSE, FINE_TUNED["B"]) else ""
        rows.append(f"<tr{key}><th scope=row>{escape(stage.name)}</th>{''.join(cells)}</tr>")
    table = f"<thead><tr><th scope=col>Model</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="stages">{table}</table></div>{_conventions(report)}'


def _conventions(report: PruneReport) -> str:
    """FLOPs by every convention, where there is more than one."""
    names = list(dict.fromkeys(name for stage in report.stages for name in stage.flops))
    if len(names) < 2:
        return ""

    def row(stage: StageResult) -> list[str]:
        return [stage.name, *(f"{stage.flops[n] / 1e6:,.2f}" if n in stage.flops else MISSING for n in names)]

    return _details("FLOPs by every convention (M)", ["Model", *names], map(row, report.stages))


def _epochs(report: PruneReport) -> str:
    rows = [
        [
            f"{timing.order}, {record.epoch}",
            f"{record.train_seconds:.2f}",
            f"{record.eval_seconds:.2f}",
            f"{record.elapsed_seconds:.2f}",
            MISSING if record.accuracy is None else f"{100 * record.accuracy:.2f}",
        ]
        for timing in report.timings
        for record in timing.epochs
    ]
    head = ["Order, epoch", "Training (s)", "Evaluation (s)", "Elapsed (s)", f"{capitalized(report.metric)} (%)"]
    return _details("Every epoch as numbers", head, rows)


def _layers(report: PruneReport) -> str:
    rows = [[layer.layer, layer.group or MISSING, str(layer.dense), str(layer.kept)] for layer in report.layers]
    return _details("Every layer as numbers", ["Layer", "Group", "Dense", "Kept"], rows)


def _predictions(report: PruneReport) -> str:
    """A row of images per state of the model."""
    rows = []
    for drawn in report.predictions:
        images = "".join(
            f'<img src="data:image/jpeg;base64,{escape(image)}" alt="Test image {number}, {escape(drawn.name)}">'
            for number, image in enumerate(drawn.images, 1)
        )
        rows.append(f"<figure><figcaption>{escape(drawn.name)}</figcaption><div>{images}</div></figure>")
    return f'<div class="predictions">{"".join(rows)}</div>'


def _details(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<details><summary>{escape(title)}</summary><div class="scroll">{table}</div></details>'


def _verdict(report: PruneReport) -> str:
    found = report.losslessness
    state = "" if found is None else "passed" if found.passed else "failed"
    verdict, _, measured = lossless_line(report).partition(":")
    text = f"<b>{escape(verdict[0].upper() + verdict[1:])}</b>:{escape(measured)}"
    if found is not None:
        text += f' <span class="quiet">(masked against reconstructed; absolute {found.max_abs_error:.1e})</span>'
    return f'<p class="verdict {state}">{text}</p>'


def _picture(report: PruneReport, draw: Callable[[PruneReport, Theme], Figure], alt: str, kind: str = "") -> str:
    """An SVG for either theme; paper and browsers without a theme take the light one."""

    def address(theme: Theme) -> str:
        stream = io.BytesIO()
        save_figure(draw(report, theme), stream, "svg")
        return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"

    return (
        f'<figure class="{kind}"><picture>'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{address("dark")}">'
        f'<img src="{address("light")}" alt="{escape(alt)}"></picture></figure>'
    )
