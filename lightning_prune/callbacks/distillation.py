"""Fine-tuning with the dense model as teacher."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.callbacks.group_sparsity import GroupSparsityCallback
from lightning_prune.callbacks.module import same_module
from lightning_prune.callbacks.processes import check_strategy
from lightning_prune.callbacks.run import RUNS, check_before_pruning
from lightning_prune.callbacks.seen_inputs import called_instead
from lightning_prune.callbacks.user_steps import loss_in
from lightning_prune.compensation.distillation import check_temperature, distillation_loss, logits_of
from lightning_prune.errors import CallbackError, CheckpointError, DistillationError
from lightning_prune.model_state.copying import copied
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.reconstruction.checkpoint import load_dense


class DistillationCallback(Callback):
    r"""Fine-tunes the pruned model on the answers of the dense one beside the labels.

    Hinton et al. (2015): the loss that training_step returns becomes
    :math:`(1 - w) L + w \, T^2 \, \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))`, where the
    student's logits s are those that ``module`` returned inside training_step (several calls: the mean of their terms),
    and t are the teacher's on the same inputs, in eval mode. The term is logged as ``distill_loss``.

    It teaches from the first masked channel on, so warm-up epochs and scoring see the task's loss alone. The teacher
    belongs to the callback: no state dict, optimizer, copy or checkpoint of the module holds it. Every process has
    its own.

    Args:
        weight: w in [0, 1]; 1 needs no labels.
        temperature: T > 0.
        module: path of the submodule whose output are logits, as training_step calls it ("model", "net"); None: the
            LightningModule itself (``self(x)``).
        teacher: a model that takes the inputs of ``module`` (it is copied), or the path of a Lightning checkpoint or
            state dict of the dense LightningModule; None: the module itself as it was before anything was masked, or
            made to shrink by `GroupSparsityCallback`.

    Attributes:
        teacher: once fitting has started.

    Raises:
        DistillationError: settings out of range; no logits, or of another shape than the teacher's.
        CallbackError: after `PruneCallback` in the list, where the dense model is gone; resumed without a teacher;
            manual optimization.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_prune import PruneCallback
        >>> callbacks = [DistillationCallback(weight=0.7, module="model"), PruneCallback("l1", ratio=0.5)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 4.0,
        *,
        module: str | None = None,
        teacher: nn.Module | str | os.PathLike[str] | None = None,
    ) -> None:
        if not 0 <= weight <= 1:
            raise DistillationError(f"weight must be in [0, 1], got {weight!r}")
        check_temperature(temperature)
        self.weight = weight
        self.temperature = temperature
        self.module = module
        self.teacher: nn.Module | None = None
        if isinstance(teacher, nn.Module):
            self.teacher = _frozen(copied(teacher))  # now: resuming may reshape the user's own
        self._path = None if teacher is None or isinstance(teacher, nn.Module) else Path(teacher)
        self._given = teacher is not None
        self._module: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        if sum(isinstance(other, DistillationCallback) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise CallbackError("Trainer(callbacks=[...]) has DistillationCallback twice: use one")
        if not pl_module.automatic_optimization:
            raise CallbackError(
                "DistillationCallback adds to the loss that training_step returns, which manual optimization does not "
                "use; add lightning_prune.compensation.distillation.distillation_loss to your own loss"
            )
        if not self._given:
            check_before_pruning(trainer, self)
        same_module(self, self._module or pl_module, pl_module)
        self._module = pl_module
        if self._path is not None and self.teacher is None:
            self.teacher = self._load(self._path, copied(pl_module))  # resuming may reshape the module
        # On the strategy, not on the module: copies of the module would bring the Trainer and the teacher along, and
        # the scoring pass, which calls the module, is to see the task's loss.
        vars(trainer.strategy).pop("training_step", None)
        step = partial(self._step, trainer, trainer.strategy.training_step)
        trainer.strategy.training_step = step  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer.strategy).pop("training_step", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning calls none then

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._part(pl_module)
        self._check_called(trainer, pl_module)
        self._take_dense(trainer, pl_module)
        assert self.teacher is not None
        self.teacher = trainer.precision_plugin.convert_module(self.teacher).to(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_dense(trainer, pl_module)  # what warm-up epochs trained is the dense model

    def _check_called(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse at once a step that calls only parts of the module, rather than after scoring and pruning."""
        run = RUNS.get(trainer)
        if self.module is not None or run is None:
            return
        if part := called_instead(pl_module, run.steps(pl_module)):
            raise DistillationError(
                f"{type(pl_module).__name__}.training_step calls self.{part}(...), not self(...): name the submodule "
                f"whose output are logits, such as DistillationCallback(module={part!r})"
            )

    def _take_dense(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._given:
            return
        run = RUNS.get(trainer)
        if run is None:
            raise CallbackError(
                "DistillationCallback: no callback prunes here, so the model would be its own teacher; add "
                "PruneCallback after it, or pass teacher=..."
            )
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        shrunk = any(isinstance(other, GroupSparsityCallback) and other.begun for other in others)
        if run.session.plan is None and not shrunk:
            self.teacher = _frozen(copy_without_masks(self._part(pl_module)))
        elif self.teacher is None:
            raise CallbackError(
                "DistillationCallback: this run goes on with a model that is already pruned or trained to be sparse, "
                "and checkpoints do not hold the teacher; pass teacher=... (the dense model, or the path of its "
                "checkpoint)"
            )

    def _load(self, path: Path, dense: LightningModule) -> nn.Module:
        if not path.is_file():
            raise CallbackError(f"teacher: there is no file {path}")
        try:
            load_dense(path, dense)
        except CheckpointError as error:
            raise CallbackError(
                f"teacher: {path} does not hold the weights of a dense {type(dense).__name__}: {error}"
            ) from error
        return _frozen(self._part(dense))

    def _part(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module if self.module is None else pl_module.get_submodule(self.module)
        except AttributeError as error:
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise CallbackError(
                f"DistillationCallback(module={self.module!r}): {type(pl_module).__name__} has no such submodule; it "
                f"has {children}"
            ) from error

    def _step(self, trainer: Trainer, training_step: Any, *args: Any, **kwargs: Any) -> Any:
        """The strategy's training_step, with the distillation in its loss."""
        run = RUNS.get(trainer)
        if run is not None and run.session.plan is None:
            return training_step(*args, **kwargs)
        module = trainer.lightning_module
        wrapped = trainer.strategy.model is not module
        with self._watched(self._part(module), outer=wrapped and self.module is None) as pairs:
            output = training_step(*args, **kwargs)
        loss = loss_in(output)
        if not isinstance(loss, Tensor):  # a skipped batch; Lightning refuses the rest
            return output
        if not pairs:
            raise DistillationError(
                f"no logits were found: {type(module).__name__}.training_step did not call "
                f"{'self(...)' if self.module is None else f'self.{self.module}(...)'} with gradients; name the "
                "submodule that it calls: DistillationCallback(module=...)"
            )
        term = torch.stack([distillation_loss(student, teacher, self.temperature) for student, teacher in pairs]).mean()
        size = len(pairs[0][0])
        module.log("distill_loss", term.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        loss = (1 - self.weight) * loss + self.weight * term
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    @contextmanager
    def _watched(self, part: nn.Module, outer: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Logits of student and teacher at every call that is differentiated.

        Args:
            part: the student.
            outer: a wrapper runs training_step inside a call of the module: that one does not count.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        answers: list[Tensor] = []
        depth = -1 if outer else 0
        teacher = self.teacher
        assert teacher is not None

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal depth
            depth += 1
            if depth == 1 and torch.is_grad_enabled():
                with torch.no_grad():  # before the student, and on copies: either may change its inputs in place
                    args, kwargs = tree_map(_copied, (args, kwargs))
                    answers.append(logits_of(teacher(*args, **kwargs)))

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            nonlocal depth
            if depth == 1 and torch.is_grad_enabled():
                pairs.append((logits_of(output), answers.pop()))
            depth -= 1

        hooks = [
            part.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            part.register_forward_hook(leave),
        ]
        try:
            yield pairs
        finally:
            for hook in hooks:
                hook.remove()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()
