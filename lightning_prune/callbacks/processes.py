"""Several processes: sums over all of them, one plan for all of them, and a fresh wrapper after reconstruction."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lightning_prune.errors import CallbackError, PruningError, first_line
from lightning_prune.plan import Plan

# By name: the same classes exist in pytorch_lightning and in lightning.pytorch.
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


# What gloo, NCCL and torch's store say when a process on the other side is gone.
_LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|socket closed|connection refused|ncclRemoteError|"
    "communicator was aborted|watchdog caught|timed out (waiting|after)|wait timeout",
    re.IGNORECASE,
)

_GONE = "another process of this training is gone, says"


def check_strategy(trainer: Trainer, callback: str) -> None:
    """Refuse strategies in which a process does not hold whole parameters, or starts from a copy of the module."""
    name = type(trainer.strategy).__name__
    launcher = getattr(trainer.strategy, "_start_method", "popen")
    if name not in STRATEGIES:
        raise CallbackError(
            f"{callback}: {name} is not supported: it shards parameters, wraps them or keeps them elsewhere, and a "
            "shard is a piece of one flat tensor, with no filters to score, to hold at zero or to cut out. Use "
            "strategy='ddp': every process holds the whole model, its gradients and the optimizer's state (Adam in "
            "float32: 20 bytes per parameter, 16 with gradient_as_bucket_view=True), less once it is reconstructed. If "
            "the dense model is too large for that, prune first (lightning_prune.prune, or DDP with small batches), "
            f"then train the small model (lightning_prune.load) with {name} and no pruning callback"
        )
    if trainer.world_size > 1 and launcher != "popen":
        raise CallbackError(
            f"{callback}: strategy='ddp_{launcher}' prunes a copy of the module that is lost when the processes end; "
            "use strategy='ddp'"
        )


def check_start(trainer: Trainer) -> None:
    """Refuse, once checkpoints are read and before DDP compares shapes, to go on from different ones.

    The Trainer calls no hook then, and before it does not say which checkpoint it was given.
    """
    strategy: Any = trainer.strategy
    if not _several() or "setup" in vars(strategy):
        return
    set_up = strategy.setup

    def checked(own: Trainer) -> None:
        forget_start(own)
        _check_same_checkpoint(own)
        set_up(own)

    strategy.setup = checked


def forget_start(trainer: Trainer) -> None:
    """Leave the Trainer as it was found."""
    vars(trainer.strategy).pop("setup", None)


def _check_same_checkpoint(trainer: Trainer) -> None:
    """As where a folder is not one that all nodes see."""
    path = trainer.ckpt_path
    file = None if path is None else Path(str(path))
    size = file.stat().st_size if file is not None and file.is_file() else None
    found = gathered(None if file is None else (file.name, size))
    other = next((process for process, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise CallbackError(
            f"process {other} starts from {_start(found[other])}, process 0 from {_start(found[0])}: checkpoints must "
            "lie in a folder that all nodes see, or be copied to every node under the same name"
        )


def _start(found: tuple[str, int | None] | None) -> str:
    if found is None:
        return "no checkpoint"
    name, size = found
    return f"{name}, which it cannot see" if size is None else f"{name} ({size:,} bytes)"


def check_same_number_of_batches(trainer: Trainer) -> None:
    """Refuse epochs of different lengths: DistributedDataParallel would wait for the missing batches for ever."""
    found = gathered(float(trainer.num_training_batches))
    other = next((process for process, number in enumerate(found) if number != found[0]), None)
    if other is not None:
        raise CallbackError(
            f"process {other} has {found[other]:g} training batches per epoch, process 0 has {found[0]:g}: the others "
            "would wait for ever for its gradients. Use a DistributedSampler (the Trainer adds one unless "
            "use_distributed_sampler=False), or limit_train_batches"
        )


def check_communication_hook(trainer: Trainer) -> None:
    """Refuse a hook that keeps tensors of the model's shapes, for a model that changes them while it trains."""
    state = getattr(trainer.strategy, "_ddp_comm_state", None)
    if state is not None:
        raise CallbackError(
            f"the communication hook of DDPStrategy keeps a {type(state).__name__} in the shapes of the model, which "
            "change when it is reconstructed while training. Use reconstruct='before' with start=0 and no schedule, "
            "reconstruct='after', or a hook without state such as fp16_compress_hook"
        )


@contextmanager
def failing_together() -> Iterator[None]:
    """What one process raises here, all raise: the others would wait for it in the next message.

    Nothing inside sends messages of its own.
    """
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        if not _several():
            raise
        raised = error
    if not _several():
        return
    said = gathered(None if raised is None else first_line(raised))
    if raised is not None:
        raise raised
    failed = next((process for process, line in enumerate(said) if line is not None), None)
    if failed is not None:
        raise CallbackError(f"process {failed} failed, so that this one stops too: {said[failed]}")


def lost_process(error: BaseException) -> str | None:
    """What an error of torch's means where another process of the training is gone; None: it is another error."""
    if isinstance(error, RuntimeError) and str(error).startswith(_GONE):
        return str(error)
    if not (_several() and isinstance(error, RuntimeError) and _LOST.search(str(error))):
        return None
    said = shorten(str(error).partition(". ")[0], 160, placeholder=" ...")
    return (
        f"{_GONE} process {dist.get_rank()}: what that one printed last says why. "
        "Start all of them again from the last checkpoint: trainer.fit(..., ckpt_path='last'), or lightning-prune fit "
        f"... --ckpt_path last ({said})"
    )


def sum_over_processes_(sums: Mapping[str, Tensor]) -> None:
    """Add up the same tensors of all processes, in place and in one message."""
    if not _several():
        return
    tensors = [sums[name] for name in sorted(sums)]
    shapes = gathered({name: list(sums[name].shape) for name in sorted(sums)})
    other = next((process for process, found in enumerate(shapes) if found != shapes[0]), None)
    if other is not None:
        raise CallbackError(
            f"process {other} found other channels in the model than process 0: they run different models or steps. "
            "Nothing was masked. Build the same model in every process"
        )
    if tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))


def check_same_plan(plan: Plan, so_far: str = "Nothing was masked") -> None:
    """Make sure that all processes arrived at the same plan; ``so_far`` says what was done with it."""
    if not _several():
        return
    digest = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
    digests = gathered(digest)
    others = [process for process, other in enumerate(digests) if other != digests[0]]
    if others:
        raise CallbackError(
            f"processes {others} chose other channels than process 0: their weights, data or versions differ. "
            f"{so_far}. Seed everything (seed_everything(workers=True)) and load the same weights in every process"
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

    The wrapper's buckets and the gradient accumulators it holds know the old shapes. After a failure there is none: the
    shapes may differ between processes, and fitting ends.
    """
    strategy: Any = trainer.strategy
    wrapped = isinstance(strategy.model, nn.parallel.DistributedDataParallel)
    if wrapped:
        strategy.model = module
        gc.collect()
    yield
    if wrapped:
        strategy.configure_ddp()


def leave_processes() -> None:
    """End the connections of gloo, whose threads may abort() while Python exits; Lightning ends those of NCCL."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
