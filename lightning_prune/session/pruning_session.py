"""One pruning of one model, step by step, in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.criteria import Criterion, Scorer, Scores, criterion_from, score
from lightning_prune.criteria.scorer import BatchNormMode
from lightning_prune.errors import PlanError, ScoreError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.entry_points import EntryPoint, head
from lightning_prune.plan import Coupling, Plan, check_coupling, keeping_fixed
from lightning_prune.reconstruction import ChannelMap, LosslessReport, MaskHandle, mask_, reconstruct_
from lightning_prune.reconstruction.rehearsal import SAMPLES
from lightning_prune.reconstruction.small_model import check_reconstructible
from lightning_prune.schedule import Schedule, Step, in_dense_channels, keep_removed
from lightning_prune.selection import GlobalRatio, Selection, selection_from
from lightning_prune.session.rehearsal import Rehearsal, rehearse, versions
from lightning_prune.session.traced_model import TracedModel


class PruningSession:
    """Model, graph, scores, plan, masks and the step of a schedule together: a pruning without a Trainer.

    Every method either succeeds or raises and leaves session, model and optimizers as they were. The model is pruned
    in place; its parameters stay the same objects, so optimizers go on. Scores and `graph` are in the channels of the
    model as it is, plans in those of the dense model. What changes the model takes ``optimizers``, whose state follows
    (zero where masked, cut where gone), and ``copies``, such as averages of the weights, which lose the same channels.

    Args:
        model: any eager module, dense.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; or a function that returns them,
            called whenever they are needed.
        criterion: an instance, or a name such as "jre".
        ratio: share of channels removed over the network; ignored if ``selection`` is given.
        selection: for example ``Budget(flops=0.5)``; modules in it are those of ``model``. Or a plan, to carry it out.
        schedule: `lightning_prune.schedule.Rounds`, ``Gradual`` or ``Soft``: several steps; None: one.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters; False is lossy.
        statistics: prune channels under layer norms and the like too, with loss, see `lightning_prune.trace`.
        baseline: state dict of the dense model, for criteria with ``reference="baseline"``.
        also: what else the model will run, see `lightning_prune.trace`; or a function that returns the list.

    Attributes:
        history: all scores so far.
        plan: what is masked or gone, all steps so far; None before the first.
        taken: how many steps are done.
        handle: the masks in force, if any.

    Example:
        >>> import torch
        >>> from lightning_prune.schedule import Rounds
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> session = PruningSession(model, torch.zeros(1, 3, 8, 8), criterion="l1", schedule=Rounds(2, epochs=1))
        >>> while not session.done:
        ...     step = session.step(optimizers=[optimizer])
        ...     for _ in range(step.epochs):
        ...         _ = model(torch.randn(4, 3, 8, 8)).square().mean().backward(), optimizer.step()
        >>> session.reconstruct_(optimizers=[optimizer]).passed, model[0]
        (True, Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1)))
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        criterion: Criterion | str = "l1",
        ratio: float = 0.5,
        selection: Selection | Plan | None = None,
        schedule: Schedule | None = None,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        statistics: bool = False,
        baseline: Mapping[str, Tensor] | None = None,
        also: Sequence[Any] | Callable[[], Sequence[Any]] = (),
    ) -> None:
        check_coupling(coupling)
        self.model = model
        self.criterion = criterion_from(criterion)
        self.selection = GlobalRatio(ratio) if selection is None else selection_from(selection).named(model)
        self.schedule = schedule
        self.coupling: Coupling = coupling
        self.batch_norm = batch_norm
        self.baseline = baseline
        self.history: list[Scores] = []
        self.plan: Plan | None = None
        self.taken = 0
        self.handle: MaskHandle | None = None
        self._traced = TracedModel(model, example_inputs, also, statistics)
        self._steps: list[Step] | None = None
        self._rehearsal: Rehearsal | None = None

    @property
    def example_inputs(self) -> Any:
        """What the model is traced and compared on."""
        return self._traced.example_inputs

    @property
    def entries(self) -> list[EntryPoint]:
        """All that the model is traced and compared on."""
        return self._traced.entries

    @property
    def graph(self) -> ChannelGraph:
        """Channel graph of the model as it is now; traced when first needed.

        Raises:
            TraceError: the model does not run on the example inputs.
        """
        return self._traced.graph

    @property
    def dense_graph(self) -> ChannelGraph:
        """Channel graph of the dense model.

        Raises:
            PlanError: the model was already small when this session first met it.
        """
        return self._traced.dense_graph

    @property
    def built(self) -> Plan | None:
        """The part of the plan that the model was already reconstructed with."""
        return self._traced.built

    @property
    def scores(self) -> Scores | None:
        """The newest scores; others of this model, computed elsewhere or earlier, may be set."""
        return self.history[-1] if self.history else None

    @scores.setter
    def scores(self, scores: Scores) -> None:
        if not isinstance(scores, Scores):
            raise ScoreError(
                f"scores must be Scores, as `lightning_prune.score` returns them, got a {type(scores).__name__}: "
                "Scores(by_group, scores.layers) makes others of them"
            )
        scores.check(self.graph)
        self.history.append(scores)

    @property
    def steps(self) -> list[Step]:
        """What the schedule comes to on this model.

        Raises:
            PlanError: the selection cannot be reached in steps.
        """
        if self._steps is None:
            one = [Step(self.selection)]
            self._steps = one if self.schedule is None else self.schedule.steps(self.selection, self.dense_graph)
        return self._steps

    @property
    def done(self) -> bool:
        """Whether everything that is to be removed is masked or gone."""
        return self.plan is not None and self.taken >= len(self.steps)

    @property
    def left(self) -> Plan | None:
        """The plan in the channels of the model as it is now."""
        return None if self.plan is None else self._traced.within(self.plan)

    @property
    def channels(self) -> ChannelMap:
        """Old and new channels: what the model will have once all that is masked so far is gone too."""
        left = self.left
        return ChannelMap.of(self.model) if left is None else ChannelMap.planned(self.model, self.graph, left)

    def cost(self, plan: Plan | None = None) -> tuple[int, int]:
        """Parameters and multiply-accumulates (per sample) that a plan leaves; the model is left as it is.

        Args:
            plan: from `select`, perhaps changed; None: of the model as it is.

        Raises:
            PlanError: a plan of another model, or one that keeps channels which are gone.
        """
        return self._traced.cost(plan)

    def scorer(self, bn_mode: BatchNormMode = "eval", model: nn.Module | None = None) -> Scorer:
        """What scores the model as it is, or a copy of it, batch by batch; set `scores` to the result."""
        model = self.model if model is None else model
        return Scorer(model, self.graph, self.criterion, baseline=self.baseline, bn_mode=bn_mode)

    def score(
        self,
        batches: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Any] | None = None,
        *,
        bn_mode: BatchNormMode = "eval",
    ) -> Scores:
        """Score the model as it is; arguments and errors as for `lightning_prune.score`."""
        graph, criterion = self.graph, self.criterion
        found = score(self.model, graph, criterion, batches, loss, baseline=self.baseline, bn_mode=bn_mode)
        self.history.append(found)
        return found

    def select(self) -> Plan:
        """The plan of the next step, which `mask_` carries out.

        Raises:
            ScoreError: there are no scores of the model as it is; call `score`.
            PlanError: all steps are done, or the selection cannot be met.
        """
        if self.done:
            raise PlanError(f"all {len(self.steps)} steps are done: nothing is left to select")
        if self.scores is None:
            raise ScoreError("there are no scores yet: call PruningSession.score first")
        self.scores.check(self.graph)
        scores = self.scores if self.built is None else in_dense_channels(self.scores, self.built)
        if self.plan is not None and not (self.schedule is not None and self.schedule.soft):
            scores = keep_removed(scores, self.plan)
        selection = self.steps[self.taken].selection
        plan = selection.select(
            self.dense_graph,
            scores,
            coupling=self.coupling,
            batch_norm=self.batch_norm,
            model=self._traced.dense,
            example_inputs=self.example_inputs if selection.needs_model else None,
        )
        return plan if self.built is None else keeping_fixed(plan, self.graph, self.built)

    def mask_(
        self,
        plan: Plan | None = None,
        *,
        optimizers: Iterable[Optimizer] = (),
        copies: Iterable[nn.Module] = (),
        rehearsed: bool = False,
    ) -> MaskHandle:
        """Take the next step: mask what its plan removes, and hold it at zero if the schedule says so.

        Args:
            plan: from `select`, perhaps changed (`Plan.keep`); None: select now.
            optimizers: see `PruningSession`.
            copies: see `PruningSession`.
            rehearsed: build the smaller model beside the masked one and compare them, as `reconstruct_` will, so that
                nobody trains a masked model that cannot be made smaller; on failure nothing is masked.

        Raises:
            PlanError: as `select`, or a plan of another model.
            ReconstructionError: the smaller model would not be equal to the masked one.
        """
        copies = list(copies)
        for copy in copies:
            self.graph.check(copy)
        compared: tuple[str, ...] = ()
        with self._taking(self.select() if plan is None else plan) as left:
            hold = self.done or self.schedule is None or self.schedule.hold
            if not hold:
                left = replace(left, batch_norm=False)  # with gamma and beta at zero a ReLU lets no gradient back
            if rehearsed and (self.done or self.schedule is None or not self.schedule.soft):
                compared = rehearse(self.model, self.graph, left, self.entries)
            handle = mask_(self.model, self.graph, left, optimizers=optimizers, undoable=False)
        for copy in copies:
            handle.clear_(copy)
        self._rehearsal = Rehearsal(left, compared, versions(self.model)) if compared else None
        self.release()
        self.handle = handle
        if not hold:
            self.release()
        return handle

    def reconstruct_(self, *, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()) -> LosslessReport:
        """Make the model physically smaller by what is masked so far, and compare it with the masked one.

        Raises:
            PlanError: nothing has been masked yet, or a `Soft` schedule chooses among all channels again.
            ReconstructionError: the smaller model would not be equal to the masked one.
            OptimizerError: an optimizer keeps something that cannot be cut along.
        """
        graph, plan, left, handle, copies = self.graph, self.plan, self.left, self.handle, list(copies)
        if plan is None or left is None:
            raise PlanError("nothing is masked yet: call PruningSession.step or mask_ first")
        if not self.done and self.schedule is not None and self.schedule.soft:
            raise PlanError(
                f"{self.schedule!r} chooses among all channels every time: none may be gone before the last"
            )
        for copy in copies:
            check_reconstructible(copy, graph)
        inputs, *also = self.entries
        before: tuple[str, ...] = ()
        if self._rehearsal is not None and self._rehearsal.plan == left:
            # Steps were taken on whole batches; as long as no weight has changed they need not be compared again.
            before = self._rehearsal.compared if self._rehearsal.holds(self.model) else ()
            also = [head(entry, SAMPLES) for entry in also if entry.required or not before]
        self.remember_dense()
        if handle is not None:
            handle.remove()
        try:
            report = reconstruct_(
                self.model, graph, left, optimizers=optimizers, example_inputs=inputs.inputs, also=also
            )
        except BaseException:
            if handle is not None:
                handle.hold()
            raise
        assert report is not None
        for copy in copies:
            reconstruct_(copy, graph, left.keeping(report.left))
        self._traced.became(plan.keeping(report.left, self.built))
        self.handle = None
        return replace(report, compared=tuple(dict.fromkeys((*report.compared, *before))))

    def step(
        self,
        batches: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Any] | None = None,
        *,
        optimizers: Iterable[Optimizer] = (),
        copies: Iterable[nn.Module] = (),
        reconstruct: bool = False,
    ) -> Step:
        """Score, select and mask; what it returns says how long to train before the next step.

        Args:
            batches: see `score`.
            loss: see `score`.
            optimizers: see `PruningSession`.
            copies: see `PruningSession`.
            reconstruct: make the model smaller at once.

        Raises:
            PruningError: one of its kinds, see `score`, `select` and `reconstruct_`.
        """
        seen = len(self.history)
        try:
            if not self.done:  # else select says so
                self.score(batches, loss)
            if reconstruct:
                with self._taking(self.select()):
                    self.reconstruct_(optimizers=optimizers, copies=copies)
            else:
                self.mask_(optimizers=optimizers, copies=copies)
        except BaseException:
            del self.history[seen:]
            raise
        return self.steps[self.taken - 1]

    def release(self) -> None:
        """Stop holding masked channels at zero."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def remember_dense(self) -> None:
        """Trace the dense model, and keep a copy for selections that count it, before it becomes smaller."""
        if not self._traced.met_dense:
            self.plan = self._traced.built = None  # of an evaluation, of which nothing was traced
        _ = self.dense_graph
        if self.selection.needs_model and not self.done:
            self._traced.keep_dense()

    def state_dict(self) -> dict[str, Any]:
        """Scores, plans and the step: tensors and plain data. The model's weights are not part of it."""
        return {
            "history": [scores.to_dict() for scores in self.history],
            "plan": None if self.plan is None else self.plan.to_dict(),
            "built": None if self.built is None else self.built.to_dict(),
            "taken": self.taken,
            "steps": 0 if self.plan is None else len(self.steps),
            "held": self.handle is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, evaluated: bool = False) -> None:
        """Go on from there: a dense model takes the shapes it had then, and masks are held again.

        Load the model's and the optimizers' states afterwards. Settings must be those of the first session.

        Args:
            state: from `state_dict`.
            evaluated: no step will follow: then plans and scores are noted, nothing is traced and no mask held. The
                model may be small already.

        Raises:
            PlanError: the state does not fit this model, or other settings make other steps.
        """
        built = None if state["built"] is None else Plan.from_dict(state["built"])
        plan = None if state["plan"] is None else Plan.from_dict(state["plan"])
        history = [Scores.from_dict(scores) for scores in state["history"]]
        if evaluated and not self._traced.met_dense:
            self.history, self.plan, self._traced.built, self.taken = history, plan, built, state["taken"]
            return
        if plan is not None:
            plan = plan.on(self.dense_graph)
        unfinished = plan is not None and (state["held"] or state["taken"] < state["steps"])
        if unfinished and len(self.steps) != state["steps"]:
            raise PlanError(
                f"the checkpoint was written with {state['steps']} steps, and {self.selection!r} with "
                f"{self.schedule!r} makes {len(self.steps)}; resume with the settings of the first run"
            )
        if built is not None and self._traced.is_dense():
            self.remember_dense()
            reconstruct_(self.model, self.dense_graph, built)
        self._traced.became(built)
        self.release()
        self.history, self.plan, self.taken = history, plan, state["taken"]
        if not unfinished and plan is not None:
            self._steps = [Step(self.selection)] * self.taken
        if state["held"]:
            left = self.left
            assert left is not None
            self.handle = mask_(self.model, self.graph, left, undoable=False)

    @contextmanager
    def _taking(self, plan: Plan) -> Iterator[Plan]:
        """Count a step; what it removes from the model as it is. On failure it was not taken."""
        before, self.plan, self.taken = (self.plan, self.taken), plan, self.taken + 1
        try:
            left = self.left
            assert left is not None
            yield left
        except BaseException:
            self.plan, self.taken = before
            raise
