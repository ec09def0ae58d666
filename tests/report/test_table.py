"""One table in every form: the same rows everywhere, nothing becomes markup, a narrow terminal loses the least."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from lightning_prune.report.table import TIMES, Column, Entry, Table, print_line, shorten

TABLE = Table(
    (Column("layer"), Column("kind", optional=True), Column("dense", "ms"), Column("pruned", "ms")),
    (
        ("backbone.stages.0.1.widen.conv", "Conv2d", "8.2", "1.3"),
        ("stem", "Conv2d", "1.0", "2.0"),
        ("205 other layers of the network", "", "3.0", "4.0"),
    ),
)
MEASURED = Table(
    (Column("a|b"), Column("latency\nof one", "ms"), Column("why", left=True)),
    (
        ("<i>", Entry("20.00", "0.50"), "a |\nb"),
        ("[red]", Entry("8.00", "0.20", f"2.5{TIMES}"), Entry("2 others", more="<b>all</b>")),
    ),
    {1: "key"},
    frozenset({0}),
)


def printed(thing: Table, width: int, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width).print(thing)
    stream.flush()
    return [line.rstrip() for line in stream.buffer.getvalue().decode(encoding).splitlines()]


def test_a_wide_terminal_shows_everything():
    lines = printed(TABLE, 80)
    assert "kind" in lines[0] + lines[1]
    assert any(line.startswith("backbone.stages.0.1.widen.conv") for line in lines)


@pytest.mark.parametrize(("encoding", "dots"), [("utf-8", "…"), ("ascii", "...")])
def test_a_narrow_one_loses_optional_columns_and_then_the_beginnings_of_paths(encoding, dots):
    lines = printed(TABLE, 34, encoding)
    assert max(map(len, lines)) <= 34
    assert "Conv2d" not in "\n".join(lines)
    (path,) = [line for line in lines if "widen.conv" in line]
    assert path.startswith(f"{dots}")
    assert path.split() == [path.split()[0], "8.2", "1.3"]  # in one line, with its numbers
    assert any(line.startswith("205 other") for line in lines)


def test_the_ratio_goes_before_the_spread_and_sections_stand_apart():
    wide, narrow = printed(MEASURED, 60), printed(MEASURED, 30)
    assert len(wide) == len(narrow) == 8  # the first row takes two lines
    assert wide[6] == ""
    assert f"8.00 ± 0.20 2.5{TIMES}" in wide[7]
    assert "8.00 ±0.20" in narrow[7]
    assert TIMES not in narrow[7]


def test_a_number_that_does_not_fit_is_visibly_cut():
    lines = printed(Table.of(("a", "b"), [("name", "1234567890")]), 8)
    assert any("…" in line for line in lines)
    assert not any(line.rstrip().endswith(("123", "1234", "12345", "123456")) for line in lines)


def test_markdown_keeps_its_columns_whatever_the_text():
    lines = MEASURED.markdown().splitlines()
    assert lines == [
        "| a\\|b | latency of one (ms) | why |",
        "| --- | ---: | --- |",
        "| <i> | 20.00 ± 0.50 | a \\| b |",
        f"| [red] | 8.00 ± 0.20 (2.5{TIMES}) | 2 others |",
    ]


def test_csv_keeps_numbers_and_reads_back():
    table = Table.of(("name", "share"), [("a,b", 0.1), ("c\nd", 3)])
    assert list(csv.reader(io.StringIO(table.csv()))) == [["name", "share"], ["a,b", "0.1"], ["c\nd", "3"]]
    assert table.data == [["a,b", 0.1], ["c\nd", 3]]


def test_html_escapes_and_folds():
    page = MEASURED.html("kind")
    assert "&lt;i&gt;" in page
    assert "<i>" not in page
    assert "<summary>2 others</summary>&lt;b&gt;all&lt;/b&gt;" in page
    assert '8.00 <small>± 0.20</small> <span class="times">2.5' in page
    assert page.count('class="key"') == 1


def test_a_sentence_is_wrapped_at_words_and_further_lines_are_indented():
    console = Console(file=io.StringIO(), width=20)
    print_line(console, "- [b]one[/b] two three four five", indent="  ")
    assert console.file.getvalue().splitlines() == ["- [b]one[/b] two ", "  three four five"]


def test_a_long_path_keeps_its_end():
    name = "backbone.features.denseblock4.denselayer24.conv1"
    assert shorten(name) == "…" + name[-33:]
    assert shorten("conv1") == "conv1"
