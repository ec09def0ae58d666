"""Record every ATen operator that a model runs, with its arguments and their labels: what a rule may look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.graph.assignments import Assignments
from lightning_prune.graph.code_arguments import SourceCall, running_call
from lightning_prune.graph.constraints import CallSite, Grid, kind_of
from lightning_prune.graph.label_space import LabelSpace
from lightning_prune.graph.labels import Labels, TensorInfo
from lightning_prune.graph.means import Mean
from lightning_prune.graph.running import RunningModules, tensors_in
from lightning_prune.graph.sizes import is_torch
from lightning_prune.model_state.dispatch import EagerMode
from lightning_prune.model_state.originals import Originals


@dataclass(eq=False)
class OperatorCall:
    """One recorded operator."""

    space: LabelSpace
    recorder: OperatorRecorder
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def name(self) -> str:
        """The operator without namespace; in-place variants under the name of their plain twin."""
        return self.func.overloadpacket._qualified_op_name.split("::")[1].removesuffix("_")

    @cached_property
    def where(self) -> str:
        """Operator and module path, for messages; outside of modules the user's step, unless it is forward."""
        name = self.func.overloadpacket._qualified_op_name.replace("::", ".")
        if self.recorder.module:
            return f"{name} at {self.recorder.module!r}"
        return f"{name} in {self.recorder.step}" if self.recorder.step else name

    @cached_property
    def site(self) -> CallSite:
        """Where it ran, for constraints."""
        return self._site(self.recorder.modules.stack)

    def _site(self, stack: list[nn.Module]) -> CallSite:
        kind = kind_of(type(stack[-1])) if stack else ""
        return CallSite(tuple(map(self.recorder.modules.path, reversed(stack))), kind, self.where)

    @property
    def made_by(self) -> SourceCall | None:
        """The call in the source of the innermost module that ran it."""
        stack = self.recorder.modules.stack
        return running_call(stack[-1]) if stack else None

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The tensors that it returned."""
        values = self.output if isinstance(self.output, (list, tuple)) else [self.output]
        return [value for value in values if isinstance(value, Tensor)]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor argument, lists opened."""
        values = (*self.args, *self.kwargs.values())
        opened = (value if isinstance(value, (list, tuple)) else (value,) for value in values)
        return [item for items in opened for item in items if isinstance(item, Tensor)]

    def info(self, value: Any) -> TensorInfo:
        """What is known of an argument."""
        return self.recorder.info(value) if isinstance(value, Tensor) else TensorInfo(uniform=True)

    def labelled(self, tensor: Tensor, dim: int) -> TensorInfo:
        """What is known of an argument with channels along ``dim``; zeros that the code made get labels."""
        info = self.info(tensor)
        if info.zeros is None or tensor.shape[dim] == 1 or any(dim in one.dims for one in info.labels):
            return info
        ids = next((one.flat().ids for one in info.zeros.like if one.dims == (dim,)), None)
        if ids is None:
            ids = self.space.fresh(tensor.shape[dim])
            self.counted_by_code(ids, info.zeros.site)
        info = replace(info, labels=(*info.labels, Labels.along(Labels(ids), tensor.shape, dim)), data=True)
        self.recorder.set_info(tensor, info)
        self.recorder.labelled_zeros = True
        return info

    def counted_by_code(self, ids: Tensor, made: CallSite) -> None:
        """These channels are as many as the code said where it made a tensor of nothing."""
        stack = self.recorder.modules.stack
        code = next((len(stack) - k for k, module in enumerate(reversed(stack)) if not is_torch(module)), 0)
        site = replace(self._site(stack[:code]), where=made.where)  # a choice of those who read them
        self.space.constraints.append(Grid(ids[None], (1,), site, made=made))

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        position, fallback = _arguments(self.func).get(name, (len(self.args), None))
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default if fallback is None else fallback)

    def rerun(self, tensor: Tensor) -> Any:
        """The operator with another first argument."""
        return self.func(tensor, *self.args[1:], **self.kwargs)

    def fold(self, labels: Labels, keep: Collection[int]) -> Labels | None:
        """See `LabelSpace.fold`."""
        return self.space.fold(labels, keep, self.where)

    def by_channel(self, reason: str, channels: Collection[int] = (1,)) -> list[Labels]:
        """The first argument's labels along its channels only; those that vary along none of them stay."""
        found = [(one, self.fold(one, channels)) for one in self.info(self.args[0]).labels]
        self.freeze([labels for labels, folded in found if folded is None], reason)
        return [folded for _, folded in found if folded is not None]

    def freeze(self, labels: Iterable[Labels], reason: str) -> None:
        """These channels must stay."""
        for one in labels:
            self.space.freeze(one.ids, reason)

    def freeze_statistic(self, labels: Labels, what: str = "enters a statistic") -> None:
        """These channels go at the price of a statistic that changes."""
        self.space.freeze(labels.ids, f"{what} over channels in {self.where}", statistics=True)

    def mean_over(self, labels: Labels, *, is_sum: bool = False) -> None:
        """A mean over these channels (n,): their module may make up for fewer, if they are zero when masked.

        is_sum: a sum, which needs nothing, unless code divides it by the number of channels.
        """
        running = self.recorder.modules
        known = bool(running.stack) and id(running.stack[-1]) in running.names
        if not bool(labels.live.any()) and known:
            if not is_sum or any(parameter is not None for parameter in running.stack[-1]._parameters.values()):
                mean = self.space.means.setdefault(self.recorder.module, Mean())
                mean.add(labels.ids, self.where, is_sum=is_sum)
        elif not is_sum:
            self.freeze_statistic(labels)

    def freeze_inputs(self, reason: str, *, keep: bool = False) -> TensorInfo:
        """Freeze every label that enters; the output has none.

        keep: what is computed from a weight alone, in its shape, keeps the weight's, so that the layer is named.
        """
        infos = [self.info(tensor) for tensor in self.tensors]
        self.freeze([labels for info in infos for labels in info.labels], reason)
        data = any(info.data for info in infos)
        if keep and not data and infos and infos[0].labels and self.outputs[0].shape == self.tensors[0].shape:
            return infos[0]
        return TensorInfo(data=data)


class OperatorRecorder(EagerMode):
    """Dispatch mode that shows every operator that ran to ``observe``.

    Information is held per tensor object, weakly: an activation's labels go when the activation goes.
    """

    def __init__(
        self,
        space: LabelSpace,
        known: Mapping[Tensor, TensorInfo],
        modules: RunningModules,
        observe: Callable[[OperatorCall], None],
        run: int,
    ) -> None:
        super().__init__()
        self.space, self.modules, self.run, self.order = space, modules, run, 0
        self.before: Tensor | None = None
        self.originals = Originals(modules.model)
        self.assignments = Assignments(space, known, self.originals, self.info)
        self.labelled_zeros = False
        self.cleared = False  # a tensor was set to zero in place
        self.unknown = TensorInfo()  # of tensors that no operator made
        self.step = ""  # the user's step that is run, if it is not forward
        self._info = WeakIdKeyDictionary(dict(known))
        self._written = WeakIdKeyDictionary()  # tensors in whose memory something was written by itself
        # Of tensors that ``repeat`` made: by dimension how many entries lie there again and again.
        self.repeats: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._observe = observe
        self._depth = 0

    @property
    def module(self) -> str:
        """Path of the innermost module that is running."""
        return self.modules.path(self.modules.stack[-1]) if self.modules.stack else ""

    def info(self, tensor: Tensor) -> TensorInfo:
        """What is known of a tensor; a parameter seen through ``.data`` or ``detach`` is found by its storage."""
        found = self._info.get(tensor)
        if found is None:
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return TensorInfo()  # ``vmap`` shows modules a tensor of other shape; operators get what is inside
            source = self.assignments.source(tensor)
            found = self.unknown if source is None else self._info[source]
        return found

    def set_info(self, tensor: Tensor, info: TensorInfo) -> None:
        """Remember the labels of a tensor for as long as it lives."""
        self._info[tensor] = info
        self.assignments.hold(tensor, info)

    def aliases(self, tensor: Tensor) -> list[Tensor]:
        """Other live tensors on the same storage."""
        storage = tensor.untyped_storage()._cdata
        return [t for t in self._info if t is not tensor and t.untyped_storage()._cdata == storage]

    def note_written(self, views: Iterable[Tensor]) -> None:
        """Something that may be other than zero was written there; views: of one memory."""
        for tensor in views:
            self._written[tensor] = True

    def was_written(self, tensor: Tensor) -> bool:
        """Whether something may lie in its memory that no operator returned as the whole of it."""
        return any(one in self._written for one in (tensor, *self.aliases(tensor)))

    def __enter__(self) -> OperatorRecorder:
        if not self._depth:
            register = nn.modules.module
            self._hooks = (
                register.register_module_forward_pre_hook(lambda module, _: self.assignments.meet(module)),
                register.register_module_forward_hook(self._leave),
            )
        self._depth += 1
        return super().__enter__()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.assignments.meet(module)
        mean = self.space.means.get(self.modules.path(module)) if self.space.means else None
        if mean is not None and mean.call is None:
            outputs = tensors_in(output)
            tensors = (*(value for value in args if isinstance(value, Tensor)), *outputs)
            mean.met(args, outputs, [self.info(tensor) for tensor in tensors])

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            for hook in self._hooks:
                hook.remove()
            self.assignments.meet_all(self.modules.model)
            self.originals.restore()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_foreach(func) and isinstance(args[0], (list, tuple)):
            with self:  # every tensor by itself, recorded as any other operator is
                return one_by_one(func, args, kwargs)
        self.assignments.meet_arguments(args)
        self.originals.note(func, args, kwargs)
        # Restrides in place: only the old strides tell whether the elements stay where they were.
        self.before = args[0].detach() if func is torch.ops.aten.as_strided_.default else None
        output = func(*args, **kwargs)
        self.order += 1
        self._observe(OperatorCall(self.space, self, func, args, kwargs, output))
        return output


@cache
def _arguments(func: Any) -> dict[str, tuple[int, Any]]:
    """Position and default value of an operator's arguments."""
    return {
        argument.name: (position, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(func._schema.arguments)
    }


@cache
def _is_foreach(func: Any) -> bool:
    return func.overloadpacket.__name__.startswith("_foreach_")


def one_by_one(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """What ``torch._foreach_add_`` and its kind do, tensor by tensor."""
    single = getattr(torch.ops.aten, func.overloadpacket.__name__.removeprefix("_foreach_"))
    names = [argument.name for argument in getattr(single, single.overloads()[0])._schema.arguments]
    outputs = []
    for k in range(len(args[0])):
        own = [value[k] if isinstance(value, (list, tuple)) else value for value in args]
        named = {name: value[k] if isinstance(value, (list, tuple)) else value for name, value in kwargs.items()}
        own += [named.pop(name) for name in ("scalars", "weight") if name in named]
        if "value" in names and len(own) > names.index("value"):  # addcmul, addcdiv
            named["value"] = own.pop()
        outputs.append(single(*own, **named))
    return None if func._schema.is_mutable else outputs
