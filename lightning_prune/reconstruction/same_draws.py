"""Random numbers that do not depend on how many are drawn, for models that draw some in eval mode too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prune.model_state.dispatch import EagerMode

_DRAWN = set("rand randn rand_like randn_like uniform_ normal_ normal exponential_ bernoulli_ bernoulli".split())


class SameDraws(EagerMode):
    """Inside, every element drawn is the same number, and every one that may be dropped is kept.

    Noise and dropout draw one number per element: of fewer channels others, so that two models which compute the same
    function differ. Draws of other kinds (an order, a choice) come as the seed says, whatever was drawn before.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name not in _DRAWN or kwargs.get("generator") is not None:  # a seed of its own: no chance
            return func(*args, **kwargs)
        state = torch.get_rng_state()
        drawn: Tensor = func(*args, **kwargs)
        torch.set_rng_state(state)
        if name == "bernoulli" and len(args) == 1:
            return drawn.copy_(args[0] >= 0.5)
        if name == "normal":  # of a mean and a deviation, tensors or numbers
            mean, deviation = (*args[:2], 1)[:2]
            return drawn.zero_().add_(mean + 0.5 * deviation)
        return drawn.fill_(1 if name.startswith("bernoulli") else 0.5)
