"""The first batch of each of a Trainer's loaders, taken so that training goes on as if nobody had looked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import CombinedLoader

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
    if any(iter(loader) is loader for loader in combined.flattened if not hasattr(loader, "dataset")):
        return []  # a stream that is read once: its first batch would be missing from training
    with _generators(combined.flattened):
        if combined._mode != "sequential":
            fresh = CombinedLoader(combined.iterables, combined._mode)
            return [batch for batch, *_ in (next(iter(fresh), (None,)),) if batch is not None]
        return [batch for loader in combined.flattened if (batch := next(iter(loader), None)) is not None]


@contextmanager
def _generators(loaders: list[Any]) -> Iterator[None]:
    """Put back the random generators that loaders and samplers were given."""
    owners = [
        part
        for loader in loaders
        for part in (loader, *(getattr(loader, n, None) for n in ("sampler", "batch_sampler")))
    ]
    owners += [getattr(owner, "sampler", None) for owner in owners]
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])
