"""Random LightningModules as people write them: heads, teachers, branches and books kept outside forward."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from tests.callbacks.random_data import unpack
from tests.callbacks.random_parts import CLASSES, PARTS, Backbone, Branch, DomainNorm, Teacher

STEPS = ("on_train_batch_end", "on_before_zero_grad", "on_train_epoch_end", "optimizer_step", "on_train_batch_start")
CONDITIONS = ("epoch", "batch_idx", "values", "size", "flag")
AVERAGES = ("data", "lerp", "state_dict", "state_dict_copy", "copy", "foreach", "assign", "mul_add", "buffers")


@dataclass(frozen=True)
class Spec:
    """What a seed stands for; every field is drawn by `spec`."""

    seed: int
    backbone: str
    width: int
    norm: str
    forward: str
    parts: tuple[str, ...]
    distills: str
    teacher: str
    updated: str
    average: str
    held_by: str
    branch: str
    condition: str
    manual: str
    books: tuple[str, ...]
    returns: str
    batch: str
    loaders: str
    validations: int
    sizes: bool
    augmented: bool
    shuffle: str
    accumulate: int
    clip: float
    averaged: bool
    criterion: str
    ratio: float
    layerwise: bool
    coupling: str
    schedule: str
    reconstruct: str
    update_weights: bool
    epochs: int

    def __str__(self) -> str:
        return "\n".join(f"  {field.name}={getattr(self, field.name)!r}" for field in fields(self))


def spec(seed: int) -> Spec:
    """The description of one task and its pruning; about half of the seeds are simple."""
    draw = random.Random(seed)
    some = draw.choice((0.15, 0.35))

    def maybe(choices: tuple[str, ...], none: str = "") -> str:
        return draw.choice(choices) if draw.random() < some else none

    names = [name for name in PARTS if draw.random() < some]
    draw.shuffle(names)
    validations = draw.choice((0, 1, 1, 1, 2))
    if not validations and "monitor" in names:
        names.remove("monitor")  # it would never run
    manual = maybe(("one", "two"))
    criterion = draw.choice(("l1", "l2", "jre", "taylor", "random", "fpgm", "lre", "apoz"))
    update = bool(manual) or draw.random() < 0.1
    schedule = maybe(("rounds", "gradual"))
    return Spec(
        seed=seed,
        backbone=draw.choice(("plain", "residual", "concat", "depthwise")),
        width=draw.choice((4, 6, 8, 12)),
        norm=draw.choice(("", "batch", "batch", "domain by batch" if draw.random() < some else "batch")),
        forward=draw.choice(("classifier", "classifier", "encoder", "maps")),
        parts=tuple(names[:3]),
        distills=maybe(("logits", "vector", "inner")),
        teacher=maybe(("backbone", "whole")),
        updated=draw.choice(("training_step", *STEPS, "callback.on_train_batch_end", "callback.on_train_epoch_end")),
        average=draw.choice(AVERAGES),
        held_by=draw.choice(("module",) * 6 + ("list", "shadow")),
        branch=maybe(("maps", "head")),
        condition=draw.choice(CONDITIONS),
        manual=manual,
        books=tuple(name for name in BOOKS if draw.random() < some),
        returns=draw.choice(("loss", "dict", "none at times" if draw.random() < some else "loss")),
        batch=draw.choice(("tuple", "list", "dict", "nested", "named")),
        loaders=maybe(("list", "dict", "dict of sequential")),
        validations=validations,
        sizes=draw.random() < some,
        augmented=draw.random() < some,
        shuffle=draw.choice(("no", "yes", "generator", "kept batches")),
        accumulate=1 if manual else draw.choice((1, 1, 2)),
        clip=0.0 if manual else draw.choice((0.0, 0.0, 0.1)),
        averaged=draw.random() < some / 2,
        criterion=criterion,
        ratio=draw.choice((0.25, 0.5, 0.75)),
        layerwise=schedule != "rounds" and draw.random() < 0.3,
        coupling=draw.choice(("joint", "joint", "union")),
        schedule=schedule,
        reconstruct=draw.choice(("before", "before", "during", "after", "after", "never")),
        update_weights=update,
        epochs=4 if schedule == "rounds" else draw.choice((2, 3)),
    )


# --- the module -----------------------------------------------------------------------------------------------


class RandomTask(LightningModule):
    """What all have in common; `build` adds the hooks that one of them overrides."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.automatic_optimization = not spec.manual
        self.backbone = Backbone(spec.backbone, spec.width, spec.norm)
        self.fc = nn.Linear(self.backbone.channels, CLASSES)
        for name in spec.parts:
            self.add_module(name, PARTS[name](self.backbone))
        if spec.branch == "head":
            self.late = nn.Linear(self.backbone.channels, CLASSES)
        elif spec.branch == "maps":
            self.backbone.branch = Branch(self.backbone.channels)
        if spec.distills:
            self.distilled = copy.deepcopy(self.backbone).requires_grad_(False).eval()
            self.distilled_fc = copy.deepcopy(self.fc).requires_grad_(False)
        if spec.teacher and not spec.updated.startswith("callback."):
            teacher = Teacher(self.student(), spec.held_by)
            self.teacher = teacher
        if "metric" in spec.books:
            self.accuracy = MulticlassAccuracy(CLASSES)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.calls, self.collected, self.flag = 0, [], False
        self.example_input_array = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)

    def student(self) -> nn.Module:
        return nn.Sequential(self.backbone, self.fc) if self.spec.teacher == "whole" else self.backbone

    def forward(self, x):
        maps = self.backbone(x)[1]
        if self.spec.forward == "maps":
            return maps
        vector = maps.mean((2, 3))
        return self.fc(vector) if self.spec.forward == "classifier" else vector

    def losses(self, batch: Any, batch_idx: int = 0, training: bool = True, now: int = 0) -> Tensor:
        """All losses of a step; needs no Trainer, so that two copies of the module can be compared on it."""
        x, y = unpack(batch)
        spec = self.spec
        for module in self.modules():
            if isinstance(module, DomainNorm):
                module.domain = int(y[0]) % 2
        later = {
            "epoch": now > 0,
            "batch_idx": batch_idx > 0,
            "values": bool(x[0, 0, 0, 0] > 0),
            "size": x.shape[-1] > 8 or not training,
            "flag": self.flag,
        }[spec.condition]
        if spec.branch == "maps":
            self.backbone.branch.taken = later
        inner, maps = self.backbone(x)
        vector = maps.mean((2, 3))
        logits = self.fc(vector)
        loss = F.cross_entropy(logits, y)
        if spec.branch == "head" and later:
            loss = loss + F.cross_entropy(self.late(vector), y)
        for name in spec.parts:
            loss = loss + getattr(self, name)(self, x, y, inner, vector, logits, training)
        if spec.distills:
            with torch.no_grad():
                taught, target = self.distilled(x)
            mine, theirs = {
                "logits": (logits, self.distilled_fc(target.mean((2, 3)))),
                "vector": (vector, target.mean((2, 3))),
                "inner": (inner, taught),
            }[spec.distills]
            loss = loss + F.mse_loss(mine, theirs.detach())
        if "teacher" in vars(self)["_modules"] and spec.held_by != "shadow":
            out = self.teacher(x)
            loss = loss + F.mse_loss(logits if spec.teacher == "whole" else maps, out.detach())
        return loss

    def training_step(self, batch, batch_idx):
        spec = self.spec
        if spec.teacher and spec.updated == "training_step":
            self.teacher.follow_(self.student(), spec.average)
        if spec.returns == "none at times" and batch_idx == 1 and not spec.manual:
            return None
        loss = self.losses(batch, batch_idx, True, self.current_epoch)
        self.keep_books("train", batch, loss)
        if spec.manual:
            self.optimize(loss)
        return {"loss": loss, "extra": loss.detach()} if spec.returns == "dict" else loss

    def optimize(self, loss: Tensor) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        if "clip" in self.spec.books:
            self.clip_gradients(optimizers[0], gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        for optimizer in optimizers:
            optimizer.step()

    def keep_books(self, stage: str, batch: Any, loss: Tensor) -> None:
        books = self.spec.books
        x, y = unpack(batch)
        self.calls += 1
        self.seen += 1
        self.log(f"{stage}_loss", loss.detach(), prog_bar=True, batch_size=len(x))
        if "dict" in books:
            self.log_dict({f"{stage}_a": loss.detach() * 2, f"{stage}_b": x.mean()}, on_epoch=True, batch_size=len(x))
        if "logger" in books and self.logger is not None:
            self.logger.log_metrics({f"{stage}_by_hand": float(loss)}, step=self.trainer.global_step)
        if "metric" in books and stage == "val":
            self.accuracy(self.fc(self.backbone(x)[1].mean((2, 3))), y)
            self.log("accuracy", self.accuracy, on_epoch=True, batch_size=len(x))
        if "collect" in books:
            self.collected.append(loss.detach())
        if "rates" in books and stage == "train":
            for group in self.trainer.optimizers[0].param_groups:
                self.log("rate", group["lr"])
                group["lr"] *= 0.9
        if "schedulers" in books and stage == "train" and self.spec.manual == "one":
            self.lr_schedulers().step()

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.spec.manual == "two":
            mine = {id(p) for p in self.fc.parameters()}
            return (
                torch.optim.Adam([p for p in trained if id(p) not in mine], 0.002),
                torch.optim.SGD(self.fc.parameters(), 0.01, momentum=0.9),
            )
        optimizer = torch.optim.AdamW(trained, 0.002) if self.spec.seed % 2 else torch.optim.SGD(trained, 0.01, 0.9)
        if "schedulers" in self.spec.books:
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        return optimizer


BOOKS = ("dict", "logger", "metric", "collect", "rates", "schedulers", "clip", "hooks", "test", "predict")


def validation_step(self, batch, batch_idx, dataloader_idx=0):
    self.keep_books("val", batch, self.losses(batch, batch_idx, False, self.current_epoch))


def final_step(self, batch, batch_idx, dataloader_idx=0):
    self.log("test_loss", self.losses(batch, batch_idx, False), batch_size=4)


def predict_step(self, batch, batch_idx):
    return self(unpack(batch)[0])


def on_train_epoch_start(self):
    self.flag = self.current_epoch > 0
    self.calls += 1


def on_train_epoch_end(self):
    if self.collected:
        self.log("collected", torch.stack(self.collected).mean())
    self.collected.clear()
    if self.spec.teacher and self.spec.updated == "on_train_epoch_end":
        self.teacher.follow_(self.student(), self.spec.average)


def on_after_batch_transfer(self, batch, dataloader_idx):
    if not isinstance(batch, Tensor) and self.trainer.training:
        x = unpack(batch)[0]
        x += torch.randn_like(x) * 0.05 * random.random()
    return batch


def follow(self, *_):
    self.teacher.follow_(self.student(), self.spec.average)


def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    optimizer.step(closure=optimizer_closure)
    self.teacher.follow_(self.student(), self.spec.average)


def build(spec: Spec) -> RandomTask:
    """A new task with the same weights every time, in a class that overrides what it needs and nothing else."""
    hooks: dict[str, Any] = {}
    if spec.teacher and spec.updated in STEPS:
        hooks[spec.updated] = optimizer_step if spec.updated == "optimizer_step" else follow
    wanted = {
        "validation_step": (validation_step, spec.validations),
        "test_step": (final_step, "test" in spec.books),
        "predict_step": (predict_step, "predict" in spec.books),
        "on_train_epoch_start": (on_train_epoch_start, spec.condition == "flag" or "hooks" in spec.books),
        "on_train_epoch_end": (on_train_epoch_end, "collect" in spec.books),
        "on_after_batch_transfer": (on_after_batch_transfer, spec.augmented),
    }
    hooks |= {name: function for name, (function, is_wanted) in wanted.items() if is_wanted}
    torch.manual_seed(spec.seed)
    return type("Task", (RandomTask,), hooks | {"__module__": "tests.helpers"})(spec)
