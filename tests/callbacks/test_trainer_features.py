"""Whatever a Trainer can do besides: it works with pruning, or is refused before any weight is touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_prune.callbacks import MaskingCallback, PruneCallback, ScoringCallback
from lightning_prune.errors import CallbackError, OptimizerError, ScoreError
from lightning_prune.schedule import Gradual
from tests.callbacks.helpers import Task, loader, params, trainer
from tests.zoo import images

WHENS = ("before", "during", "after")


def prune(when: str = "during", **options: Any) -> PruneCallback:
    return PruneCallback("jre", 0.5, schedule=Gradual(2), reconstruct=when, **options)


def run(task: Task, callback: PruneCallback, *others: Callback, epochs: int = 3, **options: Any) -> Trainer:
    torch.manual_seed(0)
    runner = trainer(callback, *others, epochs=epochs, **options)
    runner.fit(task, loader(), loader(8, shuffle=False))
    return runner


def assert_pruned(task: Task, callback: PruneCallback) -> None:
    assert callback.masking.done
    assert callback.reconstruction.lossless.passed
    assert params(task) < 0.8 * params(Task())
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        assert not any(getattr(module, hooks) for module in task.modules())


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling:UserWarning")
@pytest.mark.parametrize("when", ["during", "after"])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"overfit_batches": 2},
        {"limit_train_batches": 2, "limit_val_batches": 1},
        {"num_sanity_val_steps": -1},
        {"detect_anomaly": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_trainer_options(options: dict[str, Any], when: str) -> None:
    task, callback = Task("adamw"), prune(when)
    run(task, callback, **options)
    assert_pruned(task, callback)


@pytest.mark.parametrize("when", WHENS)
def test_fast_dev_run_prunes_once(when: str) -> None:
    task, callback = Task(), PruneCallback("jre", 0.5, reconstruct=when)
    run(task, callback, fast_dev_run=True)
    assert_pruned(task, callback)


@pytest.mark.parametrize("when", WHENS)
def test_mixed_precision(when: str) -> None:
    task, callback = Task(), prune(when)
    task.net.float()
    task.example_input_array = images(2).float()
    torch.manual_seed(0)
    data = DataLoader([(x.float(), y) for x, y in loader().dataset], 4)
    trainer(callback, epochs=3, precision="bf16-mixed").fit(task, data, data)
    assert_pruned(task, callback)
    assert callback.reconstruction.lossless.dtype == "float64"


@pytest.mark.parametrize("when", WHENS)
def test_true_double_precision_of_a_single_precision_module(when: str) -> None:
    task, callback = Task(), prune(when)
    task.net.float()
    task.example_input_array = images(2).float()
    data = DataLoader([(x.float(), y) for x, y in loader().dataset], 4)
    trainer(callback, epochs=3, precision="64-true").fit(task, data, data)
    assert_pruned(task, callback)
    assert next(task.parameters()).dtype == torch.float64


class Manual(Task):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()
        return loss

    def configure_optimizers(self):
        head = list(self.net.head.parameters())
        body = [parameter for name, parameter in self.net.named_parameters() if not name.startswith("head")]
        return torch.optim.AdamW(body, 0.005), torch.optim.SGD(head, 0.01, momentum=0.9)


@pytest.mark.parametrize("when", WHENS)
def test_manual_optimization_with_two_optimizers(when: str) -> None:
    task, callback = Manual(), PruneCallback("l1", 0.5, schedule=Gradual(2), reconstruct=when)
    runner = run(task, callback)
    assert_pruned(task, callback)
    for optimizer in runner.optimizers:
        shapes = [(parameter, value) for parameter, state in optimizer.state.items() for value in state.values()]
        assert any(value.dim() for _, value in shapes)
        assert all(value.shape in (parameter.shape, torch.Size([])) for parameter, value in shapes)


def test_manual_optimization_is_scored_while_it_trains() -> None:
    task, callback = Manual(), PruneCallback("jre", 0.5, update_weights=True)
    run(task, callback)
    assert_pruned(task, callback)


class Slow(Task):
    """Writes to weights in its step, as people do."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        for parameter in self.slow.parameters():
            parameter.data.mul_(0.5)

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


class ByHand(Slow, Manual):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.clamp_(-0.1, 0.1)
            self.follow()
            self.slow(batch[0])
        return loss


class ByLightning(Slow):
    def training_step(self, batch, batch_idx):
        self.follow()
        return F.cross_entropy(self(batch[0]), batch[1]) + 0 * self.slow(batch[0]).sum()


class Stop(Callback):
    def on_train_start(self, trainer, pl_module):
        raise ArithmeticError("before training")


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("criterion", ["jre", "taylor_fo", "l1"])
@pytest.mark.parametrize("kind", [ByHand, ByLightning])
def test_what_steps_write_to_weights_is_gone_after_scoring(kind: type[Task], criterion: str, example: bool) -> None:
    """Steps of the user's are run to find an example, to trace and to score: on copies."""
    task = kind()
    if not example and kind is ByLightning:
        task.example_input_array = None
    before = copy.deepcopy(task.state_dict())
    callback = PruneCallback(criterion, 0.0)
    with pytest.raises(ArithmeticError, match="before training"):
        trainer(callback, Stop()).fit(task, loader(), loader(8, shuffle=False))
    assert callback.masking.plan is not None
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("criterion", ["jre", "taylor_fo", "taylor", "gre", "thinet"])
def test_manual_optimization_is_scored_as_any_other(criterion: str) -> None:
    found = []
    for task in (Task(), Manual()):
        torch.manual_seed(0)
        callback = PruneCallback(criterion, 0.5)
        with pytest.raises(ArithmeticError):
            trainer(callback, Stop()).fit(task, loader(shuffle=False), loader(8, shuffle=False))
        found.append(callback.scoring.scores)
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-12) for name in found[0])


@pytest.mark.parametrize("update_weights", [False, True])
def test_batches_on_which_nothing_is_differentiated_are_left_out(update_weights: bool) -> None:
    """As in adversarial training, where the generator learns on every fifth."""

    class AtTimes(Manual):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == 0:
                super().training_step(batch, batch_idx)

    class Never(Manual):
        def training_step(self, batch, batch_idx):
            self.net(batch[0])

    options = {"update_weights": update_weights, "reconstruct": "after"}
    task, callback = AtTimes(), PruneCallback("taylor_fo", 0.5, **options)
    run(task, callback)
    assert_pruned(task, callback)
    with pytest.raises(ScoreError, match=r"no gradient of the loss ever reached it|never called while scoring"):
        run(Never(), PruneCallback("taylor_fo", 0.5, **options))


def test_later_steps_of_a_schedule_score_under_manual_optimization() -> None:
    task, callback = Manual(), PruneCallback("jre", 0.5, schedule=Gradual(2), update_weights=True)
    run(task, callback)
    assert_pruned(task, callback)
    assert len(callback.scoring.history) == 2


def test_heads_cannot_be_fitted_under_manual_optimization() -> None:
    with pytest.raises(CallbackError, match=r"fits auxiliary heads along with the loss .*manual optimization"):
        run(Manual(), PruneCallback("dcp", 0.5))


@pytest.mark.parametrize("when", WHENS)
def test_frozen_layers_stay_frozen(when: str) -> None:
    task, callback = Task("adamw"), prune(when)
    task.net.stem.requires_grad_(False)
    run(task, callback)
    assert_pruned(task, callback)
    assert not any(parameter.requires_grad for parameter in task.net.stem.parameters())


@pytest.mark.parametrize("when", WHENS)
def test_early_stopping_and_best_checkpoint(when: str, tmp_path: Path) -> None:
    task, callback = Task("adamw"), PruneCallback("l1", 0.5, reconstruct=when)
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    stopping = EarlyStopping("val_loss", patience=1, min_delta=10)
    runner = run(task, callback, stopping, best, epochs=9, enable_checkpointing=True)
    assert runner.current_epoch == 2
    assert_pruned(task, callback)
    (found,) = runner.validate(task, loader(8, shuffle=False), ckpt_path="best", verbose=False)
    assert abs(found["val_loss"] - float(best.best_model_score)) < 1e-9


class Average(WeightAveraging):
    """Says what the average is when training ends."""

    def on_train_end(self, trainer, pl_module):
        self.average = copy.deepcopy(self._average_model.module)
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize("first", [True, False])
def test_a_moving_average_is_masked_and_cut_along(first: bool) -> None:
    """What is left of the average is the same whenever the model was cut."""
    start, ends = Task("adamw").state_dict(), []
    for when in WHENS:
        task = Task("adamw")
        task.load_state_dict(start)
        prune = PruneCallback("bn_scale", 0.5, schedule=Gradual(2), reconstruct=when)
        average = Average(avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
        torch.manual_seed(0)
        callbacks = (average, prune) if first else (prune, average)
        trainer(*callbacks, epochs=3).fit(task, loader(), loader(8, shuffle=False))
        assert prune.masking.done
        ends.append(task.state_dict())
        assert all(value.shape == ends[0][name].shape for name, value in ends[-1].items()), when
    for end in ends[1:]:
        for name, value in end.items():
            assert torch.allclose(value.double(), ends[0][name].double(), rtol=1e-8, atol=1e-8), name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
def test_a_run_with_a_moving_average_is_resumed(tmp_path: Path) -> None:
    task, prune_ = Task("adamw"), PruneCallback("l1", 0.5)
    run(task, prune_, WeightAveraging(), ModelCheckpoint(tmp_path, save_last=True), epochs=2, enable_checkpointing=True)
    again, callback = Task("adamw"), PruneCallback("l1", 0.5)
    trainer(callback, WeightAveraging(), epochs=3).fit(
        again, loader(), loader(8, shuffle=False), ckpt_path=tmp_path / "last.ckpt"
    )
    assert params(again) == params(task)
    assert callback.masking.plan == prune_.masking.plan


@pytest.mark.parametrize("when", WHENS)
def test_stochastic_weight_averaging(when: str) -> None:
    task, callback = Task(), prune(when)
    run(task, callback, StochasticWeightAveraging(0.01, swa_epoch_start=1), epochs=4)
    assert params(task) < 0.8 * params(Task())
    assert callback.reconstruction.lossless.passed


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by torch.compile
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "during"])
def test_a_compiled_module_is_pruned(when: str) -> None:
    task, callback = Task(), prune(when)
    compiled = torch.compile(task, backend="eager")
    torch.manual_seed(0)
    trainer(callback, epochs=3).fit(compiled, loader(), loader(8, shuffle=False))
    assert_pruned(task, callback)
    plain, other = Task(), prune(when)
    run(plain, other)
    assert other.masking.plan.ratio == callback.masking.plan.ratio


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_optimizer_state_that_belongs_to_no_channel_is_refused_before_training(optimizer: type) -> None:
    class Other(Task):
        def configure_optimizers(self):
            return optimizer(self.parameters(), 0.01)

    for when in ("during", "after"):
        task = Other()
        before = copy.deepcopy(task.state_dict())
        with pytest.raises(OptimizerError, match=rf"{optimizer.__name__} keeps '\w+' .* cannot be cut"):
            run(task, prune(when))
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    task, callback = Other(), PruneCallback("l1", 0.5)
    run(task, callback)
    assert_pruned(task, callback)


@pytest.mark.parametrize("kind", ["Adagrad", "NAdam", "Rprop", "ASGD", "foreach", "amsgrad"])
def test_optimizers_whose_state_is_cut(kind: str) -> None:
    options = {"foreach": {"foreach": True}, "amsgrad": {"amsgrad": True}}.get(kind, {})

    class Other(Task):
        def configure_optimizers(self):
            return getattr(torch.optim, kind if not options else "AdamW")(self.parameters(), lr=0.005, **options)

    masked, small = Other(), Other()
    small.load_state_dict(masked.state_dict())
    once = {"schedule": Gradual(2), "selection": None}
    after, during = (PruneCallback("bn_scale", 0.5, reconstruct=when, **once) for when in ("after", "during"))
    run(masked, after)
    runner = run(small, during)
    for name, value in small.state_dict().items():
        assert torch.allclose(masked.state_dict()[name].double(), value.double(), rtol=1e-8, atol=1e-8), name
    state = runner.optimizers[0].state
    assert state
    assert all(
        v.shape in (p.shape, torch.Size([]), (1,)) for p, s in state.items() for v in s.values() if torch.is_tensor(v)
    )


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another, with weights of its own (Zhang et al., 2019): in its state, or beside it."""

    def __init__(self, base: torch.optim.Optimizer, beside: bool = False) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.beside, self.slow = base, beside, []
        if beside:
            self.slow = [parameter.detach().clone() for parameter in self.parameters()]

    def parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        for place, parameter in enumerate(self.parameters()):
            own = self.state[parameter]
            slow = self.slow[place] if self.beside else own.setdefault("slow", parameter.clone())
            parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


class Wrapped(Task):
    beside = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Lookahead(torch.optim.AdamW(self.parameters(), lr=0.005), self.beside)


def test_the_state_of_an_optimizer_around_another_is_cut_and_so_is_the_others() -> None:
    masked, small = Wrapped(), Wrapped()
    small.load_state_dict(masked.state_dict())
    for task, when in ((masked, "after"), (small, "during")):
        run(task, PruneCallback("bn_scale", 0.5, reconstruct=when, schedule=Gradual(2)))
    for name, value in small.state_dict().items():
        assert torch.allclose(masked.state_dict()[name].double(), value.double(), rtol=1e-8, atol=1e-8), name


def test_weights_beside_the_state_of_an_optimizer_are_refused_before_training() -> None:
    task = Wrapped()
    task.beside = True
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(OptimizerError, match=r"Lookahead keeps a tensor of shape .* in its attribute 'slow'"):
        run(task, prune())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_a_loss_that_is_not_a_number_is_refused_and_nothing_is_masked() -> None:
    class Broken(Task):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx)["loss"] * torch.nan}

    task = Broken()
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(ScoreError, match="NaN"):
        run(task, prune())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_two_prune_callbacks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PruneCallback`"):
        run(Task(), prune(), prune())

    class Other(PruneCallback):
        """Lightning takes two of different kinds."""

    with pytest.raises(CallbackError, match=r"has PruneCallback twice.*overrides"):
        run(Task(), prune(), Other())
    with pytest.raises(CallbackError, match="has ScoringCallback twice"):
        run(Task(), prune(), ScoringCallback("l1"))
    with pytest.raises(CallbackError, match="has MaskingCallback twice"):
        run(Task(), prune(), MaskingCallback())


def test_learning_rate_schedules_keep_their_steps() -> None:
    class Scheduled(Task):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)}

    task, plain = Scheduled("adamw"), Scheduled("adamw")
    first = run(task, prune())
    second = trainer(epochs=3)
    second.fit(plain, loader(), loader(8, shuffle=False))
    assert first.lr_scheduler_configs[0].scheduler.state_dict() == second.lr_scheduler_configs[0].scheduler.state_dict()


def test_several_loaders_are_scored_as_they_train() -> None:
    class Several(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)["loss"] + super().training_step(batch["b"], 0)["loss"]

    task, callback = Several(), prune()
    trainer(callback, epochs=3).fit(task, {"a": loader(), "b": loader()}, loader(8, shuffle=False))
    assert_pruned(task, callback)


def test_tuning_leaves_the_model_unpruned_for_the_fit(tmp_path: Path) -> None:
    class Tunable(Task):
        lr = 0.001
        batch_size = 2

        def train_dataloader(self):
            return loader(16, self.batch_size)

        def val_dataloader(self):
            return loader(8, shuffle=False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    task, callback = Tunable(), prune()
    dense = params(task)
    before = copy.deepcopy(task.state_dict())
    runner = trainer(callback, epochs=3, default_root_dir=tmp_path)
    tuner = Tuner(runner)
    tuner.scale_batch_size(task, max_trials=1, steps_per_trial=1)
    tuner.lr_find(task, num_training=4)
    assert params(task) == dense
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    runner.fit(task)
    assert_pruned(task, callback)
