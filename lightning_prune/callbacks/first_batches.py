"""The first batch of each of a Trainer's loaders, taken so that training goes on as if nobody had looked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import IterableDataset

from lightning_prune.model_state.preservation import random_state, set_random_state

LIGHTNING = ("pytorch_lightning.", "lightning.")
Batches = dict[str, list[Any]]  # by the step they are for: one of each loader


def first_batches(trainer: Trainer, pl_module: LightningModule) -> Batches:
    """One batch of the training data, and one of each loader of the validation data, as the loaders make them."""
    loop = trainer.fit_loop
    sources: dict[str, tuple[Any, str]] = {
        "training_step": (loop._data_source, "max_size_cycle"),
        "validation_step": (loop.epoch_loop.val_loop._data_source, "sequential"),
    }
    limits = {"training_step": trainer.limit_train_batches, "validation_step": trainer.limit_val_batches}
    found: Batches = {}
    before = random_state(pl_module)
    try:
        for step, (source, mode) in sources.items():
            if limits[step] and overrides(pl_module, step) and source.is_defined():
                found[step] = _of_each(source.dataloader(), mode)
    finally:
        set_random_state(before)
    return found


def overrides(part: Any, name: str) -> bool:
    """Whether a module or callback is not content with Lightning's own hook; by name, for there are two namespaces."""
    found = getattr(type(part), name, None)
    return found is not None and not f"{found.__module__}.".startswith(LIGHTNING)


def _of_each(loaders: Any, mode: str) -> list[Any]:
    combined: Any = loaders if hasattr(loaders, "flattened") else CombinedLoader(loaders, mode)  # type: ignore[arg-type]
    if any(read_once(loader) for loader in combined.flattened):
        return []  # its first batch would be missing from training
    with untouched_loaders(combined.flattened):
        if combined._mode != "sequential":
            fresh = CombinedLoader(combined.iterables, combined._mode)
            return [batch for batch, *_ in (next(iter(fresh), (None,)),) if batch is not None]
        return [batch for loader in combined.flattened if (batch := next(iter(loader), None)) is not None]


def read_once(loader: Any) -> bool:
    """Whether it is a stream: what is taken from it is gone, so that the next pass goes on from there."""
    data = getattr(loader, "dataset", loader)
    if data is not loader and (not isinstance(data, IterableDataset) or getattr(loader, "num_workers", False)):
        return False  # indexed, or read by other processes, each from a copy of its own
    return iter(data) is iter(data)


def transferred(trainer: Trainer, module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """A copy of a batch as the Trainer hands it to a step, by the hooks of this copy of the module."""
    selector = trainer._data_connector._datahook_selector
    batch = own_tensors(trainer.precision_plugin.convert_input(batch))
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        owner: Any = module if selector is None else selector.get_instance(name)
        owner = module if isinstance(owner, type(module)) else owner  # else a datamodule's
        extra = (module.device,) if name == "transfer_batch_to_device" else ()
        batch = getattr(owner, name)(batch, *extra, dataloader_idx)
    return batch


def own_tensors(batch: Any) -> Any:
    """New tensors in new containers: steps and hooks may work in place."""
    return tree_map_only(Tensor, torch.clone, batch)


def given_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of training data that were given; none where a method of the user's makes new ones."""
    source: Any = trainer.fit_loop._data_source
    given = None if source.is_module() else source.instance
    return [] if given is None else list(CombinedLoader(getattr(given, "iterables", given)).flattened)


@contextmanager
def untouched_loaders(loaders: list[Any]) -> Iterator[None]:
    """Put back the random generators that loaders and samplers were given, and the iterators that they keep.

    Persistent workers serve one iterator, perhaps that of the epoch under way: a second ``iter()`` would begin it anew.
    """
    owners = [
        part
        for loader in loaders
        for part in (loader, *(getattr(loader, n, None) for n in ("sampler", "batch_sampler")))
    ]
    owners += [getattr(owner, "sampler", None) for owner in owners]
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = {key: generator.get_state() for key, generator in generators.items()}
    begun = [(loader, loader._iterator) for loader in loaders if getattr(loader, "persistent_workers", False)]
    for loader, _ in begun:
        loader._iterator = None
    try:
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])
        for loader, iterator in begun:
            loader._iterator = iterator
