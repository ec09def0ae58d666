"""Report and graph in a browser: quiet, legible in both schemes, on a phone, by keyboard, and with 500 layers."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.groups import Group, Layer, Slice
from lightning_prune.reconstruction import LosslessReport
from lightning_prune.report import EpochRecord, KeptChannels, OrderTiming, PruneReport, StageResult
from lightning_prune.report.graph_picture import graph_html
from lightning_prune.report.html import html_page
from tests.browsing import FAINT, FOCUS, WIDTHS, opened, press, scrolls_sideways, seconds
from tests.zoo import build, images


def some_report(count: int) -> PruneReport:
    chance = random.Random(0)
    sizes = [64 * (1 + number * 8 // count) for number in range(count)]
    kept = [tuple(sorted(chance.sample(range(size), size if n == 2 else size // 2))) for n, size in enumerate(sizes)]
    layers = (
        KeptChannels(f"layer{n // 50}.{n % 50}.conv", size, len(keep), f"group{n}", keep)
        for n, (size, keep) in enumerate(zip(sizes, kept, strict=True))
    )
    flops = {"macs": 5e8, "flops2": 1e9}
    stages = (
        StageResult("dense", 0.98, params=11_000_000, flops=flops, latency_ms=20.0, latency_iqr_ms=1.0),
        StageResult("reconstructed", 0.42, params=3_000_000, flops=flops, latency_ms=8.0, latency_iqr_ms=0.4),
        StageResult("fine-tuned (order B)", 0.97, params=3_000_000, flops=flops, epoch_seconds=3.0),
    )
    timings = (OrderTiming("B", tuple(EpochRecord(n, 1.0, 0.5, 1.5 * n + 1.5, 0.9) for n in range(2))),)
    found = LosslessReport(4.4e-16, 3.1e-15, "float64", 1e-10, 1)
    settings = {"criterion": "JRE", "machine": "x" * 200, "seed": 0}
    return PruneReport("A report", settings, stages, timings, tuple(layers), found, ("A note.",))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    names = [f"layer{n // 50}.{n % 50}.conv" for n in range(501)]
    index = torch.arange(4).unsqueeze(1)
    chain = [
        Group(
            name,
            4,
            (Layer(name, f"{name}.weight", 0, 4, index, None, reader, index),),
            (Slice(f"{name}.weight", 0, index, True, name), Slice(f"{reader}.weight", 1, index, False, reader)),
        )
        for name, reader in pairwise(names)
    ]
    texts = {
        "report": html_page(some_report(12)),
        "graph": graph_html(trace(build("Residual"), images())),
        "report of 500 layers": html_page(some_report(500)),
        "graph of 500 layers": graph_html(
            ChannelGraph(tuple(chain), {f"{name}.weight": (4, 4, 1, 1) for name in names})
        ),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, "utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("name", ["report", "graph"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_quiet_and_legible(browser, pages, name, width, scheme) -> None:
    with opened(browser, pages[name].as_uri(), scheme=scheme, width=WIDTHS[width]) as page:
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert scrolls_sideways(page) == 0
        assert page.evaluate(FAINT) == []
        red, *_ = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (red < 60) == (scheme == "dark")


def test_what_is_faint_wide_or_from_elsewhere_is_noticed(browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<p style='width: 200vw; color: #999'>grey</p><svg><text fill='#ccc' y='9'>pale</text></svg>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.log('hello')</script>"
    )
    with pytest.raises(AssertionError, match=r"(?s)127\.0\.0\.1:9.*hello"), opened(browser, bad.as_uri()) as page:  # noqa: PT012
        assert [text.partition(":")[0] for text in page.evaluate(FAINT)] == ["grey", "pale"]
        assert scrolls_sideways(page) > 1000


def test_a_report_is_read_by_keyboard(browser, pages) -> None:
    with opened(browser, pages["report"].as_uri()) as page:
        stops = [press(page, "Tab") for _ in range(6)]
        assert all(stop["tag"] == "summary" and stop["seen"] for stop in stops)
        assert [stop["text"].split(" ")[0] for stop in stops[:2] + stops[3:]] == [
            "FLOPs", "Every", "layer0.0.conv", "layer0.1.conv", "layer0.3.conv"
        ]  # fmt: skip
        assert stops[2]["text"].endswith("channels kept (52 %), 12 layers")
        numbers = page.locator(".strips li").nth(3).locator("dl")
        assert not numbers.is_visible()
        press(page, "Enter")
        assert numbers.is_visible()
        assert "old→new" in numbers.inner_text()
        press(page, "Space")
        assert not numbers.is_visible()
        assert "layer0.3.conv 96 of 192 50 %" in page.locator(".strips").aria_snapshot()


def test_a_graph_is_read_by_keyboard(browser, pages) -> None:
    with opened(browser, pages["graph"].as_uri()) as page:
        assert press(page, "Tab")["text"] == "table of groups"
        line = press(page, "Tab")
        assert line["seen"]
        assert line["text"].startswith("stem.0: 8 channels")
        dimmed = page.locator(".lanes > a").evaluate_all("all => all.map(one => getComputedStyle(one).opacity)")
        assert dimmed == ["1", *["0.2"] * (len(dimmed) - 1)]
        press(page, "Tab", "Enter")
        row = page.locator("tr:target")
        assert row.locator("th").inner_text() == page.locator(".groups tbody th").nth(1).inner_text()
        assert row.evaluate("row => row.getBoundingClientRect().bottom <= innerHeight")


def test_a_picture_wider_than_a_phone_is_scrolled_by_keyboard(browser, pages) -> None:
    with opened(browser, pages["graph"].as_uri(), width=WIDTHS["phone"]) as page:
        page.locator(".scroll").focus()
        assert page.evaluate(FOCUS)["seen"]
        before = page.locator(".scroll").evaluate("one => one.scrollLeft")
        press(page, *["ArrowRight"] * 3)
        page.wait_for_function("before => document.querySelector('.scroll').scrollLeft > before", arg=before)


@pytest.mark.parametrize("name", ["report of 500 layers", "graph of 500 layers"])
def test_500_layers_do_not_lag(browser, pages, name) -> None:
    """Generous bounds, since other work may have both cores; a picture by matplotlib took 4.2 MB."""
    assert pages[name].stat().st_size < 2e6
    with opened(browser, pages[name].as_uri()) as page:
        assert page.locator("*").count() < 15_000
        assert min(seconds(page, page.reload) for _ in range(3)) < 10
        page.locator("details.all > summary" if name.startswith("report") else ".lanes > a").first.focus()
        for keys in (["Enter"], ["Tab"], ["PageDown"], ["Tab", "Enter"]):  # unfold, or to the table; down; a second one
            assert min(seconds(page, lambda keys=keys: press(page, *keys)) for _ in range(3)) < 4, keys
