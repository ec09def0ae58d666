r"""ResNet-20 or -56 on CIFAR-10 at equal MACs: every criterion, Torch-Pruning's, and the dense network as control.

Run from the repository's root; the data and the public weights lie in ../shared/data, whose README says how to unpack
them, and ``pip install torch-pruning==1.6.1`` brings the peer::

    python -m benchmarks.field --data /work/data --weights ../shared/data/resnet_cifar10 --model resnet20 \
        --speed-ups 2.57 --methods control criteria peer parts --seeds 0 1 2 --epochs 2 --out field_resnet20.jsonl
    python -m benchmarks.field --render field_resnet20.jsonl

The public weights become those of a network with projection shortcuts, which both libraries prune, and are adapted to
the JPEG copies (kept beside --data, and used again); ``vgg16_bn``, which has no public weights, is trained. Every
method prunes that network to the same multiply-accumulates, by its own scores on the same training images, and all are
fine-tuned on the same images in the same order, and so is the dense network. Accuracies are of all 10,000 test images
after the last epoch, which choose nothing. Every finished run is a line of --out; the same command goes on after a
kill, and a method that fails is a line with its error. Seeds are the outer loop: what is there is a whole table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_prune as lp
from benchmarks.cifar_training import (
    PUBLIC,
    Batch,
    Logits,
    Settings,
    Training,
    accuracy,
    adapted,
    cross_entropy,
    images,
    logits_of,
    public_network,
    scoring_batches,
)
from benchmarks.field.methods import Method, named
from benchmarks.field.pruning import projected, prune
from benchmarks.field.report import render
from benchmarks.field.sparse import regulariser
from benchmarks.rows import Row, Rows, cpu_name, read_rows
from lightning_prune.compensation.distillation import distillation_loss
from lightning_prune.measure import count_flops, count_params
from lightning_prune.model_state.copying import copied

WEIGHT, TEMPERATURE = 0.7, 4.0  # of distillation


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, or render what was measured."""
    options = _options(argv)
    if options.render:
        page = options.page or options.render.with_suffix(".md")
        page.write_text(render(read_rows(options.render), page.with_suffix(".png")), encoding="utf-8")
        print(page)
        return
    methods = named(options.methods)
    _check_peer(methods.values())
    torch.set_num_threads(options.threads)
    data = images(options.data)
    dense, made = _dense(options, data)
    bench = Bench(dense, data, options)
    rows = Rows(options.out, _setup(options, made))
    for seed in options.seeds:
        for speed_up in options.speed_ups:
            for name, method in methods.items():
                known = {"method": name, "speed_up": 1.0 if method.library == "none" else speed_up, "seed": seed}
                if rows.find(**known) is None:
                    row = rows.add(**known, **bench.run(method, speed_up, seed))
                    found = row.get("error") or f"{row['before']:.2f} %, then {row['accuracy']:.2f} %"
                    print(f"{name}, {known['speed_up']:g} x, seed {seed}: {found}", flush=True)


class Bench:
    """The dense network, the images, and how all are trained."""

    def __init__(self, dense: nn.Module, data: Any, options: argparse.Namespace) -> None:
        self.dense, self.data, self.options = dense, data, options
        self.settings = Settings(options.epochs, options.lr, options.batch, images=options.images, bf16=options.bf16)
        self.inputs = torch.zeros(1, 3, 32, 32)
        self.macs = count_flops(dense, self.inputs)
        self.begun: dict[Any, tuple[nn.Module, dict[str, float]]] = {}  # the last one

    def run(self, method: Method, speed_up: float, seed: int) -> Row:
        """Sparse learning, pruning, fine-tuning; or what stood in the way."""
        try:
            return self._run(method, self.macs / speed_up, seed)
        except (lp.PruningError, ArithmeticError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}

    def _run(self, method: Method, macs: float, seed: int) -> Row:
        batches = scoring_batches(self.data, self.options.score_batches, seed)
        targets = self._targets(method, macs)
        of = (replace(method, distilled=False), macs, seed)
        if of not in self.begun:  # else only the teacher differs
            self.begun = {of: self._begin(method, macs, targets, batches, seed)}
        model, seconds = copied(self.begun[of][0]), dict(self.begun[of][1])
        before = accuracy(model, self.data)
        started = time.process_time()
        training = Training(model, self.data, self.settings, seed, self._loss(method))
        pause = training.total // (2 * len(targets)) if targets else 0
        for target in targets[1:]:
            training.run(pause)
            with torch.random.fork_rng(devices=[]):  # the images that follow are those that all others see
                training.use(prune(training.network.eval(), method, target, batches))
        training.run(training.total - training.step)
        seconds["train"], _ = _since(started)
        model = training.network
        cost = {"macs": count_flops(model, self.inputs) / self.macs}
        cost["params"] = count_params(model) / count_params(self.dense)
        return {**cost, "before": before, "accuracy": accuracy(model, self.data), "seconds": seconds}

    def _begin(
        self, method: Method, macs: float, targets: list[float], batches: list[Batch], seed: int
    ) -> tuple[nn.Module, dict[str, float]]:
        """The network that fine-tuning starts with, and the seconds that took."""
        model, seconds = copied(self.dense), {}
        started = time.process_time()
        if method.sparse_epochs:
            self._learn_sparsely(model, method, macs, batches, seed)
            seconds["sparse"], started = _since(started)
        if targets:
            model = prune(model.eval(), method, targets[0], batches)
        seconds["prune"], _ = _since(started)
        return model, seconds

    def _targets(self, method: Method, macs: float) -> list[float]:
        """MACs after each round, in equal steps down to those asked for."""
        if method.library == "none":
            return []
        return [self.macs - (self.macs - macs) * step / method.rounds for step in range(1, method.rounds + 1)]

    def _learn_sparsely(self, model: nn.Module, method: Method, macs: float, batches: list[Batch], seed: int) -> None:
        """Epochs at the fine-tuning's first learning rate, with the library's regulariser; the control's without."""
        settings = replace(self.settings, epochs=method.sparse_epochs)
        training = Training(model, self.data, settings, seed + 100)
        training.before_step = regulariser(model, method, macs / self.macs, batches, training.total)
        training.run(training.total)

    def _loss(self, method: Method) -> Any:
        if not method.distilled:
            return cross_entropy
        teacher = logits_of(copied(self.dense).eval().to(memory_format=torch.channels_last), self.settings.bf16)

        def loss(logits: Logits, x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                truth = teacher(x)
            found = logits(x)
            plain = nn.functional.cross_entropy(found, y)
            return (1 - WEIGHT) * plain + WEIGHT * distillation_loss(found, truth, TEMPERATURE)

        return loss


def _check_peer(methods: Iterable[Method]) -> None:
    if any(method.library == "Torch-Pruning" for method in methods):
        try:
            import torch_pruning  # noqa: F401
        except ImportError as error:
            raise SystemExit(f"Torch-Pruning is missing ({error}): pip install torch-pruning==1.6.1") from error


def _since(started: float) -> tuple[float, float]:
    """Seconds of the processor: other work on the machine does not count."""
    now = time.process_time()
    return now - started, now


def _dense(options: argparse.Namespace, data: Any) -> tuple[nn.Module, Row]:
    """The network that all start from, and what it is."""
    name, path = options.model, options.adapted or options.data / f"field_{options.model}.pt"
    if name in PUBLIC:
        model = getattr(lp.models, name)(shortcut="B")
        start = partial(_projected, name, options.weights, data)
        of, lr = f"{PUBLIC[name] if options.weights.is_dir() else options.weights.name}, projection shortcuts", 0.05
    else:
        model = getattr(lp.models, name)()
        torch.manual_seed(0)
        start, of, lr = partial(getattr(lp.models, name)), f"{name}, from random weights", 0.03
    made = adapted(of, start, data, Settings(options.adapt_epochs, lr, bf16=options.bf16), path)
    model.load_state_dict(made["state_dict"])
    return model.eval(), made["made"]


def _projected(name: str, weights: Path, data: Any) -> nn.Module:
    return projected(public_network(name, weights).eval(), scoring_batches(data, 4))


def _setup(options: argparse.Namespace, made: Row) -> Row:
    """What all rows of a page have in common."""
    names = ("model", "threads", "epochs", "lr", "batch", "images", "bf16", "score_batches")
    about = {"dense": made, "cpu": cpu_name(), "torch": torch.__version__}
    return {**{name: getattr(options, name) for name in names}, **about}


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="the folder that holds cifar10")
    parser.add_argument("--weights", type=Path, default=Path("../shared/data/resnet_cifar10"), help="folder, or a file")
    parser.add_argument("--adapted", type=Path, help="weights to start from; default: field_MODEL.pt in --data")
    parser.add_argument("--adapt-epochs", type=int, default=12)
    parser.add_argument("--model", choices=[*sorted(PUBLIC), "vgg16_bn"], default="resnet20")
    parser.add_argument("--speed-ups", nargs="+", type=float, default=[2.57], help="dense over pruned MACs")
    parser.add_argument(
        "--methods", nargs="+", default=["control", "peer", "parts", "together", "criteria"], help="sets, or names"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--batch", type=int, default=128, help="images of a step")
    parser.add_argument("--images", type=int, default=0, help="of an epoch; 0: all")
    parser.add_argument("--bf16", action="store_true", help="train under autocast; scores and tests are in float32")
    parser.add_argument("--score-batches", type=int, default=16, help="of 128 training images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/field.jsonl"))
    parser.add_argument("--render", type=Path, metavar="ROWS", help="write the page of such a file; measure nothing")
    parser.add_argument("--page", type=Path, help="of --render; default: beside the rows")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
