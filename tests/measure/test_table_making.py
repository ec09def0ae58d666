"""Making a table: on an engine whose clock the test controls, so that every time is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.engines import Engine, OnnxEngine, OnnxRuntime, Program
from lightning_prune.errors import TableError
from lightning_prune.measure import LatencyTable, LayerKind, make_table
from lightning_prune.measure.portable.layer_files import context_file, layer_file
from lightning_prune.measure.portable.making import Layer, Maker, Preparer
from lightning_prune.measure.table_making import _module, layers_of

OVERHEAD = 0.5  # seconds that any program takes
CONV = LayerKind("conv", (3, 3), (1, 1), (1, 1), (1, 1), 1, (14, 14), 1)
DEPTHWISE = LayerKind("conv", (3, 3), (1, 1), (1, 1), (1, 1), 0, (14, 14), 1)
Cost = Callable[[int, int], float]


def lanes(into: int, out: int) -> float:
    """Lanes of 16 out; channels in that are no multiple of 4 take twice as long."""
    return (into if into % 4 == 0 else 2 * into) * (-(-out // 16) * 16) * 1e-3


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run


class Known(Preparer):
    """Layers of a known cost."""

    def __init__(self, clock: Clock, cost: Cost = lanes, seconds: float = 0.0) -> None:
        self.clock, self.cost, self.seconds = clock, cost, seconds
        self.prepared: list[tuple[int, int]] = []

    def layer(self, kind, channels):
        self.clock.now += 0.0 if channels in self.prepared else self.seconds  # compilers remember
        self.prepared.append(channels)
        return self.clock.spend(OVERHEAD + self.cost(*channels))

    def context(self, kind, channels_in):
        return self.clock.spend(OVERHEAD)

    def context_key(self, kind, channels_in):
        return (channels_in,)


def made(layers: list[Layer], cost: Cost = lanes, seconds: float = 0.0, **options) -> tuple[LatencyTable, Known]:
    clock = Clock()
    preparer = Known(clock, cost, seconds)
    layers_made = Maker(preparer, clock=clock, **options).make(layers)
    head = {"engine": "eager", "settings": "", "machine": {}, "threads": 1, "versions": {}, "made": ""}
    return LatencyTable.of({**head, "layers": layers_made}), preparer


@pytest.mark.parametrize("largest", [(100, 150), (64, 256), (130, 33)])
def test_steps_are_found_and_every_width_between_is_right(largest) -> None:
    table, _ = made([Layer(CONV, largest)])
    into, out = np.meshgrid(np.arange(4, largest[0] + 1), np.arange(1, largest[1] + 1), indexing="ij")
    expected = 1e3 * np.vectorize(lanes)(into, np.minimum(-(-out // 16) * 16, 1000))
    last = out > largest[1] // 16 * 16  # the last lane is timed at the largest width, which costs the same
    found = table.time(CONV, into, out)
    inner = (into % 4 > 0) | (into >= 16)
    assert np.allclose(found[inner & ~last], expected[inner & ~last])
    if largest[1] % 16 == 0:
        assert np.allclose(found[inner], expected[inner])


def test_all_is_one_class_where_no_alignment_matters() -> None:
    table, _ = made([Layer(CONV, (64, 64))], cost=lambda into, out: into * out * 1e-4)
    assert [surface.alignment for surface in table.layers[CONV].surfaces] == [(1, 1)]
    assert np.allclose(table.time(CONV, [13, 37, 64], [64, 11, 1]), [0.1 * 13 * 64, 0.1 * 37 * 11, 0.1 * 64])


def test_depthwise_layers_have_one_dimension() -> None:
    table, preparer = made([Layer(DEPTHWISE, (96, 96))], cost=lambda into, out: -(-out // 8) * 8e-2)
    assert all(into == out for into, out in preparer.prepared)
    assert np.allclose(table.time(DEPTHWISE, [1, 50, 96], [1, 50, 96]), [80, 560, 960])


def test_grouped_layers_are_timed_at_multiples_of_the_groups() -> None:
    kind = LayerKind("conv", (3, 3), (1, 1), (1, 1), (1, 1), 6, (14, 14), 1)
    _, preparer = made([Layer(kind, (36, 48))])
    assert {into % 6 + out % 6 for into, out in preparer.prepared} == {0}


def test_channels_that_never_change_are_not_varied() -> None:
    _, preparer = made([Layer(CONV, (3, 10), (True, True))])
    assert set(preparer.prepared) == {(3, 10)}
    _, preparer = made([Layer(CONV, (3, 64), (True, False))])
    grid = [channels for channels in preparer.prepared if channels[0] == 3]
    assert len(grid) > 4


def test_fewer_points_where_preparing_is_slow() -> None:
    points = [len(made([Layer(CONV, (256, 256))], seconds=seconds)[1].prepared) for seconds in (0.0, 3.0)]
    assert points[1] < points[0] - 10


def test_an_interrupted_run_goes_on_where_it_was() -> None:
    kept: dict[str, float] = {}
    progress: list[tuple[int, int]] = []
    whole, first = made([Layer(CONV, (64, 64))], keep=kept.update, progress=lambda *of: progress.append(of))
    assert progress[-1][0] == progress[-1][1]
    known = dict(list(kept.items())[: len(kept) // 2])
    again, second = made([Layer(CONV, (64, 64))], known=known)
    assert again.data()["layers"] == whole.data()["layers"]
    assert len(second.prepared) < len(first.prepared)


class Counted(Engine):
    """Takes as many seconds as the largest weight has entries, and half a second more."""

    name = "counted"

    def __init__(self) -> None:
        self.clock = Clock()

    def prepare(self, model, example_inputs):
        sizes = [parameter.numel() for parameter in model.parameters()] or [0]
        spend = self.clock.spend(OVERHEAD + max(sizes))

        class Spending(Program):
            def run(self, inputs):
                spend()

        return Spending()


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def test_a_table_of_a_model_names_its_origin() -> None:
    engine = Counted()
    before = torch.get_num_threads()
    table = make_table(net(), torch.zeros(1, 3, 8, 8), engine=engine, threads=before + 1, clock=engine.clock)
    assert (table.engine, table.settings, table.threads) == ("counted", "Counted()", before + 1)
    assert torch.get_num_threads() == before
    assert list(table.versions) == ["torch"]
    (conv, linear) = table.layers  # both convolutions are of one kind
    assert table.layers[conv].largest == (8, 8)
    assert np.allclose(table.time(conv, [3, 8, 5], [8, 4, 7]), 1e3 * 9 * np.array([24, 32, 35]))
    assert np.allclose(table.time(linear, 4, 2), 8e3)


def test_a_graph_tells_which_channels_stay() -> None:
    images = torch.zeros(1, 3, 8, 8)
    model = net()
    layers = layers_of(model, images, lp.trace(model, images))
    assert [layer.fixed for layer in layers] == [(False, False), (False, True)]  # 3 and 8 in, 8 and 4 out; classes
    alone = nn.Conv2d(3, 8, 3)
    assert layers_of(alone, images, lp.trace(alone, images))[0].fixed == (True, True)


class TwoHeads(nn.Module):
    def __init__(self, *outs: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(3, out, 3) for out in outs)

    def forward(self, x):
        return [head(x) for head in self.heads]


@pytest.mark.parametrize("outs", [(4, 6), (6, 4), (5, 5)])
def test_widths_that_stay_but_differ_from_layer_to_layer_are_varied(outs) -> None:
    model, images = TwoHeads(*outs), torch.zeros(1, 3, 8, 8)
    (layer,) = layers_of(model, images, lp.trace(model, images))
    assert (layer.largest, layer.fixed) == ((3, max(outs)), (True, outs[0] == outs[1]))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(TableError, match="ReLU has no convolution"):
        make_table(nn.ReLU(), torch.zeros(1), engine="eager")


KINDS = [
    *(LayerKind("conv", (3,) * n, (2,) * n, (1,) * n, (1,) * n, 1, (6,) * n, 2, activation="relu") for n in (1, 2, 3)),
    LayerKind("conv", (3, 1), (1, 2), (1, 0), (1, 1), 2, (6, 5), 1, norm=True),
    LayerKind("conv", (3, 3), (1, 1), (2, 2), (2, 2), 0, (6, 6), 1),
    LayerKind("conv_transpose", (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2, (6, 6), 1),
    LayerKind("linear", size=(5,), norm=True),
    *(
        LayerKind("conv", (1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 4), 1, activation=name)
        for name in "leaky_relu hardtanh silu hardswish hardsigmoid sigmoid tanh gelu elu mish prelu".split()
    ),
    *(LayerKind("linear", size=(5,), activation=name) for name in ("gelu", "prelu")),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_is_a_valid_file_and_a_module(kind) -> None:
    onnx = pytest.importorskip("onnx")
    content, shapes = layer_file(kind, (4, 4))
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    run = OnnxRuntime().load(content).run(tuple(torch.rand(shape) for shape in shapes.values()))
    x = torch.rand(5, 4) if kind.operator == "linear" else torch.rand(kind.batch, 4, *kind.size)
    made_by_torch = _module(kind, (4, 4)).eval()(x)
    pixel = made_by_torch.shape if kind.operator == "linear" else (kind.batch, 4, *[1] * len(kind.size))
    assert tuple(run[0].shape) == tuple(pixel)  # all but one pixel is dropped
    content, shapes = context_file(kind, 4)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    OnnxRuntime().load(content).run(tuple(torch.rand(shape) for shape in shapes.values()))


class Files(OnnxEngine):
    """Takes as many seconds as a file has megabytes."""

    name = "files"

    def __init__(self) -> None:
        self.clock = Clock()

    def check(self) -> None:
        pass

    def load(self, onnx):
        spend = self.clock.spend(1e-6 * len(onnx))

        class Spending(Program):
            def run(self, inputs):
                spend()

        return Spending()


def test_engines_of_files_get_layers_in_their_surroundings() -> None:
    engine = Files()
    table = make_table(nn.Conv2d(12, 12, 3), torch.zeros(1, 12, 9, 9), engine=engine, clock=engine.clock)
    (kind,) = table.layers
    weights = 1e-3 * 4 * 9 * 12 * 12  # the context, as large in every file, is not in it
    assert float(table.time(kind, 12, 12)) == pytest.approx(weights, abs=0.3)
