"""The user's own steps as entry points: training_step, validation_step and the hooks around them, on real batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_prune.callbacks.first_batches import Batches, overrides, own_tensors, transferred
from lightning_prune.callbacks.users_callbacks import (
    copies_for,
    in_type_of_,
    past_hooks,
    running_hook,
    taking_part,
    writes_weights,
)
from lightning_prune.callbacks.without_side_effects import Loaders, attached
from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.model_state.preservation import (
    copy_sharing_tensors,
    places_of,
    put_back,
    random_state,
    set_random_state,
)

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
LAST = ("on_train_end", "on_fit_end")  # nothing is trained any more
NAMES = {"training_step": "train", "validation_step": "validation", "test_step": "test", "predict_step": "predict"}

Copies = Sequence[tuple[Callback, Any]]  # callbacks of the user's own with their copies


def user_steps(trainer: Trainer, pl_module: LightningModule, batches: Batches) -> list[EntryPoint]:
    """An entry point for every step that the module overrides; test and predict steps take the validation's batch."""
    spare = (batches.get("validation_step") or batches.get("training_step") or [])[:1]
    copied = copy_sharing_tensors(pl_module)
    before, found, loaders = random_state(pl_module), [], Loaders(trainer)
    for name in STAGES:
        of = batches.get(name, spare if name in ("test_step", "predict_step") else [])
        for position, batch in enumerate(of if overrides(pl_module, name) else ()):
            several = len(of) > 1
            with attached(copied, trainer, STAGES[name], loaders):
                inputs = transferred(trainer, copied, batch, position)
            step = UserStep(trainer, pl_module, name, position if several else None, loaders)
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


def _as_outputs(output: Any) -> Any:
    """What a step returned, as hooks are given it."""
    return {"loss": output.detach()} if isinstance(output, Tensor) else output


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


class _Hooks:
    """Hooks of copies of the module and of the user's callbacks, around steps that are run outside of the loop."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self.callbacks = taking_part(trainer, pl_module)
        self.past = {id(one): past_hooks(trainer, pl_module, one) for one in (None, *self.callbacks)}
        self.left_out: set[str] = set()

    def _once(self, model: Any, callbacks: Copies, names: Sequence[str]) -> None:
        """Those that take no batch, where they are still to come."""
        for name in names:
            for own, callback in callbacks:
                if name not in self.past[id(own)]:
                    self._hook(callback, name, self.trainer, model)
            if name not in self.past[id(None)]:
                self._hook(model, name)

    def _of_batch(self, model: Any, callbacks: Copies, name: str, *args: Any, **extra: Any) -> Any:
        """Those of one batch; what the module's returns."""
        for _, callback in callbacks:
            self._hook(callback, name, self.trainer, model, *args, **extra)
        return self._hook(model, name, *args, **extra)

    def _hook(self, part: Any, name: str, *args: Any, **extra: Any) -> Any:
        key = f"{type(part).__qualname__}.{name}"
        if key in self.left_out or not overrides(part, name):
            return None
        try:
            return getattr(part, name)(*args, **extra)
        except Exception:
            if not self._may_fail():
                raise
            self.left_out.add(key)
            return None

    def _may_fail(self) -> bool:
        return True


class Surroundings(_Hooks):
    """The hooks around the steps of a scoring pass on a copy of the module, as in the training loop.

    A hook that fails is left out from then on: the step may do without.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, model: Any) -> None:
        super().__init__(trainer, pl_module)
        self.model = model
        self.copies = copies_for(model, pl_module, self.callbacks, trainer)

    def begin(self) -> None:
        """Before the first batch. Parts that a hook replaces, by their compiled selves say, stay: they are scored."""
        places = places_of(self.model)
        self._once(self.model, self.copies, BEFORE["training_step"])
        put_back(places)

    def begin_batch(self, batch: Any, batch_idx: int) -> bool:
        """Whether the batch is trained on, and not skipped with the rest of its epoch."""
        return bool(self._of_batch(self.model, self.copies, "on_train_batch_start", batch, batch_idx) != -1)

    def end_batch(self, output: Any, batch: Any, batch_idx: int) -> None:
        """After its step, which returned this, and the backward pass."""
        self._of_batch(self.model, self.copies, "on_train_batch_end", _as_outputs(output), batch, batch_idx)


class UserStep(_Hooks):
    """One step with the hooks of the module and of the user's callbacks around it, on any copy of the module.

    Hooks that have run in this fit, and run no more, are left alone: what they have made is there, in its size. At its
    end all are run as in a further fit. Hooks that fail on the first call are left out from then on: what they need is
    not there yet.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, name: str, dataloader_idx: int | None, loaders: Loaders
    ) -> None:
        super().__init__(trainer, pl_module)
        self.name, self.loaders = name, loaders
        self.extra = {} if dataloader_idx is None else {"dataloader_idx": dataloader_idx}
        now = running_hook(pl_module)
        self.ending = {id(one) for one in (None, *self.callbacks) if now == "on_train_end" and self._ends_with(one)}
        if now in LAST:
            self.past = dict.fromkeys(self.past, ())
        self._first = True

    def __call__(self, model: Any, batch: Any) -> Any:
        """What the step returns, after a backward pass if gradients are on."""
        batch = own_tensors(batch)
        with attached(model, self.trainer, STAGES[self.name], self.loaders):
            if self.name == "training_step" and self.ending:
                self._end(model)
            callbacks = self._copies(model)
            self._once(model, callbacks, BEFORE.get(self.name, ()))
            start, end = f"on_{NAMES[self.name]}_batch_start", f"on_{NAMES[self.name]}_batch_end"
            self._of_batch(model, callbacks, start, batch, 0, **self.extra)
            output = run_step(self.trainer, model, batch, 0, self.name, **self.extra)
            if self.name == "training_step":
                self._optimize(model, [callback for _, callback in callbacks], output)
            self._of_batch(model, callbacks, end, _as_outputs(output), batch, 0, **self.extra)
            self._once(model, callbacks, AFTER.get(self.name, ()))
        self._first = False
        return output

    def _copies(self, model: Any) -> Copies:
        copies = copies_for(model, self.pl_module, self.callbacks, self.trainer)
        in_type_of_(model, self.pl_module, [callback for _, callback in copies])
        return copies

    def _ends_with(self, part: Callback | None) -> bool:
        """Whether its ``on_train_end`` is still to come and writes weights: others may send messages, or tidy up."""
        kind = type(self.pl_module if part is None else part)
        return "on_train_end" not in self.past[id(part)] and writes_weights(kind, "on_train_end", type(self.pl_module))

    def _end(self, model: Any) -> None:
        """The hooks of the end of training, on what the others have made in it."""
        for own, callback in self._copies(model):
            if id(own) in self.ending:
                self._hook(callback, "on_train_end", self.trainer, model)
        if id(None) in self.ending:
            self._hook(model, "on_train_end")

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

    def _may_fail(self) -> bool:
        return self._first
