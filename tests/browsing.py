"""Pages in headless Chromium, as a reader meets them: what they ask for, say, show, and do at the press of a key."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = {"desk": 1280, "phone": 390}
NAMES = ("chromium", "chromium-browser", "google-chrome")

# Words whose contrast with what lies behind them is below WCAG's AA: 4.5, or 3 for large ones.
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const colour = text => {  // as it is painted, in whatever notation it was written
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const found = colour(getComputedStyle(e).backgroundColor);
      layers.push(found);
      if (found[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const faint = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, style = getComputedStyle(element);
    if (!walk.currentNode.data.trim() || !element.checkVisibility({opacityProperty: true, visibilityProperty: true}))
      continue;
    if (element.closest("title, script, style, noscript") || !element.getClientRects().length) continue;
    const ground = behind(element), ink = over(colour(element.closest("svg") ? style.fill : style.color), ground);
    const [dark, bright] = [light(ink), light(ground)].sort((a, b) => a - b);
    const contrast = (bright + .05) / (dark + .05), size = parseFloat(style.fontSize);
    if (contrast < (size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5))
      faint.add(`${walk.currentNode.data.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return [...faint];
}"""

# What has the focus, and whether a reader sees that it has.
FOCUS = """() => {
  const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  const seen = e.matches(":focus-visible") && style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
  const inside = box.bottom > 0 && box.top < innerHeight;
  return {tag: e.tagName.toLowerCase(), text: e.textContent.trim().replace(/\\s+/g, " "), seen: seen && inside};
}"""
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def chromium() -> Iterator[Browser]:
    """Start the system's browser; skip where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright, of the group dev, is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root needs that
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, *, scheme: Any = "light", width: int = WIDTHS["desk"]) -> Iterator[Page]:
    """A page that may complain of nothing, and ask for nothing outside its own folder or server."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    context.set_default_timeout(60_000)
    page = context.new_page()
    home = "/".join(address.split("/")[:3]) if "://127" in address else address.rpartition("/")[0]
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("requestfailed", lambda one: one.failure == "net::ERR_ABORTED" or said.append(f"failed: {one.url[:200]}"))
    page.on("request", lambda request: request.url.startswith((home, "data:", "blob:")) or said.append(request.url))
    try:
        page.goto(address)
        yield page
        assert not said, said
    finally:
        context.close()


def scrolls_sideways(page: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def press(page: Page, *keys: str) -> dict[str, Any]:
    """Press keys; what has the focus then."""
    for key in keys:
        page.keyboard.press(key)
    return page.evaluate(FOCUS)


def seconds(page: Page, act: Callable[[], object]) -> float:
    """Wall time until what an act changed is on the screen."""
    start = time.perf_counter()
    act()
    page.evaluate(PAINTED)
    return time.perf_counter() - start
