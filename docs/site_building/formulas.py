r"""Formulas between dollars, as MathML: every browser since 2023 draws it, without a script or a request."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def formulas(content: str) -> str:
    """A rendered page with MathML in the place of the TeX that arithmatex has found."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return f'<{match[1]} class="formula">{convert(html.unescape(match[3]), display=display)}</{match[1]}>'

    return FORMULA.sub(drawn, content)
