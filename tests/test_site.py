"""`make docs`: the site is built without a warning, asks nobody for anything, and has every public name."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

import lightning_prune as lp
from tests.browsing import FAINT, WIDTHS, opened, press, scrolls_sideways

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
from site_building import formulas, links, outputs, reference

pytestmark = pytest.mark.slow  # a minute for the pages, whose code tests/test_docs.py runs too
ROOT = Path(__file__).parents[1]
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object|use|image)\b[^>]*"""
    r"""\b(?:src|data|srcset|href)="((?:https?:)?//[^"]+)"""
    r"""|<link\b[^>]*\bhref="((?:https?:)?//[^"]+)"|url\(["']?((?:https?:)?//[^)]+)"""
    r"""|@import ["']((?:https?:)?//[^"']+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder


def test_every_public_name_stands_in_the_reference(site: Path) -> None:
    index = (site / "reference/index.html").read_text("utf-8")
    for name in lp.__all__:
        value = getattr(lp, name)
        if not isinstance(value, ModuleType):
            assert f'id="lightning_prune.{name}"' in index, name
            continue
        page = (site / f"reference/{name}.html").read_text("utf-8")
        for public in getattr(value, "__all__", None) or reference.defined_in(value):
            assert {f'id="lightning_prune.{name}.{public}"' in page, f'#lightning_prune.{public}"' in page} > {False}, (
                f"{name}.{public}"
            )


def test_every_page_is_on_the_site_and_reached_from_it(site: Path) -> None:
    first = (site / "index.html").read_text("utf-8")
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")} - {"index.html"}
    assert len(pages) > 15
    assert {page for page in pages if f'href="{page}"' not in first} == set()


def test_the_site_makes_no_request_to_anywhere(site: Path) -> None:
    checked = 0
    for path in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not LOADED.findall(path.read_text("utf-8")), path
        checked += 1
    assert checked > 40
    assert LOADED.search('<link rel="stylesheet" href="https://fonts.googleapis.com/css">')


def test_outputs_formulas_and_drawings_are_in_their_places(site: Path) -> None:
    tutorial = (site / "ten-minutes.html").read_text("utf-8")
    assert tutorial.count('<pre class="terminal"') == (ROOT / "docs/ten-minutes.md").read_text("utf-8").count(
        outputs.OUTPUT
    )
    assert "relative error" in tutorial
    assert "<math" in (site / "criteria.html").read_text("utf-8")
    drawings = (ROOT / "docs/method.md").read_text("utf-8").count("<!-- drawing ")
    assert (site / "method.html").read_text("utf-8").count('<figure class="drawing"><svg') == drawings == 4
    for path in site.glob("*.html"):
        text = path.read_text("utf-8")
        assert "<!-- python" not in text, path
        assert outputs.OUTPUT not in text, path
        assert "arithmatex" not in text, path


# In a browser


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.mark.parametrize("name", ["index", "method", "report", "ten-minutes", "reference/plan"])
def test_a_page_is_quiet_and_legible(browser, server: str, name: str) -> None:
    for scheme, width in (("light", "desk"), ("dark", "phone")):
        with opened(browser, f"{server}/{name}.html", scheme=scheme, width=WIDTHS[width]) as page:
            assert scrolls_sideways(page) == 0
            assert page.evaluate(FAINT) == [], scheme
            assert page.locator("body").get_attribute("data-md-color-scheme") == {"light": "default"}.get(
                scheme, "slate"
            )


def test_every_page_fits_a_phone_opened_as_a_file(browser, site: Path) -> None:
    with opened(browser, (site / "index.html").as_uri(), width=WIDTHS["phone"]) as page:
        for path in {*site.glob("*.html")} - {site / "404.html"}:  # that one is only for servers
            page.goto(path.as_uri())
            assert scrolls_sideways(page) == 0, path.name


def test_the_site_is_searched_by_keyboard(browser, server: str) -> None:
    with opened(browser, f"{server}/index.html") as page:
        skip = press(page, "Tab")
        assert (skip["tag"], skip["seen"]) == ("a", True)
        press(page, "s")
        page.keyboard.type("latency table")
        page.locator(".md-search-result__link").first.wait_for()
        assert page.locator(".md-search__input").evaluate("one => one === document.activeElement")
        assert press(page, "ArrowDown")["tag"] == "a"
        press(page, "Escape")
        page.locator(".md-search-result__link").first.wait_for(state="hidden")


# Its parts


def test_links_lead_to_their_place_on_the_site() -> None:
    text = "[a](../benchmarks/results/zoo.md#x) [b](../tests/zoo.py) [c](latency.md) [d](https://x.org)\n"
    code = "```python\n[e](../tests/zoo.py)\n```\n"
    expected = "[a](results/zoo.md#x) b [c](latency.md) [d](https://x.org)\n" + code
    assert links.rewrite_links("docs/a.md", text + code) == expected
    assert links.rewrite_links("benchmarks/results/a.md", "[x](../../docs/latency.md)") == "[x](../latency.md)"


def test_a_formula_becomes_mathml() -> None:
    drawn = formulas.formulas(r'<p><span class="arithmatex">\(a &lt; b\)</span></p>')
    assert drawn.startswith('<p><span class="formula"><math')
    assert "&lt;" in drawn or "&#x0003C;" in drawn


def test_a_terminal_keeps_colours_and_escapes_markup() -> None:
    shown = outputs.terminal("\x1b[32mok\x1b[0m <b>")
    assert "color: #7ee787" in shown
    assert "&lt;b&gt;" in shown


def test_the_public_names_are_found_where_no_list_says_them() -> None:
    names = reference.public_names()
    assert {"PlanError", "NoEffectWarning"} <= set(names["errors"])
    assert importlib.import_module("lightning_prune.schedule").Rounds.__name__ in names["schedule"]
