"""Pictures: what is drawn is the data, labels do not collide, Matplotlib's state is the user's."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from lightning_prune.errors import PruningError
from lightning_prune.report import EpochRecord, KeptChannels, OrderTiming
from lightning_prune.report.figures import (
    PALETTES,
    accuracy_time_figure,
    bands,
    channels_figure,
    save_figure,
)


def resnet50():
    layers = [KeptChannels("conv1", 64, 60)]
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            names = {"conv1": width, "conv2": width, "conv3": 4 * width}
            names |= {"downsample.0": 4 * width} if block == 0 else {}
            layers += [
                KeptChannels(f"layer{stage}.{block}.{name}", dense, dense // (1 + (block + i) % 4))
                for i, (name, dense) in enumerate(names.items())
            ]
    return tuple(layers)


def curve(order, seconds, accuracies, start=5.0):
    return OrderTiming(
        order,
        tuple(EpochRecord(i, seconds, 0.0, start + seconds * (i + 1), a) for i, a in enumerate(accuracies)),
    )


A, B = (
    curve("A", 24.4, (0.91, 0.955, 0.969, 0.978, 0.981)),
    curve("B", 10.3, (0.919, 0.95, 0.972, 0.975, 0.983)),
)


def boxes(figure, texts):
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    return [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]


def all_texts(figure):
    (axes,) = figure.axes
    return [*figure.texts, *axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), axes.xaxis.label]


def test_bars_are_as_long_as_the_layers_have_channels():
    layers = resnet50()
    assert len(layers) == 53
    (axes,) = channels_figure(layers).axes
    dense, kept = axes.containers
    assert [bar.get_width() for bar in dense] == [layer.dense for layer in layers]
    assert [bar.get_width() for bar in kept] == [layer.kept for layer in layers]
    assert [label.get_text() for label in axes.get_yticklabels()] == [layer.layer for layer in layers]
    centres = [bar.get_y() + bar.get_height() / 2 for bar in kept]
    np.testing.assert_allclose(centres, range(53), atol=1e-9)
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first layer is on top


def test_counts_stand_at_their_bars():
    (axes,) = channels_figure([KeptChannels("a", 64, 31), KeptChannels("b", 8, 8)]).axes
    found = {text.get_text(): text.xy for text in axes.texts}
    assert found["31 of 64"] == (64, 0)
    assert found["all 8"] == (8, 1)
    assert found["48 %"][1] == 0
    assert found["100 %"][1] == 1


@pytest.mark.parametrize("rows", [1, 20, 53])
def test_no_label_of_the_channels_covers_another(rows):
    figure = channels_figure(resnet50()[-rows:])
    found = boxes(figure, all_texts(figure))
    assert len(found) == 3 * rows + 3
    assert not [(one, two) for one, two in combinations(found, 2) if one.overlaps(two)]
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in found)


def test_long_names_keep_their_end_and_stay_on_the_paper():
    name = "backbone.features.denseblock4.denselayer24.conv1"
    figure = channels_figure([KeptChannels(name, 2048, 1024)])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["…" + name[-33:]]
    assert all(box.x0 >= 0 for box in boxes(figure, all_texts(figure)))


def test_every_second_stage_is_shaded():
    assert bands([layer.layer for layer in resnet50()]) == [(0, 0), (1, 10), (11, 23), (24, 42), (43, 52)]
    assert bands([f"features.{i}" for i in (0, 3, 7)]) == [(0, 2)]
    assert bands(["features.denseblock1.a.conv", "features.denseblock1.b.conv", "features.norm"]) == [(0, 1), (2, 2)]


def test_lines_are_the_epochs():
    (axes,) = accuracy_time_figure((A, B), dense=0.986).axes
    lines = {line.get_label(): line for line in axes.lines}
    said = {"A": "order A: 98.10 % after 127 s", "B": "order B: 98.30 % after 56 s", "dense": "dense: 98.60 %"}
    for timing in (A, B):
        line = lines[said[timing.order]]
        np.testing.assert_allclose(line.get_xdata(), [e.elapsed_seconds for e in timing.epochs])
        np.testing.assert_allclose(line.get_ydata(), [100 * e.accuracy for e in timing.epochs])
        assert line.get_marker() not in ("", "None")
    np.testing.assert_allclose(lines[said["dense"]].get_ydata(), 98.6)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(said.values())
    colors = [to_hex(text.get_color()) for text in legend.get_texts()]
    assert colors == [*PALETTES["light"].orders.values(), PALETTES["light"].quiet]


def test_epochs_without_accuracy_are_left_out_and_long_runs_are_in_minutes():
    (axes,) = accuracy_time_figure((curve("A", 600, (0.9, None, 0.95), 0), B), metric="mIoU").axes
    (line,) = [line for line in axes.lines if line.get_label().startswith("order A")]
    np.testing.assert_allclose(line.get_xdata(), [10, 30])
    assert line.get_label() == "order A: 95.00 % after 30 min"
    assert "(min)" in axes.get_xlabel()
    assert axes.figure.texts[0].get_text() == "mIoU against time (%)"
    assert len(axes.get_legend().get_texts()) == 2  # no dense model to compare with


NOISY = [0.1 + 0.88 * (1 - 2.7 ** (-i / 4)) for i in range(30)]


@pytest.mark.parametrize(
    ("timings", "dense"),
    [
        ((A, B), 0.986),
        ((curve("A", 60, NOISY), curve("B", 20, NOISY)), 0.986),
        ((curve("A", 4000, NOISY), curve("B", 1400, NOISY)), 0.986),
        ((curve("A", 6, (0.98,)), curve("B", 3, (0.985,))), 0.986),
        ((curve("A", 20, (1.0, 1.0)), curve("B", 10, (1.0, 1.0))), 1.0),
    ],
    ids=["usual", "long", "hours", "one epoch", "flat"],
)
def test_nothing_written_on_the_time_covers_anything_else(timings, dense):
    figure = accuracy_time_figure(timings, dense=dense)
    (axes,) = figure.axes
    words = [*axes.get_legend().get_texts(), *figure.texts, axes.xaxis.label, *axes.get_xticklabels()]
    found = boxes(figure, words)
    assert not [1 for one, two in combinations(found, 2) if one.overlaps(two)]
    width, height = figure.canvas.get_width_height()
    assert all(
        box.x0 >= 0 and box.x1 <= width and box.y1 <= height for box in found[: len(axes.get_legend().texts) + 2]
    )
    assert axes.get_legend().get_window_extent().y0 > axes.get_window_extent().y1  # above all curves


def test_themes_differ_in_paper_and_ink():
    for theme, palette in PALETTES.items():
        figure = accuracy_time_figure((A, B), theme)
        assert to_hex(figure.get_facecolor()) == palette.paper
        (line,) = [line for line in figure.axes[0].lines if line.get_label().startswith("order B")]
        assert to_hex(line.get_color()) == palette.orders["B"]


def test_user_settings_neither_change_nor_are_changed(tmp_path):
    plain, styled = tmp_path / "plain.png", tmp_path / "styled.png"
    save_figure(accuracy_time_figure((A, B), dense=0.986), plain)
    with matplotlib.rc_context({"text.color": "red", "font.size": 30, "lines.linewidth": 9, "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        save_figure(accuracy_time_figure((A, B), dense=0.986), styled)
        assert dict(matplotlib.rcParams) == before
    assert styled.read_bytes() == plain.read_bytes()


def test_png_has_150_dots_per_inch(tmp_path):
    path = tmp_path / "deep" / "channels.png"
    save_figure(channels_figure(resnet50()), path)
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert int.from_bytes(head[16:20], "big") == 8 * 150
    assert [item.name for item in path.parent.iterdir()] == ["channels.png"]


def test_import_leaves_matplotlib_alone_and_drawing_leaves_pyplot_and_backend():
    code = """
import sys
import lightning_prune.report.figures, lightning_prune.report.html
assert "matplotlib" not in sys.modules
from lightning_prune.report import *
report = PruneReport("t", timings=(OrderTiming("A", (EpochRecord(0, 1.0, 1.0, 1.0, 0.5),)),))
import matplotlib
before = matplotlib.rcParams._get("backend")
page = lightning_prune.report.html.html_page(report)
assert "image/svg+xml" in page
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams._get("backend") is before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_nothing_to_draw_is_refused():
    with pytest.raises(PruningError, match="no channels to draw"):
        channels_figure([])
    with pytest.raises(PruningError, match="nothing to draw"):
        accuracy_time_figure([OrderTiming("A", (EpochRecord(0, 1.0, 1.0, 2.0),))])
