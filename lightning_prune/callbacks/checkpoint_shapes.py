"""Checkpoints of a run in which the model changes shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn

from lightning_prune.callbacks.module import in_precision, uncompiled
from lightning_prune.callbacks.weight_averages import averages
from lightning_prune.model_state.code_sizes import unfollow_
from lightning_prune.model_state.cut_history import forget_cuts_
from lightning_prune.model_state.cutting import CHANGED, numbers_of, update_attributes_
from lightning_prune.model_state.memory import dense_copy, set_data_
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.checkpoint import KEY, reshape_, shapes_of
from lightning_prune.session import PruningSession


class CheckpointShapes:
    """Writes the model's shapes into Lightning checkpoints, and gives the module those of the one that is loaded.

    Lightning restores weights before it calls a callback's own ``on_load_checkpoint``, so the strategy, which loads
    them, is watched; on the module itself the Trainer would be copied along with every copy.
    """

    def __init__(self) -> None:
        self._dense: dict[str, torch.Size] | None = None
        self._sizes: dict[str, dict[str, Any]] = {}

    def watch(self, trainer: Trainer, session: PruningSession) -> None:
        """From now on fit the module's shapes to every checkpoint whose weights the Trainer loads into it."""
        strategy = trainer.strategy
        write_shapes(trainer, session.model, lambda: session.built)
        if not isinstance(vars(strategy).get("load_model_state_dict"), partial):
            load = partial(self._load, trainer, session, strategy.load_model_state_dict)
            strategy.load_model_state_dict = load  # type: ignore[method-assign]

    def forget(self, trainer: Trainer) -> None:
        """Leave what loads weights as it was found; checkpoints are also written after the fit."""
        vars(trainer.strategy).pop("load_model_state_dict", None)

    def remember(self, module: LightningModule) -> None:
        """Note the dense shapes, before the first reconstruction."""
        if self._dense is None:
            self._dense = {name: tensor.shape for name, tensor in _tensors(module).items()}
            self._sizes = {path: numbers_of(part) for path, part in module.named_modules()}

    def _load(
        self,
        trainer: Trainer,
        session: PruningSession,
        load: Callable[..., None],
        checkpoint: dict[str, Any],
        **options: Any,
    ) -> None:
        module = trainer.lightning_module
        content = checkpoint.get(KEY)
        built = content is not None and content["plan"]["groups"]
        if content is not None:
            session.release()  # its state, which is restored next, says whether masks are held
        if self._dense is not None or built:
            self._grow(module)
        if content is not None and built:
            self.remember(module)
            if trainer.training:
                in_precision(module)
                with uncompiled(module):
                    session.remember_dense()  # later steps choose in its channels
            for other in (module, *averages(trainer)):
                reshape_(other, {**content, "state_dict": checkpoint["state_dict"]}, str(trainer.ckpt_path))
        load(checkpoint, **options)

    def _grow(self, module: LightningModule) -> None:
        """Back to the dense shapes; the values come from the checkpoint."""
        if self._dense is None:
            return
        for name, tensor in _tensors(module).items():
            shape = self._dense.get(name, tensor.shape)  # what is made while training never had another
            if tensor.shape != shape:
                tensor.grad = None
                set_data_(tensor, dense_copy(tensor.new_zeros(shape), tensor))
        for path, part in module.named_modules():
            unfollow_(part)
            for name in set(vars(part).pop(CHANGED, ())) & set(self._sizes.get(path, ())):
                setattr(part, name, self._sizes[path][name])
        forget_cuts_(module)
        update_attributes_(module)


def write_shapes(trainer: Trainer, module: nn.Module, plan: Callable[[], Plan | None]) -> None:
    """Add the plan that a module was built with, and its sizes, to every checkpoint of it: plain data.

    For checkpoints of weights alone (``save_weights_only=True``) Lightning asks no callback, so the strategy, which
    writes them all, is watched here too.
    """
    strategy = trainer.strategy
    known = vars(strategy).get("save_checkpoint")
    if isinstance(known, partial) and known.args[1] is module:
        return
    write = known.args[-1] if isinstance(known, partial) else strategy.save_checkpoint  # partial: of an earlier module
    strategy.save_checkpoint = partial(_write, trainer, module, plan, write)  # type: ignore[method-assign]


def _write(
    trainer: Trainer,
    module: nn.Module,
    plan: Callable[[], Plan | None],
    write: Callable[..., None],
    checkpoint: dict[str, Any],
    *args: Any,
    **options: Any,
) -> None:
    if trainer.lightning_module is module:
        checkpoint[KEY] = shapes_of(module, plan() or Plan({}))
    write(checkpoint, *args, **options)


def _tensors(module: LightningModule) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
