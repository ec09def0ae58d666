"""PruningSession: a pruning in steps in a loop of one's own, as the callbacks do it in a Trainer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.errors import PlanError, ReconstructionError, ScoreError
from lightning_prune.schedule import Gradual, Rounds, Schedule, Soft
from tests.callbacks.helpers import trainer
from tests.zoo import build, images

EPOCHS = 5


class Net(nn.Sequential):
    """288 filters, so that rounds of 64 channels up to one half are three."""

    def __init__(self) -> None:
        layers, channels = [], 3
        for width in (64, 96, 128):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = Net().double()
        self.example_input_array = images(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(images(8), torch.arange(8) % 5), 4)


def loss(model: Task, batch: list[Tensor]) -> Tensor:
    return model.training_step(batch)


def train(model: Task, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for batch in loader():
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def session_of(model: nn.Module, schedule: Schedule | None = None, **options) -> lp.PruningSession:
    return lp.PruningSession(model, images(2), **{"criterion": "jre", "schedule": schedule, **options})


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("schedule", "reconstruct"),
    [
        (Rounds(64, epochs=1), "before"),
        (Rounds(64, epochs=1), "during"),
        (Rounds(64, epochs=1), "after"),
        (Gradual(3), "during"),
        (Soft(3), "before"),
        (Soft(3, hold=True), "after"),
    ],
    ids=str,
)
def test_a_loop_of_ones_own_computes_what_the_callback_does(schedule: Schedule, reconstruct: str) -> None:
    task = Task()
    callback = lp.PruneCallback("jre", ratio=0.5, schedule=schedule, reconstruct=reconstruct)
    trainer(callback, epochs=EPOCHS).fit(task, loader())

    model = Task()
    optimizer = model.configure_optimizers()
    session = session_of(model, schedule)
    for _ in range(EPOCHS):
        if not session.done:
            session.step(loader(), loss, optimizers=[optimizer], reconstruct=reconstruct == "during")
            if session.done and reconstruct == "before":
                session.reconstruct_(optimizers=[optimizer])
        train(model, optimizer)
    if reconstruct == "after":
        session.reconstruct_(optimizers=[optimizer])

    assert session.taken == len(session.steps) == 3
    assert session.plan == callback.masking.plan
    assert session.built == callback.masking.built
    assert sum(len(group.removed) for group in session.plan.groups.values()) == 144
    assert same(model, task)


@pytest.mark.parametrize("bare", [None, "layer2.0.conv2[24:32]"], ids=["as scored", "one group down to a channel"])
def test_groups_that_share_a_layer_keep_their_names_from_round_to_round(bare: str | None) -> None:
    """Shortcuts of option A pad with zeros: three groups have filters of one layer, which move up as others go."""
    model, images = lp.models.cifar_thin.resnet20().double().eval(), torch.rand(3, 3, 40, 40).double()
    session = lp.PruningSession(model, images[:2, :, :32, :32], criterion="l1", schedule=Gradual(4), ratio=0.6)
    names = {group.name for group in session.dense_graph.groups}
    while not session.done:
        scores = session.score()
        if bare in scores:  # the last channel is no group that can be pruned
            scores[bare].zero_()
        session.mask_()
        masked = copy.deepcopy(model)
        session.reconstruct_()
        torch.testing.assert_close(model(images), masked(images), rtol=1e-9, atol=1e-12)
        assert {group.name for group in session.graph.groups} == names
    assert bare is None or len(session.plan.groups[bare].keep) == 1
    resumed = lp.PruningSession(lp.models.cifar_thin.resnet20(), images[:2].float(), schedule=Gradual(4), ratio=0.6)
    resumed.load_state_dict(session.state_dict())
    assert [group.size for group in resumed.graph.groups] == [group.size for group in session.graph.groups]


@pytest.mark.parametrize("built", [False, True])
def test_a_saved_session_goes_on_bit_for_bit(built: bool) -> None:
    def run(stop: int | None) -> tuple[Task, lp.PruningSession]:
        model = Task()
        optimizer = model.configure_optimizers()
        session = session_of(model, Rounds(64, epochs=1), selection=lp.GlobalRatio(0.5, round_to=2))
        for epoch in range(EPOCHS):
            if epoch == stop:
                file = io.BytesIO()
                torch.save([part.state_dict() for part in (session, model, optimizer)], file)
                file.seek(0)
                states = torch.load(file, weights_only=True)
                model = Task()
                session = session_of(model, Rounds(64, epochs=1), selection=lp.GlobalRatio(0.5, round_to=2))
                session.load_state_dict(states[0])
                model.load_state_dict(states[1])
                optimizer = model.configure_optimizers()
                optimizer.load_state_dict(states[2])
                assert (session.handle is None) == built
            if not session.done:
                session.step(loader(), loss, optimizers=[optimizer], reconstruct=built)
            train(model, optimizer)
        return model, session

    whole, first = run(None)
    for stop in (1, 2, 4):
        resumed, second = run(stop)
        assert same(whole, resumed)
        assert first.plan == second.plan


def test_other_settings_than_those_of_the_first_session_are_refused() -> None:
    first = session_of(Task(), Gradual(3), criterion="l1")
    first.step()
    with pytest.raises(PlanError, match=r"written with 3 steps.*makes 4"):
        session_of(Task(), Gradual(4), criterion="l1").load_state_dict(first.state_dict())


@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_step_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch, reconstruct: bool) -> None:
    model = Task()
    optimizer = model.configure_optimizers()
    session = session_of(model, Gradual(3))
    session.step(loader(), loss, optimizers=[optimizer])
    train(model, optimizer)
    before = copy.deepcopy([part.state_dict() for part in (session, model, optimizer)])
    handle = session.handle

    def broken(*_: object, **__: object) -> None:
        raise (ReconstructionError if reconstruct else RuntimeError)("on purpose")

    name = "reconstruction.small_model.rehearse" if reconstruct else "session.pruning_session.mask_"
    with monkeypatch.context() as patched:
        patched.setattr(f"lightning_prune.{name}", broken)
        with pytest.raises(ReconstructionError if reconstruct else RuntimeError, match="on purpose"):
            session.step(loader(), loss, optimizers=[optimizer], reconstruct=reconstruct)
    after = [part.state_dict() for part in (session, model, optimizer)]
    assert repr(after[0]) == repr(before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in after[1].items())
    assert repr(after[2]) == repr(before[2])
    assert session.handle is handle
    train(model, optimizer)
    for parameter in model.parameters():
        parameter.data += 1
    model(images(2))
    assert handle.is_zero()  # the masks are in force again
    assert session.step(loader(), loss, optimizers=[optimizer], reconstruct=reconstruct) == session.steps[1]


def test_what_comes_too_early_or_too_late_is_refused() -> None:
    session = session_of(build("Residual"), Soft(2), criterion="l1")
    with pytest.raises(ScoreError, match=r"call PruningSession\.score first"):
        session.select()
    with pytest.raises(PlanError, match="nothing is masked yet"):
        session.reconstruct_()
    session.step()
    with pytest.raises(PlanError, match="none may be gone before the last"):
        session.reconstruct_()
    session.step()
    with pytest.raises(PlanError, match="all 2 steps are done"):
        session.step()
    assert len(session.history) == 2
    assert session.reconstruct_().passed
    with pytest.raises(PlanError, match="must be a Selection"):
        lp.PruningSession(build("Residual"), images(), selection=0.5)


def test_a_plain_dictionary_of_scores_is_refused_with_the_way_to_change_scores() -> None:
    session = session_of(build("Residual"), criterion="l1")
    scores = session.score()
    halved = {name: of / 2 for name, of in scores.items()}
    with pytest.raises(ScoreError, match=r"got a dict: Scores\(by_group, scores\.layers\)"):
        session.scores = halved
    session.scores = lp.criteria.Scores(halved, scores.layers)


def test_scores_of_the_model_before_a_reconstruction_are_refused() -> None:
    session = session_of(build("Residual"), Gradual(2), criterion="l1")
    session.step(reconstruct=True)
    with pytest.raises(ScoreError, match="channels"):
        session.select()
    session.score()
    assert session.select().ratio > session.plan.ratio


@pytest.mark.parametrize("reconstruct", [False, True])
def test_averages_of_the_weights_lose_the_same_channels(reconstruct: bool) -> None:
    model = Task()
    average = torch.optim.swa_utils.AveragedModel(model)
    session = session_of(model, Gradual(2), criterion="l1")
    while not session.done:
        session.step(copies=[average.module], reconstruct=reconstruct)
    assert same(average.module, model)
    if not reconstruct:
        assert session.reconstruct_(copies=[average.module]).passed
        assert same(average.module, model)


def test_an_example_that_follows_the_model_is_asked_for_when_needed() -> None:
    model = build("Residual")
    session = lp.PruningSession(model, lambda: images(2).to(next(model.parameters())), criterion="l1")
    model.float()
    session.step()
    assert session.reconstruct_().dtype == "float64"
