"""mkdocs' events: what `docs/site_building` does, and when."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_building import links, outputs, reference
from site_building.formulas import formulas

DOCS = Path(__file__).parent
FOLDER = Path(tempfile.mkdtemp(prefix="lightning-prune-docs-"))  # what the pages' code makes; gone with the build


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that the navigation does not name stand at the end of its section "Guides": none is lost."""
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    more = sorted({path.name for path in DOCS.glob("*.md")} - named)
    guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
    guides.extend(more)
    results = next(entry["Figures"] for entry in config.nav if "Figures" in entry)
    results.extend(place for place in links.pages_outside() if place.startswith("results/") and place.endswith(".md"))
    reference_section = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference_section.extend(
        {f"lp.{name}": f"reference/{name}.md"} if name else {"The names at the top": "reference/index.md"}
        for name in reference.public_names()
    )
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Run the pages' code; add what it made, the reference, and what lies outside docs/."""
    pages = sorted(DOCS.glob("*.md"))
    outputs.run_pages(pages, FOLDER)
    made = {f"made/{name}": path for name, path in outputs.made_files(pages, FOLDER).items()}
    for place, path in (made | links.pages_outside()).items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    for place, text in reference.reference_pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Outputs below their blocks, links as they lead on the site, comments for the tests away."""
    outside = links.pages_outside().get(page.file.src_uri)
    source = outside.relative_to(links.ROOT).as_posix() if outside else f"docs/{page.file.src_uri}"
    if not page.file.src_uri.startswith("reference/"):
        markdown = links.rewrite_links(source, markdown)
        markdown = outputs.show_outputs(page.file.src_uri, markdown, FOLDER)
        markdown = re.sub(r"^<!-- drawing (\w+) -->$", _drawing, markdown, flags=re.MULTILINE)
        markdown = re.sub(r"^<!-- .*?-->\n", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return markdown


def _drawing(match: re.Match[str]) -> str:
    """Inside the page, where it takes the colours of the reader's mode."""
    svg = (DOCS / f"images/method-{match[1]}.svg").read_text("utf-8")
    return f'<figure class="drawing">{svg.replace(chr(10), "")}</figure>'


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML."""
    return formulas(html)


def on_post_build(**_: Any) -> None:
    """Leave nothing behind."""
    import shutil

    shutil.rmtree(FOLDER, ignore_errors=True)
