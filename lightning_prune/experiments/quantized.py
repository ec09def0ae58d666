"""Dense and pruned, in float32 and in 8 bits: accuracy by the task's own test, time and size of the very files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from lightning_prune.engines import OnnxEngine, OnnxRuntime, Program
from lightning_prune.engines.onnx_file import onnx_bytes
from lightning_prune.errors import QuantizationError
from lightning_prune.experiments.runner import Runner, logged_metric, metric_name, quiet
from lightning_prune.files import atomic, check_writable
from lightning_prune.graph.running import as_args, call_model
from lightning_prune.measure import Latency, compare_programs, samples_in, with_samples
from lightning_prune.model_state.copying import copied
from lightning_prune.quantization import Cpu, Method, QuantizationReport, quantize
from lightning_prune.report.table import TIMES, Column, Entry, Table

FLOAT, INT8 = "fp32", "int8"


@dataclass(frozen=True)
class QuantizationSettings:
    """How the files are made and measured.

    Args:
        batches: of the training data that ranges are calibrated on.
        metric: name of the logged metric, without its stage, such as "acc"; None: mIoU, mAP or accuracy.
        method: see `lightning_prune.quantization.quantize`.
        ignore: layers that stay in float.
        cpu: where the files will run; None: here.
        engine: that runs all of the files.
        repeats: passes timed per file, in turns, one sample each.
        seed: of the choice of batches.
    """

    batches: int = 8
    metric: str | None = None
    method: Method = "minmax"
    ignore: Sequence[str] = ()
    cpu: Cpu | None = None
    engine: OnnxEngine = field(default_factory=OnnxRuntime)
    repeats: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise QuantizationError(f"at least 1 batch is needed to calibrate on, got {self.batches}")


@dataclass(frozen=True)
class FileResult:
    """One file.

    Attributes:
        model: its name.
        precision: ``fp32`` or ``int8``.
        value: the metric on the test data, computed from this file's outputs.
        latency: of one sample, in milliseconds.
        size_bytes: of the file.
        report: of the quantizer; None in float.
    """

    model: str
    precision: str
    value: float
    latency: Latency
    size_bytes: int
    report: QuantizationReport | None


@dataclass(frozen=True)
class QuantizationStudy:
    """All files, the dense one in float first.

    Attributes:
        files: in float and in 8 bits, model by model.
        metric: that was measured.
        stage: the part of the data that it was measured on, ``test`` or ``val``.
    """

    files: tuple[FileResult, ...]
    metric: str
    stage: str

    def table(self) -> Table:
        """One row per file; how many times faster and smaller than the first."""
        first = self.files[0]
        rows = [
            (
                f"{file.model}, {file.precision}",
                f"{100 * file.value:.2f}",
                Entry(f"{file.latency.median:,.2f}", f"{file.latency.iqr / 2:.2f}"),
                f"{first.latency.median / file.latency.median:.2f}{TIMES}",
                f"{file.size_bytes / 1e6:,.2f}",
                f"{first.size_bytes / file.size_bytes:.1f}{TIMES}",
            )
            for file in self.files
        ]
        columns = (
            Column(""),
            Column(metric_name(self.metric), "%"),
            Column("latency", "ms"),
            Column("times\nfaster"),
            Column("file", "MB"),
            Column("times\nsmaller"),
        )
        return Table(columns, tuple(rows), {len(rows) - 1: "key"})


def compare_quantized(
    models: Mapping[str, LightningModule],
    data: LightningDataModule,
    path: str | Path,
    settings: QuantizationSettings | None = None,
) -> QuantizationStudy:
    """Quantize each model and compare all files, those in float32 too, on one engine; the last one in 8 bits is kept.

    The network inside the task becomes the file (all of ``forward``). Ranges are calibrated on what ``test_step`` gives
    it for training data; accuracy is that of ``test_step`` on the test data, with the file in the network's place.

    Args:
        models: {name: task}, dense before pruned.
        data: of all of them.
        path: of the last model's file in 8 bits, ending in ``.onnx``.
        settings: everything else; None: the defaults.

    Raises:
        PruningError: one of its kinds, naming the cause.
    """
    settings, path = settings or QuantizationSettings(), Path(path)
    if path.suffix != ".onnx":
        raise QuantizationError(f"a quantized file must end in .onnx, got '{path}'")
    check_writable(path)
    runner = Runner(data, accelerator="cpu")
    programs: dict[tuple[str, str], tuple[Program, Any]] = {}
    measured: dict[tuple[str, str], tuple[float, int, QuantizationReport | None]] = {}
    stage = metric = ""
    with quiet(), tempfile.TemporaryDirectory(prefix="lightning-prune.") as folder:
        for name, task in models.items():
            task = copied(task).cpu().eval()
            network, inside = _network_of(task)
            runs = _seen_inputs(runner, task, network, settings)
            example = with_samples(runs[0], 1)
            draft = Path(folder) / "net.onnx"
            dense = onnx_bytes(network, example)
            chosen: dict[str, Any] = {"method": settings.method, "ignore": settings.ignore, "cpu": settings.cpu}
            report = quantize(network, example, runs, draft, **chosen)
            for precision, content, told in ((FLOAT, dense, None), (INT8, draft.read_bytes(), report)):
                program = settings.engine.load(content)
                with _run_by(program, network, inside, example):
                    stage, logged = runner.results(task)
                metric = logged_metric(task, settings.metric, logged, stage)
                programs[name, precision] = program, example
                measured[name, precision] = logged[metric], len(content), told
        keys = {f"{name} {precision}": (name, precision) for name, precision in programs}
        found = compare_programs({key: programs[of] for key, of in keys.items()}, repeats=settings.repeats)
        with atomic(path) as stream:
            stream.write(draft.read_bytes())
    files = [FileResult(*of, measured[of][0], found[key], measured[of][1], measured[of][2]) for key, of in keys.items()]
    return QuantizationStudy(tuple(files), metric, stage)


def _network_of(task: LightningModule) -> tuple[nn.Module, list[str]]:
    """The child that does all of forward, or the task itself if none does; and its modules that run then."""
    example = task.example_input_array
    if example is None:
        raise QuantizationError(f"{type(task).__name__} has no example_input_array, which says what its forward takes")
    outputs: dict[nn.Module, Any] = {}
    called: list[nn.Module] = []
    with ExitStack() as stack, torch.no_grad():
        for child in task.children():
            hook = child.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
            stack.callback(hook.remove)
        for module in task.modules():
            stack.callback(module.register_forward_pre_hook(lambda module, _: called.append(module)).remove)
        result = call_model(task, example)
    whole = [child for child, output in outputs.items() if _same(output, result)]
    network = whole[0] if whole else task
    ran = {id(module) for module in called}
    return network, [name for name, module in network.named_modules() if name and id(module) in ran]


def _same(one: Any, other: Any) -> bool:
    return [*map(id, tree_leaves(one))] == [*map(id, tree_leaves(other))]


def _seen_inputs(
    runner: Runner, task: LightningModule, network: nn.Module, settings: QuantizationSettings
) -> list[Any]:
    """What the network is called with on the training data."""
    seen: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and kwargs:
            raise QuantizationError(f"{type(network).__name__} is called with positional and keyword arguments at once")
        seen.append(kwargs or (args[0] if len(args) == 1 else args))

    hook = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        runner.see_training_data(task, settings.batches, settings.seed)
    finally:
        hook.remove()
    if not seen or not samples_in(seen[0]):
        raise QuantizationError(_never_called(task, network))
    return seen


def _never_called(task: LightningModule, network: nn.Module) -> str:
    return (
        f"the test of {type(task).__name__} never calls {type(network).__name__}.forward on a batch, which is what a "
        "file holds: nothing can be measured of the file"
    )


@contextmanager
def _run_by(program: Program, network: nn.Module, inside: Sequence[str], example: Any) -> Iterator[None]:
    """Let a program compute what the network's forward would, sample by sample; no other way into the network works."""
    with torch.no_grad():
        leaves, spec = tree_flatten(call_model(network, example))
    if not all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == 1 for leaf in leaves):
        raise QuantizationError(f"{type(network).__name__} returns something without samples in its first dimension")
    calls = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        given = kwargs or (args[0] if len(args) == 1 else args)
        return _sample_by_sample(program, given, spec)

    def refuse(module: nn.Module, _: Any) -> None:
        name = next(name for name, other in network.named_modules() if other is module)
        raise QuantizationError(
            f"the test calls {name} by itself, past {type(network).__name__}.forward: what it measures would not be "
            "what the file computes"
        )

    with ExitStack() as stack:
        for name in inside:
            stack.callback(network.get_submodule(name).register_forward_pre_hook(refuse).remove)
        network.forward = forward
        stack.callback(vars(network).pop, "forward")
        yield
    if not calls:
        raise QuantizationError(f"the test never calls {type(network).__name__}.forward, which is what the file holds")


def _sample_by_sample(program: Program, given: Any, spec: TreeSpec) -> Any:
    args, kwargs = as_args(given)
    size = samples_in(given)
    parts = [
        [
            leaf[k : k + 1] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else leaf
            for k in range(size)
        ]
        for leaf in tree_leaves((args, kwargs))
    ]
    results = [[output.clone() for output in program.run(one)] for one in zip(*parts, strict=True)]
    return tree_unflatten([torch.cat(of) for of in zip(*results, strict=True)], spec)
