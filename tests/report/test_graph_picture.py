"""The picture of a graph: layers in the order they run, every mark true, legible, safe and complete by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.graph.groups import Group, Layer, Slice
from lightning_prune.report.graph_picture import graph_html, graph_svg
from lightning_prune.report.graph_picture.layout import layout
from lightning_prune.report.table import TIMES
from tests.zoo import ZOO, build, images

MODELS = ("resnet18", "mobilenet_v2", "densenet121", "convnext_tiny", "regnet_y_400mf", "shufflenet_v2_x0_5")
NAME = "a<b>&\"'</text>"


def identity(size: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + size).unsqueeze(1)


@pytest.fixture(scope="module", params=MODELS)
def traced(request) -> tuple[nn.Module, ChannelGraph]:
    model = getattr(torchvision.models, request.param)(weights=None).eval()
    return model, trace(model, torch.zeros(1, 3, 64, 64))


def drawn(graph: ChannelGraph, **options: str) -> ET.Element:
    root = ET.fromstring(graph_svg(graph, **options))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def of_kind(root: ET.Element, kind: str, tag: str = "*") -> list[ET.Element]:
    return [e for e in root.iter() if (tag in ("*", e.tag)) and kind in e.get("class", "").split()]


def text(element: ET.Element) -> str:
    """Its words, without its tooltip."""
    copy = ET.fromstring(ET.tostring(element))
    for title in copy.findall("title"):
        title.text = ""
    return "".join(copy.itertext()).strip()


def height(row: ET.Element) -> float:
    """Where it is moved to."""
    return float(row.get("transform").rstrip(")").split()[-1])


def lanes(root: ET.Element) -> list[ET.Element]:
    return [e for group in of_kind(root, "lanes") for e in group]


# --- layout


def test_rows_are_in_the_order_the_layers_run(traced) -> None:
    model, graph = traced
    ran: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.setdefault(name))
    model(torch.zeros(1, 3, 64, 64))
    assert [row.name for row in layout(graph).rows] == list(ran)


def test_lanes_of_a_column_do_not_overlap_and_cover_their_layers(traced) -> None:
    placed = layout(traced[1])
    for one, other in combinations(placed.lanes, 2):
        assert one.column != other.column or one.last < other.first or other.last < one.first
    for number, lane in enumerate(placed.lanes):
        used = [at for at, row in enumerate(placed.rows) if number in (*row.makes, *row.reads)]
        assert (lane.first, lane.last) == (min(used), max(used))


def test_neighbours_differ_in_colour(traced) -> None:
    placed = layout(traced[1])
    for one, other in combinations(placed.lanes, 2):
        if abs(one.column - other.column) <= 1 and one.first <= other.last and other.first <= one.last:
            assert one.colour != other.colour, (one.group.name, other.group.name)


def test_residual_trunks_stay_in_the_first_column() -> None:
    placed = layout(trace(torchvision.models.mobilenet_v2(weights=None), torch.zeros(1, 3, 64, 64)))
    assert placed.columns == 3
    trunks = [lane for lane in placed.lanes if lane.group.name.endswith("conv.2") and len(lane.group.layers) > 1]
    assert [lane.column for lane in trunks] == [0] * 5


def test_makers_and_readers_of_a_residual_network() -> None:
    placed = layout(trace(build("Residual"), images()))
    names = [lane.group.name for lane in placed.lanes]
    assert [
        (row.name, [names[n] for n in row.makes], [names[n] for n in row.reads], row.filters) for row in placed.rows
    ] == [
        ("stem.0", ["stem.0"], [], 8),
        ("a1.0", ["a1.0"], ["stem.0"], 8),
        ("a2.0", ["stem.0"], ["a1.0"], 8),
        ("b1.0", ["b1.0"], ["stem.0"], 12),
        ("b2.0", ["b2.0"], ["b1.0"], 12),
        ("down.0", ["b2.0"], ["stem.0"], 12),
        ("head.fc", ["head.fc"], ["b2.0"], 5),
    ]
    assert placed.lanes[0].readers == ("a1.0", "b1.0", "down.0")


def test_a_reader_whose_weights_are_masked_is_still_a_reader() -> None:
    placed = layout(trace(build("SigmoidConstant"), images()))
    assert [row.reads for row in placed.rows] == [(), (0,), (1,), (2,)]


def test_kinds_of_layers() -> None:
    kinds = {row.name: row.kind for name in ("InvertedResidual", "Shared") for row in rows_of(name)}
    assert kinds["depthwise.0"] == f"3{TIMES}3 depthwise"
    assert kinds["expand.0"] == f"1{TIMES}1"
    assert kinds["up"] == f"2{TIMES}2 transposed"
    assert kinds["head.fc"] == "linear"
    grey = trace(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)), torch.zeros(1, 1, 8, 8))
    assert layout(grey).rows[0].kind == f"3{TIMES}3"  # one input channel alone is not depthwise


def rows_of(name: str):
    return layout(trace(build(name), images())).rows


@pytest.mark.parametrize("name", ZOO)
def test_every_topology_is_drawn(name: str) -> None:
    graph = trace(build(name), images())
    root = drawn(graph)
    members = {layer.name for group in graph.groups for layer in group.layers}
    assert sorted(text(e) for e in of_kind(root, "name")) == sorted(members)
    assert len(lanes(root)) == len(graph.groups)


def test_what_reads_without_being_a_layer_gets_a_row() -> None:
    reader = Slice("mixer.table", 1, identity(4), False, None)
    filters = Slice("conv.weight", 0, identity(4), True, "conv")
    group = Group("conv", 4, (Layer("conv", "conv.weight", 0, 4, identity(4)),), (filters, reader))
    placed = layout(ChannelGraph((group,), {"conv.weight": (4, 3, 1, 1), "mixer.table": (2, 4)}))
    assert [(row.name, row.filters, row.makes, row.reads) for row in placed.rows] == [
        ("conv", 4, (0,), ()),
        ("mixer", None, (), (0,)),
    ]


def test_layers_that_read_each_other_do_not_hang_the_order() -> None:
    one = Layer("one", "one.weight", 0, 4, identity(4), None, "two", identity(4))
    two = Layer("two", "two.weight", 0, 4, identity(4), None, "one", identity(4))
    graph = ChannelGraph((Group("two", 4, (two,), ()), Group("one", 4, (one,), ())), {})
    assert sorted(row.name for row in layout(graph).rows) == ["one", "two"]


# --- picture


def test_marks_are_those_of_the_layout(traced) -> None:
    graph = traced[1]
    placed, root = layout(graph), drawn(graph)
    made = [len(of_kind(lane, "made")) for lane in lanes(root)]
    read = [len(of_kind(lane, "read")) for lane in lanes(root)]
    for number, group in enumerate(graph.groups):
        assert made[number] == len({layer.name for layer in group.layers})
        assert read[number] == len(set(placed.lanes[number].readers) - {layer.name for layer in group.layers})
    tied = [len(group.layers) > 1 for group in graph.groups]
    assert ["tied" in lane.get("class").split() for lane in lanes(root)] == tied


def test_marks_lie_in_the_row_of_their_layer() -> None:
    root = drawn(trace(build("Residual"), images()))
    row_of = {height(row): text(name) for row in root for name in of_kind(row, "name") if row.tag == "g"}
    first = lanes(root)[0]
    made = [row_of[float(e.get("cy"))] for e in of_kind(first, "made")]
    read = [row_of[float(e.get("cy"))] for e in of_kind(first, "read")]
    assert (made, read) == (["stem.0", "a2.0"], ["a1.0", "b1.0", "down.0"])


def test_boxes_hold_the_number_of_filters_in_the_colour_of_the_group() -> None:
    root = drawn(trace(build("Residual"), images()))
    assert [text(e) for e in of_kind(root, "count")] == ["8", "8", "8", "12", "12", "12", "5"]
    looks = [e.get("class").split()[1] for e in of_kind(root, "box")]
    assert looks[0] == looks[2] != looks[1]
    assert looks[4] == looks[5]
    assert looks[-1] == "frozen"


def test_members_of_a_group_are_named_beside_it() -> None:
    said = [text(e) for e in of_kind(drawn(trace(build("Residual"), images())), "said")]
    assert said == [
        "2 layers together",
        "with stem.0",
        "2 layers together",
        "with b2.0",
        "not prunable: reaches the model's output",
    ]


def test_filters_of_several_groups_share_the_box() -> None:
    halves = tuple(
        Group(f"conv[{n}:{n + 4}]", 4, (Layer("conv", "conv.weight", 0, 8, identity(4, n)),), ()) for n in (0, 4)
    )
    root = drawn(ChannelGraph(halves, {"conv.weight": (8, 3, 1, 1)}))
    boxes = of_kind(root, "box")
    assert len(boxes) == 2
    assert float(boxes[0].get("x")) + float(boxes[0].get("width")) == float(boxes[1].get("x"))
    assert [text(e) for e in of_kind(root, "count")] == ["8"]


def test_words_stay_on_the_paper(traced) -> None:
    root = drawn(traced[1])
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter("text"):
        if element.get("transform") is None and element.get("y") is not None:
            wide = 7.2 if "name" in element.get("class").split() else 5.9
            assert float(element.get("x")) + wide * len(text(element)) <= width, text(element)
            assert float(element.get("y")) <= height


def test_names_do_not_run_into_the_next_column(traced) -> None:
    root = drawn(traced[1])
    (kernels,) = (float(e.get("x")) for e in of_kind(root, "head") if text(e) == "kernel")
    for element in of_kind(root, "name"):
        assert 16 + 7.2 * len(text(element)) < kernels


def test_a_long_name_keeps_its_end_and_all_of_it_in_the_tooltip() -> None:
    name = "very." * 15 + "end"
    graph = ChannelGraph((Group(name, 4, (Layer(name, f"{name}.weight", 0, 4, identity(4)),), ()),), {})
    (element,) = of_kind(drawn(graph), "name")
    assert text(element).endswith("very.end")
    assert len(text(element)) < 50
    assert element.find("title").text == name


def test_reasons_and_notes_are_told_in_full() -> None:
    reason = "meets something that takes very many words " * 4 + "at 'block.norm'"
    layer = Layer("conv", "conv.weight", 0, 4, identity(4))
    graph = ChannelGraph((Group("conv", 4, (layer,), (), reason),), {}, tuple(f"note {n}" for n in range(20)))
    root = drawn(graph)
    (lane,) = lanes(root)
    assert reason in lane.find("title").text
    below = " ".join(text(e) for e in of_kind(root, "kind", "text"))
    assert f"{reason}: conv" in below
    assert "note 0" in below
    assert "more" in below
    assert "note 19" not in below


def test_an_empty_graph_is_drawn_too() -> None:
    graph = ChannelGraph((), {})
    assert "no channels to prune" in "".join(text(e) for e in drawn(graph).iter("text"))
    assert "no channels to prune" in graph_html(graph)


# --- safety and looks


def hostile() -> ChannelGraph:
    layer = Layer(NAME, f"{NAME}.weight", 0, 4, identity(4))
    other = Layer(f"x{NAME}", f"x{NAME}.weight", 0, 4, identity(4))
    return ChannelGraph((Group(NAME, 4, (layer, other), (), NAME),), {}, (NAME,))


def test_names_become_no_markup() -> None:
    root = drawn(hostile(), title=NAME)
    assert text(of_kind(root, "name")[0]) == NAME
    assert text(of_kind(root, "title")[0]) == NAME
    assert root.get("aria-label") == NAME
    assert not list(root.iter("b"))
    page = Page(graph_html(hostile(), title=NAME))
    assert "b" not in page.tags
    assert page.words.count(NAME) >= 3


@pytest.mark.parametrize("draw", [graph_svg, graph_html])
def test_nothing_is_fetched_and_nothing_runs(draw) -> None:
    content = draw(trace(build("Residual"), images()))
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", content))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<image|<link rel=\"style|@import|\son\w+=", content)
    assert set(re.findall(r"url\(([^)]*)\)", content)) <= {"#not-prunable"}
    assert "prefers-color-scheme: dark" in content


def test_every_colour_is_defined_for_both_schemes() -> None:
    css = resources.files("lightning_prune.report").joinpath("templates", "style.css").read_text("utf-8")
    light, dark = (re.findall(r"(--\w+):", css.split("}")[number]) for number in (0, 1))
    assert light == dark
    assert set(re.findall(r"var\((--\w+)\)", css)) == {*light, "--c"}
    assert {f"--c{n}" for n in range(8)} <= set(light)


class Page(HTMLParser):
    """Rows of the table, all words, all tags."""

    def __init__(self, content: str):
        super().__init__()
        self.rows, self.tags, self.words = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.words.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_page_tabulates_every_group() -> None:
    graph = trace(build("Residual"), images())
    page = Page(graph_html(graph, title="net"))
    assert [row[0] for row in page.rows[1:]] == [group.name for group in graph.groups]
    assert page.rows[1] == ["stem.0", "8", "2,360", "295", "yes", "a2.0"]
    assert page.rows[5][4] == "no: reaches the model's output"
    assert page.tags.count("svg") == 1
    assert {"89 %", "4", "2", "6"} <= set(page.words)


def test_the_page_folds_long_lists_but_keeps_every_name() -> None:
    layers = tuple(Layer(f"block{n}.conv", f"block{n}.conv.weight", 0, 4, identity(4)) for n in range(40))
    page = Page(graph_html(ChannelGraph((Group("block0.conv", 4, layers, ()),), {})))
    assert page.tags.count("details") == 1
    assert "39 other layers" in page.words
    assert "block39." in page.rows[1][-1].replace("\n", "")


def test_pictures_need_neither_lightning_nor_matplotlib() -> None:
    code = """import sys
from lightning_prune.graph import ChannelGraph
from lightning_prune.report.graph_picture import graph_html
graph_html(ChannelGraph((), {}))
sys.exit(", ".join({"pytorch_lightning", "matplotlib"} & set(sys.modules)) or 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
