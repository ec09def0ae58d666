"""The user's own steps as entry points: training_step, validation_step and the hooks around them, on real batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_prune.callbacks.first_batches import Batches, overrides, own_tensors, transferred
from lightning_prune.callbacks.users_callbacks import copies_for, weight_keepers
from lightning_prune.callbacks.without_side_effects import attached
from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.model_state.preservation import copy_sharing_tensors, random_state, set_random_state

STAGES = {
    "training_step": RunningStage.TRAINING,
    "validation_step": RunningStage.VALIDATING,
    "test_step": RunningStage.TESTING,
    "predict_step": RunningStage.PREDICTING,
}
# Hooks in which people average weights or keep books; they are given nothing or what Lightning gives them.
BEFORE = {
    "training_step": ("on_fit_start", "on_train_start", "on_train_epoch_start"),
    "validation_step": ("on_validation_start", "on_validation_epoch_start"),
}
AFTER = {
    "training_step": ("on_train_epoch_end",),
    "validation_step": ("on_validation_epoch_end", "on_validation_end"),
}
NAMES = {"training_step": "train", "validation_step": "validation", "test_step": "test", "predict_step": "predict"}


def user_steps(trainer: Trainer, pl_module: LightningModule, batches: Batches) -> list[EntryPoint]:
    """An entry point for every step that the module overrides; test and predict steps take the validation's batch."""
    spare = (batches.get("validation_step") or batches.get("training_step") or [])[:1]
    copied = copy_sharing_tensors(pl_module)
    before, found = random_state(pl_module), []
    for name in STAGES:
        of = batches.get(name, spare if name in ("test_step", "predict_step") else [])
        for position, batch in enumerate(of if overrides(pl_module, name) else ()):
            several = len(of) > 1
            with attached(copied, trainer, STAGES[name]):
                inputs = transferred(trainer, copied, batch, position)
            step = Step(trainer, pl_module, name, position if several else None)
            title = f"{name} on loader {position}" if several else name
            modes = (name == "training_step",)
            found.append(
                EntryPoint(
                    title,
                    step,
                    inputs,
                    modes,
                    required=False,
                    deployed=name == "predict_step",
                    borrowed=name not in batches,
                )
            )
    set_random_state(before)  # augmentation draws numbers
    return found


def loss_in(output: Any) -> Any:
    """The loss that a training_step returned, alone or under its name among others, as Lightning takes it."""
    return output.get("loss") if isinstance(output, Mapping) else output


def run_step(
    trainer: Trainer, model: Any, batch: Any, batch_idx: int, name: str = "training_step", **extra: Any
) -> Any:
    """What the step returns, in the Trainer's precision."""
    step = getattr(model, name)
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    precision = trainer.precision_plugin
    context = {"training_step": precision.train_step_context, "validation_step": precision.val_step_context}
    with context.get(name, precision.test_step_context)():
        return step(batch, *((batch_idx,) if numbered else ()), **extra)


class Step:
    """One step with the hooks of the module and of the user's callbacks around it, on any copy of the module.

    Hooks that fail on the first call are left out from then on: what they need is not there yet.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, name: str, dataloader_idx: int | None) -> None:
        self.trainer, self.pl_module, self.name = trainer, pl_module, name
        self.extra = {} if dataloader_idx is None else {"dataloader_idx": dataloader_idx}
        self.callbacks = weight_keepers(trainer, pl_module)
        self.left_out: set[str] = set()
        self._first = True

    def __call__(self, model: Any, batch: Any) -> Any:
        """What the step returns, after a backward pass if gradients are on."""
        batch = own_tensors(batch)
        with attached(model, self.trainer, STAGES[self.name]):
            callbacks = copies_for(model, self.pl_module, self.callbacks, self.trainer)
            self._hooks(model, callbacks, BEFORE)
            start, end = f"on_{NAMES[self.name]}_batch_start", f"on_{NAMES[self.name]}_batch_end"
            for callback in callbacks:
                self._hook(callback, start, self.trainer, model, batch, 0, **self.extra)
            self._hook(model, start, batch, 0, **self.extra)
            output = run_step(self.trainer, model, batch, 0, self.name, **self.extra)
            if self.name == "training_step":
                self._optimize(model, callbacks, output)
            outputs = {"loss": output.detach()} if isinstance(output, Tensor) else output
            for callback in callbacks:
                self._hook(callback, end, self.trainer, model, outputs, batch, 0, **self.extra)
            self._hook(model, end, outputs, batch, 0, **self.extra)
            self._hooks(model, callbacks, AFTER)
        self._first = False
        return output

    def _optimize(self, model: Any, callbacks: list[Callback], output: Any) -> None:
        """The backward pass and what hangs on an optimizer; without a change of weights."""
        loss = loss_in(output)
        if model.automatic_optimization and isinstance(loss, Tensor) and loss.requires_grad:
            loss.sum().backward()
        wanted = [part for part in (*callbacks, model) if overrides(part, "on_before_zero_grad")]
        if not wanted and not overrides(model, "optimizer_step"):
            return
        optimizers = model.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for part in wanted:
                arguments = (optimizer,) if part is model else (self.trainer, model, optimizer)
                self._hook(part, "on_before_zero_grad", *arguments)
            self._hook(model, "optimizer_step", 0, 0, optimizer, lambda: None)

    def _hooks(self, model: Any, callbacks: list[Callback], around: Mapping[str, tuple[str, ...]]) -> None:
        for name in around.get(self.name, ()):
            for callback in callbacks if name != "on_fit_start" else ():  # Lightning is in the middle of these
                self._hook(callback, name, self.trainer, model)
            self._hook(model, name)

    def _hook(self, part: Any, name: str, *args: Any, **extra: Any) -> None:
        key = f"{type(part).__qualname__}.{name}"
        if key in self.left_out or not overrides(part, name):
            return
        try:
            getattr(part, name)(*args, **extra)
        except Exception:
            if not self._first:
                raise
            self.left_out.add(key)
