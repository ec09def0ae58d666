"""Reports: numbers survive every form, ratios are right, nothing of the user's text becomes markup."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from lightning_prune.errors import PruningError
from lightning_prune.reconstruction import LosslessReport
from lightning_prune.report import (
    EpochRecord,
    KeptChannels,
    OrderTiming,
    Predictions,
    PruneReport,
    StageResult,
    markdown_table,
    print_report,
)
from lightning_prune.report.html import html_page, table_text, write_report
from lightning_prune.report.summary import MINUS
from lightning_prune.report.table import MISSING, TIMES


def epochs(seconds, accuracies):
    return tuple(EpochRecord(i, seconds, 0.5, (i + 1) * (seconds + 0.5), a) for i, a in enumerate(accuracies))


@pytest.fixture(scope="module")
def report():
    flops = {"macs": 500e6, "flops2": 1000e6}
    small = {"macs": 125e6, "flops2": 250e6}
    return PruneReport(
        "ResNet-18 <b>on</b> [red]digits[/red] & more",
        {"criterion": "JRE", "ratio": 0.5, "machine": "<script>alert(1)</script>", "threads": 2},
        (
            StageResult("dense", 0.98, "accuracy", 11_173_962, flops, 20.0, 1.0, 22.0, 1.0, 44_780_000),
            StageResult("masked", 0.42, "accuracy", 11_173_962, flops, 21.0, 1.2, None, None, 44_780_000),
            StageResult("reconstructed", 0.42, "accuracy", 2_793_490, small, 8.0, 0.4, None, None, 11_200_000),
            StageResult("fine-tuned (order A)", 0.97, "accuracy", 2_793_490, small, 8.1, 0.4, 24.0, 0.5, 11_200_000),
            StageResult("fine-tuned (order B)", 0.975, "accuracy", 2_793_490, small, 8.2, 0.3, 10.0, 0.5, 11_200_000),
        ),
        (
            OrderTiming("A", epochs(24.0, (0.9, 0.96, 0.97))),
            OrderTiming("B", epochs(10.0, (0.91, None, 0.975))),
        ),
        (KeptChannels("conv1", 64, 32, "conv1"), KeptChannels("layer1.0.conv1", 64, 64)),
        LosslessReport(4.4e-16, 3.1e-15, "float64", 1e-10, 1),
        ("a note | with a pipe & <i>tags</i>",),
        changed_predictions=(0, 360),
    )


class Page(HTMLParser):
    """Rows of cells of the first table, all text, and every address that a browser would open."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.tags, self.words = [], [], [], []
        self.tables = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.tables += tag == "table"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        self.words.append(data)


def numbers(text):
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*\.?\d*", text)]


# per stage: accuracy, params, FLOPs, latency, spread, epoch, disk; and the ratios behind them
WANTED = {
    "dense": [98.0, 11.17, 1000.0, 20.0, 0.5, 22.0, 44.78],
    "masked": [42.0, 11.17, 1000.0, 21.0, 0.6, 44.78],
    "reconstructed": [42.0, 2.79, 4.0, 250.0, 4.0, 8.0, 0.2, 2.5, 11.2],
    "fine-tuned (order A)": [97.0, 2.79, 4.0, 250.0, 4.0, 8.1, 0.2, 2.5, 24.0, 11.2],
    "fine-tuned (order B)": [97.5, 2.79, 4.0, 250.0, 4.0, 8.2, 0.15, 2.4, 10.0, 11.2],
}


def test_ratios_compare_the_reconstructed_with_the_dense_model(report):
    assert report.params_cut == pytest.approx(11_173_962 / 2_793_490)
    assert report.flops_cut == pytest.approx(4)
    assert report.latency_gain == pytest.approx(2.5)
    assert report.epoch_speedup == pytest.approx(24 / 10)
    assert report.accuracy_change == pytest.approx(-0.5)


def test_accuracy_change_falls_back_to_order_a(report):
    only_a = dataclasses.replace(report, stages=report.stages[:4])
    assert only_a.accuracy_change == pytest.approx(-1.0)


def test_epoch_of_an_order_is_the_median_of_its_epochs():
    uneven = tuple(EpochRecord(i, s, 0.0, 0.0) for i, s in enumerate((90.0, 10.0, 12.0)))
    assert OrderTiming("A", uneven).epoch_seconds == 12.0
    assert OrderTiming("B").epoch_seconds is None


@pytest.mark.parametrize("width", [100, 110, 160])
def test_terminal_table_shows_the_numbers_of_the_data(report, width):
    lines = table_text(report, width).splitlines()
    for name, wanted in WANTED.items():
        row = next(line for line in lines if line.startswith(name))
        assert numbers(row.removeprefix(name)) == wanted


def test_terminal_table_fits_80_columns_in_one_line_a_stage(report):
    lines = table_text(report, 80).splitlines()
    assert max(map(len, lines)) <= 80
    for name, wanted in WANTED.items():
        row = next(line for line in lines if line.startswith(name))
        ratio_of_latency = [2.5] if len(wanted) > 7 and name != "fine-tuned (order B)" else [2.4]
        assert numbers(row.removeprefix(name)) == [x for x in wanted if x not in ratio_of_latency]


def test_markdown_shows_the_numbers_of_the_data(report):
    lines = markdown_table(report).splitlines()
    for line, (name, wanted) in zip(lines[2:7], WANTED.items(), strict=True):
        assert line.startswith(f"| {name} |")
        assert line.count("|") == lines[0].count("|") == 8
        assert numbers(line.split("|", 2)[2]) == wanted


def test_html_shows_the_numbers_of_the_data(report):
    rows = {row[0]: " ".join(row[1:]) for row in Page(html_page(report)).rows[:6]}
    for name, wanted in WANTED.items():
        assert numbers(rows[name]) == pytest.approx(wanted)


def test_lines_under_the_table(report):
    text = " ".join(table_text(report, 80).split()).replace(TIMES, "x").replace(MINUS, "-")
    assert "4.0x fewer parameters, 4.0x fewer FLOPs, 2.5x lower CPU latency, accuracy -0.50 points" in text
    assert "lossless: max relative error 3.1e-15 in float64, 0 of 360 predictions changed" in text
    assert (
        "24.00 s/epoch in order A (masked) against 10.00 s/epoch in order B (reconstructed), 2.4x faster; "
        "accuracy A 97.00 %, B 97.50 %" in text
    )
    assert "a note | with a pipe & <i>tags</i>" in text


def test_what_is_worse_is_called_worse(report):
    slow = dataclasses.replace(
        report,
        losslessness=LosslessReport(0.2, 0.1, "float32", 1e-5, 1),
        changed_predictions=(3, 360),
        stages=tuple(
            dataclasses.replace(s, epoch_seconds=s.epoch_seconds and 100 / s.epoch_seconds) for s in report.stages
        ),
    )
    text = " ".join(table_text(slow).split())
    assert "NOT lossless: max relative error 1.0e-01 in float32, 3 of 360 predictions changed" in text
    assert f"2.4{TIMES} slower" in text
    assert 'class="verdict failed"' in html_page(slow)
    assert "2.4\u00d7</dd><dt>slower training epoch" in html_page(slow)


def test_a_log_in_ascii_gets_ascii(report):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_report(report, Console(file=stream, width=80))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "4.0x" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_titles_and_settings_are_text_and_never_markup(report):
    assert "[red]digits[/red]" in table_text(report)
    page = html_page(report)
    assert "<script" not in page
    assert "<i>" not in page
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.words.count(report.title) == 2  # the window and the heading
    assert parsed.tags.count("b") == 1  # the verdict
    assert report.settings["machine"] in parsed.words
    piped = PruneReport("t", stages=(StageResult("a|b"),))
    assert "| a\\|b |" in markdown_table(piped)


def test_page_asks_for_nothing_outside_itself(report):
    page = html_page(report)
    addresses = Page(page).addresses
    assert len(addresses) == 3  # an icon, and a picture in two themes
    assert all(address.startswith("data:") for address in addresses)
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {"#not-prunable"}


def test_json_holds_the_report(report, tmp_path):
    files = write_report(report, tmp_path / "new" / "folder")
    assert set(files) == {"json", "html", "channels", "accuracy_time", "table", "markdown"}
    assert all(path.stat().st_size > 0 for path in files.values())
    assert sorted(path.name for path in files["json"].parent.iterdir()) == sorted(p.name for p in files.values())
    data = json.loads(files["json"].read_text(encoding="utf-8"))
    assert data == report.to_dict()
    assert data["stages"][2]["params"] == 2_793_490
    assert data["timings"][1]["epochs"][1]["accuracy"] is None
    errors = {"max_abs_error": 4.4e-16, "max_rel_error": 3.1e-15, "dtype": "float64", "passed": True}
    assert data["losslessness"] == {**errors, "changed": 0, "total": 360}
    assert "changed_predictions" not in data


def test_failing_to_write_leaves_the_old_file(report, tmp_path, monkeypatch):
    files = write_report(report, tmp_path)
    before = files["channels"].read_bytes()

    def half(self, stream, **options):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    changed = dataclasses.replace(report, timings=(), layers=(KeptChannels("x", 4, 2),))
    monkeypatch.setattr("lightning_prune.report.html.html_page", lambda report: "page")
    with pytest.raises(PruningError, match="disk full"):
        write_report(changed, tmp_path)
    assert files["channels"].read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_non_finite_numbers_survive_strict_json():
    broken = LosslessReport(float("inf"), float("nan"), "float32", 1e-5, 1)
    report = PruneReport("t", stages=(StageResult("dense", accuracy=float("nan")),), losslessness=broken)
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert float(again["losslessness"]["max_abs_error"]) == float("inf")
    assert np.isnan(float(again["losslessness"]["max_rel_error"]))
    assert np.isnan(float(again["stages"][0]["accuracy"]))
    assert "nan" in table_text(report)


def test_values_of_numpy_and_paths_become_plain_data(tmp_path):
    report = PruneReport(
        "t",
        {"seed": np.int64(3), "where": tmp_path, "pair": (1, 2)},
        (StageResult("dense", params=np.int64(5)),),
    )
    assert report.settings == {"seed": 3, "where": str(tmp_path), "pair": [1, 2]}
    assert report.to_dict()["stages"][0]["params"] == 5
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_nothing_measured_is_shown_as_nothing(tmp_path):
    report = PruneReport("bare", stages=(StageResult("dense"), StageResult("reconstructed")))
    properties = ("params_cut", "flops_cut", "latency_gain", "accuracy_change", "epoch_speedup")
    assert [getattr(report, name) for name in properties] == [None] * 5
    row = next(line for line in table_text(report).splitlines() if line.startswith("dense"))
    assert row.split() == ["dense", *[MISSING] * 6]
    assert "losslessness: not checked" in table_text(report)
    files = write_report(report, tmp_path)
    assert set(files) == {"json", "html", "table", "markdown"}
    assert "<img" not in html_page(report)
    assert html_page(PruneReport("empty")).count("<h1>empty</h1>") == 1
    assert "empty" in table_text(PruneReport("empty"))
    assert "losslessness" in markdown_table(PruneReport("empty"))


@pytest.mark.parametrize(
    ("params", "unit", "shown"), [(61_706, "k", "61.71"), (138_357_544, "M", "138.4"), (430, "k", "0.430")]
)
def test_unit_fits_the_size_of_the_model(params, unit, shown):
    lines = markdown_table(PruneReport("t", stages=(StageResult("dense", params=params),))).splitlines()
    assert f"Parameters ({unit})" in lines[0]
    assert lines[2].split("|")[2].strip() == shown


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OrderTiming("C"), "'A' or 'B'"),
        (lambda: KeptChannels("conv", 4, 5), "cannot have kept 5 of 4"),
        (
            lambda: PruneReport("t", stages=(StageResult("a"), StageResult("a"))),
            "every stage can be reported once",
        ),
        (lambda: PruneReport("t", timings=(OrderTiming("A"),) * 2), "every order can be reported once"),
        (lambda: PruneReport("t", stages=(StageResult("a", flops={"macs": 1.0}),)), "'flops2'.*macs"),
    ],
)
def test_what_is_no_report_is_refused(build, message):
    with pytest.raises(PruningError, match=message):
        build()


def test_what_the_models_find_is_shown_in_rows_and_survives_json(report, tmp_path):
    with_images = dataclasses.replace(
        report, predictions=(Predictions("truth", ("QUJD", "REVG")), Predictions("dense"))
    )
    files = write_report(with_images, tmp_path)
    data = json.loads(files["json"].read_text(encoding="utf-8"))
    assert data["predictions"] == [{"name": "truth", "images": ["QUJD", "REVG"]}, {"name": "dense", "images": []}]
    page = files["html"].read_text(encoding="utf-8")
    assert '<figcaption>truth</figcaption><div><img src="data:image/jpeg;base64,QUJD"' in page
    assert "What is found" in page
    assert "What is found" not in html_page(report)


def test_a_metrics_name_keeps_its_capitals(report):
    stages = tuple(dataclasses.replace(stage, metric="mIoU") for stage in report.stages)
    text = table_text(dataclasses.replace(report, stages=stages))
    assert "mIoU" in text
    assert "Miou" not in text
    assert "Accuracy" not in html_page(dataclasses.replace(report, stages=stages))
    assert "Accuracy (%)" in html_page(report)
