"""What masks cost: operators, time and memory of training steps and evaluations, masked beside plain.

Run from the repository's root on an idle machine: ``python -m benchmarks.masked_step``; about five minutes. On a GPU:
``--device cuda``, where batches are of 512 under bfloat16 autocast and a measurement is an epoch-like loop of steps
with one synchronisation at its end.

Operators: what a `TorchDispatchMode` sees in one step; "within" counts all that ``lightning_prune::zero_`` calls
instead: views and marks, which launch nothing, and one or two ``_foreach_mul_``. Times: the median ratio to a plain
step over rounds of three, one after the other in turning order: plain, a copy of it (how far that is from 1 is noise)
and masked. The masked model lost half its channels. Memory: indices and masks beside the parameters' bytes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_prune as lp
from lightning_prune.models import resnet18
from lightning_prune.reconstruction import MaskHandle, zeroing

OPERATORS, TRAINING, EVALUATION, MEMORY = 1.1, 1.03, 1.05, 0.01  # to reach
MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenet_v2": torchvision.models.mobilenet_v2}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-4, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-4, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, 0.001, foreach=True),
}
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, on a machine that others use too")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {options.rounds} rounds{', CPU time' * options.cpu_time}")
    for model, make in MODELS.items():
        plain, masked, handle = _models(make, device)
        models = [plain, copy.deepcopy(plain), masked]
        print(f"\n{model:<31}    plain    masked   ratio  to reach")
        for optimizer, build in OPTIMIZERS.items():
            bare, with_masks = (_training(one, build, device, 2) for one in (plain, masked))
            _operators(f"operators, step, {optimizer}", bare, with_masks)
        _operators("operators, evaluation", *(_evaluation(one, device, 32) for one in (plain, masked)))
        clock = time.process_time if options.cpu_time else time.perf_counter
        batch, loop = (512, 20) if on_gpu else (64, 1)
        steps = [_training(one, OPTIMIZERS["SGD foreach"], device, batch) for one in models]
        _times(f"ms, step, batch {batch}", steps, options.rounds, loop, clock, TRAINING)
        for side in (32, 224):
            steps = [_evaluation(one, device, side) for one in models]
            _times(f"ms, evaluation, {side} px", steps, options.rounds * (224 // side), loop, clock, EVALUATION)
        weights = sum(parameter.nbytes for parameter in masked.parameters())
        print(f"{'bytes':<28}{weights:>12,}{_bytes(handle):>10,}{_bytes(handle) / weights:>8.2%}{MEMORY:>10.0%}")


def _models(make: Callable[[], nn.Module], device: torch.device) -> tuple[nn.Module, nn.Module, MaskHandle]:
    torch.manual_seed(0)
    plain = make().to(device)
    masked = copy.deepcopy(plain)
    graph = lp.trace(masked, torch.randn(2, 3, 32, 32, device=device))
    plan = lp.GlobalRatio(0.5).select(graph, lp.score(masked, graph, "l1"))
    return plain, masked, lp.mask_(masked, graph, plan, undoable=False)


def _training(model: nn.Module, build: Callable[[Any], Any], device: torch.device, batch: int) -> Step:
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    optimizer = build(model.parameters())

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _evaluation(model: nn.Module, device: torch.device, side: int) -> Step:
    image = torch.randn(1, 3, side, side, device=device)

    def step() -> None:
        model.eval()
        with torch.inference_mode():
            model(image)

    return step


class _Counter(TorchDispatchMode):
    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within, self.count = within, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within and func is torch.ops.lightning_prune.zero_.default:
            with self:
                return zeroing._zero_(*args)
        self.count += 1
        return func(*args, **(kwargs or {}))


def _operators(title: str, bare: Step, masked: Step) -> None:
    counts = []
    for step, within in ((bare, False), (masked, False), (masked, True)):
        step()
        step()
        with _Counter(within) as counter:
            step()
        counts.append(counter.count)
    plain, seen, all_of_them = counts
    within = f"   ({all_of_them} within)" if all_of_them > seen else ""
    print(f"{title:<31}{plain:>9}{seen:>10}{seen / plain:>8.3f}{OPERATORS:>10}{within}")


def _times(title: str, steps: list[Step], rounds: int, loop: int, clock: Callable[[], float], target: float) -> None:
    times: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 3):
        for k in range(len(steps)):
            turn = (k + number) % len(steps)
            started = clock()
            for _ in range(loop):
                steps[turn]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[turn].append(1000 * (clock() - started) / loop)
    plain, twin, masked = (column[3:] for column in times)  # the first ones warm up
    noise, ratio = (statistics.median(a / b for a, b in zip(column, plain, strict=True)) for column in (twin, masked))
    medians = [statistics.median(column) for column in (plain, masked)]
    print(f"{title:<31}{medians[0]:>9.2f}{medians[1]:>10.2f}{ratio:>8.3f}{target:>10}   (plain again: {noise:.3f})")


def _bytes(handle: MaskHandle) -> int:
    masks = [mask for place in handle._held.places for mask in place.masks]
    storages = [tensor.untyped_storage() for tensor in (*masks, *(zeros.entries for zeros in handle.zeros))]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


if __name__ == "__main__":
    main()
