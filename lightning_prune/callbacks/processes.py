"""Several processes: sums over all of them, one plan for all of them, and a fresh wrapper after reconstruction."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lightning_prune.errors import CallbackError, PruningError, first_line
from lightning_prune.plan import Plan

# By name: the same classes exist in pytorch_lightning and in lightning.pytorch.
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


def check_strategy(trainer: Trainer, callback: str) -> None:
    """Refuse strategies in which a process does not hold whole parameters, or starts from a copy of the module."""
    name = type(trainer.strategy).__name__
    launcher = getattr(trainer.strategy, "_start_method", "popen")
    if name not in STRATEGIES:
        raise CallbackError(
            f"{callback}: {name} is not supported: channels are cut out of whole parameters, which it shards, wraps or "
            "keeps elsewhere. Use strategy='ddp' or one device; or prune first (lightning_prune.prune), then train the "
            f"small model with {name} and no pruning callback"
        )
    if trainer.world_size > 1 and launcher != "popen":
        raise CallbackError(
            f"{callback}: strategy='ddp_{launcher}' prunes a copy of the module that is lost when the processes end; "
            "use strategy='ddp'"
        )


def sum_over_processes_(sums: Mapping[str, Tensor]) -> None:
    """Add up the same tensors of all processes, in place and in one message."""
    if not _several():
        return
    tensors = [sums[name] for name in sorted(sums)]
    if tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


def check_same_plan(plan: Plan) -> None:
    """Make sure that all processes arrived at the same plan."""
    if not _several():
        return
    digest = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
    digests = gathered(digest)
    others = [process for process, other in enumerate(digests) if other != digests[0]]
    if others:
        raise CallbackError(
            f"processes {others} chose other channels than process 0: their weights, data or versions differ. Nothing "
            "was masked. Seed everything (seed_everything(workers=True)) and load the same weights in every process"
        )


def of_the_first(choose: Callable[[], Plan]) -> Plan:
    """The plan that process 0 chooses while the others wait: what is chosen by measuring differs between processes."""
    if not _several():
        return choose()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = choose().to_dict()
        except Exception as error:  # noqa: BLE001  # the others wait
            found[1] = error if isinstance(error, PruningError) else CallbackError(first_line(error))
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return Plan.from_dict(found[0])


def gathered(value: Any) -> list[Any]:
    """The value of every process, in their order."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def unwrapped(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Take the module out of DistributedDataParallel while its parameters change shape, then wrap it anew.

    The wrapper's buckets and the gradient accumulators it holds know the old shapes.
    """
    strategy: Any = trainer.strategy
    wrapped = isinstance(strategy.model, nn.parallel.DistributedDataParallel)
    if wrapped:
        strategy.model = module
        gc.collect()
    try:
        yield
    finally:
        if wrapped:
            strategy.configure_ddp()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
