"""How many channels go in and out of modules: numbers that their code may compare with an attribute.

``assert x.shape[1] == self.channels`` runs no operator, so no rule sees it. Every call of a module is noted, at next to
no cost; only where a smaller model fails in a module are its attributes of such a value made to follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_prune.graph.constraints import CallSite, CodeSize, kind_of
from lightning_prune.graph.label_space import Pairs
from lightning_prune.graph.labels import NO_LABEL, Labels
from lightning_prune.graph.operator_call import OperatorRecorder
from lightning_prune.graph.resolve import Choice
from lightning_prune.graph.running import tensors_in
from lightning_prune.graph.sizes import is_torch
from lightning_prune.model_state.cutting import sizes_of

IN, OUT, INSIDE = "enters the module", "leaves it", "enters or leaves what it calls"


class Widths:
    """The labels that entered and left every call of a module, by the user's module whose code made the call."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in self._modules.items() if not is_torch(module)}
        self.kinds: dict[str, str] = {}  # of the user's modules that ran, the type
        self._noted: dict[str, list[tuple[Labels, str]]] = {}  # per path, with one of IN, OUT and INSIDE

    @contextmanager
    def noting(self, stack: list[nn.Module], recorder: OperatorRecorder) -> Iterator[None]:
        """Note the calls of modules; ``stack``: those that are running, outermost first."""

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            owners = [one for one in (module, *reversed(stack[:-1])) if id(one) in self._names][:1]
            if module in owners:
                owners += [one for one in stack[-2:-1] if id(one) in self._names]
            entering = [one for t in tensors_in((args, kwargs)) for one in recorder.info(t).labels]
            leaving = [one for t in tensors_in(output) for one in recorder.info(t).labels]
            for owner in owners:
                path = self._names[id(owner)]
                self.kinds[path] = kind_of(type(owner))
                noted = self._noted.setdefault(path, [])
                noted += [(labels, IN if owner is module else INSIDE) for labels in entering]
                noted += [(labels, OUT if owner is module else INSIDE) for labels in leaving]

        hook = torch_module.register_module_forward_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            torch_module._global_forward_hooks_with_kwargs.pop(hook.id, None)  # which torch leaves there

    def repeat(self, path: str, twin: str) -> None:
        """Count a module that no run called as called where its twin was."""
        for known, kind in list(self.kinds.items()):
            if known == twin or known.startswith(f"{twin}."):
                self.kinds[path + known.removeprefix(twin)] = kind
                self._noted[path + known.removeprefix(twin)] = self._noted[known]

    def ends(self, path: str) -> list[Tensor]:
        """The channels that entered or left a module of the user's, (n,) ids each."""
        found = [labels for labels, place in self._noted.get(path, ()) if place != INSIDE and len(labels.dims) == 1]
        ids = (labels.flat().ids for labels in {id(labels.ids): labels for labels in found}.values())
        return list({tuple(one.tolist()): one for one in ids}.values())

    def followed(self, choices: Mapping[str, Choice]) -> tuple[list[CodeSize], Pairs]:
        """Sizes that follow under these choices, and what has to go together so that one attribute can count it."""
        sizes: list[CodeSize] = []
        pairs: Pairs = []
        for path, kind in self.kinds.items():
            choice = choices.get(kind, Choice.AS_IS)
            if choice.follows_widths:
                for found in self._spaces(path, only_inputs=choice is Choice.INPUTS):
                    sizes += found
                    pairs += [_both(found[0].ids, other.ids) for other in found[1:] if other.position is None]
        return sizes, pairs

    def _spaces(self, path: str, *, only_inputs: bool) -> list[list[CodeSize]]:
        """Per size that an attribute of the module has, the channels of that number that it sees."""
        site = CallSite((path,), self.kinds[path], f"the code of {path!r}")
        held = {name: value for name, value in sizes_of(self._modules[path]).items() if not name.startswith("_")}
        wanted = {item for value in held.values() for item in (value if isinstance(value, (list, tuple)) else (value,))}
        listed = [tuple(value) for value in held.values() if isinstance(value, (list, tuple))]
        spaces: dict[int, dict[tuple[int, ...], Tensor]] = {}
        for labels, place in self._noted[path]:
            size = max((labels.ids.shape[d] for d in labels.dims), default=0)
            if len(labels.dims) == 1 and size in wanted and (place == IN or not only_inputs):
                ids = labels.flat().ids
                spaces.setdefault(size, {}).setdefault(tuple(ids.tolist()), ids)
        return [
            [
                *(CodeSize(ids, site) for ids in found.values()),
                *(
                    CodeSize(ids, site, position=position, listed=values)
                    for ids in found.values()
                    for values in listed
                    for position, value in enumerate(values)
                    if value == size
                ),
            ]
            for size, found in spaces.items()
        ]


def _both(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    labelled = (first != NO_LABEL) & (second != NO_LABEL)
    return first[labelled], second[labelled]
